"""The optimizer step with its state on NVMe, alone, against the mixed read/write rate of the disk.

    python tools/bench/nvme_step.py --path DIR [--parameters 200] [--rounds 7]
    python tools/bench/nvme_step.py --path DIR --parameters 50 200 1000 --rounds 3

The bound is the time that the same bytes take when nothing but I/O happens: the same engine, files
and request sizes, reads and writes in flight together, measured between the steps of the same run.
With several sizes, in millions, their rounds take turns: seconds a parameter are to stay within 10%
from the smallest to the largest. Weights and gradients are in host memory, the state on disk takes
10 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from _process import at_least, folder, make_parser, print_table
from _training import settle
from torch import nn

import offload
from offload.engine.engine import Engine
from offload.partition.blocks import Block, BlockStore
from offload.partition.staging import Staged

Loaded = tuple[Block, int, Staged]


def make_engine(path: str, millions: int) -> Engine:
    """An engine over linear layers of 4 Mi weights each; optimizer state on NVMe."""
    torch.manual_seed(0)
    layers = max(1, millions * 1_000_000 // (2048 * 2048))
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))
    return offload.initialize(
        model,
        {
            "tiers": {
                "device": {"kind": "cpu", "memory": "256MiB"},
                "host": {"memory": f"{millions * 6 + 400}MB"},
                "nvme": {"paths": [path]},
            },
            "placement": {"weights": "host", "gradients": "host", "optimizer": "nvme"},
        },
    )


def give_gradients(engine: Engine) -> None:
    """A gradient for every parameter, as if backward had run."""
    generator = torch.Generator().manual_seed(engine.global_steps)
    for parameter in engine.module.parameters():
        gradient = torch.empty(parameter.shape, dtype=parameter.dtype)
        gradient.view(torch.int16).random_(0x3000, 0x3100, generator=generator)
        parameter.grad = gradient
    engine._slots.adopt_all()


def io_seconds(store: BlockStore, depth: int) -> float:
    """Read and write every optimizer chunk once, as the step does, without the update."""
    blocks = [b for b in store.blocks() if b.home == "nvme"]
    chunks = [(b, c) for b in blocks for c in range(len(b.layout.chunk_nbytes))]
    reading: deque[Loaded] = deque()
    started = time.perf_counter()
    for block, chunk in chunks:
        staged = store.start_load(block, chunk)
        while staged is None:
            _write_oldest(store, reading)
            staged = store.start_load(block, chunk)
        reading.append((block, chunk, staged))
        if len(reading) >= depth:
            _write_oldest(store, reading)
    while reading:
        _write_oldest(store, reading)
    store.drain()
    return time.perf_counter() - started


def _write_oldest(store: BlockStore, reading: deque[Loaded]) -> None:
    block, chunk, staged = reading.popleft()
    staged.transfer.wait()
    store.start_store(block, chunk, staged)


@dataclass
class Size:
    """An engine of some parameters, and the seconds of each of its rounds."""

    parameters: int
    engine: Engine
    repeats: int  # steps a round, so that small sizes are not judged by one short step
    steps: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    moved_bytes: int = 0

    def round(self, depth: int) -> None:
        """Measure the step, and the bound after it."""
        steps, bounds = [], []
        for _ in range(self.repeats):
            give_gradients(self.engine)
            moved_before = self._moved_bytes()
            started = time.perf_counter()
            self.engine.step()
            settle(self.engine)
            steps.append(time.perf_counter() - started)
            self.moved_bytes = self._moved_bytes() - moved_before
            bounds.append(io_seconds(self.engine._parts.store, depth))
        self.steps.append(statistics.mean(steps))
        self.bounds.append(statistics.mean(bounds))

    def _moved_bytes(self) -> int:
        lanes = self.engine._parts.io.lanes()
        return lanes["nvme_read"][0] + lanes["nvme_write"][0]

    def share(self) -> float:
        """Bound over step, the median of the rounds."""
        pairs = zip(self.bounds, self.steps, strict=True)
        return statistics.median(bound / step for bound, step in pairs)

    def nanoseconds(self) -> list[float]:
        """Of the step, for each parameter, by round."""
        return [1e9 * step / self.parameters for step in self.steps]


def growth(small: Size, large: Size) -> float:
    """Time a parameter of `large` over that of `small`: the median of the rounds' ratios."""
    pairs = zip(large.nanoseconds(), small.nanoseconds(), strict=True)
    return statistics.median(a / b for a, b in pairs)


def measure(options: argparse.Namespace, stack: ExitStack) -> list[Size]:
    """Every size, one round after the other; the first round is not counted."""
    path = stack.enter_context(tempfile.TemporaryDirectory(dir=options.path, prefix="bench-"))
    sizes = []
    for millions in sorted(set(options.parameters)):
        engine = stack.enter_context(make_engine(path, millions))
        numel = sum(p.numel() for p in engine.module.parameters())
        repeats = min(4, max(options.parameters) // millions)
        sizes.append(Size(numel, engine, max(1, repeats)))
    for size in sizes:
        size.round(options.depth)
        size.steps.clear()
        size.bounds.clear()
    for _ in range(options.rounds):
        for size in sizes:
            size.round(options.depth)
    return sizes


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", type=folder, help="on the disk; default: that of temporary files")
    parser.add_argument(
        "--parameters", type=at_least(1), nargs="+", default=[200], help="in millions; sizes"
    )
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument(
        "--depth", type=at_least(1), default=2, help="reads in flight of the bound's loop"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        sizes = measure(options, stack)
    rows, found = [], []
    for size in sizes:
        step, bound = statistics.median(size.steps), statistics.median(size.bounds)
        each = {
            "parameters": size.parameters,
            "step_seconds": step,
            "bound_seconds": bound,
            "share": size.share(),
            "nanoseconds_a_parameter": statistics.median(size.nanoseconds()),
            "growth": growth(sizes[0], size),
        }
        found.append(each)
        rows.append(
            [
                f"{size.parameters / 1e6:.0f}M",
                f"{size.moved_bytes / 1e9:.2f}",
                f"{bound:.3f}",
                f"{step:.3f}",
                f"{size.moved_bytes / step / 1e9:.2f}",
                f"{each['share']:.3f}",
                f"{each['nanoseconds_a_parameter']:.3f}",
                f"{each['growth']:.3f}",
            ]
        )
    headings = ("parameters", "GB moved", "I/O alone s", "step s", "GB/s", "share of bound")
    print_table((*headings, "ns a parameter", "of the smallest"), rows)
    print(json.dumps({"sizes": found, "growth": found[-1]["growth"], "share": found[-1]["share"]}))


if __name__ == "__main__":
    main()
