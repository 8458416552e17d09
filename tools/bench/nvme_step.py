"""The optimizer step with its state on NVMe, alone, against the mixed read/write rate of the disk.

    python tools/bench/nvme_step.py --path DIR [--parameters 200] [--rounds 7]

The bound is the time that the same bytes take when nothing but I/O happens: the same engine, files
and request sizes, reads and writes in flight together, measured between the steps of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque

import torch
from torch import nn

import offload
from offload.engine.engine import Engine
from offload.partition.blocks import Block, BlockStore, Staged

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", help="directory on the disk; default: the one of temporary files")
    parser.add_argument("--parameters", type=int, default=200, help="in millions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=2, help="reads in flight of the bound's loop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as path:
        engine = make_engine(path, options.parameters)
        with engine:
            steps, bounds, moved = [], [], 0
            for round_number in range(options.rounds + 1):
                give_gradients(engine)
                started = time.perf_counter()
                engine.step()
                step = time.perf_counter() - started
                lanes = engine.report().lanes
                moved = lanes["nvme_read"].bytes + lanes["nvme_write"].bytes
                bound = io_seconds(engine._parts.store, options.depth)
                if round_number:
                    steps.append(step)
                    bounds.append(bound)
    ratio = statistics.median(b / s for b, s in zip(bounds, steps, strict=True))
    step, bound = statistics.median(steps), statistics.median(bounds)
    print(f"{options.parameters}M parameters, {moved / 1e9:.2f} GB read and written a step")
    print(
        f"step {step:.3f} s ({moved / step / 1e9:.2f} GB/s)   I/O alone {bound:.3f} s "
        f"({moved / bound / 1e9:.2f} GB/s)   share of bound {ratio:.3f}"
    )
    print(json.dumps({"step_seconds": step, "bound_seconds": bound, "share": ratio}))


if __name__ == "__main__":
    main()
