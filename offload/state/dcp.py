"""Directories of torch.distributed.checkpoint, read without torch.distributed and without pickle.

See [Note: DCP directory] in dcp_export.py for the layout. A tensor may be cut into chunks, as ranks
wrote them: they are put together, and have to cover it exactly. Names of files in `.metadata` are
names beside it, or refused.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self

import torch

from offload.errors import CheckpointError
from offload.state import durable
from offload.state.foreign import (
    OPTIMIZER_GROUPS,
    Foreign,
    ForeignTensor,
    Known,
    prefixes_of,
    shared_prefix,
)
from offload.state.pickled import Constructor, Record, class_names, interpret
from offload.state.stored_zip import ReadOnlyFile
from offload.state.torch_archive import TENSOR_NAMES, ArchivedTensor, TorchArchive, as_shape

METADATA_NAME = ".metadata"
_MAX_METADATA_BYTES = 512 << 20
_MAX_VALUES = 32_000_000
_MAX_OPEN_FILES = 16
_MAX_COMPARISONS = 1_000_000
_FILE_NAME = re.compile(r"[^/\0]{1,255}")
_MODULE = "torch.distributed.checkpoint.metadata"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"


def _ignored(*_: Any) -> None:
    """For a value that nobody needs."""


_IGNORED = Constructor(_ignored)


def _member(owner: Any, name: Any) -> None:
    """What Python before 3.11.4 writes for a member of an enumeration: `getattr(class, name)`."""
    if owner is not _IGNORED or type(name) is not str:
        raise ValueError("an attribute of something that is no known enumeration")


_NAMES = {
    **TENSOR_NAMES,
    **class_names(
        _MODULE,
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "MetadataIndex", "StorageMeta"),
    ),
    **class_names("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    **class_names(_OLD_MODULE, "TensorProperties"),
    (_MODULE, "_MEM_FORMAT_ENCODING"): _IGNORED,
    (_OLD_MODULE, "MEM_FORMAT_ENCODING"): _IGNORED,
    ("builtins", "getattr"): Constructor(_member),
    ("torch.serialization", "_get_layout"): _IGNORED,
    # Where the directory was when it was written.
    ("pathlib", "PosixPath"): _IGNORED,
    ("pathlib._local", "PosixPath"): _IGNORED,
}


@dataclass(frozen=True, slots=True)
class _Place:
    """An entry: a file of torch.save inside a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and its entry."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _Place


class DcpDirectory:
    """An open directory of torch.distributed.checkpoint. A context manager.

    Attributes:
        tensors: by key.
        values: keys of plain values; see `value`.

    Raises (constructor): CheckpointError: it is damaged, or asks for anything but plain values and
        tensors. StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: OrderedDict[str, ReadOnlyFile] = OrderedDict()
        where = path / METADATA_NAME
        data = durable.read_small_file(where, limit_bytes=_MAX_METADATA_BYTES)
        metadata = interpret(data, _NAMES, where=str(where), max_values=_MAX_VALUES)
        try:
            places = _places_of(metadata)
            self.tensors: dict[str, ForeignTensor] = {}
            self.values: dict[str, _Place] = {}
            for key, described in _fields(metadata, "Metadata", "state_dict_metadata").items():
                if type(described) is Record and described.kind.endswith(".BytesStorageMetadata"):
                    self.values[key] = places[key, None]
                else:
                    self.tensors[key] = self._tensor(key, described, places)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: the metadata is malformed ({str(error)[:200]})"
            ) from error

    def value(self, key: str) -> Any:
        """A plain value.

        Raises:
            CheckpointError: it is damaged, or not plain.
            StorageError: it cannot be read.
        """
        return self._archive(self.values[key]).value

    def _tensor(
        self, key: str, described: Any, places: dict[tuple[str, Any], _Place]
    ) -> ForeignTensor:
        size = as_shape(_fields(described, "TensorStorageMetadata", "size", tuple))
        properties = _fields(described, "TensorStorageMetadata", "properties", Record)
        dtype = properties.state[0] if type(properties.state) is tuple else properties.get("dtype")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{key!r} has no dtype")
        chunks = []
        for chunk in _fields(described, "TensorStorageMetadata", "chunks", list):
            offsets = as_shape(_fields(chunk, "ChunkStorageMetadata", "offsets", tuple))
            sizes = as_shape(_fields(chunk, "ChunkStorageMetadata", "sizes", tuple))
            chunks.append(_Chunk(offsets, sizes, places[key, offsets]))
        _check_cover(key, size, chunks)
        return ForeignTensor(dtype, size, partial(self._read, key, dtype, size, chunks))

    def _read(
        self, key: str, dtype: torch.dtype, size: tuple[int, ...], chunks: Sequence[_Chunk]
    ) -> torch.Tensor:
        if len(chunks) == 1:
            return self._read_chunk(key, dtype, chunks[0])
        whole = torch.empty(size, dtype=dtype)
        for chunk in chunks:
            box = tuple(
                slice(start, start + length)
                for start, length in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[box] = self._read_chunk(key, dtype, chunk)
        return whole

    def _read_chunk(self, key: str, dtype: torch.dtype, chunk: _Chunk) -> torch.Tensor:
        archive = self._archive(chunk.place)
        found = archive.value
        if not isinstance(found, ArchivedTensor) or (found.dtype, found.shape) != (
            dtype,
            chunk.sizes,
        ):
            raise CheckpointError(
                f"{self.path / chunk.place.file}: at byte {chunk.place.offset} there is not the "
                f"chunk of {key!r} that {METADATA_NAME} says: {dtype} {chunk.sizes}"
            )
        return archive.read(found)

    def _archive(self, place: _Place) -> TorchArchive:
        file = self._files.get(place.file)
        if file is None:
            if len(self._files) == _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file = self._files[place.file] = ReadOnlyFile(self.path / place.file)
        self._files.move_to_end(place.file)
        return TorchArchive(file, start=place.offset, nbytes=place.nbytes)

    def close(self) -> None:
        """Close its files."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_dcp(directory: DcpDirectory, known: Known) -> Foreign:
    """What a directory has for the engine; prefixes such as "model." are found from its names.

    Raises:
        CheckpointError: a plain value is damaged.
        StorageError: one cannot be read.
    """
    keys = [*directory.tensors, *directory.values]
    foreign = Foreign(directory.path, "torch.distributed.checkpoint")
    of_state = _state_prefix(keys, known)
    state = [key for key in keys if of_state is not None and key.startswith(of_state)]
    of_weights = shared_prefix(
        {key: [p for p, rest in prefixes_of(key) if rest in known.names] for key in keys}
    )
    others = set(keys) - set(state)
    tops = {name.split(".")[0] for name in known.names}
    for key in sorted(others):
        rest = key.removeprefix(of_weights or "")
        is_weight = of_weights is not None and key.startswith(of_weights)
        if is_weight and (of_weights or rest.split(".")[0] in tops) and key in directory.tensors:
            foreign.weights[rest] = directory.tensors[key]
            others.discard(key)
    for key in state:
        name, _, field_name = key.removeprefix(of_state or "").rpartition(".")
        is_tensor = key in directory.tensors
        value = directory.tensors[key] if is_tensor else directory.value(key)
        foreign.state.setdefault(name, {})[field_name] = value
    foreign.not_resumed = _left(others)
    return foreign


def _state_prefix(keys: Sequence[str], known: Known) -> str | None:
    """The prefix behind which "<name>.<field>" stands; None if there is no optimizer state."""

    def prefixes(key: str) -> Iterator[str]:
        head, _, last = key.rpartition(".")
        if last in known.fields:
            yield from (prefix for prefix, name in prefixes_of(head) if name in known.names)

    return shared_prefix({key: list(prefixes(key)) for key in keys})


def _left(keys: set[str]) -> list[str]:
    """What other keys are of, in words."""
    groups = {key for key in keys if ".param_groups." in key or key.startswith("param_groups.")}
    tops = sorted({key.split(".")[0] for key in keys - groups})
    return ([OPTIMIZER_GROUPS] if groups else []) + tops


# -- .metadata -------------------------------------------------------------------------------------


def _fields(record: Any, kind: str, name: str, of: type = dict) -> Any:
    """A field of a record of a kind. Raises TypeError where it is another, or of another type."""
    if type(record) is not Record or not record.kind.endswith(f".{kind}"):
        raise TypeError(f"something that is no {kind}")
    value = record.get(name)
    if type(value) is not of:
        raise TypeError(f"{name} of a {kind} is a {type(value).__name__}")
    return value


def _places_of(metadata: Any) -> dict[tuple[str, Any], _Place]:
    """(key, offsets of a chunk or None) -> the entry."""
    places = {}
    for index, place in _fields(metadata, "Metadata", "storage_data").items():
        key = _fields(index, "MetadataIndex", "fqn", str)
        offsets = index.get("offset")
        name = _fields(place, "_StorageInfo", "relative_path", str)
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"{name[:100]!r} is no name of a file beside it")
        if place.get("transform_descriptors"):
            raise ValueError(f"{key!r} is compressed or encrypted by an extension")
        offset = _fields(place, "_StorageInfo", "offset", int)
        nbytes = _fields(place, "_StorageInfo", "length", int)
        offsets = None if offsets is None else as_shape(offsets)
        places[key, offsets] = _Place(name, offset, nbytes)
    return places


def _check_cover(key: str, size: tuple[int, ...], chunks: Sequence[_Chunk]) -> None:
    """Raise ValueError where chunks do not cover a tensor exactly."""
    for chunk in chunks:
        if len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size):
            raise ValueError(f"a chunk of {key!r} has other dimensions than it")
        if any(
            start + length > whole
            for start, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        ):
            raise ValueError(f"a chunk of {key!r} is not inside of it")
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(size):
        raise ValueError(f"the chunks of {key!r} do not cover it")
    budget = _MAX_COMPARISONS
    active: list[_Chunk] = []
    for chunk in sorted(chunks, key=lambda c: c.offsets):
        if not prod(chunk.sizes):
            continue
        active = [a for a in active if not size or a.offsets[0] + a.sizes[0] > chunk.offsets[0]]
        budget -= len(active) + 1
        if budget < 0:
            raise ValueError(f"{key!r} is cut into too many chunks")
        if any(_overlap(other, chunk) for other in active):
            raise ValueError(f"chunks of {key!r} overlap")
        active.append(chunk)


def _overlap(a: _Chunk, b: _Chunk) -> bool:
    return all(
        max(a.offsets[d], b.offsets[d]) < min(a.offsets[d] + a.sizes[d], b.offsets[d] + b.sizes[d])
        for d in range(len(a.sizes))
    )
