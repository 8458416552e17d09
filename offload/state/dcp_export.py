"""Export to torch.distributed.checkpoint: a directory that `dcp.load` reads.

[Note: keys of a DCP export]
    model.<name>                        weights and persistent buffers, tied names included
    optim.state.<name>.<field>          with the optimizer: exp_avg, ..., step
    optim.param_groups.<number>.<key>   its groups; "params" are names
These are the flattened keys of {"model": ..., "optim": ...} as `get_model_state_dict` and
`get_optimizer_state_dict` of torch.distributed.checkpoint.state_dict return them, so a program of
torch loads with what it has. Moments are fp32.

[Note: DCP directory]
    __0_0.distcp, ...   entries: each is a file of torch.save, one behind the other
    .metadata           a pickle: dtype, shape and chunks of every tensor, and where each entry is
Written here without torch.distributed and without pickling, a tensor at a time: torch's own writer
keeps every tensor of a file in memory until the file is written.
Source: torch/distributed/checkpoint/{metadata,filesystem,default_planner,_nested_dict}.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError, DiskFullError
from offload.state import durable, plain
from offload.state.export import EXPORT_FILE_MODE, EXPORT_FOLDER_MODE, MAX_SHARD_BYTES
from offload.state.exported import ExportedCheckpoint, Precision, open_checkpoint
from offload.state.moments import decoded_moment, is_encoded, scale_key
from offload.state.safetensors_stream import TORCH_DTYPES, tensor_nbytes
from offload.state.torch_format import (
    Buffer,
    Called,
    Made,
    Named,
    dtype_name,
    encode,
    size,
    tensor_archive,
    value_archive,
)

_METADATA_NAME = ".metadata"
MODEL_KEY, OPTIMIZER_KEY = "model", "optim"
_VERSION = "1.0.0"
_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# Of an entry, beside its tensor: zip headers, the pickle, and its share of the metadata.
_ENTRY_BYTES = 4096
_WEIGHT_FIELDS = ("weight", "master", "remainder")
# What torch's optimizers have in a group beside what ours have, and what ours do.
_TORCH_SETTINGS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: its path in the state dict, what it is, and how to have it."""

    path: tuple[str | int, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Value:
    """A plain value to write."""

    path: tuple[str | int, ...]
    value: Any


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry has been written."""

    file: str
    offset: int
    nbytes: int


def export_dcp(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Precision = "compute",
    optimizer: bool = False,
    max_file_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint as torch.distributed.checkpoint does, to a new directory; return it.

    Needs neither the model nor an engine, and holds a few tensors at a time. The directory appears
    when it is complete and synced.

    Args:
        checkpoint: as of `export_checkpoint`.
        directory: a name that is free, or an empty folder.
        tag: which checkpoint.
        dtype: of the weights; "fp32" loses nothing of them.
        optimizer: write the optimizer's state and groups, too; see [Note: keys of a DCP export].
        max_file_bytes: of one file; a larger tensor has its own.

    Raises:
        CheckpointError: no undamaged checkpoint, one that lacks what an export needs, or there is
            something at `directory`.
        DiskFullError, StorageError: the file system; nothing is left behind.
    """
    root = Path(directory)
    if root.is_symlink() or (root.exists() and not (root.is_dir() and not any(root.iterdir()))):
        raise CheckpointError(f"{root} is not empty", remedy="export to a new directory")
    with open_checkpoint(Path(checkpoint), tag) as found:
        exported = ExportedCheckpoint(found, dtype)
        items: list[_Tensor | _Value] = list(_model_items(exported))
        if optimizer:
            items += _optimizer_items(exported)
        durable.make_folder(root.parent, mode=EXPORT_FOLDER_MODE)
        _check_room(root, items)
        with _pending(root) as pending:
            places = _write_entries(pending, items, max_file_bytes)
            metadata = encode(_metadata(items, places, exported.aliases))
            durable.write_file(pending / _METADATA_NAME, metadata, mode=EXPORT_FILE_MODE)
            with durable.storage_errors("rename", root, what=root.name):
                pending.rename(root)
        durable.sync_folder(root.parent)
    return root


@contextlib.contextmanager
def _pending(root: Path) -> Iterator[Path]:
    """A folder beside `root` for what will become it; removed at the end unless it did."""
    folder = durable.pending_name(root)
    with durable.storage_errors("create", folder, what=root.name):
        folder.mkdir(mode=EXPORT_FOLDER_MODE)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- what is written -------------------------------------------------------------------------------


def _model_items(exported: ExportedCheckpoint) -> Iterator[_Tensor]:
    for item in exported.items:
        name = item.name if item.parameter is None else item.parameter
        read = partial(exported.read, item)
        yield _Tensor((MODEL_KEY, name), item.dtype, item.shape, read)


def _optimizer_items(exported: ExportedCheckpoint) -> Iterator[_Tensor | _Value]:
    """Every parameter's moments and step, what else the optimizer keeps, and its groups."""
    values = exported.stored.content.values
    steps = _steps(exported)
    scalars = plain.decode(values["optimizer_scalars"])
    records = {(r.kind, r.name, r.field): r for r in exported.stored.content.tensors}
    described = {key: (record.dtype, record.shape) for key, record in records.items()}
    encoded = {key for key in records if is_encoded(key, described)}
    scales = {scale_key(key) for key in encoded}
    trained: dict[str, None] = {}
    for key, record in records.items():
        kind, name, field = key
        if kind != "parameter" or field in _WEIGHT_FIELDS or key in scales:
            continue
        trained[name] = None
        path = (OPTIMIZER_KEY, "state", name, field)
        if key in encoded:
            read = partial(decoded_moment, exported.stored, records, key)
            yield _Tensor(path, torch.float32, record.shape, read)
        else:
            read = partial(exported.stored.read, record)
            yield _Tensor(path, exported.stored.dtype(record), record.shape, read)
    for name in trained:
        own = scalars.get(name, {})
        if "step" not in own and ("parameter", name, "step") not in records:
            step = torch.tensor(float(steps[name]))
            path = (OPTIMIZER_KEY, "state", name, "step")
            yield _Tensor(path, step.dtype, (), partial(_as_is, step))
        for key_of, value in own.items():
            yield _scalar((OPTIMIZER_KEY, "state", name, key_of), value)
    for number, group in enumerate(_groups(exported, list(trained))):
        for setting, value in group.items():
            yield _Value((OPTIMIZER_KEY, "param_groups", number, setting), value)


def _scalar(path: tuple[str | int, ...], value: Any) -> _Tensor | _Value:
    if isinstance(value, dict) and set(value) == {"tensor", "dtype"}:
        tensor = torch.tensor(value["tensor"], dtype=TORCH_DTYPES[value["dtype"]])
        return _Tensor(path, tensor.dtype, (), partial(_as_is, tensor))
    return _Value(path, value)


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _steps(exported: ExportedCheckpoint) -> dict[str, int]:
    """Updates that each parameter has had."""
    content = exported.stored.content
    names = [r.name for r in content.tensors if r.kind == "parameter" and r.field == "weight"]
    return dict(zip(names, content.values["parameter_steps"], strict=True))


def _groups(exported: ExportedCheckpoint, trained: Sequence[str]) -> list[dict[str, Any]]:
    """The optimizer's groups as torch has them; [] if it is not known whose they are."""
    groups = plain.decode(exported.stored.content.values["optimizer_groups"])
    members = exported.groups
    if members is None and len(groups) == 1:
        members = [list(trained)]
    if members is None or len(members) != len(groups):
        return []
    return [
        {**_TORCH_SETTINGS, **group, "params": names}
        for group, names in zip(groups, members, strict=True)
    ]


# -- files -----------------------------------------------------------------------------------------


def _check_room(root: Path, items: Sequence[_Tensor | _Value]) -> None:
    tensors = [item for item in items if isinstance(item, _Tensor)]
    needed = sum(tensor_nbytes(item.dtype, item.shape) for item in tensors)
    needed += _ENTRY_BYTES * len(items)
    free = durable.free_bytes(root.parent)
    if needed > free:
        raise DiskFullError(
            path=root,
            needed_bytes=needed,
            free_bytes=free,
            what="export",
            remedy=f"free space on the file system of {root.parent}, or export elsewhere",
        )


def _write_entries(
    folder: Path, items: Sequence[_Tensor | _Value], max_file_bytes: int
) -> list[_Place]:
    """Write every item's entry, and sync the files."""
    places: list[_Place] = []
    with contextlib.ExitStack() as opened:
        number, descriptor, at = -1, -1, 0
        for item in items:
            nbytes = tensor_nbytes(item.dtype, item.shape) if isinstance(item, _Tensor) else 0
            if number < 0 or (at and at + nbytes > max_file_bytes):
                opened.close()  # synced
                number, at = number + 1, 0
                descriptor = opened.enter_context(_synced(folder / _file_name(number)))
            nbytes = _write_entry(descriptor, folder / _file_name(number), item, at)
            places.append(_Place(_file_name(number), at, nbytes))
            at += nbytes
    return places


def _write_entry(descriptor: int, path: Path, item: _Tensor | _Value, at: int) -> int:
    """Write one entry, and return its bytes; the tensor is gone afterwards."""
    pieces = _pieces(item)
    nbytes = sum(len(piece) for piece in pieces)
    with durable.storage_errors("write", path, what=_key(item.path), offset=at, nbytes=nbytes):
        for piece in pieces:
            durable.write_all(descriptor, memoryview(piece), at)
            at += len(piece)
    return nbytes


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"


def _pieces(item: _Tensor | _Value) -> list[Buffer]:
    if isinstance(item, _Value):
        return value_archive(item.value)
    return tensor_archive(item.read().contiguous())


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[int]:
    """Descriptor of a new file, synced at the end of the block."""
    with durable.storage_errors("create", path, what=path.name):
        descriptor = durable.create_exclusive(path, mode=EXPORT_FILE_MODE)
    try:
        yield descriptor
        with durable.storage_errors("fsync", path, what=path.name):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _metadata(
    items: Sequence[_Tensor | _Value], places: Sequence[_Place], aliases: dict[str, str]
) -> Made:
    """The value of `.metadata`; a tied name is a second key of the same entry."""
    placed = list(zip(items, places, strict=True))
    by_path = {item.path: (item, place) for item, place in placed}
    for alias, name in aliases.items():
        item, place = by_path[MODEL_KEY, name]
        assert isinstance(item, _Tensor)
        tied = _Tensor((MODEL_KEY, alias), item.dtype, item.shape, item.read)
        placed.append((tied, place))
    state = {
        "state_dict_metadata": {_key(item.path): _description(item) for item, _ in placed},
        "planner_data": {_key(item.path): item.path for item, _ in placed},
        "storage_data": {_index(item): _storage(place) for item, place in placed},
        "storage_meta": None,
        "version": _VERSION,
    }
    return Made(Named(_METADATA, "Metadata"), state)


def _description(item: _Tensor | _Value) -> Made:
    if isinstance(item, _Value):
        return Made(Named(_METADATA, "BytesStorageMetadata"))
    layout = Called(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Called(Named(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))  # contiguous
    properties = (dtype_name(item.dtype), layout, False, memory, False)
    chunk = {"offsets": size([0] * len(item.shape)), "sizes": size(item.shape)}
    state = {
        "properties": Made(Named(_METADATA, "TensorProperties"), properties),
        "size": size(item.shape),
        "chunks": [Made(Named(_METADATA, "ChunkStorageMetadata"), chunk)],
    }
    return Made(Named(_METADATA, "TensorStorageMetadata"), state)


def _index(item: _Tensor | _Value) -> Made:
    state: dict[str, Any] = {"fqn": _key(item.path), "index": None}
    if isinstance(item, _Tensor):
        state |= {"offset": size([0] * len(item.shape)), "index": 0}
    return Made(Named(_METADATA, "MetadataIndex"), state)


def _storage(place: _Place) -> Made:
    state = {"relative_path": place.file, "offset": place.offset, "length": place.nbytes}
    return Made(_STORAGE_INFO, state)
