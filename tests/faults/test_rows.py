"""The table of uses in DESIGN.md: every row is right, and fails on a build without its guard."""

from __future__ import annotations

import pytest

from tests.faults.all_rows import ROWS
from tests.faults.breaks import BREAKS
from tests.faults.conftest import RunInChild


@pytest.mark.parametrize("name", ROWS)
def test_use_gives_the_numbers_of_plain_pytorch(name: str, run_in_child: RunInChild) -> None:
    answer = run_in_child(name)
    assert answer["outcome"] == "passed", answer["detail"]


@pytest.mark.parametrize(
    ("name", "broken"), [(name, broken) for name, row in ROWS.items() for broken in row.breaks]
)
def test_row_fails_on_the_unguarded_build(name: str, broken: str, run_in_child: RunInChild) -> None:
    answer = run_in_child(name, broken, seconds=30.0)
    assert answer["outcome"] != "passed", f"{name} passes with {broken} off: it has no teeth"


def test_every_row_has_teeth() -> None:
    toothless = [name for name, row in ROWS.items() if not row.breaks]
    assert not toothless


def test_every_break_has_a_row() -> None:
    used = {broken for row in ROWS.values() for broken in row.breaks}
    assert used == set(BREAKS)
