"""A model of plain torch for `offload bench`, where the configuration names none.

[Note: built-in model]
It stands in for a model that is larger than memory, in seconds: the largest of a few sizes of which
the budgets have room for whole layers. What it must not do is stay on the device, so what the
configuration leaves `auto` in `[placement]` is on the tier furthest from it; and settings that name
parts of another model are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from offload.config import OffloadConfig
from offload.engine.planning import device_is_host_memory, plan
from offload.state.deferred import deferred_init

NUM_BLOCKS = 8
NUM_TOKENS = 256
_WIDTHS = (512, 256, 128, 64)
_WIDTHS_ON_ACCELERATOR = (2048, 1024, *_WIDTHS)
_STATE_CLASSES = ("weights", "gradients", "optimizer")


class WithLoss(NamedTuple):
    """What the model returns."""

    loss: torch.Tensor


class BuiltInModel(nn.Module):
    """Blocks of two linear layers, in and out of four times the width, around each a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(NUM_BLOCKS)
        )

    def forward(self, hidden: torch.Tensor) -> WithLoss:
        """The mean square of what the blocks make of `hidden`, (tokens, width)."""
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return WithLoss(hidden.float().square().mean())


def build_built_in(config: OffloadConfig) -> BuiltInModel:
    """The largest built-in model that fits, deferred; the smallest if none does.

    `config` is one of `built_in_config`.
    """
    widths = _WIDTHS if device_is_host_memory(config) else _WIDTHS_ON_ACCELERATOR
    *larger, smallest = widths
    width = next((each for each in larger if _fits(each, config)), smallest)
    with deferred_init():
        return BuiltInModel(width)


def _fits(width: int, config: OffloadConfig) -> bool:
    with torch.device("meta"):
        model = BuiltInModel(width)
    planned = plan(model, config)
    return planned.fits and not planned.tiled


def built_in_config(config: OffloadConfig) -> OffloadConfig:
    """The configuration as it is for the built-in model, see [Note: built-in model]."""
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for section, names in (
        ("guard", ("gather",)),
        ("tiling", ("modules",)),
        ("training", ("loss_chunk_tokens", "lm_head")),
        ("precision", ("keep_fp32",)),
        ("optimizer", ("groups",)),
    ):
        if section in plain:
            plain[section] = {k: v for k, v in plain[section].items() if k not in names}
    furthest = "nvme" if config.tiers.nvme.paths else "host"
    placement = plain.setdefault("placement", {})
    for state_class in _STATE_CLASSES if config.optimizer.name != "mezo" else ("weights",):
        if placement.get(state_class, "auto") == "auto":
            placement[state_class] = furthest
    return OffloadConfig(**plain)
