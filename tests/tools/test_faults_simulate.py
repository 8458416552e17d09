"""A small dose of `tools/faults.py simulate`, and that its seeds repeat; the suite has 10,000."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The part, as tools/faults.py imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("fault.simulate")


def run(simulate: ModuleType, seeds: range) -> list[Any]:
    return [outcome for outcome, _ in simulate._run_seeds(seeds)]


def test_seeds_end_with_the_bits_of_the_reference_or_a_typed_error(simulate: ModuleType) -> None:
    before = threading.active_count()
    outcomes = run(simulate, range(100, 140))
    assert [outcome.problem for outcome in outcomes if outcome.problem] == []
    assert sum(outcome.steps for outcome in outcomes) > 80
    assert sum(bool(outcome.errors) for outcome in outcomes) > 5, "something has failed on the way"
    assert any(outcome.committed for outcome in outcomes)
    assert threading.active_count() == before


def test_a_seed_is_always_the_same_run(simulate: ModuleType) -> None:
    seeds = range(3, 12)
    assert run(simulate, seeds) == run(simulate, seeds)


@pytest.mark.parametrize(
    ("broken", "seeds"),
    [
        ("the pump is not woken when it is closed", range(40)),
        ("what is computed does not wait for its copy", range(40)),
        ("an update is applied twice after a retry", range(40)),
    ],
)
def test_a_broken_build_is_seen(broken: str, seeds: range, simulate: ModuleType) -> None:
    row = simulate._run_broken((broken, seeds.start, len(seeds)))
    assert row.good, row


def test_who_waits_for_ever_is_told(simulate: ModuleType) -> None:
    virtual = importlib.import_module("fault._virtual")
    with simulate.installed():
        scheduler = virtual.Scheduler(0)
        lock = virtual.VirtualLock()
        lock.acquire()
        with pytest.raises(virtual.DeadlockError, match="wait for ever: main"):
            lock.acquire()
        scheduler.close()
