"""SIGTERM and SIGINT at random milliseconds of `offload train`, once or twice.

A run of a tiny model, which saves a checkpoint at every step, is interrupted at random times and
resumed, until it is through; then another one. A run that gets one signal finishes the step under
way; a second signal ends it at once. Always

- its exit code is 128 plus a signal's number (or it dies of the signal, before it has begun), or
  what a run that was already through returns;
- the newest checkpoint verifies: after one signal that of the last step that was taken, after two
  of that or the one before (lost);
- the steps it takes have the losses of a run without interruption (mixed);
- it leaves no backing file and, after one signal, no pending folder; after two the next save
  removes what that one has left (problems).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fault.result import Row
from offload.cli import interrupt, train
from offload.cli import main as command_line
from offload.cli.interrupt import EXIT_SIGNAL
from offload.errors import OffloadError
from offload.state import checkpoint, stored
from offload.state.saver import Saver
from offload.state.source import StateSource
from offload.telemetry import read_jsonl

TRIALS = 150
_STEPS = 12
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LATEST_SHARE = 0.8  # of the seconds of a whole run, for the first signal
_SECOND_SHARE = 0.4  # of the trials have a second signal
_SECOND_SECONDS = 0.08  # ... so much later, at most
_UNSAVED_STEPS = 1  # a second signal interrupts a save
_FRESH_SHARE = 0.1  # of the trials, besides, start a fresh Python
_FRESH_SECONDS = 4.0  # ... which takes so much longer
TEETH_TRIALS = 20
_DEADLINE_SECONDS = 60.0
_SHOWN_CHARACTERS = 4000  # of what a run with a problem has printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to work."""
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """One signal, then two, each at random times."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        runs = _Runs(Path(name), draw)
        trials = options.trials or TRIALS
        num_twice = round(trials * _SECOND_SHARE)
        if options.teeth:
            for number, breaks in enumerate((_no_handler, _save_left_out)):
                row = Row(f"one signal, {number}", broken=breaks.__name__[1:].replace("_", " "))
                yield runs.interrupt(row, options.trials or TEETH_TRIALS, breaks=breaks)
            return
        yield runs.interrupt(Row("one signal"), trials - num_twice)
        yield runs.interrupt(Row("two signals"), max(1, num_twice), twice=True)
        num_fresh = max(1, round(trials * _FRESH_SHARE))
        yield runs.interrupt(Row("one signal, a fresh process"), num_fresh, fresh=True)


class _Runs:
    """Runs of one config in a folder, one after the other; some of them are whole."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        (folder / "nvme").mkdir()
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        self._train_here(self._config("reference"))  # this process is warm then
        self.losses = self._losses("reference", 0)
        config = self._config("timed")
        began = time.perf_counter()
        status = _wait(_fork(config, folder / "log"))
        self.seconds = time.perf_counter() - began
        if status != 0 or self._losses("timed", 0) != self.losses:
            raise SystemExit(f"error: an undisturbed run fails: {self._log()}")

    def interrupt(
        self,
        row: Row,
        trials: int,
        *,
        twice: bool = False,
        fresh: bool = False,
        breaks: Callable[[], None] | None = None,
    ) -> Row:
        """Interrupt `trials` runs; one that is not through is resumed by the next trial."""
        began = time.perf_counter()
        counts = dict.fromkeys(("before its first step", "in its steps", "when it was through"), 0)
        name, is_over = f"{row.name} 0", False
        for number in range(trials):
            if is_over:
                shutil.rmtree(self.folder / name)
                name = f"{row.name} {number}"
            sent = self.draw.choices(_SIGNALS, k=2 if twice else 1)
            known = len(self._metrics(name))
            pid = _fork(self._config(name), self.folder / "log", fresh=fresh, breaks=breaks)
            longest = self.seconds + (_FRESH_SECONDS if fresh else 0)
            time.sleep(self.draw.uniform(0, _LATEST_SHARE * longest))
            os.kill(pid, sent[0])
            if twice:
                time.sleep(self.draw.uniform(0, _SECOND_SECONDS))
                os.kill(pid, sent[1])
            status = _wait(pid)
            row.trials += 1
            entries = self._metrics(name)[known:]
            kinds = [entry["kind"] for entry in entries]
            is_over = self._is_through(name, kinds)
            moment = "in its steps" if "step" in kinds else "before its first step"
            counts["when it was through" if is_over else moment] += 1
            self._judge(row, name, status, sent, kinds)
            wrong = [
                entry["step"]
                for entry in entries
                if entry["kind"] == "step" and entry["loss"] != self.losses[entry["step"] - 1]
            ]
            if wrong:
                row.mixed += 1
                row.details.append(f"{self._said(sent, status)}: other losses in steps {wrong}")
        row.remark = "interrupted: " + ", ".join(f"{n} {moment}" for moment, n in counts.items())
        row.seconds = time.perf_counter() - began
        return row

    def _judge(
        self, row: Row, name: str, status: int, sent: list[signal.Signals], kinds: list[str]
    ) -> None:
        said = self._said(sent, status)
        fine = {EXIT_SIGNAL + number for number in sent}
        if "start" not in kinds or "summary" in kinds:
            fine |= {-number for number in sent}  # there was nothing to finish any more, or yet
        if self._is_through(name, kinds):
            fine.add(0)
        if status not in fine:
            row.problems.append(f"{said}: {self._log()}")
        left = [path.name for path in (self.folder / "nvme").iterdir()]
        checkpoints = self.folder / name / "checkpoints"
        if checkpoints.is_dir() and len(sent) == 1:
            left += [path.name for path in checkpoints.iterdir() if path.name[0] == "."]
        if left:
            row.problems.append(f"{said}: it leaves {left}")
        last = self._last_step(name)
        if last == 0:
            return
        oldest = last - (_UNSAVED_STEPS if len(sent) > 1 else 0)
        step = self._newest_checkpoint(checkpoints)
        if step < oldest:
            row.lost += 1
            row.details.append(f"{said}: step {last} was taken, the newest checkpoint is {step}")

    def _newest_checkpoint(self, folder: Path) -> int:
        """The step of the newest checkpoint, whose every byte is as it was written; 0: none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with stored.find(folder, None) as found:
                    found.verify()
                    step: int = found.content.values["global_steps"]
                    return step
        except OffloadError:
            return 0

    def _said(self, sent: list[signal.Signals], status: int) -> str:
        return f"{' and '.join(number.name for number in sent)}, exit status {status}"

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-_SHOWN_CHARACTERS:]

    def _metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        return list(read_jsonl(path)) if path.exists() else []

    def _losses(self, name: str, known: int) -> list[float]:
        return [e["loss"] for e in self._metrics(name)[known:] if e["kind"] == "step"]

    def _last_step(self, name: str) -> int:
        """The last one that was taken, as far as the metrics tell."""
        return next((e["step"] for e in self._metrics(name)[::-1] if e["kind"] == "step"), 0)

    def _is_through(self, name: str, kinds: list[str]) -> bool:
        """Whether a life with lines of these `kinds` in its metrics came to the end of the run."""
        newest = self._newest_checkpoint(self.folder / name / "checkpoints")
        return "summary" in kinds and max(newest, self._last_step(name)) == _STEPS

    def _train_here(self, config: Path) -> None:
        with (self.folder / "log").open("w") as log, contextlib.redirect_stdout(log):
            status = train.run(config)
        num_threads = len(list(Path("/proc/self/task").iterdir()))
        if status != 0 or num_threads != 1:
            raise SystemExit(f"error: status {status}, {num_threads} threads before a fork")

    def _config(self, name: str) -> Path:
        """Write the config of the run `name`."""
        content = {
            "tiers": {
                "device": {"kind": "cpu", "memory": "1MiB"},
                "host": {"memory": "2MiB"},
                "nvme": {"paths": [str(self.folder / "nvme")]},
            },
            "placement": {"weights": "nvme", "optimizer": "nvme"},
            "partition": {"bucket_elements": 16384},
            "precision": {"compute": "bf16"},
            "optimizer": {"lr": 1e-2},
            "run": {
                "architecture": "LlamaForCausalLM",
                "hf_config": {
                    "vocab_size": 259,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 64,
                    "bos_token_id": 256,
                    "eos_token_id": 257,
                },
                "data": str(self.folder / "text.txt"),
                "steps": _STEPS,
                "batch": 4,
                "sequence_length": 32,
                "output": str(self.folder / name),
            },
            "checkpoint": {"every_steps": 1},
        }
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(content))
        return path


def _no_handler() -> None:
    """Signals have their default effect."""
    interrupt.StopRequest.__enter__ = lambda self: self  # type: ignore[method-assign]


def _save_left_out() -> None:
    """Every second step is not saved."""
    honest = checkpoint.save_checkpoint

    def save_checkpoint(
        engine: StateSource, saver: Saver, directory: str | Path, **options: Any
    ) -> Path:
        if engine.global_steps % 2:
            return honest(engine, saver, directory, **options)
        return Path(directory)

    checkpoint.save_checkpoint = save_checkpoint  # type: ignore[assignment]


def _fork(
    config: Path, log: Path, *, fresh: bool = False, breaks: Callable[[], None] | None = None
) -> int:
    """Start `offload train config` in a fork of this warm process, or in a fresh one."""
    early = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is a program to end
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, early)
        return pid
    status = 1
    try:
        # As the shell starts a program: what the parent ignores, a fork would ignore.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if fresh:
            command = [sys.executable, "-m", "offload.cli.main", "train", str(config)]
            signal.pthread_sigmask(signal.SIG_SETMASK, early)
            os.execv(command[0], command)
        if breaks is not None:
            breaks()
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, early)
            command_line.main(["train", str(config)])
        except KeyboardInterrupt:
            status = EXIT_SIGNAL + signal.SIGINT  # before its first line
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - it goes into the log
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(pid: int) -> int:
    """The exit status of a process.

    Raises:
        TimeoutError: it does not end.
    """
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} does not end after its signals")
