"""Export: standard sharded safetensors that `transformers` loads, streamed in constant memory.

Every parameter is written once, in the compute dtype, under the name that loading expects; tied
names are restored by the model that loads. Files that are not part of an export (a tokenizer, say)
are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.state import durable
from offload.state.safetensors_stream import SafetensorsWriter, tensor_nbytes
from offload.state.source import StateSource, persistent_buffers

MAX_SHARD_BYTES = 5 << 30
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Exports are shared, unlike offload's own files: the umask decides.
_EXPORT_FILE_MODE = 0o666
_EXPORT_FOLDER_MODE = 0o777


@dataclass(frozen=True, slots=True)
class _Exported:
    """One tensor of an export: the name on disk, and the parameter's canonical name (None for a
    buffer).
    """

    name: str
    parameter: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


def save_pretrained(
    engine: StateSource, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the model's weights and configuration to `directory` and return it.

    For a Hugging Face model: ``config.json``, ``generation_config.json`` where it generates, and
        ``model.safetensors`` or
    shards of at most `max_shard_bytes` (a larger tensor has its own) with their index, as
    `from_pretrained` reads them. For any other module: the safetensors files alone, named as its
    state dict names them, ties once. All new shards are complete and synced before the first takes
    its name.

    Raises:
        DiskFullError, StorageError: the file system; nothing of an earlier export has been
            replaced, unless it was a rename or a sync that failed.
        CheckpointError: a dtype that safetensors does not have.
    """
    root = Path(directory)
    durable.make_folder(root, mode=_EXPORT_FOLDER_MODE)
    _save_configs(engine.module, root, _compute_dtype(engine))
    shards = _shards(list(_exported(engine)), max_shard_bytes)
    names = _file_names(len(shards))
    buffers = dict(persistent_buffers(engine.module))
    with contextlib.ExitStack() as open_writers:
        writers = [
            open_writers.enter_context(_writer(root / name, shard))
            for name, shard in zip(names, shards, strict=True)
        ]
        for writer, shard in zip(writers, shards, strict=True):
            for item in shard:
                writer.write(item.name, _read(engine, buffers, item))
        for writer in writers:
            writer.finish()
    if len(names) > 1:
        index = _index(names, shards)
        durable.write_file(root / INDEX_NAME, index, mode=_EXPORT_FILE_MODE)
    _remove_stale(root, keep=set(names) | ({INDEX_NAME} if len(names) > 1 else set()))
    return root


def _compute_dtype(engine: StateSource) -> torch.dtype | None:
    """Dtype of the first floating weight, as `transformers` defines a model's dtype."""
    for name in engine.parameter_names():
        dtype = engine.state_fields(name)["weight"][0]
        if dtype.is_floating_point:
            return dtype
    return None


def _save_configs(module: nn.Module, root: Path, dtype: torch.dtype | None) -> None:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    # The user's own config object stays as it is.
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__]
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(root)
    can_generate = getattr(module, "can_generate", None)
    if callable(can_generate) and can_generate():
        generation: Any = module.generation_config
        generation.save_pretrained(root)


def _exported(engine: StateSource) -> Iterator[_Exported]:
    tied = _restored_names(engine.module)
    names_of: dict[str, list[str]] = {}
    for alias, canonical in engine.aliases().items():
        names_of.setdefault(canonical, [canonical]).append(alias)
    for parameter in engine.parameter_names():
        # transformers drops the names that its own tying restores; the source name must be on disk.
        names = names_of.get(parameter, [parameter])
        name = next((n for n in names if n not in tied), parameter)
        dtype, shape = engine.state_fields(parameter)["weight"]
        yield _Exported(name, parameter, dtype, tuple(shape))
    for name, buffer in persistent_buffers(engine.module):
        yield _Exported(name, None, buffer.dtype, tuple(buffer.shape))


def _restored_names(module: nn.Module) -> set[str]:
    """Names that `transformers` ties to another weight after loading."""
    return set(getattr(module, "all_tied_weights_keys", None) or ())


def _read(engine: StateSource, buffers: dict[str, torch.Tensor], item: _Exported) -> torch.Tensor:
    if item.parameter is None:
        return buffers[item.name].detach().cpu()
    return engine.read_state(item.parameter, "weight")


def _shards(items: list[_Exported], max_shard_bytes: int) -> list[list[_Exported]]:
    shards: list[list[_Exported]] = [[]]
    filled_bytes = 0
    for item in items:
        if shards[-1] and filled_bytes + item.nbytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(item)
        filled_bytes += item.nbytes
    return shards


def _file_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def _writer(path: Path, shard: list[_Exported]) -> SafetensorsWriter:
    tensors = [(item.name, item.dtype, item.shape) for item in shard]
    return SafetensorsWriter(path, tensors, metadata={"format": "pt"}, mode=_EXPORT_FILE_MODE)


def _index(names: list[str], shards: list[list[_Exported]]) -> bytes:
    weight_map = {
        item.name: name for name, shard in zip(names, shards, strict=True) for item in shard
    }
    total_bytes = sum(item.nbytes for shard in shards for item in shard)
    content = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _remove_stale(root: Path, *, keep: set[str]) -> None:
    """Remove the files of an earlier export that this one did not replace; `from_pretrained` would
    prefer them.
    """
    stale = {
        SINGLE_NAME,
        INDEX_NAME,
        *(path.name for path in root.glob("model-*-of-*.safetensors")),
    }
    for name in stale - keep:
        with durable.storage_errors("unlink", root / name, what=name):
            (root / name).unlink(missing_ok=True)
    durable.sync_folder(root)
