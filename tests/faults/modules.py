"""Small modules that rows share. Each weight of 32 x 32 fp32 is a bucket of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 32


def tokens(step: int = 0) -> torch.Tensor:
    """Token numbers, (4, 8) int64, below 32; the same for the same step."""
    return torch.randint(0, WIDTH, (4, 8), generator=torch.Generator().manual_seed(step))


def inputs(step: int = 0) -> torch.Tensor:
    """Values, (4, 32) fp32; the same for the same step."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(logits: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Cross-entropy of (..., 32) against the tokens of a step, or a square if it has other rows."""
    flat = logits.flatten(0, -2)
    target = tokens(step).flatten()
    if len(flat) == len(target):
        return F.cross_entropy(flat, target)
    return flat.square().mean()


class Chain(nn.Module):
    """Embedding, `depth` linear layers, norm, linear head: (4, 8) int64 -> (4, 8, 32)."""

    def __init__(self, depth: int = 4, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = F.gelu(layer(hidden))
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """A residual MLP of two weights: (..., 32) -> (..., 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(F.gelu(self.up(hidden)))


class Blocks(nn.Module):
    """Four blocks: (..., 32) -> (..., 32)."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def weight(*shape: int) -> nn.Parameter:
    """A parameter of the shape, scaled by its last dimension."""
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)
