"""What the engine costs when everything fits on the device: against plain PyTorch, interleaved.

    python tools/bench/guard.py [--rounds 9] [--tokens 512] [--hidden 768 --layers 12]

Both sides train the same Llama in the same precision: bf16 weights and gradients, fp32 masters and
moments. The plain side is what people write by hand: bf16 module, fp32 masters, fused torch AdamW, casts.
`guard` isolates forward and backward, where guard, hooks and gradient departure act.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import offload


def make_model(hidden: int, layers: int) -> nn.Module:
    """A Llama of about 12 * layers * hidden^2 parameters beside its embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    return LlamaForCausalLM(config)


class Plain:
    """bf16 weights with fp32 masters, by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.to(torch.bfloat16).train()
        self.weights = list(self.model.parameters())
        self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def passes(self, ids: torch.Tensor) -> None:
        """Forward and backward."""
        self.model(input_ids=ids, labels=ids).loss.backward()

    def update(self) -> None:
        """Optimizer step."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


class Offloaded:
    """The engine with every tier on the device."""

    def __init__(self, model: nn.Module) -> None:
        on_device = {"weights": "device", "gradients": "device", "optimizer": "device"}
        self.engine = offload.initialize(
            model.train(),
            {
                "tiers": {"device": {"kind": "cpu", "memory": "8GiB"}, "host": {"memory": "64MiB"}},
                "placement": on_device,
                "precision": {"compute": "bf16"},
            },
        )

    def passes(self, ids: torch.Tensor) -> None:
        """Forward and backward."""
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)

    def update(self) -> None:
        """Optimizer step."""
        self.engine.step()


def timed(action: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    ids = torch.randint(0, 8192, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    sides = {
        "plain": Plain(make_model(options.hidden, options.layers)),
        "offload": Offloaded(make_model(options.hidden, options.layers)),
    }
    numel = sum(p.numel() for p in sides["plain"].model.parameters())  # type: ignore[union-attr]
    seconds: dict[str, dict[str, list[float]]] = {s: {"passes": [], "update": []} for s in sides}
    for round_number in range(options.rounds + 2):
        for name, side in sides.items():
            passes = timed(lambda side=side: side.passes(ids))
            update = timed(side.update)
            if round_number >= 2:
                seconds[name]["passes"].append(passes)
                seconds[name]["update"].append(update)
    print(f"{numel / 1e6:.0f}M parameters, {options.tokens} tokens, {options.rounds} rounds")
    result = {}
    for phase in ("passes", "update", "step"):
        medians = {}
        for name, phases in seconds.items():
            values = phases[phase] if phase != "step" else [
                a + b for a, b in zip(phases["passes"], phases["update"], strict=True)
            ]
            medians[name] = statistics.median(values)
            seconds[name].setdefault("step", values if phase == "step" else [])
        ratios = [
            b / a for a, b in zip(
                *(
                    phases[phase] if phase != "step" else [
                        p + u for p, u in zip(phases["passes"], phases["update"], strict=True)
                    ]
                    for phases in seconds.values()
                ),
                strict=True,
            )
        ]
        result[phase] = statistics.median(ratios)
        print(
            f"{phase:<8} plain {medians['plain']:.3f} s   offload {medians['offload']:.3f} s   "
            f"ratio {result[phase]:.3f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
