"""The models and sides that the benchmarks train: the same definition, data and seed for all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from offload.engine.engine import Engine


@dataclass(frozen=True)
class LlamaShape:
    """The size of a Llama; attention heads of 64."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int

    def make(self, *, dtype: torch.dtype = torch.float32, checkpoint: bool = False) -> nn.Module:
        """A new one from seed 0, whose weights are made in `dtype`."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
        )
        with default_dtype(dtype):
            model = LlamaForCausalLM(config)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module: nn.Module = model.train()
        return module

    def count(self) -> int:
        """Its parameters."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.make().parameters())

    def ids(self, batch: int, sequence: int, seed: int) -> torch.Tensor:
        """Random tokens, (batch, sequence) int64."""
        drawn = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocabulary, (batch, sequence), generator=drawn)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating point tensors have `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class PlainTraining:
    """What people write by hand: a bf16 module, fp32 masters, fused torch AdamW, casts."""

    def __init__(self, model: nn.Module, lr: float = 1e-4) -> None:
        self.model = model.to(torch.bfloat16).train()
        self.weights = list(self.model.parameters())
        self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def passes(self, ids: torch.Tensor) -> float:
        """Forward and backward; returns the loss."""
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """Optimizer step."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None, "backward gives every weight a gradient"
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def settle(engine: Engine) -> None:
    """Wait until nothing of the engine's steps is left to do or in flight."""
    engine.parameter_steps()  # counts what is pending, so that it has to be applied
    engine._parts.store.drain()


def train_step(engine: Engine, ids: torch.Tensor) -> float:
    """Forward, backward and step; returns the loss."""
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


@dataclass(frozen=True)
class Steps:
    """Some steps in a row, from the end of the one before: seconds and bytes of all, and losses."""

    seconds: list[float]
    read_bytes: int
    written_bytes: int
    losses: list[float]


def steady_steps(engine: Engine, ids: torch.Tensor, count: int) -> Steps:
    """`count` steps after one that is not counted.

    A step may leave work to the next one's forward: counted from the end of a step to the end of
    another, what flows in at one side flows out at the other.
    """
    train_step(engine, ids)
    seconds, losses, read, written = [], [], 0, 0
    for _ in range(count):
        started = time.perf_counter()
        losses.append(train_step(engine, ids))
        seconds.append(time.perf_counter() - started)
        lanes = engine.report().lanes
        read += lanes["nvme_read"].bytes
        written += lanes["nvme_write"].bytes
    settle(engine)
    return Steps(seconds, read, written, losses)


def tiers(path: str, device_bytes: int, host_bytes: int) -> dict[str, Mapping[str, Any]]:
    """The section `[tiers]` of a configuration without an accelerator."""
    return {
        "device": {"kind": "cpu", "memory": device_bytes},
        "host": {"memory": host_bytes},
        "nvme": {"paths": [path]},
    }
