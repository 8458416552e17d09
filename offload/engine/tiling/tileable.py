"""Which parameters can be tiled at all: what linear and embedding ops alone use.

[Note: Tileable]
Tileable is what only `nn.Linear` and `nn.Embedding` modules use as their weight: two dimensions,
floating-point, rows one after the other. Which of those are tiled says selection.py.
"""

from __future__ import annotations

import torch
from torch import nn

from offload.engine.guards.whole_modules import fused_modules, gathered_modules


def tileable_parameters(module: nn.Module) -> frozenset[nn.Parameter]:
    """The parameters that linear and embedding modules use as their weight, and nothing else does.

    Not those of modules that see raw memory: compiled ones, fused kernels.
    """
    found: set[nn.Parameter] = set()
    refused: set[nn.Parameter] = set()
    for outer in (*fused_modules(module).values(), *gathered_modules(module, ()).values()):
        refused.update(outer.parameters())
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            is_user = name == "weight" and _takes_tiles(owner)
            (found if is_user and _has_rows(parameter) else refused).add(parameter)
    return frozenset(found - refused)


def _takes_tiles(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not (module.sparse or module.scale_grad_by_freq)
    return isinstance(module, nn.Linear)


def _has_rows(parameter: nn.Parameter) -> bool:
    return (
        parameter.dim() == 2
        and parameter.is_floating_point()
        and parameter.dtype.itemsize > 1
        and parameter.is_contiguous()
        and parameter.shape[0] > 1
        and parameter.shape[1] > 0
        and type(parameter.data) is torch.Tensor
    )
