"""What an export of a checkpoint holds, and how each of its tensors is read.

[Note: export of a checkpoint]
A checkpoint holds what an export needs of the model beside its tensors, so that neither the model's
code nor an engine is needed to export it:
    names     canonical parameter name -> name in the export, where they differ (tied weights)
    configs   file name -> text of the model's configuration files; {} if it has none
    quantized names of parameters that are several tensors: such a model has no export
    aliases   tied name -> canonical parameter name
    groups    canonical names of the parameters of each of the optimizer's groups
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from offload.errors import CheckpointError, listed
from offload.optim.split import merge_tensor
from offload.state import stored
from offload.state.manifest import MANIFEST_NAME
from offload.state.safetensors_stream import tensor_nbytes

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

Precision = Literal["compute", "fp32"]
"""Weights as the model computes with them, or the exact fp32 values that the optimizer updates."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One tensor of an export: its name on disk; the parameter's name, or None for a buffer."""

    name: str
    parameter: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


class ExportedCheckpoint:
    """The export of a checkpoint, one tensor at a time.

    Attributes:
        items: its tensors, in the order of the checkpoint.
        configs: file name -> text of the model's configuration files, for this precision.
        aliases: tied name -> canonical name; {} of a checkpoint that does not say.
        groups: names of each optimizer group's parameters; None of a checkpoint that does not say.

    Raises:
        CheckpointError: the checkpoint does not say what its export is, or has none.
    """

    def __init__(self, found: stored.StoredCheckpoint, dtype: Precision) -> None:
        self.stored = found
        names, configs = _description_of(found)
        self.configs = {
            name: _with_dtype(text) if dtype == "fp32" and name == CONFIG_NAME else text
            for name, text in configs.items()
        }
        self.aliases, self.groups = _structure_of(found)
        self._records = {(r.name, r.field): r for r in found.content.tensors}
        self.items = [
            Exported(
                names.get(record.name, record.name),
                None if record.kind == "buffer" else record.name,
                _exported_dtype(found.dtype(record), dtype),
                record.shape,
            )
            for record in found.content.tensors
            if record.kind == "buffer" or record.field == "weight"
        ]

    def read(self, item: Exported) -> torch.Tensor:
        """A tensor in the dtype of the export: the merged master where that is fp32 of a half.

        Raises:
            CheckpointError: it is damaged.
            StorageError: it cannot be read.
        """
        if item.parameter is None:
            return self._field(item.name, "buffer").to(item.dtype)
        name = item.parameter
        if item.dtype is torch.float32:
            if (name, "master") in self._records:
                return self._field(name, "master")
            if (name, "remainder") in self._records:
                return merge_tensor(self._field(name, "weight"), self._field(name, "remainder"))
        return self._field(name, "weight").to(item.dtype)

    def _field(self, name: str, field: str) -> torch.Tensor:
        return self.stored.read(self._records[name, field])


def open_checkpoint(path: Path, tag: str | None) -> stored.StoredCheckpoint:
    """A checkpoint's own folder, or the newest (or that of the tag) of what was saved to `path`.

    Raises:
        CheckpointError: there is no undamaged one.
    """
    if tag is None and (path / MANIFEST_NAME).exists():
        path, tag = path.resolve().parent, path.resolve().name
    return stored.find(path, tag)


def refuse_quantized(names: Sequence[str]) -> None:
    """Refuse to write what loads under the names of an export as something else.

    Raises:
        CheckpointError: there are quantized weights; names one.
    """
    if names:
        raise CheckpointError(
            f"{listed(names)}: quantized, but an export holds plain weights",
            remedy="keep the adapters, e.g. peft's, beside the base that you quantized; or save "
            "engine.state_dict() with torch.save; checkpoints hold everything",
        )


def _description_of(found: stored.StoredCheckpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The names and configs of a checkpoint; only known file names become paths.

    Raises:
        CheckpointError: it has none, or not of this form.
    """
    described: Any = found.content.values.get("export")
    try:
        names, configs = dict(described["names"]), dict(described["configs"])
        quantized = list(described.get("quantized", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found.folder} does not describe its export",
            remedy="load it, and call save_pretrained",
        ) from error
    refuse_quantized(quantized)
    texts = [*names.values(), *configs.values()]
    unknown = configs.keys() - {CONFIG_NAME, GENERATION_CONFIG_NAME}
    if unknown or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{found.folder}: the description of its export is malformed")
    return names, configs


def _structure_of(
    found: stored.StoredCheckpoint,
) -> tuple[dict[str, str], list[list[str]] | None]:
    """Ties and groups of a checkpoint, if it names them.

    Raises:
        CheckpointError: not of this form.
    """
    described: Any = found.content.values["export"]
    aliases, groups = described.get("aliases", {}), described.get("groups")
    known = {record.name for record in found.content.tensors if record.kind == "parameter"}
    try:
        unknown = {*aliases.values(), *(name for group in groups or () for name in group)} - known
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{found.folder}: its ties or groups are malformed") from error
    if unknown:
        raise CheckpointError(f"{found.folder}: its ties or groups name what it does not hold")
    return aliases, groups


def _with_dtype(config: str) -> str:
    """A configuration that says fp32."""
    fields = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in fields else "dtype"
    return json.dumps(fields | {key: "float32"}, indent=2, sort_keys=True) + "\n"


def _exported_dtype(dtype: torch.dtype, wanted: Precision) -> torch.dtype:
    halves = (torch.bfloat16, torch.float16)
    return torch.float32 if wanted == "fp32" and dtype in halves else dtype
