"""A tiny training run that is killed: its state, its steps, and what it must resume with.

[Note: one chain of lives] A *life* is a forked process that opens an engine, loads the newest
checkpoint, and then trains and saves at every step until it is killed. It reports through a pipe,
which survives it: what it has loaded (with a digest of every bit), and each save that was
acknowledged. The next life continues from what it finds; so a chain of lives takes the steps of one
run, and at every step it must have exactly the bits that a run without interruption has there. That
run keeps all its state in memory and saves nothing: placement never changes the numbers.

What else is there has to be whole: some older checkpoints are verified, too.

What is compared: every field of every parameter, buffers, the random generators, the counters, the
learning-rate scheduler, the loss scale, and the position in the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from offload.state import folders, stored
from offload.state.session import OffloadEngine

LAST_STEP = 40
PRECISIONS = ("fp32", "bf16", "fp16")
# Homes of weights and optimizer state; a life draws one. Later steps write over what is on NVMe.
PLACEMENTS = (("nvme", "nvme"), ("host", "nvme"), ("nvme", "nvme"), ("nvme", "host"))
_DEADLINE_SECONDS = 60.0
_VOCABULARY = 64
_NUM_VERIFIED = 8  # of the checkpoints that are there; the newest is loaded besides


class Net(nn.Module):
    """Ties, a frozen layer, buffers and dropout; some 30,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 48)
        self.norm = nn.BatchNorm1d(48)
        self.drop = nn.Dropout(0.2)
        self.wide = nn.Linear(48, 160)
        self.frozen = nn.Linear(160, 48).requires_grad_(False)
        self.head = nn.Linear(48, _VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of `tokens` (1-D)."""
        hidden = self.drop(self.norm(self.embed(tokens)))
        found: torch.Tensor = self.head(self.frozen(torch.relu(self.wide(hidden))))
        return found


@dataclass(frozen=True)
class Scenario:
    """How a chain of lives saves.

    Attributes:
        tag: None is a new checkpoint at every step, else that one is replaced.
        portable: nothing refers to the extents of the process.
        beside: a checkpoint is waited for when the next step is through, not at once.
        most: the engine saves by itself, and keeps so many.
    """

    name: str
    tag: str | None = None
    portable: bool = False
    beside: bool = False
    most: int = 0


SCENARIOS = (
    Scenario("a tag a step"),
    Scenario("one tag, replaced", tag="best"),
    Scenario("beside the next step", beside=True),
    Scenario("by itself, the last 2 kept", most=2),
    Scenario("portable", portable=True),
)


@dataclass(frozen=True)
class Job:
    """What one life does; `paths` are on the disk that is tested."""

    scenario: Scenario
    precision: str
    placement: tuple[str, str]
    nvme: Path
    checkpoints: Path
    must_load: bool
    num_steps: int = LAST_STEP
    prepare: Callable[[], None] | None = None  # breaks the code; see [Note: teeth]
    gate: int | None = None  # a descriptor: the steps begin when a byte can be read


def open_engine(precision: str, placement: tuple[str, str], **sections: Any) -> OffloadEngine:
    """A fresh engine over `Net`, with the random generators at their start."""
    torch.manual_seed(7)
    random.seed(7)
    weights, optimizer = placement
    config = {
        "tiers": {
            "device": {"kind": "cpu", "memory": "1MiB"},
            "host": {"memory": "4MiB"},
            **sections.pop("tiers", {}),
        },
        "placement": {"weights": weights, "optimizer": optimizer, "gradients": "host"},
        "partition": {"bucket_elements": 4096},
        "precision": {"compute": precision},
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"name": "linear", "warmup_steps": 10, "total_steps": LAST_STEP},
        **sections,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return offload.initialize(Net(), config)


def take_step(engine: OffloadEngine) -> bool:
    """One step on the batch that is due; whether it was taken, not skipped."""
    number = engine.global_steps + engine.skipped_steps
    tokens = (torch.arange(24) * (number + 1) + number) % _VOCABULARY
    logits = engine(tokens).float()
    engine.backward(nn.functional.cross_entropy(logits, tokens.roll(1)))
    return engine.step()


def digest(engine: OffloadEngine) -> str:
    """Of every bit that the next steps depend on."""
    found = hashlib.blake2b(digest_size=16)

    def add(name: str, tensor: torch.Tensor) -> None:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )

    for name, tensors in engine.named_state():
        for key in sorted(tensors):
            if key != "gradient":
                add(f"{name} {key}", tensors[key])
    for name, buffer in engine.module.named_buffers():
        add(name, buffer)
    add("torch", torch.get_rng_state())
    scheduler, scale = engine.lr_scheduler, engine.loss_scale
    values = [
        random.getstate(),
        engine.global_steps,
        engine.skipped_steps,
        engine.micro_steps,
        scheduler and sorted(scheduler.state_dict().items(), key=lambda item: item[0]),
        scale and sorted(scale.state_dict().items()),
        [group["lr"] for group in engine.optimizer.param_groups],
    ]
    found.update(repr(values).encode())
    return found.hexdigest()


class Uninterrupted(dict[str, list[str]]):
    """By precision: the digest after each number of steps of a run without interruption.

    It has all its state in memory and saves nothing. It is done when it is first asked for, in this
    process, so that lives start in milliseconds; it leaves one thread, so that this may fork.
    """

    def __missing__(self, precision: str) -> list[str]:
        torch.set_num_threads(1)
        with open_engine(precision, ("host", "host")) as engine:
            digests = [digest(engine)]
            for _ in range(LAST_STEP):
                take_step(engine)
                digests.append(digest(engine))
        num_threads = len(list(Path("/proc/self/task").iterdir()))
        if num_threads != 1:
            raise RuntimeError(f"{num_threads} threads before a fork")
        self[precision] = digests
        return digests


def live(job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """One life; see [Note: one chain of lives].

    Raises:
        OffloadError: whatever ended it.
    """
    torch.set_num_threads(1)
    if job.prepare is not None:
        job.prepare()
    sections: dict[str, Any] = {"tiers": {"nvme": {"paths": [str(job.nvme)]}}}
    if job.scenario.most:
        sections["checkpoint"] = {
            "directory": str(job.checkpoints),
            "every_steps": 1,
            "keep_last": job.scenario.most,
        }
    engine = open_engine(job.precision, job.placement, **sections)
    if has_checkpoint(job.checkpoints):
        report({"kind": "older", "damaged": _damaged(job.checkpoints)})
    if job.must_load or has_checkpoint(job.checkpoints):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client_state = engine.load_checkpoint(job.checkpoints)
        loaded = {
            "kind": "loaded",
            "step": engine.global_steps + engine.skipped_steps,
            "digest": digest(engine),
            "position": client_state["position"],
            "warnings": [str(warning.message) for warning in caught],
        }
        report(loaded)
    else:
        report({"kind": "fresh"})
    if job.gate is not None:
        os.read(job.gate, 1)
    _train(engine, job, report)
    engine.close()
    report({"kind": "end"})


def _train(engine: OffloadEngine, job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """Steps and saves; a save is acknowledged when the engine has waited for it."""
    scenario = job.scenario
    unacknowledged: list[int] = []
    was_swept = False

    def acknowledge() -> None:
        nonlocal was_swept
        engine.wait_for_checkpoint()
        for number in unacknowledged:
            report({"kind": "saved", "step": number})
        if unacknowledged and not was_swept:
            report({"kind": "swept", "left": _litter(job)})
            was_swept = True
        unacknowledged.clear()

    for _ in range(job.num_steps):
        number = engine.global_steps + engine.skipped_steps + 1
        if number > LAST_STEP:
            break
        if scenario.most:
            report({"kind": "saving", "step": number})
            engine.client_state = {"position": number}
        was_taken = take_step(engine)
        if scenario.beside:
            acknowledge()
        if scenario.most:
            unacknowledged += [number] * was_taken
        else:
            report({"kind": "saving", "step": number})
            engine.save_checkpoint(
                job.checkpoints,
                scenario.tag,
                {"position": number},
                portable=scenario.portable,
            )
            unacknowledged.append(number)
        if not scenario.beside:
            acknowledge()
    acknowledge()


def _litter(job: Job) -> list[str]:
    """What should not be there when a save is through."""
    names = sorted(path.name for path in job.checkpoints.iterdir() if path.is_dir())
    left = [name for name in names if name.startswith(".")]
    if job.scenario.most:
        left += names[len(left) : -job.scenario.most]
    return left


def _damaged(folder: Path) -> list[str]:
    """Of the newest checkpoints those that are not, byte for byte, what was written."""
    found, damaged = folders.candidates(folder, None)
    for path, _ in found[:_NUM_VERIFIED]:
        if path.name.startswith("."):
            continue  # it has a successor, or it is the newest
        try:
            with stored.find(folder, path.name):
                pass
        except offload.OffloadError as error:
            damaged.append(str(error)[:400])
    return damaged


def has_checkpoint(folder: Path) -> bool:
    """Whether a save was published there."""
    return folder.is_dir() and any(
        (path / "manifest.json").exists()
        for path in folder.iterdir()
        if not path.name.startswith((".tmp-", ".gone-"))
    )


class Life:
    """A forked process that lives `job`; must be ended with `end`."""

    def __init__(self, job: Job) -> None:
        self.reports: list[dict[str, Any]] = []
        self._text = b""
        self._pipe, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _live_and_exit(job, theirs)
        os.close(theirs)

    def wait_for(self, *kinds: str, count: int = 1) -> bool:
        """Read until `count` reports of these kinds are there; False: it ended before.

        Raises:
            TimeoutError: nothing was reported for a minute.
        """
        while sum(report["kind"] in kinds for report in self.reports) < count:
            if not self._read():
                return False
        return True

    def kill(self) -> None:
        """SIGKILL; it may have ended by itself."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Read what it still has reported, and return its exit status as of `waitstatus`."""
        while self._read():
            pass
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        ready, _, _ = select.select([self._pipe], [], [], _DEADLINE_SECONDS)
        if not ready:
            raise TimeoutError(f"the process reports nothing after {self.reports[-3:]}")
        data = os.read(self._pipe, 65536)
        *lines, self._text = (self._text + data).split(b"\n")
        self.reports += [json.loads(line) for line in lines]
        return bool(data)


def _live_and_exit(job: Job, pipe: int) -> None:
    """Never returns: the parent's stack, its files and its exit handlers are not the child's."""

    def report(content: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(content).encode() + b"\n")

    status = 1
    warnings.simplefilter("ignore")  # those of loading are caught and reported
    try:
        live(job, report)
        status = 0
    except BaseException as error:  # noqa: BLE001 - the parent decides what it means
        with contextlib.suppress(OSError):
            report({"kind": "error", "text": f"{type(error).__name__}: {error}"[:2000]})
    finally:
        os._exit(status)
