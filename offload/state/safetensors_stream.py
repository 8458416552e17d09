"""Standard safetensors files, a tensor at a time, in constant memory.

[Note: safetensors file]
    8 bytes   little-endian length H of the header
    H bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, plus
              "__metadata__": str -> str; padded with spaces
    rest      the tensors' bytes, row-major, little-endian, without holes or overlap; offsets count
              from here
The writer knows all shapes first, so the header is final before the first tensor arrives; it is
padded so that data starts at 4 KiB, and tensors stand in order of falling item size, so that each
is aligned to its items.
Source: https://github.com/huggingface/safetensors (format section of README.md; `tensor.rs` for
    the checks).

The reader trusts nothing: header length, JSON, names, dtypes, shapes, and the exact cover of the
data are checked once, with caps, before any allocation; after that tensors are read by offset.
Nothing here unpickles, and no name becomes a path.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from offload.errors import CheckpointError
from offload.native import crc32c
from offload.state import durable

DATA_ALIGNMENT_BYTES = 4096
# The format's own cap (tensor.rs MAX_HEADER_SIZE), and ours on what one header may list.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 63

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NAMES}
"""By the name that torch gives it, every dtype that a safetensors file can hold."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; [begin, end) are bytes from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def tensor_nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor."""
    nbytes = dtype.itemsize
    for dimension in shape:
        nbytes *= dimension
    return nbytes


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous CPU tensor as a 1-D uint8 view (no copy)."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8)


def _buffer_of(tensor: torch.Tensor) -> memoryview:
    data: Any = bytes_of(tensor).numpy()
    return memoryview(data)


def checksum_of(tensor: torch.Tensor) -> int:
    """CRC32C of the bytes of a contiguous CPU tensor."""
    nbytes = tensor.numel() * tensor.element_size()
    return crc32c(tensor.data_ptr(), nbytes) if nbytes else 0


def _checksum_of_bytes(data: bytes) -> int:
    return checksum_of(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if data else 0


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[TensorEntry]:
    """Offsets of a file's tensors, without holes: by falling item size, else in the given order.

    Raises:
        CheckpointError: a name appears twice, is reserved, or a dtype has no safetensors name.
    """
    listed = list(tensors)
    seen: set[str] = set()
    for name, dtype, _ in listed:
        if name in seen or name == "__metadata__":
            raise CheckpointError(
                f"tensor name {name!r} is reserved or appears twice; names in one file must differ"
            )
        if dtype not in _NAMES:
            raise CheckpointError(
                f"tensor {name!r} has dtype {dtype}, which safetensors cannot hold; "
                f"expected one of {', '.join(sorted(_DTYPES))}"
            )
        seen.add(name)
    entries, offset = [], 0
    for name, dtype, shape in sorted(listed, key=lambda item: -item[1].itemsize):
        end = offset + tensor_nbytes(dtype, shape)
        entries.append(TensorEntry(name, dtype, tuple(shape), offset, end))
        offset = end
    return entries


def encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and the JSON header, padded to a multiple of `DATA_ALIGNMENT_BYTES`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES
    return (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)


class SafetensorsWriter:
    """Writes one safetensors file; tensors arrive one at a time and in any order.

    Space is allocated when the writer opens. `finish()` syncs and renames; until then, and after
    any error or an early `close()`, `path` is what it was before. Use as a context manager:
    leaving it without `finish()` discards the file.

    Raises (all methods): StorageError or DiskFullError from the file system; CheckpointError for a
        tensor that is not the one the header declares. After an error only `close()` is usable.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        mode: int = durable.PRIVATE_FILE_MODE,
    ) -> None:
        self.path = path
        self.entries = {entry.name: entry for entry in lay_out(tensors)}
        self.checksums: dict[str, int] = {}  # name -> CRC32C, for the tensors written so far
        header = encode_header(self.entries.values(), metadata or {})
        if len(header) - 8 > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"the header of {path.name} would need {len(header)} bytes, more than the format's "
                f"{MAX_HEADER_BYTES}; write more, smaller shards"
            )
        self.header_checksum = _checksum_of_bytes(header)
        self.data_start_bytes = len(header)
        self.nbytes = len(header) + sum(entry.nbytes for entry in self.entries.values())
        self._pending = durable.pending_name(path)
        self._descriptor = -1
        with durable.storage_errors("create", path, what=path.name, nbytes=self.nbytes):
            self._descriptor = durable.create_exclusive(self._pending, mode=mode)
            try:
                os.posix_fallocate(self._descriptor, 0, self.nbytes)
                durable.write_all(self._descriptor, memoryview(header), 0)
            except BaseException:
                self.close()
                raise

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one declared tensor (CPU, any strides) and return the CRC32C of its bytes."""
        entry = self.entries.get(name)
        if entry is None or name in self.checksums:
            raise CheckpointError(
                f"tensor {name!r} was {'already written' if entry else 'not declared'} "
                f"in {self.path.name}"
            )
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}",
                expected=f"{entry.dtype} {entry.shape}, as the header of {self.path.name} declares",
            )
        dense = tensor.detach().contiguous()
        checksum = checksum_of(dense)
        if entry.nbytes:
            offset = self.data_start_bytes + entry.begin
            with durable.storage_errors(
                "write", self.path, what=name, offset=offset, nbytes=entry.nbytes
            ):
                durable.write_all(self._descriptor, _buffer_of(dense), offset)
        self.checksums[name] = checksum
        return checksum

    def finish(self) -> None:
        """Sync the bytes, give the file its name, sync the folder."""
        missing = [name for name in self.entries if name not in self.checksums]
        if missing:
            raise CheckpointError(
                f"{self.path.name} was finished without {len(missing)} declared tensors, "
                f"the first is {missing[0]!r}"
            )
        with durable.storage_errors("fsync", self.path, what=self.path.name, nbytes=self.nbytes):
            os.fsync(self._descriptor)
            self._pending.rename(self.path)
        self._release()
        durable.sync_folder(self.path.parent)

    def close(self) -> None:
        """Discard an unfinished file; does nothing after `finish()`."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._pending.unlink()
            self._release()

    def _release(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SafetensorsReader:
    """Reads tensors of one validated safetensors file by name, without mmap.

    Raises (constructor): CheckpointError naming the file and what is wrong with it; StorageError
        if it cannot be read.
    """

    def __init__(self, path: Path, *, follow_symlinks: bool = False) -> None:
        self.path = path
        self._descriptor = -1
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        flags |= 0 if follow_symlinks else os.O_NOFOLLOW
        with durable.storage_errors("open", path, what=path.name):
            self._descriptor = os.open(path, flags)
            try:
                self.nbytes = durable.regular_file_nbytes(self._descriptor)
                self.metadata, self.entries = self._read_header()
            except BaseException:
                self.close()
                raise

    def read(self, name: str) -> torch.Tensor:
        """One tensor (CPU, contiguous), newly allocated."""
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(entry, tensor)
        return tensor

    def read_range(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of one tensor, row-major (CPU, 1-D), newly allocated."""
        entry = self._entry(name)
        itemsize = entry.dtype.itemsize
        assert start >= 0
        assert (start + numel) * itemsize <= entry.nbytes
        tensor = torch.empty(numel, dtype=entry.dtype)
        if numel:
            offset = self.data_start_bytes + entry.begin + start * itemsize
            with durable.storage_errors(
                "read", self.path, what=name, offset=offset, nbytes=numel * itemsize
            ):
                durable.read_all(self._descriptor, _buffer_of(tensor), offset)
        return tensor

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor of the entry's dtype and shape."""
        entry = self._entry(name)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"tensor {name!r} in {self.path.name} is {entry.dtype} {entry.shape}; "
                f"the destination is {tensor.dtype} {tuple(tensor.shape)}"
            )
        self._fill(entry, tensor)

    def _fill(self, entry: TensorEntry, tensor: torch.Tensor) -> None:
        if entry.nbytes:
            offset = self.data_start_bytes + entry.begin
            with durable.storage_errors(
                "read", self.path, what=entry.name, offset=offset, nbytes=entry.nbytes
            ):
                view = _buffer_of(tensor)
                durable.read_all(self._descriptor, view, offset)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path.name} holds no tensor {name!r}")
        return entry

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorEntry]]:
        if self.nbytes < 8:
            raise self._damaged(f"{self.nbytes} bytes are too few for a length prefix")
        prefix = bytearray(8)
        durable.read_all(self._descriptor, memoryview(prefix), 0)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > min(MAX_HEADER_BYTES, self.nbytes - 8):
            raise self._damaged(
                f"the header claims {header_bytes} bytes; the file has {self.nbytes} and the "
                f"format allows {MAX_HEADER_BYTES}"
            )
        text = bytearray(header_bytes)
        durable.read_all(self._descriptor, memoryview(text), 8)
        self.header_checksum = _checksum_of_bytes(bytes(prefix + text))
        self.data_start_bytes = 8 + header_bytes
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the header is no valid JSON ({error})") from error
        if not isinstance(header, dict) or len(header) > MAX_TENSORS:
            raise self._damaged(f"the header is no JSON object of at most {MAX_TENSORS} tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("__metadata__ is no map of strings")
        entries = {name: self._parse_entry(name, fields) for name, fields in header.items()}
        self._check_cover(entries.values())
        return metadata, entries

    def _parse_entry(self, name: str, fields: Any) -> TensorEntry:
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise self._damaged(f"tensor {name!r} has the unknown dtype {kind!r}")
        if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has no valid shape")
        if not _is_counts(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r} has no valid data_offsets")
        begin, end = offsets
        data_bytes = self.nbytes - self.data_start_bytes
        if not begin <= end <= data_bytes:
            raise self._damaged(
                f"tensor {name!r} claims bytes [{begin}, {end}) of {data_bytes}; the file is "
                "truncated or forged"
            )
        dtype = _DTYPES[kind]
        # Checked as tensor.rs does, zero dimensions included: torch multiplies in 64 bits.
        if math.prod(max(d, 1) for d in shape) * dtype.itemsize >= _MAX_SIZE:
            raise self._damaged(f"tensor {name!r} has a shape whose size overflows 64 bits")
        if tensor_nbytes(dtype, shape) != end - begin:
            raise self._damaged(
                f"tensor {name!r} is {kind} {shape}, which is not the {end - begin} bytes it claims"
            )
        return TensorEntry(name, dtype, tuple(shape), begin, end)

    def _check_cover(self, entries: Iterable[TensorEntry]) -> None:
        offset = 0
        for entry in sorted(entries, key=lambda item: (item.begin, item.end)):
            if entry.begin != offset:
                kind = "overlaps the tensor before it" if entry.begin < offset else "leaves a hole"
                raise self._damaged(f"tensor {entry.name!r} at byte {entry.begin} {kind}")
            offset = entry.end
        if offset != self.nbytes - self.data_start_bytes:
            raise self._damaged(
                f"tensors cover {offset} of {self.nbytes - self.data_start_bytes} data bytes"
            )

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: no valid safetensors file: {reason}")

    def close(self) -> None:
        """Close the file; repeated calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _MAX_SIZE for v in value)
