"""Exports of a model with LoRA adapters: the adapters alone, or added into the model.

One tensor at a time, from an engine or a checkpoint, so a merged model needs no memory that grows
with it. W + scaling * B @ A is computed in fp32 and rounded once; in fp32 that is what peft's
`merge_and_unload` gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from offload.errors import CheckpointError
from offload.state import adapters, durable, export
from offload.state.adapters import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from offload.state.exported import (
    CONFIG_NAME,
    Exported,
    ExportedCheckpoint,
    Precision,
    open_checkpoint,
)
from offload.state.source import StateSource

Form = Literal["adapter", "merged"]
Read = Callable[[Exported], torch.Tensor]


def save_merged(engine: StateSource, directory: str | Path) -> Path:
    """Write the engine's model with its adapters added in, as `from_pretrained` reads it.

    Raises:
        CheckpointError: the adapters are not plain LoRA.
        DiskFullError, StorageError: as of `export.save_pretrained`.
    """
    described = export.description(engine)
    items, read = export.live_items(engine)
    root = Path(directory)
    durable.make_folder(root, mode=export.EXPORT_FOLDER_MODE)
    adapter = _adapter_of(described, str(root))
    _write_merged(root, adapter, described["configs"], items, read)
    return root


def export_adapted(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Precision = "compute",
    form: Form = "adapter",
) -> Path:
    """Write the adapters of a checkpoint as peft loads them, or the model they are added in to.

    Raises:
        CheckpointError: no undamaged checkpoint, or none with plain LoRA.
        DiskFullError, StorageError: as of `export.export_checkpoint`.
    """
    root = Path(directory)
    with open_checkpoint(Path(checkpoint), tag) as found:
        exported = ExportedCheckpoint(found, dtype)
        adapter = _adapter_of(found.content.values["export"], str(found.folder))
        durable.make_folder(root, mode=export.EXPORT_FOLDER_MODE)
        if form == "merged":
            _write_merged(root, adapter, exported.configs, exported.items, exported.read)
        else:
            _write_adapter(root, adapter, exported.items, exported.read)
    return root


def export_any(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Precision = "compute",
    merge: bool = False,
) -> Path:
    """`export_adapted` of a checkpoint with plain LoRA, else `export.export_checkpoint`.

    Raises:
        CheckpointError: as of them; or there is nothing to merge.
    """
    with open_checkpoint(Path(checkpoint), tag) as found:
        described = found.content.values.get("export")
    if merge or (isinstance(described, Mapping) and "adapter" in described):
        form: Form = "merged" if merge else "adapter"
        return export_adapted(checkpoint, directory, tag=tag, dtype=dtype, form=form)
    return export.export_checkpoint(checkpoint, directory, tag=tag, dtype=dtype)


def _adapter_of(described: Any, what: str) -> Mapping[str, Any]:
    """The part of a description that is of adapters.

    Raises:
        CheckpointError: there is none, or not of this form.
    """
    adapter = described.get("adapter")
    if adapter is None:
        raise CheckpointError(
            f"{what}: no plain LoRA adapters",
            remedy="load the checkpoint into an engine, and use peft's merge_and_unload",
        )
    kinds = {"config": str, "keys": dict, "names": dict, "pairs": dict, "base": str}
    if not all(isinstance(adapter.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{what}: the description of its adapters is malformed")
    return dict(adapter)


def _write_adapter(
    root: Path, adapter: Mapping[str, Any], items: Sequence[Exported], read: Read
) -> None:
    kept = {item.parameter: item for item in items if item.parameter in adapter["keys"]}
    renamed = {
        name: Exported(str(adapter["keys"][name]), name, item.dtype, item.shape)
        for name, item in kept.items()
        if name is not None
    }
    text = str(adapter["config"])
    durable.write_file(root / ADAPTER_CONFIG_NAME, text.encode(), mode=export.EXPORT_FILE_MODE)
    export.write_shards(root, {ADAPTER_WEIGHTS_NAME: list(renamed.values())}, read)


def _write_merged(
    root: Path,
    adapter: Mapping[str, Any],
    configs: Mapping[str, str],
    items: Sequence[Exported],
    read: Read,
) -> None:
    of = {item.parameter: item for item in items if item.parameter is not None}
    names, pairs = adapter["names"], adapter["pairs"]

    def merged(item: Exported) -> torch.Tensor:
        weight = read(buffers.get(item.name, item))
        if item.parameter not in pairs:
            return weight
        first, second, scaling, is_transposed = pairs[item.parameter]
        delta = read(of[second]).float() @ read(of[first]).float()
        delta = (delta.T if is_transposed else delta) * scaling
        summed: torch.Tensor = weight.float() + delta
        return summed.to(weight.dtype)

    # Buffers are read under the names that they have here, so those are looked up by the new ones.
    buffers = {_base_name(item, names): item for item in items if item.parameter is None}
    kept = [
        Exported(_base_name(item, names), item.parameter, item.dtype, item.shape)
        for item in items
        if item.parameter is None or item.parameter in names
    ]
    texts = {
        name: _with_architecture(text, str(adapter["base"])) if name == CONFIG_NAME else text
        for name, text in configs.items()
    }
    export.write_configs(root, texts)
    export.write_weights(root, kept, merged, export.MAX_SHARD_BYTES)


def _base_name(item: Exported, names: Mapping[str, str]) -> str:
    if item.parameter is None:
        return adapters.without_adapters(item.name)
    return names[item.parameter]


def _with_architecture(config: str, name: str) -> str:
    return json.dumps(json.loads(config) | {"architectures": [name]}, indent=2) + "\n"
