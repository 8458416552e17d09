"""Layer-major accumulation against the usual order: bytes and seconds of a training step.

    python tools/bench/accumulation.py --path DIR [--weights nvme] [--count 4] [--rounds 5]

A Llama in bf16 whose weights are at home on NVMe or host, with a device budget that holds a few
layers; gradients and optimizer state are in host memory, so that the lanes show the weights. Both
engines take a step of `--count` micro-batches in turn, by `engine.accumulate`. Layers are
checkpointed: what is saved for backward is there for all micro-batches at once.

Weights move 2 * count times a step in the usual order and twice in layer-major order, less what is
still on the device when backward begins. From NVMe the update reads them once more in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from _process import MIB, at_least, folder, make_parser, print_table
from _training import LlamaShape, settle, tiers

import offload
from offload.engine.engine import Engine

ORDERS = ("micro_batch_major", "layer_major")
LANES = {"nvme": "nvme_read", "host": "h2d"}


def open_engine(options: argparse.Namespace, order: str, path: str) -> Engine:
    """An engine of one order."""
    shape = LlamaShape(options.hidden, options.layers, 11 * options.hidden // 4, options.vocabulary)
    engine: Engine = offload.initialize(
        shape.make(checkpoint=True),
        {
            "tiers": tiers(path, options.device * MIB, options.host * MIB),
            "placement": {"weights": options.weights, "gradients": "host", "optimizer": "host"},
            "training": {"gradient_accumulation_steps": options.count, "accumulation": order},
        },
    )
    return engine


def step(engine: Engine, batches: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Seconds of one step with all that it leaves to do, and the losses of its micro-batches."""
    started = time.perf_counter()
    losses = [loss.item() for loss in engine.accumulate(batches)]
    engine.step()
    settle(engine)
    return time.perf_counter() - started, losses


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", type=folder, default=tempfile.gettempdir(), help="on the disk")
    parser.add_argument("--weights", choices=sorted(LANES), default="nvme")
    parser.add_argument("--count", type=at_least(2), default=4, help="micro-batches a step")
    parser.add_argument("--hidden", type=at_least(64), default=1024)
    parser.add_argument("--layers", type=at_least(2), default=10)
    parser.add_argument("--vocabulary", type=at_least(64), default=8192)
    parser.add_argument("--tokens", type=at_least(2), default=32, help="of a micro-batch")
    parser.add_argument("--device", type=at_least(1), default=96, help="device budget in MiB")
    parser.add_argument("--host", type=at_least(1), default=3072, help="host budget in MiB")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    options = parser.parse_args()
    shape = LlamaShape(options.hidden, options.layers, 0, options.vocabulary)
    ids = [shape.ids(1, options.tokens, seed) for seed in range(options.count)]
    batches = [{"input_ids": one, "labels": one} for one in ids]
    seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
    moved: dict[str, int] = {}
    losses: dict[str, list[float]] = {order: [] for order in ORDERS}
    with ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory(dir=options.path, prefix="bench-"))
        engines = {
            order: stack.enter_context(open_engine(options, order, path)) for order in ORDERS
        }
        for number in range(options.rounds + 2):  # one to see the module, one to record the trace
            for order, engine in engines.items():
                taken, found = step(engine, batches)
                losses[order] += found
                if number >= 2:
                    seconds[order].append(taken)
                    moved[order] = engine.report().lanes[LANES[options.weights]].bytes
        numel = sum(parameter.numel() for parameter in engines[ORDERS[0]].module.parameters())
    assert losses[ORDERS[0]] == losses[ORDERS[1]], "both orders have the same losses"
    usual, layered = ORDERS
    ratios = [a / b for a, b in zip(seconds[usual], seconds[layered], strict=True)]
    rows = [
        [order, f"{moved[order] / numel:.2f}", f"{statistics.median(seconds[order]):.3f}"]
        for order in ORDERS
    ]
    print(f"{numel / 1e6:.1f}M parameters, {options.count} x {options.tokens} tokens, medians\n")
    print_table(("order", f"{LANES[options.weights]} bytes a parameter", "step s"), rows)
    found_ratios = {
        "bytes": moved[usual] / moved[layered],
        "seconds": statistics.median(ratios),
    }
    print(
        f"\nusual over layer-major: {found_ratios['bytes']:.2f} of the bytes, "
        f"{found_ratios['seconds']:.2f} of the seconds"
    )
    print(json.dumps({"ratios": found_ratios, "seconds": seconds, "bytes": moved}))


if __name__ == "__main__":
    main()
