"""Activations on NVMe against activations on the device: peak memory of the process, step time.

    python tools/bench/activations.py --path DIR [--layers 12] [--hidden 512] [--tokens 1024]

Without an accelerator the device is host memory, so what leaves for NVMe leaves the process. Each
side is a process of its own and trains the same Llama with all other state in memory. `growth` is
the kernel's high-water mark of the steps (VmHWM) less what the process held after the first one,
and with what the saved tensors have taken of their room on the host: activations, gradients in
flight, and what ops need for themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

from _process import MIB, arguments_of, in_fresh_process, make_parser, reset_peak, status_bytes

SIDES = ("device", "nvme")
CARRIED = ("layers", "hidden", "batch", "tokens", "steps", "room", "minimum", "path")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train in this process; returns bytes and seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import offload

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 1),
    )
    model = LlamaForCausalLM(config).train()
    if options.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(
        0, 1024, (options.batch, options.tokens), generator=torch.Generator().manual_seed(1)
    )
    settings: dict[str, object] = {"placement": {"activations": options.run}}
    if options.run != "device":
        settings["activations"] = {
            "host_memory": options.room * MIB,
            "min_bytes": options.minimum * 1024,
        }
    with tempfile.TemporaryDirectory(dir=options.path) as path:
        settings["tiers"] = {"device": {"kind": "cpu"}, "nvme": {"paths": [path]}}
        with offload.initialize(model, settings) as engine:
            seconds, loss, before = [], 0.0, 0
            for step in range(options.steps):
                started = time.perf_counter()
                output = engine(input_ids=ids, labels=ids).loss
                loss = output.item()
                engine.backward(output)
                engine.step()
                seconds.append(time.perf_counter() - started)
                del output
                if step == 0:  # all state has its memory now
                    reset_peak()
                    before = status_bytes("VmRSS")
            report = engine.report()
            saved = report.activations
            return {
                "growth": status_bytes("VmHWM") - before + saved.host_peak_bytes,
                "seconds": statistics.median(seconds[1:]),
                "loss": loss,
                "moved": saved.moved_bytes,
                "deduplicated": saved.deduplicated_bytes,
                "forwarded": saved.forwarded_bytes,
                "written": report.lanes["nvme_write"].bytes,
                "read": report.lanes["nvme_read"].bytes,
            }


def measure(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Run one side in a fresh process."""
    checkpoint = ["--checkpoint"] if options.checkpoint else []
    return in_fresh_process(__file__, side, [*arguments_of(options, CARRIED), *checkpoint])


def main() -> None:
    """Measure both sides and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--room", type=int, default=64, help="activations.host_memory in MiB")
    parser.add_argument("--minimum", type=int, default=1024, help="activations.min_bytes in KiB")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--path", default=tempfile.gettempdir())
    parser.add_argument("--run", choices=SIDES, help="internal: one side, here")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options)))
        return
    found = {side: measure(options, side) for side in SIDES}
    assert found["nvme"]["loss"] == found["device"]["loss"], "placement has changed the numbers"
    for side, numbers in found.items():
        print(
            f"{side:<7} growth {numbers['growth'] / MIB:7.1f} MiB  step {numbers['seconds']:6.2f} s"
            f"  moved {numbers['moved'] / MIB:7.1f}  deduplicated "
            f"{numbers['deduplicated'] / MIB:6.1f}  forwarded {numbers['forwarded'] / MIB:5.1f}  "
            f"written {numbers['written'] / MIB:7.1f}  read {numbers['read'] / MIB:7.1f} MiB"
        )
    ratios = {
        "growth_ratio": found["nvme"]["growth"] / found["device"]["growth"],
        "seconds_ratio": found["nvme"]["seconds"] / found["device"]["seconds"],
        "moved_bytes": found["nvme"]["moved"],
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
