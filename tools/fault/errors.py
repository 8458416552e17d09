"""Fails each I/O attempt of a training in turn: errors, short transfers, lost answers.

A tiny training (build, step, save, load) runs once without a fault, and its I/O attempts are
counted. Then it runs once for each attempt and each kind of fault, with that attempt failing:

    engine    the I/O engine's own hook, on every backend: reads and writes of the NVMe tier
    files     the calls of Python code on folders: checkpoints, and opening the NVMe tier; here
              each call also hangs, and whoever waits for it must give it up in time
    strace    the same seen from the kernel's side, an example of each system call

Wanted: an interrupted, refused (EAGAIN) or short transfer is healed, and with `io.retries` an EIO
that has passed when the request is made again. Any other error is an
`OffloadError` that names operation, file, offset, bytes, errno and record; the caller repeats the
call and ends with the bits of the undisturbed run. After a failed save the checkpoint before still
loads. No descriptor, thread or lease is left, and no fsync is repeated on the same data.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fault import _error_teeth, _life, _tiny
from fault._os_layer import SYNCS, TRANSFERS, VITAL, Call, Fault, OsLayer
from fault.result import Row
from offload.engine import build
from offload.errors import CheckpointError, StorageError
from offload.native import IoEngine, IoFile
from offload.native.engine import BACKENDS

CLASSES = ("engine", "files", "strace")
HOMES = ("nvme", "host")
_TRANSIENT = (errno.EINTR, errno.EAGAIN)
# kind -> the action of [Note: fault specification] in offload/native/fault_spec.py
ENGINE_FAULTS = {
    "EIO": f"errno={errno.EIO}",
    "EIO, made again": f"errno={errno.EIO}",
    "ENOSPC": f"errno={errno.ENOSPC}",
    "EINTR": f"errno={errno.EINTR}",
    "EAGAIN": f"errno={errno.EAGAIN}",
    "half": "short=4096",
    "one byte": "short=1",
}
FSYNC_FAULTS = ("EIO", "ENOSPC")  # fsync is not to be repeated, and moves nothing
HEALED = ("EIO, made again", "EINTR", "EAGAIN", "half", "one byte")
RETRIES = {"EIO, made again": 3}  # io.retries; the others are seen the first time
FILE_FAULTS = (
    Fault("EIO", errno.EIO),
    Fault("ENOSPC", errno.ENOSPC),
    Fault("EAGAIN", errno.EAGAIN),
    Fault("EIO, but done", errno.EIO, late=True),
    Fault("half", half=True),
    Fault("zero bytes", zero=True),
    Fault("hangs", errno.ETIMEDOUT, hangs=True),
)
_DEADLINE_SECONDS = 0.3  # where something hangs
# System call, what happens to its first call about the folder, and what must come of it: the caller
# is told, or it is healed. None: either; what was not vital may fail.
STRACED = (
    ("pwrite64", "error=EIO", "told"),
    ("pwrite64", "error=EINTR", "healed"),
    ("preadv2", "error=EIO", None),
    ("preadv2", "error=EINTR", "healed"),
    ("fsync", "error=EIO", "told"),
    ("fallocate", "error=ENOSPC", "told"),
    ("fallocate", "error=EINTR", "healed"),
    ("rename", "error=EIO", "told"),
    ("mkdir", "error=ENOSPC", "told"),
    ("openat", "error=EMFILE", None),
    ("openat", "error=EINTR", "healed"),
    ("unlinkat", "error=EIO", None),
    ("statfs", "error=EIO", "told"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `fault.result`."""
    parser.add_argument("--only", choices=CLASSES, nargs="+", default=list(CLASSES))
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=list(BACKENDS))
    parser.add_argument("--homes", choices=HOMES, nargs="+", default=list(HOMES))
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """See `fault.result`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as folder:
        sweep = Sweep(Path(folder), options.trials)
        if options.teeth:
            yield from _teeth(sweep)
            return
        if "engine" in options.only:
            for backend in options.backends:
                for kind in ENGINE_FAULTS:
                    yield sweep.engine(backend, kind)
        if "files" in options.only:
            for home in options.homes:
                for fault in FILE_FAULTS:
                    yield sweep.files(home, fault)
        if "strace" in options.only:
            yield from _straced(Path(folder) / "traced", options.trials)


class CountingIo(IoEngine):
    """Counts the requests, which are attempts: every one of them is one block here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.counts = {"read": 0, "write": 0, "fsync": 0}
        self.repeated: list[str] = []
        self._unsynced: set[IoFile] = set()  # their fsync failed, and nothing was written since

    def start_read(self, *arguments: Any, **options: Any) -> Any:
        self.counts["read"] += 1
        return super().start_read(*arguments, **options)

    def start_write(self, *arguments: Any, **options: Any) -> Any:
        self.counts["write"] += 1
        self._unsynced.discard(arguments[0])
        return super().start_write(*arguments, **options)

    def fsync(self, file: IoFile) -> None:
        self.counts["fsync"] += 1
        if file in self._unsynced:
            self.repeated.append(file.path)
        try:
            super().fsync(file)
        except StorageError:
            self._unsynced.add(file)
            raise


@dataclass
class Sweep:
    """Trials in one folder; `most` of each class, spread evenly (None: all)."""

    folder: Path
    most: int | None = None
    until_seen: bool = False  # one problem is enough

    def __post_init__(self) -> None:
        (self.folder / "nvme").mkdir()

    def engine(self, backend: str, kind: str) -> Row:
        """One I/O attempt of the engine after the other is disturbed."""
        row = Row(f"engine, {backend}: {kind}")
        began, outcomes = time.perf_counter(), Counter[str]()
        retries = RETRIES.get(kind, 0)
        calm, io = self._through_engine(backend, None, retries)
        _require_calm(calm)
        for operation, count in io.counts.items():
            if operation == "fsync" and kind not in FSYNC_FAULTS:
                continue
            for nth in self._spread(count):
                fault = f"op={operation},nth={nth},{ENGINE_FAULTS[kind]}"
                life, io = self._through_engine(backend, fault, retries)
                problems = _engine_problems(life, calm, kind)
                problems += [f"fsync of {path} was repeated" for path in io.repeated]
                if operation == "fsync" and not life.errors:
                    problems.append("nobody was told")
                _count(row, outcomes, life, problems, f"{operation} {nth}")
                if self.until_seen and problems:
                    return row
        row.seconds = time.perf_counter() - began
        return row

    def files(self, home: str, fault: Fault) -> Row:
        """One call on folders after the other is disturbed."""
        row = Row(f"files, state on {home}: {fault.name}")
        began, outcomes = time.perf_counter(), Counter[str]()
        calm, layer = self._through_files(home, None, 0)
        _require_calm(calm)
        concerned = [n for n, call in enumerate(layer.calls, start=1) if fault.concerns(call)]
        for place in self._spread(len(concerned)):
            nth = concerned[place - 1]
            life, layer = self._through_files(home, fault, nth)
            problems = _file_problems(life, calm, fault, layer)
            _count(row, outcomes, life, problems, f"call {nth} ({layer.hit})")
            if self.until_seen and problems:
                break
        row.seconds = time.perf_counter() - began
        return row

    def _through_engine(
        self, backend: str, fault: str | None, retries: int
    ) -> tuple[_life.Life, CountingIo]:
        """A life with its state on NVMe, and its I/O engine."""
        engines: list[CountingIo] = []

        def open_io(_: Any) -> IoEngine:
            # A second engine, after one that could not be built, has none.
            hook = fault if not engines else None
            engines.append(CountingIo(backend=backend, threads=2, fault=hook))
            return engines[-1]

        with mock.patch.object(build, "open_io", open_io):
            life = self._live("nvme", retries=retries)
        return life, engines[-1]

    def _through_files(
        self, home: str, fault: Fault | None, nth: int
    ) -> tuple[_life.Life, OsLayer]:
        hangs = fault is not None and fault.hangs
        with OsLayer([self.folder], fault=fault, nth=nth) as layer:
            life = self._live(
                home,
                checking=layer.paused,
                after_error=layer.free,
                deadline_seconds=_DEADLINE_SECONDS if hangs else 60.0,
            )
        return life, layer

    def _live(
        self, home: str, *, retries: int = 0, deadline_seconds: float = 60.0, **watching: Any
    ) -> _life.Life:
        io = {"backend": "threads", "retries": retries, "deadline_seconds": deadline_seconds}
        config = _tiny.settings(self.folder / "nvme", home=home, io=io)
        return _life.live(lambda: _tiny.engine(config), self.folder / "checkpoints", **watching)

    def _spread(self, count: int) -> list[int]:
        """Which of the attempts 1 to `count` to disturb."""
        if self.most is None or self.most >= count:
            return list(range(1, count + 1))
        return sorted(
            {1 + place * (count - 1) // max(1, self.most - 1) for place in range(self.most)}
        )


def _require_calm(life: _life.Life) -> None:
    if life.errors or life.problems:
        raise RuntimeError(f"without a fault: {life.errors} {life.problems}")


def _count(
    row: Row, outcomes: Counter[str], life: _life.Life, problems: list[str], where: str
) -> None:
    row.trials += 1
    outcomes["told" if life.errors else "healed"] += 1
    row.remark = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    if problems:
        row.problems.append(f"{where}: {'; '.join(problems)}")


def _engine_problems(life: _life.Life, calm: _life.Life, kind: str) -> list[str]:
    problems = life.problems + _life.differences(life, calm)
    if kind in HEALED:
        problems += [f"{name} raised {error!r}" for name, error in life.errors]
        return problems
    for name, error in life.errors:
        if not isinstance(error, StorageError):
            problems.append(f"{name} raised {error!r}, which is no StorageError")
        elif errno.errorcode[error.errno or 0] != kind or not error.path:
            problems.append(f"{name} raised an error that does not say what failed: {error}")
        elif error.operation not in SYNCS and (
            not error.what or not error.nbytes or error.offset is None
        ):
            problems.append(f"{name} raised an error that does not say where: {error}")
    return problems


def _file_problems(life: _life.Life, calm: _life.Life, fault: Fault, layer: OsLayer) -> list[str]:
    problems = life.problems + _life.differences(life, calm)
    problems += [f"fsync of {path} was repeated" for path in layer.repeated]
    problems += [f"nobody gave {call} up" for call in layer.waits]
    call = layer.hit
    if call is None:  # what is written beside the training makes its calls in no fixed order
        return problems
    healed = fault.half or (fault.errno in _TRANSIENT and call.name in TRANSFERS)
    for name, error in life.errors:
        if healed:
            problems.append(f"{name} raised {error!r}")
        else:
            problems += _unclear(name, error, fault, call, str(layer.roots[0]))
    is_saving = "/checkpoints" in call.path and "LATEST" not in call.path
    if not life.errors and not healed and call.name in VITAL and is_saving:
        problems.append("nobody was told")
    return problems


def _unclear(name: str, error: BaseException, fault: Fault, call: Call, root: str) -> list[str]:
    """What an error does not say of the call that failed."""
    message = str(error)
    code = fault.errno or errno.EIO
    missing = []
    if isinstance(error, StorageError):
        wanted = ["operation", "path"]
        if call.name != "open" and not fault.hangs:
            wanted.append("what")
        missing += [each for each in wanted if not getattr(error, each)]
        if error.errno != code:
            missing.append(f"errno {code}")
        if call.name in TRANSFERS and error.nbytes is None and not fault.hangs:
            missing.append("bytes")
    elif not isinstance(error, CheckpointError):
        return []  # no OffloadError: a problem already
    elif errno.errorcode[code] not in message:
        missing.append(f"the error {errno.errorcode[code]}")
    if root not in message:
        missing.append("the path")
    return [f"{name} raised an error without {', '.join(missing)}: {message}"] if missing else []


def _straced(folder: Path, most: int | None) -> Iterator[Row]:
    """An example of each system call, failed by the tracer."""
    reason = _cannot_trace()
    if reason:
        yield Row("strace", skipped=reason)
        return
    calm, log = _trace(folder, ",".join({call for call, *_ in STRACED}), None)
    for call, what, wanted in STRACED[:most]:
        row = Row(f"strace: {call} {what}")
        began = time.perf_counter()
        # Reads begin with the trial's own; the last one is of the engine's load.
        nth = _place_in(log, call, str(folder), last=call == "preadv2")
        if nth is None:
            row.skipped = f"the training does not call {call} there"
        else:
            found, _ = _trace(folder, call, f"{call}:{what}:when={nth}")
            row.trials = 1
            row.problems += found["problems"]
            if found["fingerprint"] != calm["fingerprint"]:
                row.undetected = 1
            outcome = "told" if found["errors"] else "healed"
            row.remark = outcome
            if wanted not in (None, outcome):
                row.problems.append(f"it is not {wanted}: {found['errors']}")
        row.seconds = time.perf_counter() - began
        yield row


def _cannot_trace() -> str:
    if shutil.which("strace") is None:
        return "no strace here"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "strace may not trace here"


def _trace(folder: Path, calls: str, inject: str | None) -> tuple[dict[str, Any], str]:
    """One life in a process of its own under strace, its state on the host; and the log.

    An I/O engine makes its calls in threads of its own, and strace counts by thread.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an error may have spared something
    (folder / "nvme").mkdir(parents=True)
    log = folder.with_suffix(".strace")
    command = ["strace", "-f", "-y", "--seccomp-bpf", "-o", str(log), "-e", f"trace={calls}"]
    command += ["-e", f"inject={inject}"] if inject else []
    script = str(Path(_life.__file__).resolve())
    done = subprocess.run(
        [*command, sys.executable, script, str(folder), "host"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    text = log.read_text(errors="replace")
    log.unlink()
    if done.returncode:
        raise RuntimeError(f"{inject}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result, text


def _place_in(log: str, call: str, folder: str, *, last: bool) -> int | None:
    """Which call of its thread is the first or last about the folder; strace counts by thread."""
    seen: dict[str, int] = {}
    found: int | None = None
    for line in log.splitlines():
        match = re.match(rf"(\d+) +{call}\((.*)", line)
        if match is None:
            continue
        seen[match[1]] = seen.get(match[1], 0) + 1
        if folder in match[2]:
            found = seen[match[1]]
            if not last:
                break
    return found


def _teeth(sweep: Sweep) -> Iterator[Row]:
    """Each break, under the faults that must show it."""
    sweep.until_seen = True
    for tooth in _error_teeth.TEETH:
        with tooth.broken():
            row = (
                sweep.engine(tooth.backend, tooth.kind)
                if tooth.backend
                else sweep.files(tooth.home, next(f for f in FILE_FAULTS if f.name == tooth.kind))
            )
        row.broken = tooth.name
        yield row
