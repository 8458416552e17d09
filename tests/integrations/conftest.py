"""Engines that trainers have made, and that nobody has closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.scenes import closing_engines


@pytest.fixture(autouse=True)
def engines_are_closed() -> Iterator[None]:
    with closing_engines():
        yield
