"""Random modules, control flow and budgets: the bits of plain PyTorch, always."""

from __future__ import annotations

import select
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine import random_modules
from tests.engine.random_modules import (
    KINDS,
    PASSES,
    PLACES,
    Case,
    Step,
    Training,
    check,
    count_outcomes,
    make_case,
)

MANY = range(10_000, 11_000)
SEED_17 = Case(
    kinds=("batch norm", "clamp", "norm", "checkpoint", "experts", "conv"),
    steps=(
        Step(order=(0,), passes="two backwards", evaluates=True, edit="load"),
        Step(order=(2, 6, 4, 6), passes="double", evaluates=False, edit="load"),
        Step(order=(3, 1, 4, 0, 1, 6), passes="two backwards", evaluates=True, edit="load"),
    ),
    pages=7,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(60))
def test_a_random_module_gives_the_bits_of_plain_pytorch(seed: int) -> None:
    check(seed, places=(PLACES[seed % 4],))


@pytest.mark.filterwarnings("ignore")
def test_a_second_backward_recomputes_with_the_weights_as_they_were() -> None:
    """Plain where they were plain: else a checkpoint finds other tensors than it has saved."""
    check(10_706, places=PLACES)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_random_modules_in_every_placement() -> None:
    """In child processes, so that a crash or a hang would be counted; prints what it counted."""
    outcomes = count_outcomes(MANY.start, len(MANY))
    steps = outcomes.pop("steps")
    print(f"{len(MANY)} modules, {len(PLACES)} placements each, {steps} steps: {dict(outcomes)}")
    assert outcomes == Counter(equal=len(MANY))


def test_the_thousand_have_every_kind_of_layer_and_pass() -> None:
    kinds: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    for seed in MANY:
        case = make_case(seed)
        kinds.update(set(case.kinds))
        passes.update(step.passes for step in case.steps)
    assert set(kinds) == set(KINDS)
    assert set(passes) == set(PASSES)
    assert min(kinds.values()) >= 100
    assert min(passes.values()) >= 100


def test_a_seed_means_the_same_case_as_ever() -> None:
    assert make_case(17) == SEED_17


def test_steps_are_counted_when_they_end_and_errors_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {True: "changed in place: [weight]", False: "changed in place: parameter weight"}
    take_step = Training._step

    def step(self: Training, number: int, step: Step) -> None:
        if number == 2:
            raise RuntimeError(said[self.engine is None])
        take_step(self, number, step)

    monkeypatch.setattr(Training, "_step", step)
    assert check(17, places=("device", "host")) == 4
    said[False] = "the weight is lost: parameter weight"
    with pytest.raises(AssertionError, match="the weight is lost"):
        check(17, places=("device",))


TOLD = """
import os, pathlib, sys, time
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
    print(f"start {seed}", flush=True)
    if seed == 2:
        os.abort()
    if seed == 5:
        pathlib.Path(__file__).with_name("hangs").touch()
        time.sleep(600)
    ok = seed != 4
    outcome = '"equal", "steps": 8' if ok else '"failed", "steps": 0, "detail": "differs"'
    print('{"seed": %d, "outcome": %s}' % (seed, outcome), flush=True)
"""


def test_crashes_and_hangs_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(TOLD)
    hangs = tmp_path / "hangs"

    def has_said(readable: list[Any], *_: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """As select, but sure that a child hangs: what it has said before is there by then."""
        while not (found := select.select(readable, [], [], 0.01))[0]:
            if hangs.exists():
                hangs.rename(tmp_path / "hung")
                return select.select(readable, [], [], 0)
        return found

    monkeypatch.setattr(random_modules, "select", SimpleNamespace(select=has_said))
    outcomes = count_outcomes(0, 8, program=[str(program)])
    assert outcomes == Counter(equal=5, crashed=1, failed=1, hung=1, steps=40)
    told = capfd.readouterr().err
    assert "seed 2 ends the process with -6" in told
    assert "seed 4: differs" in told
    assert "seed 5 hangs" in told
