"""Deltas: an export that holds only the tensors whose bits differ from those of a base.

A fine-tune that left most weights frozen is a small change of a base that its users already have.

[Note: delta]
    delta.json               what is the same and what is not; written last
    delta.safetensors        the tensors that differ, or delta-00001-of-00002.safetensors, ...
    config.json, ...         the model's configuration files, as in the export
`delta.json` lists the tensors of the export in its order, each with dtype, shape and CRC32C, the
names of those that the base has bit for bit, and the base's index digest: the SHA-256 of the names,
dtypes and shapes of all its tensors. Applied to the base, the delta gives the files of the export
bit for bit: every tensor is checked on its way. Nothing of the base is in a delta, and no name in
it becomes a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from offload.errors import CheckpointError, listed
from offload.state import durable
from offload.state.export import (
    EXPORT_FILE_MODE,
    EXPORT_FOLDER_MODE,
    MAX_SHARD_BYTES,
    shard,
    shard_names,
    write_configs,
    write_shards,
    write_weights,
)
from offload.state.exported import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    Exported,
    ExportedCheckpoint,
    Precision,
    open_checkpoint,
)
from offload.state.safetensors_stream import (
    MAX_TENSORS,
    TORCH_DTYPES,
    SafetensorsReader,
    bytes_of,
    checksum_of,
)
from offload.state.weight_files import INDEX_NAME, SINGLE_NAME, StoredTensor, open_files

DELTA_NAME = "delta.json"
_STEM = "delta"
_FORMAT_VERSION = 1
_MAX_DELTA_BYTES = 512 << 20
_MAX_FILES = 100_000
_REMEDY = "give the base that the delta was made from; delta.json has its index digest"


@dataclass(frozen=True, slots=True)
class DeltaSummary:
    """What a delta holds; bytes are of tensors."""

    folder: Path
    num_changed: int
    num_unchanged: int
    changed_bytes: int
    total_bytes: int


class _Base(Protocol):
    """The tensors that a delta is against."""

    @property
    def kinds(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Folder:
    """A base that is a folder of safetensors files."""

    tensors: Mapping[str, StoredTensor]

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].reader.read(name)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A base that is a checkpoint: its export in the precision of the delta."""

    exported: ExportedCheckpoint
    items: Mapping[str, Exported]

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (item.dtype, item.shape) for name, item in self.items.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.exported.read(self.items[name])


@dataclass(frozen=True, slots=True)
class _Listed:
    """One tensor of the export, as `delta.json` lists it."""

    item: Exported
    crc32c: int
    changed: bool


@dataclass(frozen=True, slots=True)
class _Delta:
    """A parsed `delta.json`."""

    base_digest: str
    precision: Precision
    max_shard_bytes: int
    num_files: int
    tensors: tuple[_Listed, ...]


def export_delta(
    checkpoint: str | Path,
    base: str | Path,
    directory: str | Path,
    *,
    tag: str | None = None,
    dtype: Precision = "compute",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> DeltaSummary:
    """Write what an export of a checkpoint has that `base` has not, to `directory`.

    A few tensors are in memory at a time, whatever the size.

    Args:
        checkpoint: as of `export_checkpoint`.
        base: a folder of safetensors files (Hugging Face, or an export), or a checkpoint.
        directory: where to write.
        tag: which checkpoint.
        dtype: as of `export_checkpoint`. Tensors are the same when their dtypes are, too.
        max_shard_bytes: of one file.

    Raises:
        CheckpointError: no undamaged checkpoint or base; or the base has no tensor of the export:
            nothing was written.
        DiskFullError, StorageError: the file system.
    """
    root = Path(directory)
    _refuse_overwriting(root, base)
    with open_checkpoint(Path(checkpoint), tag) as found, _opened(Path(base), dtype) as known:
        exported = ExportedCheckpoint(found, dtype)
        tensors = _compared(exported, known, base)
        changed = [each.item for each in tensors if each.changed]
        shards = shard(changed, max_shard_bytes)
        names = shard_names(len(shards), _STEM)
        digest = index_digest(known.kinds)
        durable.make_folder(root, mode=EXPORT_FOLDER_MODE)
        _remove_stale(root)
        write_configs(root, exported.configs)
        metadata = {"base_index_sha256": digest}
        files = dict(zip(names, shards, strict=True))
        write_shards(root, files, exported.read, metadata)
        delta = _Delta(digest, dtype, max_shard_bytes, len(names), tuple(tensors))
        durable.write_file(root / DELTA_NAME, _encode(delta), mode=EXPORT_FILE_MODE)
    return DeltaSummary(
        root,
        num_changed=len(changed),
        num_unchanged=len(tensors) - len(changed),
        changed_bytes=sum(item.nbytes for item in changed),
        total_bytes=sum(each.item.nbytes for each in tensors),
    )


def apply_delta(base: str | Path, delta: str | Path, out: str | Path) -> Path:
    """Write to `out` the export that `delta` was made from, bit for bit, and return it.

    `base` is what the delta was made against, in any of the forms that `export_delta` takes; a copy
    of it will do. Tensors are read, checked and written one at a time.

    Raises:
        CheckpointError: the base is another: the message names the tensor; or the delta is damaged.
            No file of an earlier export in `out` has been replaced.
        DiskFullError, StorageError: the file system.
    """
    source, root = Path(delta), Path(out)
    _refuse_overwriting(root, base, delta)
    parsed = _read_delta(source)
    listed_by_name = {each.item.name: each for each in parsed.tensors}
    with contextlib.ExitStack() as files:
        changed = _open_changed(source, parsed, files)
        known = files.enter_context(_opened(Path(base), parsed.precision))
        _check_base(base, known, parsed)

        def read(item: Exported) -> torch.Tensor:
            expected = listed_by_name[item.name]
            where = source if expected.changed else Path(base)
            tensor = (
                changed[item.name].read(item.name) if expected.changed else known.read(item.name)
            )
            if checksum_of(tensor) != expected.crc32c:
                raise CheckpointError(
                    f"{where}: {item.name!r} does not have the bits that {source / DELTA_NAME} "
                    "expects",
                    remedy="the delta is damaged: make it again" if expected.changed else _REMEDY,
                )
            return tensor

        durable.make_folder(root, mode=EXPORT_FOLDER_MODE)
        write_weights(root, [each.item for each in parsed.tensors], read, parsed.max_shard_bytes)
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            if (source / name).is_file():
                text = durable.read_small_file(source / name, limit_bytes=_MAX_DELTA_BYTES)
                durable.write_file(root / name, text, mode=EXPORT_FILE_MODE)
    return root


def index_digest(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """SHA-256 over the names, dtypes and shapes of tensors, in the order of their names."""
    index = [[name, _dtype_name(kinds[name][0]), list(kinds[name][1])] for name in sorted(kinds)]
    return hashlib.sha256(json.dumps(index, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def _opened(path: Path, dtype: Precision) -> Iterator[_Base]:
    """A base: a folder of weight files, or a checkpoint.

    Raises:
        CheckpointError: it is neither.
    """
    if (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file():
        with contextlib.ExitStack() as files:
            yield _Folder(open_files(path, files))
        return
    if (path / DELTA_NAME).is_file():
        raise CheckpointError(
            f"{path} is a delta itself", remedy="apply it to its base first, and give the result"
        )
    with open_checkpoint(path, None) as found:
        exported = ExportedCheckpoint(found, dtype)
        yield _Checkpoint(exported, {item.name: item for item in exported.items})


def _compared(exported: ExportedCheckpoint, known: _Base, base: str | Path) -> list[_Listed]:
    """Every tensor of the export, read once, with whether the base has its bits."""
    kinds = known.kinds
    if not any(item.name in kinds for item in exported.items):
        names = [item.name for item in exported.items]
        raise CheckpointError(
            f"{base} has no tensor of the export: neither {listed(names)}",
            expected="the model that training started from",
            remedy="export without a delta",
        )
    return [
        _compare(
            exported, item, known if kinds.get(item.name) == (item.dtype, item.shape) else None
        )
        for item in exported.items
    ]


def _compare(exported: ExportedCheckpoint, item: Exported, known: _Base | None) -> _Listed:
    """Read one tensor, and that of a base that has it in the same dtype and shape."""
    tensor = exported.read(item).contiguous()
    same = known is not None and torch.equal(bytes_of(known.read(item.name)), bytes_of(tensor))
    return _Listed(item, checksum_of(tensor), changed=not same)


def _check_base(base: str | Path, known: _Base, delta: _Delta) -> None:
    """Refuse a base that lacks a tensor, or has it of another kind, before anything is written."""
    kinds = known.kinds
    for each in delta.tensors:
        wanted = (each.item.dtype, each.item.shape)
        if not each.changed and kinds.get(each.item.name) != wanted:
            found = kinds.get(each.item.name)
            raise CheckpointError(
                f"{base} is not the base of this delta: {each.item.name!r} is "
                + ("missing" if found is None else f"{found[0]} {found[1]}"),
                expected=f"{wanted[0]} {wanted[1]}, of a base with the index digest "
                f"{delta.base_digest}; this one has {index_digest(kinds)}",
                remedy=_REMEDY,
            )


def _refuse_overwriting(root: Path, *sources: str | Path) -> None:
    if root.resolve() in {Path(source).resolve() for source in sources}:
        raise CheckpointError(f"{root} is also what is read", remedy="write to a folder of its own")


def _remove_stale(root: Path) -> None:
    """Remove an earlier delta, its description first."""
    for path in (root / DELTA_NAME, root / f"{_STEM}.safetensors", *root.glob(f"{_STEM}-*-of-*")):
        with durable.storage_errors("unlink", path, what=path.name):
            path.unlink(missing_ok=True)
    durable.sync_folder(root)


# -- delta.json ------------------------------------------------------------------------------------


def _encode(delta: _Delta) -> bytes:
    content = {
        "format": "offload delta",
        "version": _FORMAT_VERSION,
        "base": {"index_sha256": delta.base_digest},
        "dtype": delta.precision,
        "max_shard_bytes": delta.max_shard_bytes,
        "num_files": delta.num_files,
        "unchanged": [each.item.name for each in delta.tensors if not each.changed],
        "tensors": [
            {
                "name": each.item.name,
                "dtype": _dtype_name(each.item.dtype),
                "shape": list(each.item.shape),
                "crc32c": f"{each.crc32c:08x}",
            }
            for each in delta.tensors
        ],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _read_delta(folder: Path) -> _Delta:
    """Raises CheckpointError where there is none, or not of this form."""
    path = folder / DELTA_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no delta: it has no {DELTA_NAME}",
            remedy="give the folder that `offload export --delta` wrote",
        )
    try:
        content = json.loads(durable.read_small_file(path, limit_bytes=_MAX_DELTA_BYTES))
        return _parse(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the description of the delta is malformed ({error})",
            remedy="make the delta again",
        ) from error


def _parse(content: Any) -> _Delta:
    if content["format"] != "offload delta" or content["version"] != _FORMAT_VERSION:
        raise ValueError(f"format version {content['version']!r}, expected {_FORMAT_VERSION}")
    if content["dtype"] not in ("compute", "fp32") or len(content["tensors"]) > MAX_TENSORS:
        raise ValueError("unknown dtype, or too many tensors")
    unchanged = set(content["unchanged"])
    tensors = tuple(_parse_tensor(each, unchanged) for each in content["tensors"])
    names = {each.item.name for each in tensors}
    if len(names) != len(tensors) or not unchanged <= names:
        raise ValueError("a tensor is listed twice, or not at all")
    max_shard_bytes, num_files = content["max_shard_bytes"], content["num_files"]
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError("max_shard_bytes is no size")
    if type(num_files) is not int or not 1 <= num_files <= _MAX_FILES:
        raise ValueError("num_files is no number of files")
    digest = str(content["base"]["index_sha256"])
    return _Delta(digest, content["dtype"], max_shard_bytes, num_files, tensors)


def _parse_tensor(entry: Any, unchanged: Iterable[str]) -> _Listed:
    name, shape = entry["name"], entry["shape"]
    dtype = TORCH_DTYPES[entry["dtype"]]
    if type(name) is not str:
        raise ValueError(f"{name!r} is no name of a tensor")
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise ValueError(f"{name!r} has no valid shape")
    item = Exported(name, None, dtype, tuple(shape))
    return _Listed(item, int(entry["crc32c"], 16), changed=name not in unchanged)


def _open_changed(
    folder: Path, delta: _Delta, files: contextlib.ExitStack
) -> dict[str, SafetensorsReader]:
    """The files of a delta, which hold together what it lists as changed.

    Raises:
        CheckpointError: they do not.
    """
    found: dict[str, SafetensorsReader] = {}
    for name in shard_names(delta.num_files, _STEM):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}", remedy="copy the whole delta")
        reader = files.enter_context(SafetensorsReader(folder / name, follow_symlinks=True))
        found |= dict.fromkeys(reader.entries, reader)
    for each in delta.tensors:
        if not each.changed:
            continue
        reader_of = found.get(each.item.name)
        entry = None if reader_of is None else reader_of.entries[each.item.name]
        if entry is None or (entry.dtype, entry.shape) != (each.item.dtype, each.item.shape):
            raise CheckpointError(
                f"{folder}: its files do not hold {each.item.name!r} as {DELTA_NAME} lists it",
                remedy="copy the whole delta, or make it again",
            )
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
