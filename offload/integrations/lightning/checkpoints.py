"""Lightning's checkpoint content as plain values, so that it can stand in a manifest.

Small tensors (a monitored metric, a best score) become lists of numbers with their dtype; all other
values have to be plain already.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError

_TENSOR, _PATH = "offload.tensor", "offload.path"
_MOST_ELEMENTS = 1 << 12


def to_plain(value: Any, where: str = "checkpoint") -> Any:
    """Tensors, numpy scalars and paths replaced by plain values.

    Raises:
        CheckpointError: a tensor is large: it would be text.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() > _MOST_ELEMENTS:
            raise CheckpointError(
                f"{where} is a tensor of {value.numel()} elements",
                expected=f"at most {_MOST_ELEMENTS}",
                remedy="make it a buffer of the module, or save it as a file of your own",
            )
        kept = value.detach().cpu()
        dtype = str(kept.dtype).removeprefix("torch.")
        return {_TENSOR: [dtype, list(kept.shape), kept.flatten().tolist()]}
    if isinstance(value, Path):
        return {_PATH: str(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            dtype, shape, items = value[_TENSOR]
            return torch.tensor(items, dtype=getattr(torch, dtype)).reshape(shape)
        if set(value) == {_PATH}:
            return Path(value[_PATH])
        return {key: from_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(from_plain(inner) for inner in value)
    return value
