"""Ctrl-C before a line of the code, drawn at random from all that run, in a living training.

A tiny training with state on NVMe, an optimizer step that is overlapped, and a checkpoint after
each step, on a disk that answers late. SIGINT or SIGTERM, with a handler that raises, comes before
the n-th time that a certain line runs. Then

    goes on   whoever trains repeats what was cut off, as docs/training-any-module.md says. There
              is no error that is not by design, in particular none that blames the disk; losses
              and all state at the end are those of a run without interruption (mixed), and the
              newest checkpoint verifies (lost)
    closes    the engine closes without an error

and in both no memory and no extent is given back while a request is in flight on it (P18). `place`
is a file of the package or the beginning of one; the lines of guards are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import offload.state.session
from fault import _tiny
from fault.result import Row
from offload.engine import build
from offload.errors import ChecksumError, OffloadError
from offload.native import IoEngine
from offload.native.library import NativeCore
from offload.state import stored
from offload.tiers import uninterrupted
from offload.tiers.device import DeviceTier
from offload.tiers.extents import ExtentPool
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostPiece
from offload.tiers.nvme import NvmeStore

CLASSES = ("goes on", "closes")
TRIALS = 100
TEETH_TRIALS = 60  # at most: the first damage is enough
_PACKAGE = str(Path(offload.__file__).parent) + "/"
_PLACES = ("native/", "tiers/", "partition/", "schedule/", "optim/", "engine/", "state/")
_LEFT_OUT = ("engine/guards/", "tiers/uninterrupted.py")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STEPS, _FIRST = 4, 2  # the interrupt comes after so many steps
_SLOW = "op=read,count=0,delay=1;op=write,count=0,delay=1"
_SMALL = {"device": {"kind": "cpu", "memory": 160 << 10}, "host": {"memory": 512 << 10}}
_MOST_ERRORS = 4
_DEADLINE_SECONDS = 30.0


class Point(NamedTuple):
    """Before `place`, file and line, runs for the `occurrence`-th time, `number` is sent."""

    place: str
    occurrence: int
    number: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is done afterwards, where the interrupts come, and where to work."""
    parser.add_argument("--only", choices=CLASSES, nargs="+", default=list(CLASSES))
    parser.add_argument("--place", nargs="+", default=list(_PLACES), help="of the package")
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each thing that is done afterwards, with much memory and with little."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        for only in CLASSES[:1] if options.teeth else options.only:
            for small in (False, True):
                row = Row(f"{only}, with {'little' if small else 'much'} memory")
                trials = _Trials(Path(name) / "trial", tuple(options.place), small=small)
                count = options.trials or (TEETH_TRIALS if options.teeth else TRIALS)
                if options.teeth:
                    row.broken = "nothing is held back"
                    trials.breaks = _held_back_no_more
                yield trials.row(row, draw, count, goes_on=only == "goes on")


class _Trials:
    """Trainings in forks of this process, which has one thread."""

    def __init__(self, folder: Path, places: tuple[str, ...], *, small: bool) -> None:
        self.folder, self.places, self.small = folder, places, small
        self.breaks: Callable[[], None] | None = None
        self.whole = self._fork(None, goes_on=True)
        if self.whole["problems"] or "state" not in self.whole:
            raise SystemExit(f"error: an undisturbed run fails: {self.whole}")

    def row(self, row: Row, draw: random.Random, count: int, *, goes_on: bool) -> Row:
        """Interrupt `count` trainings."""
        began = time.perf_counter()
        lines = {p: n for p, n in sorted(self.whole["lines"].items()) if p.startswith(self.places)}
        phases: Counter[str] = Counter()
        for _ in range(count):
            place = draw.choice(list(lines))
            point = Point(place, draw.randint(1, lines[place]), int(draw.choice(_SIGNALS)))
            found = self._fork(point, goes_on=goes_on)
            row.trials += 1
            phases[found.get("phase", "not reached")] += 1
            if row.broken and row.damage:
                break
            said = f"{signal.Signals(point.number).name} at {place}, time {point.occurrence}"
            row.problems += [f"{said}: {problem}" for problem in found["problems"]]
            if not goes_on or found["problems"]:
                continue
            if found["saved"] != _STEPS:
                row.lost += 1
                row.details.append(f"{said}: the newest checkpoint is {found['saved']}")
            elif (found["state"], found["losses"]) != (self.whole["state"], self.whole["losses"]):
                row.mixed += 1
                row.details.append(f"{said}: other bits or losses at the end")
        row.remark = "interrupted in: " + ", ".join(f"{k} {n}" for k, n in sorted(phases.items()))
        row.seconds = time.perf_counter() - began
        return row

    def _fork(self, point: Point | None, *, goes_on: bool) -> dict[str, Any]:
        """What a training has found."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "nvme").mkdir(parents=True)
        end, start = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(end)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                if self.breaks is not None and point is not None:
                    self.breaks()
                training = _Training(self.folder, point, small=self.small, goes_on=goes_on)
                with os.fdopen(start, "w") as pipe:
                    json.dump(training.run(), pipe)
            finally:
                os._exit(0)
        os.close(start)
        said = _read(end, _DEADLINE_SECONDS)
        if said is None:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if said:
            found: dict[str, Any] = json.loads(said)
            return found
        return {"problems": ["it hangs" if said is None else "it dies"]}


class _Training:
    """One training, and its user."""

    def __init__(self, folder: Path, point: Point | None, *, small: bool, goes_on: bool) -> None:
        warnings.simplefilter("ignore")
        self.folder, self.goes_on = folder, goes_on
        self.found: dict[str, Any] = {"problems": []}
        self.lines = _Lines(point)
        _replace(build, "open_io", lambda _: IoEngine(backend="threads", threads=3, fault=_SLOW))
        self.owned = _Owned()
        tiers = _SMALL if small else {}
        config = _tiny.settings(folder / "nvme", tiers=tiers, overlap={"optimizer": True})
        for number in _SIGNALS:
            signal.signal(number, _raise)
        self.engine = _tiny.engine(config)

    def run(self) -> dict[str, Any]:
        """What it finds."""
        try:
            self._train()
            if self.found.get("is_through") and not self.found["problems"]:
                self._look()
        except Exception:  # noqa: BLE001 - a result
            self.found["problems"].append(traceback.format_exc())
        for _ in range(2):  # it must close, and then be closed
            try:
                self.engine.close()
            except Exception:  # noqa: BLE001
                self.found["problems"].append(f"close: {traceback.format_exc()}")
        self.found["problems"] += self.owned.problems
        self.found["lines"] = dict(self.lines.counts) if self.lines.point is None else {}
        return self.found

    def _train(self) -> None:
        engine, losses, phase, num_errors = self.engine, {}, "batch", 0
        while engine.global_steps < _STEPS or phase == "save":
            if engine.global_steps == _FIRST and phase == "batch":
                self.lines.start()
            number = engine.global_steps
            try:
                if phase == "batch again":
                    engine.optimizer.zero_grad()
                    phase = "batch"
                if phase == "batch":
                    loss = _tiny.loss(engine, number)
                    engine.backward(loss)
                    losses[number] = loss.item()
                    phase = "step"
                if phase == "step":
                    engine.step()
                    phase = "save"
                if phase == "save":
                    engine.save_checkpoint(self.folder / "checkpoints")
                    phase = "batch"
            except (KeyboardInterrupt, OffloadError) as error:
                if isinstance(error, OffloadError):
                    num_errors += 1
                    if isinstance(error, ChecksumError) or num_errors > _MOST_ERRORS:
                        raise
                else:
                    self.found["phase"] = phase
                    if not self.goes_on:
                        return
                if phase == "batch" or "zero_grad" in str(error):
                    phase = "batch again"
                elif phase == "step" and engine.global_steps > number:
                    phase = "save"
        self.lines.stop()
        self.found |= {"losses": list(losses.values()), "is_through": True}

    def _look(self) -> None:
        engine = self.engine
        engine.wait_for_checkpoint()
        state = hashlib.sha256()
        for name, tensors in engine.named_state():
            for field, tensor in sorted(tensors.items()):
                state.update(f"{name} {field}".encode() + tensor.detach().numpy().tobytes())
        self.found["state"] = state.hexdigest()
        with stored.find(self.folder / "checkpoints", None) as checkpoint:
            checkpoint.verify()
            self.found["saved"] = checkpoint.content.values["global_steps"]


class _Lines:
    """Counts the lines that the main thread runs, and sends the signal of a point before one."""

    def __init__(self, point: Point | None) -> None:
        self.point = point
        self.counts: Counter[str] = Counter()
        self._is_over = False

    def start(self) -> None:
        """Count from here on; a second call does nothing."""
        if not self._is_over and sys.gettrace() is None:
            sys.settrace(self._call)

    def stop(self) -> None:
        """Count no more."""
        self._is_over = True
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        name = frame.f_code.co_filename.removeprefix(_PACKAGE)
        wanted = name.startswith(_PLACES) and not name.startswith(_LEFT_OUT)
        # What is raised in __del__ is ignored by Python.
        return self._line if wanted and frame.f_code.co_name != "__del__" else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        del arg
        if event == "line" and not self._is_over:
            place = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
            self.counts[place] += 1
            if self.point is not None and (place, self.counts[place]) == self.point[:2]:
                self.stop()
                signal.raise_signal(self.point.number)
        return self._line


class _Owned:
    """Watches that nothing of a request in flight is given back; it looks at the native core."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._requests: dict[int | None, tuple[NativeCore, Any, int, int]] = {}
        self._writes: dict[int | None, Any] = {}
        self._watch_requests()
        self._watch_extents()
        self._watch(HostArena, "_take_back", lambda *a: (a[1].address, a[1].nbytes))
        self._watch(HostPiece, "release", lambda p: (p.tensor.data_ptr(), p.tensor.numel()))
        self._watch(DeviceTier, "_take_back", lambda *a: (a[2].data_ptr(), a[2].numel()))

    def _watch_requests(self) -> None:
        start, start_copy, forget = NativeCore.start, NativeCore.start_copy, NativeCore.forget

        def started(core: NativeCore, request: Any) -> Any:
            handle: Any = start(core, request)
            self._requests[handle.value] = (core, handle, request.address, request.nbytes)
            return handle

        def copied(core: NativeCore, request: Any) -> Any:
            handle: Any = start_copy(core, request)
            self._requests[handle.value] = (core, handle, request.dst_address, request.nbytes)
            return handle

        def forgotten(core: NativeCore, handle: Any) -> None:
            self._requests.pop(handle.value, None)
            self._writes.pop(handle.value, None)
            forget(core, handle)

        _replace(NativeCore, "start", started)
        _replace(NativeCore, "start_copy", copied)
        _replace(NativeCore, "forget", forgotten)

    def _watch_extents(self) -> None:
        start, release = NvmeStore._start, ExtentPool._release

        def started(store: NvmeStore, record: Any, operation: Any, extent: Any, *rest: Any) -> Any:
            before = set(self._requests)
            try:
                return start(store, record, operation, extent, *rest)
            finally:
                if operation == "write":
                    self._writes |= dict.fromkeys(set(self._requests) - before, extent)

        def released(pool: ExtentPool, extent: Any) -> None:
            for handle, written in list(self._writes.items()):
                if written == extent:
                    self._check(handle, f"{extent} is free")
            release(pool, extent)

        _replace(NvmeStore, "_start", started)
        _replace(ExtentPool, "_release", released)

    def _watch(self, kind: Any, name: str, memory: Callable[..., tuple[int, int]]) -> None:
        give_back = getattr(kind, name)

        def given_back(*arguments: Any) -> None:
            start, nbytes = memory(*arguments)
            for handle, (_, _, address, length) in list(self._requests.items()):
                if start < address + length and address < start + nbytes:
                    self._check(handle, f"{nbytes} bytes of {kind.__name__} are free")
            give_back(*arguments)

        _replace(kind, name, given_back)

    def _check(self, number: int | None, what: str) -> None:
        core, handle, *_ = self._requests[number]
        if not core.done(handle):
            self.problems.append(f"{what}, on which a request is in flight")


def _raise(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _replace(holder: Any, name: str, by: Callable[..., Any]) -> None:
    setattr(holder, name, by)


def _held_back_no_more() -> None:
    """The locks and blocks hold no signal back."""
    for name in ("hold_back", "let_go"):
        _replace(uninterrupted, name, lambda: None)


def _read(end: int, seconds: float) -> str | None:
    """All that a pipe says; None: that takes too long."""
    deadline, said = time.monotonic() + seconds, b""
    with os.fdopen(end, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            more = pipe.read(1 << 16)
            if not more:
                return said.decode()
            said += more
    return None
