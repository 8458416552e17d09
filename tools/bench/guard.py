"""What the engine costs when everything fits on the device: against plain PyTorch, interleaved.

    python tools/bench/guard.py [--rounds 9] [--tokens 512] [--hidden 768 --layers 12]
    python tools/bench/guard.py --against unguarded [...]

Both sides train the same Llama in the same precision: bf16 weights and gradients, fp32 masters and
moments. The plain side is what people write by hand: bf16 module, fp32 masters, fused torch AdamW,
casts. `passes` are forward and backward, where guard, hooks and gradient departure act; `update`
is the optimizer's; `step` is both.

Against `unguarded` both sides are the engine: one as it is, the other without module hooks, saved
tensor hooks and guards, every weight plain and pinned on the device. That is what the guard costs
in the steady state, alone: once with weights at home on the device, once with weights at home on
the host and room for all of them. CPU seconds of one thread, so that other work on the machine
matters little. Weights that come from the host are copied by both sides, by the bare one as part
of its update.
"""

from __future__ import annotations

import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from _process import make_parser
from _training import PlainTraining
from torch import nn

import offload

Phases = dict[str, float]  # seconds of passes, update and step
Clock = Callable[[], float]


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
        self._training = PlainTraining(model)

    def passes(self, ids: torch.Tensor) -> None:
        self._training.passes(ids)

    def update(self) -> None:
        self._training.update()


class Offloaded(Side):
    """The engine with room on the device for everything."""

    def __init__(self, model: nn.Module, weights: str = "device") -> None:
        placement = {"weights": weights, "gradients": "device", "optimizer": "device"}
        host = "64MiB" if weights == "device" else "2GiB"
        self.engine = offload.initialize(
            model.train(),
            {
                "tiers": {"device": {"kind": "cpu", "memory": "8GiB"}, "host": {"memory": host}},
                "placement": placement,
                "precision": {"compute": "bf16"},
            },
        )

    def passes(self, ids: torch.Tensor) -> None:
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)

    def update(self) -> None:
        self.engine.step()


class Unguarded(Offloaded):
    """The same without anything that watches weights; they are all there, and stay."""

    def __init__(self, model: nn.Module, weights: str = "device") -> None:
        super().__init__(model, weights)
        for handle in self.engine._handles:
            handle.remove()
        self.engine._parts.pager.pin(self.engine._parts.pages, "the benchmark")
        for parameter in self.engine._parts.paged:
            parameter.wear_plain()


def timed(action: Callable[[], None], clock: Clock) -> float:
    """Seconds of one call."""
    started = clock()
    action()
    return clock() - started


def measure(
    sides: dict[str, Side], ids: torch.Tensor, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[Phases]]:
    """Seconds of each round by side, interleaved; the first two rounds only warm up."""
    seconds: dict[str, list[Phases]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            passes = timed(partial(side.passes, ids), clock)
            update = timed(side.update, clock)
            seconds[name].append({"passes": passes, "update": update, "step": passes + update})
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--against", choices=["plain", "unguarded"], default="plain")
    options = parser.parse_args()
    ids = torch.randint(0, 8192, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    make = partial(make_model, options.hidden, options.layers)
    with torch.device("meta"):
        numel = sum(p.numel() for p in make().parameters())
    print(f"{numel / 1e6:.1f}M parameters, {options.tokens} tokens, {options.rounds} rounds")
    compare = against_plain if options.against == "plain" else against_unguarded
    print(json.dumps(compare(make, ids, options.rounds)))


def against_plain(make: Callable[[], nn.Module], ids: torch.Tensor, rounds: int) -> Phases:
    """Ratios of wall time to plain PyTorch by phase."""
    sides = {"plain": Plain(make()), "offload": Offloaded(make())}
    seconds = measure(sides, ids, rounds)
    ratios = {}
    for phase in ("passes", "update", "step"):
        plain, ours = ([values[phase] for values in seconds[name]] for name in sides)
        ratios[phase] = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
        print(
            f"{phase:<8} plain {statistics.median(plain):.3f} s   "
            f"offload {statistics.median(ours):.3f} s   ratio {ratios[phase]:.3f}"
        )
    return ratios


def against_unguarded(make: Callable[[], nn.Module], ids: torch.Tensor, rounds: int) -> Phases:
    """What the guard adds, as a share of the step, by the home of the weights."""
    torch.set_num_threads(1)
    shares = {}
    for home in ("device", "host"):
        sides: dict[str, Side] = {
            "bare": Unguarded(make(), home),
            "guarded": Offloaded(make(), home),
        }
        seconds = measure(sides, ids, rounds, time.process_time)
        bare, guarded = (seconds[name] for name in sides)
        added = [b["step"] - a["step"] for a, b in zip(bare, guarded, strict=True)]
        step = statistics.median(values["step"] for values in guarded)
        shares[home] = statistics.median(added) / step
        print(
            f"weights on {home:<7} step {1000 * step:.2f} ms   "
            f"guard {1000 * statistics.median(added):.2f} ms   share {shares[home]:.2%}"
        )
    return shares


if __name__ == "__main__":
    main()
