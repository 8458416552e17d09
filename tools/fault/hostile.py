"""Trains on machines that refuse something: memory, calls, files, space, a disk that answers.

Each row is a training of its own process with save, load and resume. It ends with the bits of the
undisturbed one (the remark says "same bits"), or with an `OffloadError` that names what is refused
and what to do about it; where that is a save, the training goes on as if nothing had been. Never a
hang, never a wrong number (`undetected`).

What needs root, a tool or a file system that is not here is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fault import _hostile_child, _hostile_teeth
from fault._hostile_child import Job
from fault._machine import (
    MIB,
    SkippedError,
    command,
    disk,
    frozen,
    mounted,
    require_root,
    throttled,
)
from fault.result import Row

IO_URING = [425, 426, 427]  # io_uring_setup, _enter, _register
KERNEL_AIO = [206, 207, 208, 209, 210]  # io_setup, _destroy, _getevents, _submit, _cancel
_TRIAL_SECONDS = 90.0  # longer is a hang
_DEADLINE_SECONDS = 1.0  # of the disks that do not answer
_NAMED_SECONDS = 10.0  # ... and so long it may take until the error is there; and to close
_SMALL_FILES = (16, 24, 32, 48, 64)
_STATE_BYTES = MIB // 2  # about what the tiny training takes of a disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, and where to work."""
    parser.add_argument("--only", choices=list(ROWS), nargs="+", default=list(ROWS))
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder on a disk")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """See `fault.result`."""
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as folder:
        hostile = Hostile(Path(folder))
        if options.teeth:
            for broken, (_, name) in _hostile_teeth.BREAKS.items():
                hostile.environment = {_hostile_teeth.VARIABLE: broken}
                row = hostile.row(name)
                row.broken = broken
                yield row
            return
        for each in options.only:
            yield hostile.row(each)


WhilePaused = Callable[[int], contextlib.AbstractContextManager[None]]  # of the process's number


@dataclass
class Wanted:
    """How a training may end: with the same bits, or with an error in one of some stages.

    `words` are in the error's message. None of `stages`: it must end with the same bits. After a
    save that failed it goes on, unless the disk of the state is refused as well.
    """

    same: bool = True
    stages: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    seconds: float = _TRIAL_SECONDS
    goes_on: bool = True


class Hostile:
    """Trainings in one folder; `environment` is added to that of every process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self._number = 0
        self.bits = self._train(self.job())["bits"]

    def job(self, **options: Any) -> Job:
        """A job with fresh folders, where `options` name none."""
        self._number += 1
        place = self.folder / str(self._number)
        (place / "nvme").mkdir(parents=True)
        given = {"nvme": str(place / "nvme"), "checkpoints": str(place / "checkpoints"), **options}
        return Job(**given)

    def row(self, name: str) -> Row:
        """The trials of one of `ROWS`."""
        row = Row(name)
        began = time.perf_counter()
        remarks = []
        try:
            for trial in ROWS[name](self):
                row.trials += 1
                remarks.append(trial.judge(self.bits, row))
        except SkippedError as reason:
            row.skipped = str(reason)
        row.remark = "; ".join(dict.fromkeys(remarks))
        row.seconds = time.perf_counter() - began
        return row

    def trial(
        self,
        job: Job,
        wanted: Wanted,
        *,
        wrapped: tuple[str, ...] = (),
        while_paused: WhilePaused | None = None,
    ) -> Trial:
        """Train, and return what became of it."""
        try:
            result = self._train(job, wrapped, while_paused)
        except _HangError as error:
            return Trial(wanted, {}, str(error))
        return Trial(wanted, result, "")

    def _train(
        self,
        job: Job,
        wrapped: tuple[str, ...] = (),
        while_paused: WhilePaused | None = None,
    ) -> dict[str, Any]:
        script = str(Path(_hostile_child.__file__).resolve())
        child = subprocess.Popen(
            [*wrapped, sys.executable, script, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
        )
        try:
            found = _line(child)
            if "ready" in found and while_paused is not None:
                with while_paused(child.pid):
                    assert child.stdin is not None
                    child.stdin.write("\n")
                    child.stdin.flush()
                    found = _line(child)
            return found
        finally:
            child.kill()
            child.communicate()


@dataclass
class Trial:
    """One training that has ended, or what else was wrong: it hangs, say."""

    wanted: Wanted
    result: dict[str, Any]
    failure: str

    def judge(self, bits: str, row: Row) -> str:
        """Count what must not be in `row`; what became of the training, in words."""
        if self.failure:
            row.problems.append(self.failure)
            return self.failure
        errors = self.result["errors"]
        wrong = self.result["bits"] not in ("", bits)
        if wrong:
            row.undetected += 1
            row.details.append("it ends with other bits")
        if not errors:
            if self.result["bits"] == bits and not self.wanted.same:
                row.problems.append("it was to be refused, and was not")
            elif self.result["bits"] != bits and not wrong:
                row.problems.append("it ends with no bits and no error")
            return f"{'other' if wrong else 'same'} bits ({self.result['backend']})"
        self._judge_error(errors[0], bits, row)
        return f"{errors[0]['stage']}: {errors[0]['type']}: {errors[0]['message']}"

    def _judge_error(self, error: dict[str, Any], bits: str, row: Row) -> None:
        told = f"{error['stage']} raised {error['type']}: {error['message']}"
        if not error["is_ours"]:
            row.problems.append(f"no OffloadError: {told}")
        if error["stage"] not in self.wanted.stages:
            row.problems.append(f"it should have ended well: {told}")
        missing = [word for word in self.wanted.words if word not in error["message"]]
        if missing:
            row.problems.append(f"the error does not say {missing}: {told}")
        if error["seconds"] > self.wanted.seconds:
            row.problems.append(f"after {error['seconds']:.1f} s: {told}")
        if self.result["close_seconds"] > self.wanted.seconds:
            row.problems.append(f"it closes in {self.result['close_seconds']:.1f} s: {told}")
        if error["stage"] == "save" and self.wanted.goes_on and self.result["bits"] != bits:
            row.problems.append(f"the training did not go on: {told}; {self.result['errors'][1:]}")


class _HangError(Exception):
    """A process that does not answer."""


def _line(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a process as JSON."""
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], _TRIAL_SECONDS)
    if not ready:
        raise _HangError(f"it hangs: nothing after {_TRIAL_SECONDS:g} s")
    text = child.stdout.readline()
    if not text:
        _, said = child.communicate()
        raise _HangError(f"it died with {child.returncode}: {said[-1000:]}")
    found: dict[str, Any] = json.loads(text)
    return found


Trials = Iterator[Trial]
_SAME = Wanted()


def _low_memlock(hostile: Hostile) -> Trials:
    require_root()
    command("setpriv", "--version")
    limited = ("prlimit", "--memlock=65536", "setpriv", "--bounding-set", "-ipc_lock")
    wrapped = (*limited, "--inh-caps", "-ipc_lock")
    for backend in ("auto", "io_uring"):
        yield hostile.trial(hostile.job(io={"backend": backend}), _SAME, wrapped=wrapped)


def _no_io_uring(hostile: Hostile) -> Trials:
    for code in (errno.EPERM, errno.ENOSYS):
        refused: dict[str, Any] = {"refused_calls": IO_URING, "errno": code}
        yield hostile.trial(hostile.job(**refused), _SAME)
        named = Wanted(same=False, stages=("build",), words=("io_uring", "remedy"))
        yield hostile.trial(hostile.job(io={"backend": "io_uring"}, **refused), named)


def _no_asynchronous_io(hostile: Hostile) -> Trials:
    calls = [*IO_URING, *KERNEL_AIO]
    yield hostile.trial(hostile.job(refused_calls=calls, errno=errno.ENOSYS), _SAME)


def _on(hostile: Hostile, folder: Path, wanted: Wanted = _SAME, **options: Any) -> Trial:
    """A training with all its files in `folder`."""
    (folder / "nvme").mkdir(exist_ok=True)
    folders = {"nvme": str(folder / "nvme"), "checkpoints": str(folder / "checkpoints")}
    return hostile.trial(hostile.job(**folders, **options), wanted)


def _4kn(hostile: Hostile) -> Trials:
    with disk(hostile.folder / "4kn", "ext4", 64 * MIB, "-b", "4096") as (folder, _):
        for backend in ("auto", "threads"):
            yield _on(hostile, folder, io={"backend": backend})


def _tmpfs(hostile: Hostile) -> Trials:
    with mounted(hostile.folder / "tmpfs", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as folder:
        trial = _on(hostile, folder)
        warned = any("tmpfs is memory" in each for each in trial.result.get("warnings", ()))
        yield trial if warned else Trial(trial.wanted, {}, "no warning says that this is memory")


def _overlay(hostile: Hostile) -> Trials:
    for name in ("lower", "upper", "work"):
        (hostile.folder / name).mkdir()
    at = {name: hostile.folder / name for name in ("lower", "upper", "work")}
    options = f"lowerdir={at['lower']},upperdir={at['upper']},workdir={at['work']}"
    with mounted(hostile.folder / "overlay", "-t", "overlay", "-o", options, "overlay") as folder:
        yield _on(hostile, folder)


def _xfs(hostile: Hostile) -> Trials:
    with disk(hostile.folder / "xfs", "xfs", 320 * MIB) as (folder, _):
        yield _on(hostile, folder)


def _btrfs(hostile: Hostile) -> Trials:
    with disk(hostile.folder / "btrfs", "btrfs", 256 * MIB) as (folder, _):
        yield _on(hostile, folder)


def _read_only(hostile: Hostile) -> Trials:
    source = hostile.folder / "writable"
    (source / "nvme").mkdir(parents=True)
    with mounted(hostile.folder / "read-only", "--bind", source) as folder:
        command("mount", "-o", "remount,bind,ro", folder)
        nvme = Wanted(same=False, stages=("build",), words=("EROFS", str(folder), "remedy"))
        yield hostile.trial(hostile.job(nvme=str(folder / "nvme")), nvme)
        save = Wanted(same=False, stages=("save",), words=("EROFS", str(folder)))
        for home in ("nvme", "host"):
            job = hostile.job(checkpoints=str(folder / "checkpoints"), home=home)
            yield hostile.trial(job, save)


def _few_files(hostile: Hostile) -> Trials:
    for home in ("nvme", "host"):
        for count in _SMALL_FILES:
            either = Wanted(stages=("build", "save", "load"), words=("EMFILE",))
            yield hostile.trial(hostile.job(max_files=count, home=home), either)


def _small_files(hostile: Hostile) -> Trials:
    nvme = Wanted(same=False, stages=("build",), words=("EFBIG", "ulimit -f"))
    yield hostile.trial(hostile.job(max_file_bytes=64 << 10), nvme)
    save = Wanted(same=False, stages=("save",), words=("EFBIG",))
    yield hostile.trial(hostile.job(max_file_bytes=64 << 10, home="host"), save)


def _full_disk(hostile: Hostile) -> Trials:
    """Full before step 0: nothing is started, and nothing is left there."""
    with disk(hostile.folder / "full", "ext4", 64 * MIB) as (folder, _):
        _fill(folder / "ballast", leave=_STATE_BYTES // 4)
        free = os.statvfs(folder).f_bfree
        (folder / "nvme").mkdir()
        named = Wanted(same=False, stages=("build",), words=("nvme",))
        yield hostile.trial(hostile.job(nvme=str(folder / "nvme")), named)
        save = Wanted(same=False, stages=("save",), words=("ENOSPC", str(folder)))
        for home in ("nvme", "host"):
            yield hostile.trial(hostile.job(checkpoints=str(folder / "c"), home=home), save)
        if free - os.statvfs(folder).f_bfree > 8:  # blocks of the folders
            yield Trial(named, {}, "a refused training has left blocks on the full disk")


def _fill(path: Path, leave: int) -> None:
    """Allocate all of a disk but `leave` bytes."""
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


_LATE = Wanted(
    same=False,
    stages=("step",),
    words=("not done after", "in flight", "remedy"),
    seconds=_NAMED_SECONDS,
)


def _slow_disk(hostile: Hostile) -> Trials:
    with (
        disk(hostile.folder / "slow", "ext4", 64 * MIB) as (folder, device),
        throttled(device, 4096) as group,
    ):
        for backend in ("io_uring", "libaio", "threads"):
            io = {"backend": backend, "deadline_seconds": _DEADLINE_SECONDS}
            job = hostile.job(nvme=str(folder), io=io, pause_before="step")
            yield hostile.trial(job, _LATE, while_paused=lambda pid: _joined(group, pid))


@contextlib.contextmanager
def _joined(group: Path, pid: int) -> Iterator[None]:
    """A process is in a cgroup for the rest of its life."""
    (group / "cgroup.procs").write_text(str(pid))
    yield


def _hung_disk(hostile: Hostile) -> Trials:
    with disk(hostile.folder / "hung", "ext4", 64 * MIB) as (folder, _):
        for backend in ("io_uring", "libaio", "threads"):
            io = {"backend": backend, "deadline_seconds": _DEADLINE_SECONDS}
            job = hostile.job(nvme=str(folder), io=io, pause_before="step")
            yield hostile.trial(job, _LATE, while_paused=lambda _: frozen(folder))


def _hung_checkpoint_disk(hostile: Hostile) -> Trials:
    """It is the save that meets the disk that hangs; and the steps after it, if state is there."""
    io = {"deadline_seconds": _DEADLINE_SECONDS}
    named = replace(_LATE, stages=("save",), words=("it hangs", "remedy"))
    with disk(hostile.folder / "hung-checkpoints", "ext4", 64 * MIB) as (folder, _):
        for name in ("nvme", "checkpoints"):
            (folder / name).mkdir()
        checkpoints = str(folder / "checkpoints")
        for home in ("nvme", "host"):
            job = hostile.job(checkpoints=checkpoints, home=home, io=io, pause_before="save")
            yield hostile.trial(job, named, while_paused=lambda _: frozen(folder))
        job = hostile.job(
            nvme=str(folder / "nvme"), checkpoints=checkpoints, io=io, pause_before="save"
        )
        both = replace(named, goes_on=False)
        yield hostile.trial(job, both, while_paused=lambda _: frozen(folder))


ROWS: dict[str, Callable[[Hostile], Trials]] = {
    "low memlock": _low_memlock,
    "no io_uring": _no_io_uring,
    "no asynchronous I/O": _no_asynchronous_io,
    "4Kn disk": _4kn,
    "tmpfs": _tmpfs,
    "overlay": _overlay,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "read-only path": _read_only,
    "few open files": _few_files,
    "small files only": _small_files,
    "full disk": _full_disk,
    "slow disk": _slow_disk,
    "hung disk": _hung_disk,
    "hung disk of checkpoints": _hung_checkpoint_disk,
}
