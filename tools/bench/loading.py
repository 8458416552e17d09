"""Loading a model from safetensors: peak memory and speed against transformers' from_pretrained.

    python tools/bench/loading.py --path DIR [--hidden 2048 --layers 16] [--rounds 3]

A Llama in bf16. Each load is a process of its own; the files are dropped from the page cache before
it. transformers loads into memory; offload loads onto NVMe, ready to train: it writes the weights
and the remainders of the fp32 masters too. Growth is the kernel's high-water mark (VmHWM) less what
was in use before loading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _process import MIB, arguments_of, in_fresh_process, make_parser, reset_peak, status_bytes

SIDES = ("transformers", "offload")
CARRIED = ("hidden", "layers", "device", "host", "path")


def write_model(options: argparse.Namespace, folder: str) -> None:
    """Make the folder to load from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def load(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Load in this process; returns seconds and bytes."""
    import torch
    from transformers import LlamaForCausalLM

    import offload

    config = {
        "tiers": {
            "device": {"kind": "cpu", "memory": options.device * MIB},
            "host": {"memory": options.host * MIB},
            "nvme": {"paths": [options.path]},
        },
        "placement": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
    }
    with offload.initialize(torch.nn.Linear(8, 8), config):
        pass  # libraries are loaded, kernels compiled
    reset_peak()
    before = status_bytes("VmRSS")
    started = time.perf_counter()
    if options.run == "offload":
        engine: Any = offload.from_pretrained(folder, config)
        found = engine.module
    else:
        engine = None
        found = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for parameter in found.parameters():
            parameter.detach().view(-1)[::2048].sum()  # every page is there, not only mapped
    seconds = time.perf_counter() - started
    numel = sum(parameter.numel() for parameter in found.parameters())
    return {
        "seconds": seconds,
        "growth_bytes": status_bytes("VmHWM") - before,
        "model_bytes": 2 * numel,
    }


def drop_from_cache(folder: str) -> None:
    """Let the next read come from the disk."""
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_process(options: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """Run one part in a fresh process."""
    arguments = [*arguments_of(options, CARRIED), f"--folder={folder}"]
    return in_fresh_process(__file__, side, arguments)


def main() -> None:
    """Load with both sides in turn; print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=int, default=128, help="device budget in MiB")
    parser.add_argument("--host", type=int, default=256, help="host budget in MiB")
    parser.add_argument("--path", default=tempfile.gettempdir())
    parser.add_argument("--run", choices=("write", *SIDES), help="internal: one part, here")
    parser.add_argument("--folder", help="internal: the model")
    options = parser.parse_args()
    if options.run == "write":
        write_model(options, options.folder)
        print("{}")
        return
    if options.run:
        print(json.dumps(load(options, options.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=options.path) as folder:
        in_process(options, "write", folder)
        for _ in range(options.rounds):
            for side in SIDES:
                drop_from_cache(folder)
                found[side].append(in_process(options, side, folder))
    model_bytes = found["offload"][0]["model_bytes"]
    print(f"model: {model_bytes / 1e9:.2f} GB of bf16 weights, {options.rounds} rounds")
    medians = {}
    for side, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        growth = max(run["growth_bytes"] for run in runs)
        medians[side] = {"seconds": seconds, "growth_bytes": growth}
        print(
            f"{side:13} {seconds:7.2f} s  {model_bytes / seconds / 1e9:5.2f} GB/s  "
            f"memory grows by {growth / MIB:8.1f} MiB ({growth / model_bytes:.3f} of the weights)"
        )
    ours, theirs = medians["offload"], medians["transformers"]
    ratios = {name: ours[name] / theirs[name] for name in ours}
    print(json.dumps({"model_bytes": model_bytes, "ratios": ratios, **medians}))


if __name__ == "__main__":
    main()
