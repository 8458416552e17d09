"""What a row of the zoo is: a module, a loss, and what there is to know about both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.oracle import Loss

# Why the weights of a row are compared step by step: Adam divides gradients that are rounding noise
# by their own size, so two runs whose weights differ in a last bit part there, and nowhere else.
KEY_BIAS = "the gradient of a bias of keys is rounding noise: softmax ignores a shift"
NORMALIZED_BIAS = "the gradient of a bias before a normalization is rounding noise"


@dataclass(frozen=True, slots=True)
class Row:
    """One module of the zoo. `build` and `loss` are called afresh for every run.

    Attributes:
        name: unique; what the table shows.
        family: the rows that it stands with.
        build: makes the module, with weights that the generator's state decides.
        loss: loss of micro-batch number `index` of a model; draws the same numbers on every side.
        notes: what is special about it, and why `pages` or `optimizer` are given.
        pages: buckets that the device of the harshest placement holds: those of the largest op.
        per_step: why weights are compared with plain PyTorch after each step from the same state,
            and not after all steps; empty if they are compared after all.
        bucket_elements: elements of a bucket, so small that the module has many.
        optimizer: the engine's `[optimizer]` section, if it is not the oracle's AdamW.
        plain_optimizer: the same for plain PyTorch.
        has_bf16: whether the module can compute in bf16.
        same_kernels: whether torch runs the same kernels in evaluation when modules have hooks; if
            so, the first evaluation must be the same bits as in plain PyTorch.
        warnings: message patterns of warnings that the module's own library gives.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    loss: Loss
    notes: str = ""
    pages: int = 2
    per_step: str = ""
    bucket_elements: int = 1024
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    plain_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    has_bf16: bool = True
    same_kernels: bool = True
    warnings: tuple[str, ...] = ()

    def make(self) -> nn.Module:
        """The module with seeded weights, in training mode."""
        torch.manual_seed(0)
        module = self.build()
        module.train()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)  # else a bias is nothing but its first updates
        return module


def seeded(index: int) -> torch.Generator:
    """The generator of the data of micro-batch `index`."""
    return torch.Generator().manual_seed(1000 + index)
