"""I/O that fails during training: typed errors, nothing applied twice, the same bits after."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.config import OffloadConfig
from offload.engine import build
from offload.errors import ChecksumError, DeadlineError, EngineStateError, StorageError
from offload.native import IoEngine
from offload.optim.rules import UpdateRule
from tests.oracle import (
    assert_identical,
    continue_engine,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
)

STEPS = 4
Faulty = Callable[..., Any]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A function that makes an engine with all state on NVMe whose I/O has the fault given."""
    engines = []

    def make(fault: str | None, *, backend: str = "threads", **sections: Any) -> Any:
        def open_io(config: OffloadConfig) -> IoEngine:
            return CountingIo(backend=backend, threads=2, fault=fault)

        monkeypatch.setattr(build, "open_io", open_io)
        engine = make_engine(small_model(), nvme_settings(tmp_path, **sections))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def nvme_settings(path: Path, **sections: Any) -> dict[str, Any]:
    return settings("nvme", path, bucket_elements=1024, device=1 << 20, host=4 << 20, **sections)


class CountingIo(IoEngine):
    """Counts the requests of each kind; every one of these tests is one block."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.counts = {"read": 0, "write": 0}

    def start_read(self, *arguments: Any, **options: Any) -> Any:
        self.counts["read"] += 1
        return super().start_read(*arguments, **options)

    def start_write(self, *arguments: Any, **options: Any) -> Any:
        self.counts["write"] += 1
        return super().start_write(*arguments, **options)


def places(engine: Any, kind: str) -> list[int]:
    """Operations to disturb: spread over the first two steps, closer together in the second."""
    io = engine._parts.io
    ends = [io.counts[kind]]
    for _ in range(2):
        taken = False
        while not taken:
            engine.backward(small_loss(engine, engine.micro_steps))
            taken = engine.step()
        ends.append(io.counts[kind])
    first = [ends[0] + (ends[1] - ends[0]) * share // 4 for share in (1, 3)]
    second = [ends[1] + (ends[2] - ends[1]) * share // 10 for share in range(1, 10)]
    return first + second


def run_through(engine: Any, *, accumulation: int = 1) -> tuple[Any, list[str]]:
    """Train `STEPS` steps as a user would who tries again after errors; and where they came."""
    errors: list[str] = []
    losses: list[float] = []
    while engine.global_steps < STEPS:
        start = engine.micro_steps
        accumulated: list[float] = []
        while engine.micro_steps < start + accumulation and engine.global_steps < STEPS:
            try:
                loss = small_loss(engine, engine.micro_steps)
            except StorageError:
                errors.append("forward")
                continue
            try:
                engine.backward(loss)
            except StorageError:
                errors.append("backward")
                assert engine.micro_steps == start
                accumulated.clear()
                continue
            accumulated.append(loss.item())
            before = engine.global_steps
            try:
                engine.step()
            except StorageError:
                errors.append("step")
                taken = engine.step()
                assert taken
            if engine.global_steps > before:
                break
        losses += accumulated
    run = continue_engine(engine, small_loss, steps=0)
    run.losses = losses
    return run, errors


@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_training_goes_on_after_an_error_anywhere(
    kind: str,
    accumulation: int,
    overlapped: bool,
    faulty: Faulty,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """One operation in a run fails, each time another; the end is that of an undisturbed run."""
    if not overlapped:
        request.getfixturevalue("by_itself")
    training = {"training": {"gradient_accumulation_steps": accumulation}}
    calm = train_engine(small_model(), nvme_settings(tmp_path, **training), small_loss, steps=STEPS)
    code = errno.EIO if kind == "read" else errno.ENOSPC
    seen: set[str] = set()
    for nth in places(faulty(None, **training), kind):
        engine = faulty(f"op={kind},nth={nth},errno={code}", **training)
        run, errors = run_through(engine, accumulation=accumulation)
        seen.update(errors)
        assert run.losses == calm.losses, nth
        assert run.steps == calm.steps, nth
        calm.norms = run.norms
        assert_identical(run, calm)
        engine.close()
    assert overlapped or "step" in seen
    assert overlapped or seen & {"forward", "backward"}


@pytest.mark.usefixtures("by_itself")
def test_a_pending_step_refuses_everything_but_its_completion(
    faulty: Faulty, tmp_path: Path
) -> None:
    calm = train_engine(small_model(), nvme_settings(tmp_path), small_loss, steps=STEPS)
    engine = faulty(None)
    writes = places(engine, "write")[-1]
    engine.close()
    engine = faulty(f"op=write,nth={writes},errno={errno.ENOSPC}")
    first = continue_engine_until_error(engine)
    assert engine._pending is not None
    weight = engine.module[1].weight
    for action in (
        lambda: engine(None),
        lambda: engine.backward(weight.sum()),
        lambda: engine.optimizer.zero_grad(),
        lambda: engine.set_state("1.weight", {}),
        lambda: engine.load_state_dict({}),
        lambda: engine.write_state("1.weight", "weight", weight),
        lambda: engine.gathered().__enter__(),
    ):
        with pytest.raises(EngineStateError, match="pending"):
            action()
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e6  # frozen when the step began
    taken = engine.step()
    assert taken
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    rest = continue_engine(engine, small_loss, steps=STEPS - engine.global_steps)
    rest.losses = first + rest.losses
    rest.norms = calm.norms
    assert_identical(rest, calm)


def continue_engine_until_error(engine: Any) -> list[float]:
    """Train until `step` fails; the losses up to there."""
    losses = []
    while True:
        loss = small_loss(engine, engine.micro_steps)
        losses.append(loss.item())
        engine.backward(loss)
        try:
            engine.step()
        except StorageError as error:
            failure = error
            break
    assert failure.errno in (errno.ENOSPC, errno.EIO)
    assert failure.path
    assert failure.nbytes
    assert failure.what
    return losses


@pytest.mark.usefixtures("by_itself")
@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
def test_an_error_again_and_again(faulty: Faulty, tmp_path: Path) -> None:
    """Many writes in a row fail; each call of step gets further, and nothing is applied twice."""
    calm = train_engine(small_model(), nvme_settings(tmp_path), small_loss, steps=2)
    engine = faulty(None)
    writes = places(engine, "write")[-4]
    engine.close()
    engine = faulty(f"op=write,nth={writes},count=9,errno={errno.EIO}")
    continue_engine_until_error(engine)
    failures = 1
    while engine.global_steps < 2:
        try:
            engine.step()
        except StorageError:
            failures += 1
    assert failures > 1
    found = continue_engine(engine, small_loss, steps=0)
    found.losses, found.norms = calm.losses, calm.norms
    assert_identical(found, calm)


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("backend", ["threads", "python"])
def test_a_flipped_bit_is_an_error_that_names_the_record(backend: str, faulty: Faulty) -> None:
    engine = faulty(None)
    reads = places(engine, "read")
    engine.close()
    for nth in (reads[1], reads[-1]):
        engine = faulty(f"op=read,nth={nth},corrupt=1", backend=backend)
        with pytest.raises(ChecksumError, match=r"(weights|gradients|optimizer) of bucket \d+"):
            run_until_error(engine)
        engine.close()


@pytest.mark.usefixtures("by_itself")  # what memory has is not read
@pytest.mark.parametrize("damage", ["lost=1", "misdirect=4096", "corrupt=1"])
def test_a_write_that_went_wrong_is_found_when_it_is_read(damage: str, faulty: Faulty) -> None:
    engine = faulty(None)
    writes = places(engine, "write")
    engine.close()
    engine = faulty(f"op=write,nth={writes[3]},{damage}")
    with pytest.raises(ChecksumError):
        run_until_error(engine)


def run_until_error(engine: Any) -> None:
    for _ in range(STEPS):
        engine.backward(small_loss(engine, engine.micro_steps))
        engine.step()


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_operation_that_hangs_is_an_error_in_time(kind: str, faulty: Faulty) -> None:
    engine = faulty(None)
    where = places(engine, kind)
    engine.close()
    for nth in (where[0], where[-1]):
        engine = faulty(f"op={kind},nth={nth},drop=1", io={"deadline_seconds": 0.3})
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="still in flight"):
            run_until_error(engine)
        assert time.monotonic() - started < 5
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            engine.close()
        engine.close()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("tier", ["host", "nvme", "nvme, overlapped"])
def test_an_interrupt_in_the_middle_of_an_update(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C comes when some elements of a chunk have been updated: none is updated twice."""
    if tier != "nvme, overlapped":
        request.getfixturevalue("by_itself")
    tier, *overlapped = tier.split(",")
    config = settings(tier, tmp_path, bucket_elements=1024)
    calm = train_engine(small_model(), config, small_loss, steps=STEPS)
    update, calls = UpdateRule.update, []

    def interrupted(rule: UpdateRule, **arguments: Any) -> bool:
        finite = update(rule, **arguments)
        calls.append(0)
        if len(calls) % 13 == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return finite

    monkeypatch.setattr(UpdateRule, "update", interrupted)
    interrupts = 0
    losses = []
    with make_engine(small_model(), config) as engine:
        for step in range(STEPS):
            has_gradients = False
            while engine.global_steps == step:
                try:
                    if not has_gradients:
                        loss = small_loss(engine, step)
                        engine.backward(loss)
                        has_gradients = True
                    engine.step()
                except KeyboardInterrupt:
                    interrupts += 1
            losses.append(loss.item())
        monkeypatch.undo()
        run = continue_engine(engine, small_loss, steps=0)
    run.losses, run.norms = losses, calm.norms
    assert_identical(run, calm)
    assert interrupts > (0 if overlapped else STEPS)
