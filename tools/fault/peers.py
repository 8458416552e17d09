"""What torch.distributed.checkpoint and DeepSpeed do in the tests of `kill` and `power`.

The same model trains with each, and saves at every step: to a new folder or tag, or replacing the
one before. It is killed, or the power of its disk is cut, at random moments from its second step
on; the next process loads what is newest, as the peer names it, or else the next older one.

    lost        what it loads is older than a save that had returned; or there is nothing
    mixed       it loads without an error, and the next losses are over 1% from those of that step
    problems    the newest cannot be loaded: one has to know that an older one is to be named

The file system is mounted as it is by default. DeepSpeed has its optimizer state in host memory,
ZeRO-3 in bf16. The last row has it on
NVMe and is never disturbed: it saves, ends, and resumes. Cutting power needs root; DeepSpeed needs
an environment of its own, which `tools/bench/versus_deepspeed.py --install` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from fault._loop import JOURNAL_FLUSHED, JOURNAL_LOST, LoopDisk
from fault.result import Row

TRIALS = 100
_PROGRAM = Path(__file__).with_name("_peer_life.py")
_BENCH = Path(__file__).resolve().parents[1] / "bench"
_LAST_STEP = 20
_TOLERANCE = 1e-2  # DeepSpeed's losses differ in the sixth digit after some undisturbed resumptions
_DISK_BYTES = 1 << 30
_DEADLINE_SECONDS = 180.0
_SHORT_TEXT = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to work, and where DeepSpeed is."""
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")
    parser.add_argument("--venv", type=Path, help="an environment with DeepSpeed; else without it")
    parser.add_argument(
        "--only", choices=("dcp", "deepspeed"), help="one peer instead of all that are there"
    )


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each peer, way to save, and fault."""
    draw = random.Random(options.seed)
    trials = options.trials or TRIALS
    peers = {"dcp": "torch.distributed.checkpoint", "deepspeed": "DeepSpeed"}
    if options.venv is None:
        del peers["deepspeed"]
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        folder = Path(name)
        for peer, title in peers.items():
            if options.only not in {None, peer}:
                continue
            with Nursery(peer, options.venv) as nursery:
                tests = Tests(nursery, draw, title)
                yield tests.kill(folder / "killed", None, trials)
                yield tests.kill(folder / "killed", "best", trials)
                with LoopDisk(folder / f"{peer}.image", folder / peer, _DISK_BYTES) as disk:
                    yield tests.cut(disk, None, trials)
                    yield tests.cut(disk, "best", trials)
        if "deepspeed" in peers and options.only != "dcp":
            with Nursery("deepspeed-nvme", options.venv) as nursery:
                tests = Tests(nursery, draw, "DeepSpeed, state on NVMe")
                yield tests.undisturbed(folder / "undisturbed", 3)


class Nursery:
    """A process that forks lives, in the peer's environment; a context manager."""

    def __init__(self, peer: str, venv: Path | None) -> None:
        python, variables = sys.executable, {}
        if peer.startswith("deepspeed") and venv is not None:
            sys.path.append(str(_BENCH))
            import _deepspeed

            python, variables = _deepspeed.python_of(venv), _deepspeed.environment(venv)
        self._process = subprocess.Popen(
            [python, str(_PROGRAM), peer],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._text = b""
        self.reports: list[dict[str, Any]] = []
        self.pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pid:
            self.kill()
        self._process.kill()
        self._process.communicate()

    def start(self, job: dict[str, Any]) -> None:
        """Fork a life; `reports` are its."""
        assert self._process.stdin is not None
        self.reports = []
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        self.wait_for("pid")
        (self.pid,) = [report["pid"] for report in self.reports if report["kind"] == "pid"]

    def wait_for(self, kind: str, count: int = 1) -> bool:
        """Read until `count` reports of this kind are there; False: the life ended before.

        Raises:
            RuntimeError: nothing was reported for minutes, or the process is gone.
        """
        while sum(report["kind"] == kind for report in self.reports) < count:
            if self.reports and self.reports[-1]["kind"] == "dead":
                return False
            self._read()
        return True

    def kill(self) -> None:
        """SIGKILL for the life, and wait until it is dead."""
        if self.reports[-1]["kind"] != "dead":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait_for("dead")
        self.pid = 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        data = os.read(pipe, 65536) if select.select([pipe], [], [], _DEADLINE_SECONDS)[0] else b""
        if not data:
            raise RuntimeError(f"the peer's process says nothing after {self.reports[-2:]}")
        *lines, self._text = (self._text + data).split(b"\n")
        self.reports += [json.loads(line) for line in lines]


class Tests:
    """The trials of one peer."""

    def __init__(self, nursery: Nursery, draw: random.Random, title: str) -> None:
        self.nursery, self.draw, self.title = nursery, draw, title
        with tempfile.TemporaryDirectory() as name:
            reports = self._whole_life(Path(name), None, _LAST_STEP, saves=False)
        self.losses = [report["loss"] for report in reports if report["kind"] == "stepped"]
        if len(self.losses) != _LAST_STEP:
            raise SystemExit(f"error: {title} cannot train here: {reports[-2:]}")
        self.newest: int | None = None

    def _whole_life(
        self, folder: Path, tag: str | None, num_steps: int, *, saves: bool
    ) -> list[dict[str, Any]]:
        self.nursery.start(self._job(folder, tag, num_steps, saves=saves))
        self.nursery.wait_for("dead")
        self.nursery.kill()
        return self.nursery.reports

    def _job(
        self, folder: Path, tag: str | None, num_steps: int = _LAST_STEP, *, saves: bool = True
    ) -> dict[str, Any]:
        return {
            "checkpoints": str(folder / "checkpoints"),
            "scratch": str(folder / "scratch"),
            "tag": tag,
            "num_steps": num_steps,
            "saves": saves,
        }

    def kill(self, folder: Path, tag: str | None, trials: int) -> Row:
        """Killed at random moments."""
        return self._trials(
            "killed", folder, tag, trials, cut=lambda _n: None, recover=lambda: None
        )

    def cut(self, disk: LoopDisk, tag: str | None, trials: int) -> Row:
        """The power of its disk cut at random moments."""

        def cut(number: int) -> None:
            disk.cut((JOURNAL_FLUSHED, JOURNAL_LOST)[number % 2])

        def recover() -> None:
            disk.unmount()
            disk.mount("rw")

        return self._trials("cut", disk.folder / "run", tag, trials, cut=cut, recover=recover)

    def undisturbed(self, folder: Path, trials: int) -> Row:
        """Saves, ends, and resumes."""
        row = Row(f"{self.title}: resumed, undisturbed", peer=True)
        began = time.perf_counter()
        for number in range(trials):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._whole_life(folder, None, 3 + number, saves=True)
            self.newest = 3 + number
            row.trials += 1
            self._judge(row, self._whole_life(folder, None, 8 + number, saves=False))
        row.seconds = time.perf_counter() - began
        return row

    def _trials(
        self,
        fault: str,
        folder: Path,
        tag: str | None,
        trials: int,
        *,
        cut: Callable[[int], None],
        recover: Callable[[], None],
    ) -> Row:
        way = "a new one at every step" if tag is None else "one, replaced"
        row = Row(f"{self.title}: {fault}, {way}", peer=True)
        began = time.perf_counter()
        period = self._restart(folder, tag)
        acknowledged = 0
        for number in range(trials):
            if self.newest is None or self.newest > _LAST_STEP - 6:
                self._restart(folder, tag)
            self.nursery.start(self._job(folder, tag))
            self.nursery.wait_for(self.draw.choice(("saving", "saving", "saved")), 2)
            time.sleep(self.draw.uniform(0, period))
            cut(number)
            self.nursery.kill()
            recover()
            row.trials += 1
            self._judge(row, self.nursery.reports)
            acknowledged += sum(r["kind"] == "saved" for r in self.nursery.reports)
        if self.newest is not None:
            self._judge(row, self._whole_life(folder, tag, _LAST_STEP, saves=False))
        row.remark = f"{acknowledged} saves returned; the newest could not be loaded "
        row.remark += f"{len(row.problems)} times"
        row.seconds = time.perf_counter() - began
        return row

    def _restart(self, folder: Path, tag: str | None) -> float:
        """Begin anew with three saves; returns the seconds of a step and its save."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(parent)  # a power cut would bring the old one back
        os.close(parent)
        self.nursery.start(self._job(folder, tag, 4))
        self.nursery.wait_for("saved", 1)
        began = time.perf_counter()
        self.nursery.wait_for("dead")
        self.nursery.kill()
        self.newest = 4
        return (time.perf_counter() - began) / 3

    def _is_loss(self, report: dict[str, Any]) -> bool:
        """Whether a step has the loss of the run without interruption."""
        loss: float = report["loss"]
        expected: float = self.losses[report["step"] - 1]
        return abs(loss - expected) <= _TOLERANCE * expected

    def _judge(self, row: Row, reports: list[dict[str, Any]]) -> None:
        """Count what a life found; forgets everything where it was not the newest step."""
        begun = False
        first_unloadable = next((r for r in reports if r["kind"] == "unloadable"), None)
        for report in reports:
            kind = report["kind"]
            if kind == "unloadable" and report is first_unloadable:
                row.problems.append(f"{report['tag']}: {report['text'][:_SHORT_TEXT]}")
            elif kind == "loaded" and self.newest is not None and report["step"] < self.newest:
                row.lost += 1
                row.details.append(f"step {self.newest} was saved, loaded is {report['step']}")
                self.newest = report["step"]
            elif kind == "loaded":
                self.newest = report["step"]
            elif kind == "fresh" and self.newest is not None:
                row.lost += 1
                row.details.append(f"step {self.newest} was saved, there is nothing")
                self.newest = None
                return
            elif kind == "stepped" and not self._is_loss(report):
                row.mixed += 1
                row.details.append(f"step {report['step']} after loading has another loss")
                self.newest = None  # what follows has that step's history
                return
            elif kind == "saved":
                self.newest = report["step"]
            begun = begun or kind in {"loaded", "fresh"}
        if not begun:
            row.details.append(f"it cannot begin: {reports[-2:]}")
            row.lost += 1
            self.newest = None
