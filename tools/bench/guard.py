"""What the engine costs when everything fits on the device: against plain PyTorch, interleaved.

    python tools/bench/guard.py [--rounds 9] [--tokens 512] [--hidden 768 --layers 12]

Both sides train the same Llama in the same precision: bf16 weights and gradients, fp32 masters and
moments. The plain side is what people write by hand: bf16 module, fp32 masters, fused torch AdamW,
casts. `passes` are forward and backward, where guard, hooks and gradient departure act; `update`
is the optimizer's; `step` is both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import offload

Phases = dict[str, float]  # seconds of passes, update and step


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
    model: nn.Module = LlamaForCausalLM(config)
    return model


class Side(ABC):
    """One way to train; both take the same steps."""

    @abstractmethod
    def passes(self, ids: torch.Tensor) -> None:
        """Forward and backward."""

    @abstractmethod
    def update(self) -> None:
        """Optimizer step."""


class Plain(Side):
    """bf16 weights with fp32 masters, by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.to(torch.bfloat16).train()
        self.weights = list(self.model.parameters())
        self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def passes(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()

    def update(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


class Offloaded(Side):
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
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)

    def update(self) -> None:
        self.engine.step()


def timed(action: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(sides: dict[str, Side], ids: torch.Tensor, rounds: int) -> dict[str, list[Phases]]:
    """Seconds of each round by side, interleaved; the first two rounds only warm up."""
    seconds: dict[str, list[Phases]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            passes, update = timed(partial(side.passes, ids)), timed(side.update)
            seconds[name].append({"passes": passes, "update": update, "step": passes + update})
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    ids = torch.randint(0, 8192, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    model = make_model(options.hidden, options.layers)
    numel = sum(p.numel() for p in model.parameters())
    sides = {
        "plain": Plain(model),
        "offload": Offloaded(make_model(options.hidden, options.layers)),
    }
    seconds = measure(sides, ids, options.rounds)
    print(f"{numel / 1e6:.0f}M parameters, {options.tokens} tokens, {options.rounds} rounds")
    ratios = {}
    for phase in ("passes", "update", "step"):
        plain, ours = ([values[phase] for values in seconds[name]] for name in sides)
        ratios[phase] = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
        print(
            f"{phase:<8} plain {statistics.median(plain):.3f} s   "
            f"offload {statistics.median(ours):.3f} s   ratio {ratios[phase]:.3f}"
        )
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
