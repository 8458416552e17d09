"""A whole training step with all state on NVMe, against max(compute + update, I/O).

    python tools/bench/train_step.py --path DIR [--rounds 5] [--steps 3]

A Llama in bf16, its weights, gradients and optimizer state on NVMe. Every part of the bound is
measured in the same run, in turn with the steps:

    compute  forward and backward of the same model and tokens, everything on the device
    update   the optimizer step of that engine: the update kernels on state in memory
    I/O      as many bytes read and written as the step moves, by the same I/O engine, no compute

`on` is the step as it is, `off` the same with `[overlap] prefetch` and `optimizer` switched off.
Both are judged by one bound, that of `on`: what an overlapped step does not move twice, because
memory still has it, is a part of the schedule. The share of the bound of a side's own bytes stands
beside it. Tokens are chosen so that compute + update and I/O are within 25% of each other; with
--no-match they are taken as given. Steps are counted from the end of one to the end of the next, so
that work that a step leaves to the next forward counts. Targets: on >= 0.85, off <= 0.65.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from _disk import MixedDisk
from _process import MIB, at_least, folder, make_parser, print_table
from _training import LlamaShape, Steps, settle, steady_steps, tiers, train_step

import offload
from offload.engine.engine import Engine

WITHIN = 0.25
TARGETS = {"on": 0.85, "off": 0.65}
TOKENS_MULTIPLE = 32
MOST_TRIES = 4


@dataclass
class Samples:
    """Seconds of each round; those of steps are the mean of the round's."""

    compute: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    io: dict[str, list[float]] = field(default_factory=lambda: {"on": [], "off": []})
    step: dict[str, list[float]] = field(default_factory=lambda: {"on": [], "off": []})
    moved: dict[str, tuple[float, float]] = field(default_factory=dict)  # GB a step

    def busier_over_other(self) -> float:
        """By how much the longer of compute + update and I/O is longer."""
        work = statistics.median(map(sum, zip(self.compute, self.update, strict=True)))
        disk = statistics.median(self.io["on"])
        return max(work, disk) / min(work, disk) - 1

    def shares(self, side: str, *, bytes_of: str = "on") -> list[float]:
        """Bound over measured, of each round; the bound moves the bytes of one of the sides."""
        rows = zip(self.compute, self.update, self.io[bytes_of], self.step[side], strict=True)
        return [max(compute + update, io) / step for compute, update, io, step in rows]


class Sides:
    """The three engines, and the disk; all take steps in turn."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self.options = options
        self.shape = LlamaShape(
            options.hidden, options.layers, 11 * options.hidden // 4, options.vocabulary
        )
        self.numel = self.shape.count()
        self.folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=options.path, prefix="bench-")
        )
        off = {"prefetch": False, "optimizer": False}
        memory = stack.enter_context(self._open("device", overlap=off))
        self.memory: Engine = memory
        self.engines: dict[str, Engine] = {
            "on": stack.enter_context(self._open("nvme", overlap={})),
            "off": stack.enter_context(self._open("nvme", overlap=off)),
        }
        self.disk = stack.enter_context(MixedDisk(options.path, 12 * self.numel))

    def _open(self, home: str, overlap: dict[str, Any]) -> Engine:
        options = self.options
        if home == "device":
            budgets = tiers(self.folder, 20 * self.numel + 256 * MIB, 256 * MIB)
        else:
            budgets = tiers(self.folder, options.device * MIB, options.host * MIB)
        return offload.initialize(
            self.shape.make(checkpoint=options.checkpoint),
            {
                "tiers": budgets,
                "placement": {"weights": home, "gradients": home, "optimizer": home},
                "overlap": overlap,
            },
        )

    def in_memory(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of the passes and of the update, everything on the device."""
        engine = self.memory
        started = time.perf_counter()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        passed = time.perf_counter()
        engine.step()
        settle(engine)
        return passed - started, time.perf_counter() - passed

    def round(self, ids: torch.Tensor, samples: Samples) -> None:
        """Measure everything once."""
        work = [self.in_memory(ids) for _ in range(self.options.steps + 1)][1:]
        samples.compute.append(statistics.mean(compute for compute, _ in work))
        samples.update.append(statistics.mean(update for _, update in work))
        for name, engine in self.engines.items():
            count = self.options.steps
            found: Steps = steady_steps(engine, ids, count)
            read, written = found.read_bytes // count, found.written_bytes // count
            samples.step[name].append(statistics.mean(found.seconds))
            samples.io[name].append(self.disk.seconds(read, written))
            samples.moved[name] = (read / 1e9, written / 1e9)

    def ids(self, tokens: int) -> torch.Tensor:
        """About `tokens` tokens, in sequences of at most --sequence."""
        batch = -(-tokens // self.options.sequence)
        return self.shape.ids(batch, max(2, tokens // batch), seed=1)


def matched_ids(sides: Sides) -> torch.Tensor:
    """Tokens for which compute + update takes about as long as the I/O, unless --no-match."""
    tokens = sides.options.tokens
    for engine in sides.engines.values():
        train_step(engine, sides.ids(tokens))  # the trace is recorded
    if not sides.options.match:
        return sides.ids(tokens)
    tried: dict[int, float] = {}
    while len(tried) < MOST_TRIES and tokens not in tried:
        ids = sides.ids(tokens)
        samples = Samples()
        sides.round(ids, samples)
        tried[tokens] = samples.busier_over_other()
        print(f"{ids.numel()} tokens: work and I/O are {tried[tokens]:.0%} apart", flush=True)
        if tried[tokens] < 0.6 * WITHIN:
            break
        # Compute is linear in the tokens, to first order; the update does not depend on them. One
        # measurement may be off: it moves them by a factor of two at most.
        wanted = max(samples.io["on"][0] - samples.update[0], 0.0)
        factor = min(2.0, max(0.5, wanted / samples.compute[0]))
        tokens = max(TOKENS_MULTIPLE, round(tokens * factor / TOKENS_MULTIPLE) * TOKENS_MULTIPLE)
    return sides.ids(min(tried, key=tried.__getitem__))


def show(sides: Sides, ids: torch.Tensor, samples: Samples) -> dict[str, Any]:
    """Print the tables; returns the numbers."""
    apart = samples.busier_over_other()
    print(f"{sides.numel / 1e6:.1f}M parameters, {tuple(ids.shape)} tokens, medians of rounds\n")
    compute, update = statistics.median(samples.compute), statistics.median(samples.update)
    rows, found = [], {}
    for name in ("on", "off"):
        shares = samples.shares(name)
        step, io = statistics.median(samples.step[name]), statistics.median(samples.io[name])
        read, written = samples.moved[name]
        share = statistics.median(shares)
        own = statistics.median(samples.shares(name, bytes_of=name))
        per_parameter = f"{read * 1e9 / sides.numel:.1f} + {written * 1e9 / sides.numel:.1f}"
        cells = (compute, update, io, max(compute + update, io), step)
        numbers = (f"{cell:.3f}" for cell in (*cells, share, own))
        rows.append([name, per_parameter, *numbers])
        found[name] = {
            "share": share,
            "share_of_own_bytes": own,
            "step_seconds": step,
            "io_seconds": io,
            "shares": shares,
        }
    headings = ("overlap", "bytes a parameter", "compute s", "update s", "I/O s", "own bound s")
    print_table((*headings, "step s", "share", "of own"), rows)
    print(f"\ncompute + update and I/O are {apart:.0%} apart (within {WITHIN:.0%} wanted)")
    if apart > WITHIN:
        print("warning: too far apart to judge the overlap by this run", file=sys.stderr)
    print(f"targets: on at least {TARGETS['on']}, off at most {TARGETS['off']}")
    return {
        "tokens": ids.numel(),
        "parameters": sides.numel,
        "compute_seconds": compute,
        "update_seconds": update,
        "apart": apart,
        **found,
    }


def main() -> None:
    """Measure and print tables and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", type=folder, default=tempfile.gettempdir(), help="on the disk")
    parser.add_argument("--hidden", type=at_least(64), default=1024)
    parser.add_argument("--layers", type=at_least(1), default=10)
    parser.add_argument("--vocabulary", type=at_least(64), default=8192)
    parser.add_argument("--tokens", type=at_least(2), default=512, help="a step, to begin with")
    parser.add_argument("--sequence", type=at_least(2), default=512, help="longest sequence")
    parser.add_argument("--match", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--steps", type=at_least(1), default=3, help="of each side, a round")
    parser.add_argument("--device", type=at_least(1), default=192, help="device budget in MiB")
    parser.add_argument("--host", type=at_least(1), default=320, help="host budget in MiB")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    options = parser.parse_args()
    if options.hidden % 64:
        parser.error("--hidden must be a multiple of 64")
    with ExitStack() as stack:
        sides = Sides(options, stack)
        ids = matched_ids(sides)
        samples = Samples()
        for _ in range(options.rounds):
            sides.round(ids, samples)
        found = show(sides, ids, samples)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
