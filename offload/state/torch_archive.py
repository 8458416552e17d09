"""Tensors and plain values out of what `torch.save` wrote, without unpickling.

[Note: torch archive]
    <name>/data.pkl     the pickle of the value; a storage in it is a persistent id
                        ("storage", class, key, device, number of elements)
    <name>/data/<key>   the bytes of a storage
    <name>/byteorder    "little"
    <name>/version, .format_version, .storage_alignment, .data/serialization_id
It is a zip archive whose entries are stored, so that a tensor is a range of the file; stored_zip.py
says what is checked of it. A tensor lies inside its storage and has no more elements than that,
before memory for it is asked for. See pickled.py for what becomes of the pickle.
Source: torch/serialization.py, torch/_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from offload.state.pickled import Constructor, Names, interpret
from offload.state.safetensors_stream import MAX_DIMENSIONS, TORCH_DTYPES, bytes_of
from offload.state.stored_zip import ReadOnlyFile, StoredZip

MAX_PICKLE_BYTES = 64 << 20
_ORDER_BYTES = 16
_MAX_SIZE = 1 << 62
_MAX_TENSOR_BYTES = 1 << 63
_ENTRY_NAMES = (
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]{1,18}"
)

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class _StorageClass:
    """The class of a storage: the dtype of its elements; None: bytes."""

    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage in the archive; `dtype` None: only bytes."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ArchivedTensor:
    """A tensor that stands in an archive; `offset` and `stride` count elements."""

    storage: _Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class TorchArchive:
    """What one call of `torch.save` wrote: a file, or [start, start + nbytes) of one.

    Attributes:
        value: plain values as of `pickled.interpret`, and `ArchivedTensor`.

    Raises (constructor): CheckpointError: it is no such archive, damaged, or asks for anything but
        plain values and tensors. StorageError: it cannot be read.
    """

    def __init__(
        self,
        file: ReadOnlyFile,
        *,
        start: int = 0,
        nbytes: int | None = None,
        names: Names | None = None,
    ) -> None:
        """`names`: what its pickle may name beside tensors."""
        self._zip = StoredZip(file, _ENTRY_NAMES, start=start, nbytes=nbytes)
        order = (
            self._zip.small("byteorder", limit_bytes=_ORDER_BYTES)
            if ("byteorder" in self._zip.entries)
            else b"little"
        )
        if order != b"little":
            raise self._zip.damaged("its numbers are not little-endian")
        self.value = interpret(
            self._zip.small("data.pkl", limit_bytes=MAX_PICKLE_BYTES),
            {**TENSOR_NAMES, **(names or {})},
            where=str(file.path),
            persistent=self._storage,
        )

    def read(self, tensor: ArchivedTensor) -> torch.Tensor:
        """A tensor of the archive (CPU, contiguous), newly allocated.

        Raises:
            CheckpointError: its storage is damaged.
            StorageError: it cannot be read.
        """
        itemsize = tensor.dtype.itemsize
        span = _span(tensor.shape, tensor.stride)
        name = f"data/{tensor.storage.key}"
        entry = self._zip.entries[name]
        whole = span * itemsize == entry.nbytes
        if not whole:
            self._zip.verify(name)
        flat = torch.empty(span, dtype=tensor.dtype)
        if span:
            data: Any = bytes_of(flat).numpy()
            self._zip.file.read_into(memoryview(data), entry.offset + tensor.offset * itemsize)
            if whole:
                self._zip.check(name, memoryview(data))
        return flat.as_strided(tensor.shape, tensor.stride).contiguous()

    def verify(self) -> None:
        """Read every entry once, and compare it with its CRC32.

        Raises:
            CheckpointError: one is damaged.
            StorageError: one cannot be read.
        """
        for name in self._zip.entries:
            self._zip.verify(name)

    def _storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id; see [Note: torch archive]."""
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("a persistent id that is no storage")
        _, kind, key, _, numel = identity
        if type(kind) is not _StorageClass or type(key) is not str or not _is_size(numel):
            raise ValueError("a persistent id that is no storage")
        entry = self._zip.entries.get(f"data/{key}")
        nbytes = numel * (1 if kind.dtype is None else kind.dtype.itemsize)
        if entry is None or entry.nbytes != nbytes:
            raise ValueError(f"a storage of {nbytes} bytes that the archive does not hold")
        return _Storage(key, kind.dtype, nbytes)


# -- what names in the pickle stand for ------------------------------------------------------------


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def as_shape(value: Any) -> tuple[int, ...]:
    """A tuple of sizes. Raises ValueError for anything else."""
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise ValueError("a shape that is no tuple of sizes")
    return value


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of memory from the first to the last of a tensor; 0 if it has none."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> ArchivedTensor:
    """A tensor over a storage, inside of it, and no larger than it."""
    shape, stride = as_shape(shape), as_shape(stride)
    if type(storage) is not _Storage or not _is_size(offset) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, an offset and strides")
    if hooks or metadata:
        raise ValueError("a tensor with hooks, or one that is conjugate or negative")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None:
        raise ValueError("a tensor without a dtype")
    # Zero dimensions included: torch multiplies in 64 bits.
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= _MAX_TENSOR_BYTES:
        raise ValueError("a shape whose size overflows 64 bits")
    held = storage.nbytes // dtype.itemsize
    span = _span(shape, stride)
    if prod(shape) > held or (span and offset + span > held):
        raise ValueError(f"a tensor of shape {shape} that is not inside its storage")
    return ArchivedTensor(storage, dtype, shape, stride, offset)


def _tensor_with_dtype(*arguments: Any) -> ArchivedTensor:
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a dtype")
    return _tensor(*arguments[:6], dtype=dtype)


def _parameter(data: Any, _requires_grad: Any, hooks: Any) -> ArchivedTensor:
    if type(data) is not ArchivedTensor or hooks:
        raise ValueError("a parameter that is no tensor, or has hooks")
    return data


def _from_type(make: Any, kind: Any, arguments: Any, _state: Any) -> ArchivedTensor:
    if make not in _REBUILDING or kind not in _TENSOR_CLASSES or type(arguments) is not tuple:
        raise ValueError("a tensor of a class that is not known here")
    made: ArchivedTensor = make.make(*arguments)
    return made


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict with arguments")
    return {}


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.Parameter")
_REBUILDING = (Constructor(_tensor), Constructor(_tensor_with_dtype))
TENSOR_NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Constructor(_ordered_dict),
    ("torch", "Size"): Constructor(as_shape),
    ("torch", "Tensor"): _TENSOR_CLASSES[0],
    ("torch.nn.parameter", "Parameter"): _TENSOR_CLASSES[1],
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILDING[0],
    ("torch._utils", "_rebuild_tensor_v3"): _REBUILDING[1],
    ("torch._utils", "_rebuild_parameter"): Constructor(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Constructor(_from_type),
    ("torch.storage", "UntypedStorage"): _StorageClass(None),
    **{("torch", name): _StorageClass(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
}
"""What names in the pickle of an archive stand for: classes of tensors, storages and dtypes."""
