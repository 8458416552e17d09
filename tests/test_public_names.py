"""The public names of `offload`: every one resolves, lazily and to one object."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import offload


def test_the_three_lists_agree() -> None:
    assert sorted(offload.__all__) == sorted([*offload._HOME_OF, "__version__"])
    assert dir(offload) == sorted(offload.__all__)
    tree = ast.parse(Path(offload.__file__).read_text())
    typed = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offload.")
        for alias in node.names
    }
    assert typed == {f"{home}.{name}" for name, home in offload._HOME_OF.items()}


@pytest.mark.parametrize("name", offload.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(offload, name) is getattr(offload, name)
    assert getattr(offload, name).__doc__
