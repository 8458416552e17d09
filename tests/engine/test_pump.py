"""The overlapped step beside an accelerator: a thread of its own updates, to the same bits."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import OffloadConfig
from offload.engine import build, planning
from offload.errors import EngineStateError, OffloadError
from offload.native import IoEngine
from offload.optim.overlapped import OverlappedStep
from offload.optim.streamed import StreamedStep
from offload.tiers.accelerator import AcceleratorTier
from offload.tiers.simulated_streams import RaceError, SimulatedAccelerator
from tests.engine.accelerator import WatchedOps, use_accelerator
from tests.engine.test_overlap import OFF, PLACEMENTS, late, loss_with_nan_in
from tests.oracle import (
    Run,
    assert_identical,
    continue_engine,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
)

STEPS = 6
NAME = "offload-updates"
SECONDS = 20.0
PLACES = PLACEMENTS | {
    "all on the device": {"weights": "device", "gradients": "device", "optimizer": "device"},
    "all on the host": {"weights": "host", "gradients": "host", "optimizer": "host"},
}


def pump_settings(path: Path, placement: str, update: Any = "cpu", **sections: Any) -> Any:
    """The small model, most of whose state is not where the CPU updates it."""
    config = settings("nvme", path, bucket_elements=1024, device=1 << 20, host=1 << 20, **sections)
    return {**config, "placement": {**PLACES[placement], "update": update}}


@cache
def serial(accumulation: int, limit: float, compute: str, nan_in: frozenset[int]) -> Run:
    """The run in host memory, whose steps are taken by themselves; before any accelerator."""
    assert planning.device_is_host_memory.__name__ == "device_is_host_memory", "no accelerator yet"
    training = {"gradient_accumulation_steps": accumulation, "max_grad_norm": limit}
    precision = {"compute": compute, "initial_loss_scale": 256.0, "growth_interval": 2}
    config = settings("host", bucket_elements=1024, training=training, precision=precision, **OFF)
    return train_engine(small_model(), config, loss_with_nan_in(set(nan_in)), steps=STEPS)


Accelerator = Callable[..., list[SimulatedAccelerator]]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A function that gives the engines made from here on an accelerator, and a disk with faults.

    What the engines leave running is an error.
    """

    def use(*, seed: int = 3, fault: str = "", copies: str | None = None) -> Any:
        def open_io(config: OffloadConfig) -> IoEngine:
            del config
            return IoEngine(backend="threads", threads=3, fault=fault or None)

        monkeypatch.setattr(build, "open_io", open_io)
        return use_accelerator(monkeypatch, seed=seed, fault=copies)

    return use


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not pumps()


def pumps() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def in_pump() -> bool:
    return threading.current_thread().name == NAME


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, "it never happens"
        time.sleep(0.001)


def is_idle(updates: OverlappedStep) -> bool:
    untold = updates._expected is not None and updates._told
    can_hold = any(map(updates._held.has_room_for, updates._complete))
    return not (updates._loading or updates._pending or can_hold or untold)


def until_idle(engine: Any, *_: Any) -> None:
    """Wait until the pump has done what it can, and all writes have ended."""
    engine._parts.gradients.land()
    wait_until(lambda: is_idle(engine._parts.updates))
    in_flight = engine._parts.nvme._in_flight
    wait_until(lambda: all(each.done() for of_size in in_flight.values() for each in of_size))


def _check_drawn(seed: int, accelerator: Accelerator, path: Path) -> None:
    drawn = random.Random(seed)
    accumulation, compute = drawn.choice((1, 2)), drawn.choice(("fp32", "bf16", "fp16"))
    nan_in = frozenset({drawn.randrange(STEPS)} if drawn.random() < 0.3 else ())
    norms = serial(accumulation, 0.0, compute, frozenset()).norms
    limit = drawn.choice((0.0, sorted(norms)[2], 1e-3))
    expected = serial(accumulation, limit, compute, nan_in)
    tiers = accelerator(seed=seed, fault=late(seed))
    training = {"gradient_accumulation_steps": accumulation, "max_grad_norm": limit}
    precision = {"compute": compute, "initial_loss_scale": 256.0, "growth_interval": 2}
    config = pump_settings(
        path,
        drawn.choice(list(PLACES)),
        drawn.choice(("cpu", "cpu", 0.5)),
        training=training,
        precision=precision,
    )
    with make_engine(small_model(), config) as engine:
        assert engine.plan.overlap.flow_bytes, "nothing is overlapped"
        with WatchedOps(tiers[0]):
            loss_of = loss_with_nan_in(set(nan_in))
            for _ in range(STEPS * accumulation):
                engine.backward(loss_of(engine, engine.micro_steps))
                engine.step()
        assert pumps()
        assert all(t.peak_bytes <= t.budget_bytes for t in engine.report().tiers.values())
        found = Run(expected.losses, expected.norms)
        found.state, found.steps = dict(engine.named_state()), engine.parameter_steps()
    assert_identical(found, expected)


@pytest.mark.parametrize("seed", range(12))
def test_the_bits_are_those_of_the_serial_step(
    seed: int, accelerator: Accelerator, tmp_path: Path
) -> None:
    _check_drawn(seed, accelerator, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 250))
def test_the_bits_are_those_of_the_serial_step_often(
    seed: int, accelerator: Accelerator, tmp_path: Path
) -> None:
    _check_drawn(seed, accelerator, tmp_path)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("placement", list(PLACES))
def test_with_time_enough_the_pump_makes_all_updates(
    placement: str,
    accumulation: int,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """All but the first layers are held when the step comes; the rest is late.

    Of what is on the host no second copy is held: all of it is late.
    """
    expected = serial(accumulation, 0.0, "bf16", frozenset())
    accelerator()
    where = set()
    compute = StreamedStep.compute

    def noted(step: StreamedStep, *args: Any) -> Any:
        where.add(threading.current_thread().name)
        return compute(step, *args)

    monkeypatch.setattr(StreamedStep, "compute", noted)
    training = {"gradient_accumulation_steps": accumulation}
    config = pump_settings(tmp_path, placement, training=training, precision={"compute": "bf16"})
    with make_engine(small_model(), config) as engine:
        updates = engine._parts.updates

        engine.module[1].register_full_backward_hook(partial(until_idle, engine))
        found = Run()
        for _ in range(STEPS):
            before = updates.committed
            run = continue_engine_by_micro_steps(engine, accumulation)
            wait_until(lambda: is_idle(updates))
            assert (updates.committed > before) == (placement != "all on the host")
            found.losses += run.losses
            found.norms += run.norms
        assert where == {NAME}
        found.state, found.steps = dict(engine.named_state()), engine.parameter_steps()
        assert updates.dropped == 0
    assert_identical(found, expected)


def continue_engine_by_micro_steps(engine: Any, count: int) -> Run:
    run = Run()
    for _ in range(count):
        loss = small_loss(engine, engine.micro_steps)
        engine.backward(loss)
        run.losses.append(loss.item())
        if engine.step():
            run.norms.append(engine.grad_norm)
    return run


class Held:
    """Updates of the pump stop at a gate. It opens by itself if somebody waits there too long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.gate = threading.Event()
        self.was_late = False
        compute = StreamedStep.compute

        def held(step: StreamedStep, *args: Any) -> Any:
            if in_pump():
                self.reached.set()
                self.was_late |= not self.gate.wait(SECONDS)
            return compute(step, *args)

        monkeypatch.setattr(StreamedStep, "compute", held)


def test_backward_does_not_wait_for_an_update(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = serial(1, 0.0, "bf16", frozenset())
    accelerator()
    held = Held(monkeypatch)
    held.gate.set()
    config = pump_settings(tmp_path, "weights on the host", precision={"compute": "bf16"})
    with make_engine(small_model(), config) as engine:
        found = Run()
        for _ in range(STEPS):
            wait_until(lambda: is_idle(engine._parts.updates))
            loss = small_loss(engine, engine.micro_steps)
            held.reached.clear()
            held.gate.clear()
            engine.backward(loss)  # with the pump at the gate for most of it
            engine._parts.gradients.land()
            assert held.reached.wait(SECONDS)
            engine._parts.updates.advance()
            assert not engine._parts.updates.is_pending(0)
            held.gate.set()
            assert engine.step()
            found.losses.append(loss.item())
            found.norms.append(engine.grad_norm)
        assert not held.was_late
        found.state, found.steps = dict(engine.named_state()), engine.parameter_steps()
    assert_identical(found, expected)


def test_an_engine_closes_while_the_pump_works(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accelerator()
    held = Held(monkeypatch)
    with make_engine(small_model(), pump_settings(tmp_path, "all on nvme")) as engine:
        engine.backward(small_loss(engine, 0))
        engine._parts.gradients.land()
        assert held.reached.wait(SECONDS)
        threading.Timer(0.05, held.gate.set).start()
    assert not pumps()
    assert not held.was_late


@pytest.mark.parametrize("backwards", [1, 2])
def test_an_engine_closes_with_a_disk_that_hangs(
    backwards: int, accelerator: Accelerator, tmp_path: Path
) -> None:
    """The pump waits no longer than the deadline; and it is not the only one."""
    accelerator(fault="op=read,nth=3,count=30,delay=1500")
    sections = {"io": {"deadline_seconds": 0.2}}
    engine = make_engine(small_model(), pump_settings(tmp_path, "all on nvme", **sections))
    with contextlib.suppress(OffloadError):
        for index in range(backwards):
            engine.backward(small_loss(engine, index))
            engine.step()
    with contextlib.suppress(OffloadError):
        engine.close()
    assert not pumps()
    time.sleep(1.5)  # until the disk has let go of the memory


def _use_in_fork(engine: Any, out: Any) -> None:
    found = []
    for _ in range(2):
        try:
            with torch.no_grad():
                engine.module(torch.zeros(1, 4, dtype=torch.long))
        except EngineStateError:
            found.append("refused")
    with contextlib.suppress(EngineStateError):  # what is in flight is the parent's
        engine.close()
    out.send((found, len(pumps())))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_hangs_nor_updates(accelerator: Accelerator, tmp_path: Path) -> None:
    expected = serial(1, 0.0, "bf16", frozenset())
    accelerator(fault="op=read,nth=8,count=4000,delay=10")
    config = pump_settings(tmp_path, "weights on the host", precision={"compute": "bf16"})
    context = multiprocessing.get_context("fork")
    with make_engine(small_model(), config) as engine:
        found = Run()
        for _ in range(STEPS):
            run = continue_engine_by_micro_steps(engine, 1)
            found.losses += run.losses
            found.norms += run.norms
            assert engine._parts.updates._pending, "the slow disk leaves something to do"
            receive, send = context.Pipe(duplex=False)
            child = context.Process(target=_use_in_fork, args=(engine, send))
            child.start()
            assert receive.poll(SECONDS), "the child hangs"
            assert receive.recv() == (["refused", "refused"], 0)
            child.join(SECONDS)
        found.state, found.steps = dict(engine.named_state()), engine.parameter_steps()
    assert_identical(found, expected)


def test_an_error_in_the_pump_is_raised_until_state_is_loaded(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = serial(1, 0.0, "fp32", frozenset())
    accelerator()
    compute = StreamedStep.compute
    fails = [False]

    def failing(step: StreamedStep, *args: Any) -> Any:
        if in_pump() and fails[0]:
            raise ZeroDivisionError("a kernel is broken")
        return compute(step, *args)

    monkeypatch.setattr(StreamedStep, "compute", failing)
    with make_engine(small_model(), pump_settings(tmp_path, "all on nvme")) as engine:
        first = continue_engine_by_micro_steps(engine, 2)
        engine.save_checkpoint(tmp_path / "checkpoint")
        fails[0] = True
        engine.backward(small_loss(engine, 2))
        engine._parts.gradients.land()
        wait_until(lambda: engine._parts.updates._pump._work.error)
        for act in (engine.step, engine.step, lambda: engine(torch.zeros(1, 4).long())):
            with pytest.raises(OffloadError, match="ZeroDivisionError: a kernel is broken"):
                act()
        fails[0] = False
        engine.load_checkpoint(tmp_path / "checkpoint")
        found = continue_engine(engine, small_loss, steps=STEPS - 2)
        engine._parts.updates.settle()
        engine._parts.store.drain()
        assert not engine._parts.updates._held.share.used_bytes, "staging is lost"
    found.losses, found.norms = first.losses + found.losses, first.norms + found.norms
    assert_identical(found, expected)


def test_an_engine_that_nobody_refers_to_leaves_no_thread(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    accelerator()
    model = small_model()
    engine = make_engine(model, pump_settings(tmp_path, "weights on the host"))
    continue_engine(engine, small_loss, steps=1)
    assert pumps()
    parts = engine._parts
    for thing in (parts.pager, parts.gradients):
        thing.updates = None
    parts.closing.pop_all()
    parts.updates = None
    wait_until(lambda: gc.collect() >= 0 and not pumps())
    engine._handles.clear()
    assert parts.nvme is not None
    for tier in (parts.nvme, parts.device, parts.host, parts.io):
        tier.close()


@pytest.mark.parametrize("act", ["edit", "evaluate"])
def test_a5_homes_on_the_device_are_copied_after_the_step_was_taken(
    act: str,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What the stream of the training has queued before the step is not run over by the pump."""
    train_beside(act, accelerator, tmp_path / "first")

    @contextlib.contextmanager
    def after(tier: AcceleratorTier, mark: object) -> Iterator[None]:
        with tier._beside():
            yield

    monkeypatch.setattr(AcceleratorTier, "after", after)
    with pytest.raises((RaceError, OffloadError)) as raised:
        train_beside(act, accelerator, tmp_path / "second")
    error = raised.value if isinstance(raised.value, RaceError) else raised.value.__cause__
    assert isinstance(error, RaceError)
    assert "A5" in str(error)


def train_beside(act: str, accelerator: Accelerator, path: Path) -> None:
    """Steps on a stream of their own; something uses weights at home before each."""
    path.mkdir()
    tiers = accelerator()
    config = pump_settings(path, "weights on the device")
    with make_engine(small_model(), config) as engine:
        (tier,) = tiers
        with WatchedOps(tier), tier.on_stream("side"):
            for index in range(3):
                engine.backward(small_loss(engine, index))
                engine._parts.gradients.land()
                # What is on its way while it is edited is held and dropped: a race without effect.
                wait_until(lambda: is_idle(engine._parts.updates) or has_failed(engine))
                with torch.no_grad():
                    if act == "edit":
                        for parameter in engine.module.parameters():
                            parameter.mul_(0.9)
                    else:
                        small_loss(engine, index)
                engine.step()
                wait_until(lambda: is_idle(engine._parts.updates) or has_failed(engine))
                engine._parts.updates.raise_failure()


def has_failed(engine: Any) -> bool:
    return engine._parts.updates._pump._work.error is not None


@pytest.mark.parametrize("operation", ["read", "write"])
def test_errors_that_nobody_is_told_of_are_counted(
    operation: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    expected = serial(1, 0.0, "bf16", frozenset())
    accelerator(fault=f"op={operation},nth=20,count=2,errno=5")
    config = pump_settings(tmp_path, "weights on the host", precision={"compute": "bf16"})
    found, reports = Run(), []
    with make_engine(small_model(), config) as engine, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine.module[1].register_full_backward_hook(partial(until_idle, engine))
        for _ in range(STEPS):
            run = continue_engine_by_micro_steps(engine, 1)
            until_idle(engine)
            found.losses += run.losses
            found.norms += run.norms
            reports.append(engine.report().retries)
        found.state, found.steps = dict(engine.named_state()), engine.parameter_steps()
    assert_identical(found, expected)
    (warning,) = seen
    assert warning.category is RuntimeWarning
    assert f"{operation} of optimizer of bucket" in str(warning.message)
    assert sum(report.count for report in reports) == 2
    assert all(("EIO" in report.last) == bool(report.count) for report in reports)


SCRIPT = """
import sys, pytest
from pathlib import Path
from tests.engine.accelerator import use_accelerator
from tests.engine.test_pump import pump_settings
from tests.oracle import make_engine, small_loss, small_model

use_accelerator(pytest.MonkeyPatch())
engine = make_engine(small_model(), pump_settings(Path(sys.argv[1]), "all on nvme"))
for index in range(3):
    engine.backward(small_loss(engine, index))
    engine.step()
engine.backward(small_loss(engine, 3))
print("trained")
"""


def test_an_interpreter_ends_while_the_pump_works(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "trained\n", "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
