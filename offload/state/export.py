"""Export: standard sharded safetensors that `transformers` loads, streamed in constant memory.

Every parameter is written once, in the compute dtype, under the name that loading expects; tied
names are restored by the model that loads. Files that are not part of an export (a tokenizer, say)
are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.state import adapters, durable
from offload.state.exported import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    Exported,
    ExportedCheckpoint,
    Precision,
    open_checkpoint,
    refuse_quantized,
)
from offload.state.safetensors_stream import SafetensorsWriter
from offload.state.source import StateSource, persistent_buffers
from offload.state.weight_files import INDEX_NAME, SINGLE_NAME

MAX_SHARD_BYTES = 5 << 30
# Exports are shared, unlike offload's own files: the umask decides.
EXPORT_FILE_MODE = 0o666
EXPORT_FOLDER_MODE = 0o777


def save_pretrained(
    engine: StateSource, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the model's weights and configuration to `directory` and return it.

    For a Hugging Face model: ``config.json``, ``generation_config.json`` where it generates, and
    ``model.safetensors`` or shards of at most `max_shard_bytes` (a larger tensor has its own) with
    their index, as `from_pretrained` reads them. For any other module: the safetensors files alone,
    named as its state dict names them, ties once. All new shards are complete and synced before
    the first takes its name.

    Raises:
        DiskFullError, StorageError: the file system; nothing of an earlier export has been
            replaced, unless it was a rename or a sync that failed.
        CheckpointError: a dtype that safetensors does not have, or a quantized weight.
    """
    refuse_quantized(engine.composite_names())
    root = Path(directory)
    durable.make_folder(root, mode=EXPORT_FOLDER_MODE)
    _save_configs(engine.module, root, _compute_dtype(engine))
    items, read = live_items(engine)
    write_weights(root, items, read, max_shard_bytes)
    return root


def live_items(
    engine: StateSource,
) -> tuple[list[Exported], Callable[[Exported], torch.Tensor]]:
    """The tensors of an engine's export, and what reads one of them."""
    buffers = dict(persistent_buffers(engine.module))
    return list(_exported(engine)), partial(_read, engine, buffers)


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Precision = "compute",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the weights of a checkpoint to `directory` as `save_pretrained` does; return it.

    Needs neither the model nor an engine, and holds a few tensors at a time, whatever the size.

    Args:
        checkpoint: a checkpoint's own folder, or what `save_checkpoint` wrote to: then its newest,
            or the one of the tag.
        directory: where to write; other files in it stay.
        tag: which checkpoint.
        dtype: "compute": weights as the model computes with them; "fp32": the exact fp32 values
            that the optimizer updates.
        max_shard_bytes: of one file; a larger tensor has its own.

    Raises:
        CheckpointError: no undamaged checkpoint, or one that lacks what an export needs.
        DiskFullError, StorageError: as of `save_pretrained`.
    """
    root = Path(directory)
    with open_checkpoint(Path(checkpoint), tag) as found:
        exported = ExportedCheckpoint(found, dtype)
        durable.make_folder(root, mode=EXPORT_FOLDER_MODE)
        write_configs(root, exported.configs)
        write_weights(root, exported.items, exported.read, max_shard_bytes)
    return root


def write_configs(root: Path, configs: Mapping[str, str]) -> None:
    """Write the model's configuration files. Raises StorageError."""
    for name, text in configs.items():
        durable.write_file(root / name, text.encode(), mode=EXPORT_FILE_MODE)


def description(engine: StateSource) -> dict[str, Any]:
    """What a checkpoint holds for its export; see [Note: export of a checkpoint]."""
    configs = _configs_of(engine)
    parameters = (item for item in _exported(engine) if item.parameter is not None)
    names = {item.parameter: item.name for item in parameters if item.parameter != item.name}
    return {
        "names": names,
        "configs": configs,
        "quantized": engine.composite_names(),
        "aliases": engine.aliases(),
        "groups": engine.optimizer_members(),
        **adapters.description(engine),
    }


def _configs_of(engine: StateSource) -> dict[str, str]:
    """The model's configuration files; made anew when the configuration has changed."""
    if not hasattr(getattr(engine.module, "config", None), "save_pretrained"):
        return {}
    generation = getattr(engine.module, "generation_config", None)
    stamp = repr((engine.module.config, generation, _compute_dtype(engine)))
    if _known_configs.get(engine.module, ("", {}))[0] != stamp:
        _known_configs[engine.module] = stamp, _made_configs(engine)
    return _known_configs[engine.module][1]


_known_configs: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


def _made_configs(engine: StateSource) -> dict[str, str]:
    configs = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _save_configs(engine.module, Path(folder), _compute_dtype(engine))
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(
                f"the model's configuration cannot be written ({error}): an export of this "
                "checkpoint will hold weights only",
                RuntimeWarning,
                stacklevel=6,
            )
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            with contextlib.suppress(FileNotFoundError):
                configs[name] = (Path(folder) / name).read_text(encoding="utf-8")
    return configs


def write_weights(
    root: Path,
    items: Sequence[Exported],
    read: Callable[[Exported], torch.Tensor],
    max_shard_bytes: int,
) -> None:
    """Write the weight files of an export and their index; files of an earlier export go.

    Raises:
        DiskFullError, StorageError, CheckpointError: as of `write_shards`.
    """
    shards = shard(items, max_shard_bytes)
    names = shard_names(len(shards))
    write_shards(root, dict(zip(names, shards, strict=True)), read)
    if len(names) > 1:
        index = _index(names, shards)
        durable.write_file(root / INDEX_NAME, index, mode=EXPORT_FILE_MODE)
    _remove_stale(root, keep=set(names) | ({INDEX_NAME} if len(names) > 1 else set()))


def write_shards(
    root: Path,
    shards: Mapping[str, Sequence[Exported]],
    read: Callable[[Exported], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors files by name; the first takes its name when all are complete and synced.

    Raises:
        DiskFullError, StorageError: the file system.
        CheckpointError: a dtype that safetensors does not have.
    """
    described = {"format": "pt", **(metadata or {})}
    with contextlib.ExitStack() as open_writers:
        writers = [
            open_writers.enter_context(_writer(root / name, items, described))
            for name, items in shards.items()
        ]
        for writer, items in zip(writers, shards.values(), strict=True):
            for item in items:
                writer.write(item.name, read(item))
        for writer in writers:
            writer.finish()


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


def _exported(engine: StateSource) -> Iterator[Exported]:
    tied = _restored_names(engine.module)
    names_of: dict[str, list[str]] = {}
    for alias, canonical in engine.aliases().items():
        names_of.setdefault(canonical, [canonical]).append(alias)
    for parameter in engine.parameter_names():
        # transformers drops the names that its own tying restores; the source name must be on disk.
        names = names_of.get(parameter, [parameter])
        name = next((n for n in names if n not in tied), parameter)
        dtype, shape = engine.state_fields(parameter)["weight"]
        yield Exported(name, parameter, dtype, tuple(shape))
    for name, buffer in persistent_buffers(engine.module):
        yield Exported(name, None, buffer.dtype, tuple(buffer.shape))


def _restored_names(module: nn.Module) -> set[str]:
    """Names that `transformers` ties to another weight after loading."""
    return set(getattr(module, "all_tied_weights_keys", None) or ())


def _read(engine: StateSource, buffers: dict[str, torch.Tensor], item: Exported) -> torch.Tensor:
    if item.parameter is None:
        return buffers[item.name].detach().cpu()
    return engine.read_state(item.parameter, "weight")


def shard(items: Sequence[Exported], max_shard_bytes: int) -> list[list[Exported]]:
    """Cut where a file would exceed `max_shard_bytes`; a tensor is never cut."""
    shards: list[list[Exported]] = [[]]
    filled_bytes = 0
    for item in items:
        if shards[-1] and filled_bytes + item.nbytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(item)
        filled_bytes += item.nbytes
    return shards


def shard_names(num_shards: int, stem: str = "model") -> list[str]:
    """Names of the files of an export: they follow from their number alone."""
    if num_shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def _writer(
    path: Path, items: Sequence[Exported], metadata: Mapping[str, str]
) -> SafetensorsWriter:
    tensors = [(item.name, item.dtype, item.shape) for item in items]
    return SafetensorsWriter(path, tensors, metadata=metadata, mode=EXPORT_FILE_MODE)


def _index(names: list[str], shards: list[list[Exported]]) -> bytes:
    weight_map = {
        item.name: name for name, items in zip(names, shards, strict=True) for item in items
    }
    total_bytes = sum(item.nbytes for items in shards for item in items)
    content = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _remove_stale(root: Path, *, keep: set[str]) -> None:
    """Remove files of an earlier export that this one has not replaced, else they would be read."""
    stale = {
        SINGLE_NAME,
        INDEX_NAME,
        *(path.name for path in root.glob("model-*-of-*.safetensors")),
    }
    for name in stale - keep:
        with durable.storage_errors("unlink", root / name, what=name):
            (root / name).unlink(missing_ok=True)
    durable.sync_folder(root)
