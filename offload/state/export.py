"""Export: standard sharded safetensors that `transformers` loads, streamed in constant memory.

Every parameter is written once, in the compute dtype, under the name that loading expects; tied
names are restored by the model that loads. Files that are not part of an export (a tokenizer, say)
are not touched.

[Note: export of a checkpoint]
A checkpoint holds what an export needs of the model beside its tensors, so that neither the model's
code nor an engine is needed to export it:
    names     canonical parameter name -> name in the export, where they differ (tied weights)
    configs   file name -> text of the model's configuration files; {} if it has none
    quantized names of parameters that are several tensors: such a model has no export
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from offload.errors import CheckpointError, listed
from offload.optim.split import merge_tensor
from offload.state import durable, stored
from offload.state.manifest import MANIFEST_NAME, TensorRecord
from offload.state.safetensors_stream import SafetensorsWriter, tensor_nbytes
from offload.state.source import StateSource, persistent_buffers

MAX_SHARD_BYTES = 5 << 30
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
# Exports are shared, unlike offload's own files: the umask decides.
_EXPORT_FILE_MODE = 0o666
_EXPORT_FOLDER_MODE = 0o777


@dataclass(frozen=True, slots=True)
class _Exported:
    """One tensor of an export: its name on disk; the parameter's name, or None for a buffer."""

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
    ``model.safetensors`` or shards of at most `max_shard_bytes` (a larger tensor has its own) with
    their index, as `from_pretrained` reads them. For any other module: the safetensors files alone,
    named as its state dict names them, ties once. All new shards are complete and synced before
    the first takes its name.

    Raises:
        DiskFullError, StorageError: the file system; nothing of an earlier export has been
            replaced, unless it was a rename or a sync that failed.
        CheckpointError: a dtype that safetensors does not have, or a quantized weight.
    """
    _refuse_quantized(engine.composite_names())
    root = Path(directory)
    durable.make_folder(root, mode=_EXPORT_FOLDER_MODE)
    _save_configs(engine.module, root, _compute_dtype(engine))
    buffers = dict(persistent_buffers(engine.module))
    read = partial(_read, engine, buffers)
    _write_shards(root, _shards(list(_exported(engine)), max_shard_bytes), read)
    return root


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Literal["compute", "fp32"] = "compute",
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
    source, root = Path(checkpoint), Path(directory)
    if tag is None and (source / MANIFEST_NAME).exists():
        source, tag = source.resolve().parent, source.resolve().name
    with stored.find(source, tag) as found:
        names, configs = _description_of(found)
        durable.make_folder(root, mode=_EXPORT_FOLDER_MODE)
        for name, text in configs.items():
            data = _with_dtype(text) if dtype == "fp32" and name == CONFIG_NAME else text
            durable.write_file(root / name, data.encode(), mode=_EXPORT_FILE_MODE)
        records = {(r.name, r.field): r for r in found.content.tensors}
        items = [
            _Exported(
                names.get(record.name, record.name),
                None if record.kind == "buffer" else record.name,
                _exported_dtype(found.dtype(record), dtype),
                record.shape,
            )
            for record in found.content.tensors
            if record.kind == "buffer" or record.field == "weight"
        ]
        read = partial(_read_stored, found, records)
        _write_shards(root, _shards(items, max_shard_bytes), read)
    return root


def _refuse_quantized(names: Sequence[str]) -> None:
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


def description(engine: StateSource) -> dict[str, Any]:
    """What a checkpoint holds for its export; see [Note: export of a checkpoint]."""
    configs = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            _save_configs(engine.module, Path(folder), _compute_dtype(engine))
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(
                f"the model's configuration cannot be written ({error}): an export of this "
                "checkpoint will hold weights only",
                RuntimeWarning,
                stacklevel=4,
            )
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            with contextlib.suppress(FileNotFoundError):
                configs[name] = (Path(folder) / name).read_text(encoding="utf-8")
    parameters = (item for item in _exported(engine) if item.parameter is not None)
    names = {item.parameter: item.name for item in parameters if item.parameter != item.name}
    return {"names": names, "configs": configs, "quantized": engine.composite_names()}


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
    _refuse_quantized(quantized)
    texts = [*names.values(), *configs.values()]
    unknown = configs.keys() - {CONFIG_NAME, GENERATION_CONFIG_NAME}
    if unknown or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{found.folder}: the description of its export is malformed")
    return names, configs


def _with_dtype(config: str) -> str:
    """A configuration that says fp32."""
    fields = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in fields else "dtype"
    return json.dumps(fields | {key: "float32"}, indent=2, sort_keys=True) + "\n"


def _exported_dtype(dtype: torch.dtype, wanted: Literal["compute", "fp32"]) -> torch.dtype:
    halves = (torch.bfloat16, torch.float16)
    return torch.float32 if wanted == "fp32" and dtype in halves else dtype


def _read_stored(
    found: stored.StoredCheckpoint,
    records: Mapping[tuple[str, str], TensorRecord],
    item: _Exported,
) -> torch.Tensor:
    """A tensor in the dtype of the export: the merged master where that is fp32 of a half."""
    if item.parameter is None:
        return found.read(records[item.name, "buffer"]).to(item.dtype)
    name = item.parameter
    if item.dtype is torch.float32:
        if (name, "master") in records:
            return found.read(records[name, "master"])
        if (name, "remainder") in records:
            weight = found.read(records[name, "weight"])
            return merge_tensor(weight, found.read(records[name, "remainder"]))
    return found.read(records[name, "weight"]).to(item.dtype)


def _write_shards(
    root: Path, shards: list[list[_Exported]], read: Callable[[_Exported], torch.Tensor]
) -> None:
    """Write every shard and the index; files of an earlier export go."""
    names = _file_names(len(shards))
    with contextlib.ExitStack() as open_writers:
        writers = [
            open_writers.enter_context(_writer(root / name, shard))
            for name, shard in zip(names, shards, strict=True)
        ]
        for writer, shard in zip(writers, shards, strict=True):
            for item in shard:
                writer.write(item.name, read(item))
        for writer in writers:
            writer.finish()
    if len(names) > 1:
        index = _index(names, shards)
        durable.write_file(root / INDEX_NAME, index, mode=_EXPORT_FILE_MODE)
    _remove_stale(root, keep=set(names) | ({INDEX_NAME} if len(names) > 1 else set()))


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
