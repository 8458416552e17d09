"""tools/faults.py model: a machine as the command runs it, and a broken build that it sees."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part, as tools/faults.py imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("fault.model")


def test_every_machine_is_there_and_every_break_has_one(model: ModuleType) -> None:
    for module, name in model.MACHINES.values():
        assert hasattr(importlib.import_module(module), name)
    assert {machine for machine, _ in model.BREAKS.values()} == set(model.MACHINES)


def test_a_machine_runs_as_many_examples_as_are_asked_for(model: ModuleType) -> None:
    row = model.trial("device tier", 15, 1)
    assert row.good, row
    assert row.trials >= 15


def test_a_broken_build_is_seen(model: ModuleType) -> None:
    machine, broken = model.BREAKS["leases overlap by a page"]
    with broken():
        row = model.trial(machine, 100, 1, broken="leases overlap by a page")
    assert row.good, row
    assert "written by somebody else" in row.problems[0] or "Error" in row.problems[0]
