"""Host memory of the whole process against its budgets: does the overhead grow with the model?

    python tools/bench/memory.py [--layers 6 --factor 4] [--hidden 512]

Each run is a process of its own: a Llama with gradient checkpointing, everything on NVMe, the same
budgets. The kernel's high-water mark (VmHWM) is reset after initialisation, so that it is that of
the training steps. What a plain PyTorch process needs for activations, measured the same way with
the same model, is taken off:

    overhead = VmHWM(offload) - peak bytes of device and host tier - activations(plain)
"""

from __future__ import annotations

import argparse
import json
import tempfile

from _process import MIB, arguments_of, in_fresh_process, make_parser, reset_peak, status_bytes

STEPS = 3
CARRIED = ("hidden", "tokens", "device", "host", "path")


def run(options: argparse.Namespace) -> dict[str, int]:
    """Train in this process; returns bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
    )
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1024, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    numel = sum(p.numel() for p in model.parameters())
    if options.run == "plain":
        model.to(torch.bfloat16)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
        reset_peak()
        before = status_bytes("VmRSS")
        model(input_ids=ids, labels=ids).loss.backward()
        return {"numel": numel, "activations": status_bytes("VmHWM") - before}
    import offload

    with (
        tempfile.TemporaryDirectory(dir=options.path) as path,
        offload.initialize(
            model,
            {
                "tiers": {
                    "device": {"kind": "cpu", "memory": options.device * MIB},
                    "host": {"memory": options.host * MIB},
                    "nvme": {"paths": [path]},
                },
                "placement": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
            },
        ) as engine,
    ):
        reset_peak()
        for _ in range(STEPS):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        tiers = engine.report().tiers
        return {
            "numel": numel,
            "peak": status_bytes("VmHWM"),
            "device": tiers["device"].peak_bytes,
            "host": tiers["host"].peak_bytes,
            "nvme": tiers["nvme"].peak_bytes,
        }


def measure(options: argparse.Namespace, side: str, layers: int) -> dict[str, int]:
    """Run one side in a fresh process."""
    arguments = [*arguments_of(options, CARRIED), f"--layers={layers}"]
    return in_fresh_process(__file__, side, arguments)


def main() -> None:
    """Measure both sizes and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", type=int, default=24, help="device budget in MiB")
    parser.add_argument("--host", type=int, default=96, help="host budget in MiB")
    parser.add_argument("--path", default=tempfile.gettempdir())
    parser.add_argument("--run", choices=("offload", "plain"), help="internal: one side, here")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options)))
        return
    overheads = []
    for layers in (options.layers, options.layers * options.factor):
        offloaded = measure(options, "offload", layers)
        plain = measure(options, "plain", layers)
        tiers = offloaded["device"] + offloaded["host"]
        overhead = offloaded["peak"] - tiers - plain["activations"]
        overheads.append(overhead)
        print(
            f"{layers:>3} layers {offloaded['numel'] / 1e6:7.1f}M parameters  state on nvme "
            f"{offloaded['nvme'] / MIB:8.0f} MiB  peak RSS {offloaded['peak'] / MIB:7.1f}  tiers "
            f"{tiers / MIB:6.1f}  activations {plain['activations'] / MIB:6.1f}  overhead "
            f"{overhead / MIB:6.1f} MiB"
        )
    ratio = overheads[1] / overheads[0]
    print(json.dumps({"overhead_ratio": ratio, "overhead_bytes": overheads}))


if __name__ == "__main__":
    main()
