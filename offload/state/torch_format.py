"""Bytes that `torch.load` reads, written without pickling: plain values, tensors, named objects.

The mirror of pickled.py and torch_archive.py; see [Note: pickles], [Note: torch archive] and
[Note: stored zip] there. A tensor is written from its own memory, without a copy.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.state.safetensors_stream import bytes_of
from offload.state.torch_archive import STORAGES

_FOLDER = "archive"
_VERSION = b"3\n"
_FORMAT_VERSION = b"1"
# From here on zip needs its 64-bit forms.
_WIDE = 0xFFFFFFFF
_ZIP_VERSION, _ZIP64_VERSION, _UTF8 = 20, 45, 0x0800
_EPOCH_DATE = 0x21  # 1980-01-01: the bytes of an archive follow from its content alone

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Named:
    """A name that the reader resolves: a class, a function, a dtype."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Called:
    """What a named function returns for arguments."""

    target: Named
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """An object of a named class, with a state: a dict, a tuple, or None for none.

    It may be a key of a dict: each is only equal to itself.
    """

    target: Named
    state: Any = None


@dataclass(frozen=True, slots=True)
class _Persistent:
    """Something that stands beside the pickle."""

    identity: tuple[Any, ...]


def encode(value: Any) -> bytes:
    """A pickle, protocol 2, of None, bool, int, float, str, list, tuple, dict, and the above.

    Raises:
        CheckpointError: it has something else in it.
    """
    parts: list[bytes] = [b"\x80\x02"]
    _encode(value, parts)
    parts.append(b".")
    return b"".join(parts)


def _encode(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, tuple):
        parts.append(b"(")
        for item in value:
            _encode(item, parts)
        parts.append(b"t")
    elif isinstance(value, list):
        parts.append(b"](")
        for item in value:
            _encode(item, parts)
        parts.append(b"e")
    elif isinstance(value, Mapping):
        parts.append(b"}(")
        for key, item in value.items():
            _encode(key, parts)
            _encode(item, parts)
        parts.append(b"u")
    elif isinstance(value, Named):
        parts.append(f"c{value.module}\n{value.name}\n".encode())
    elif isinstance(value, Called):
        _encode(value.target, parts)
        _encode(value.arguments, parts)
        parts.append(b"R")
    elif isinstance(value, Made):
        _encode(value.target, parts)
        parts.append(b")\x81")
        if value.state is not None:
            _encode(value.state, parts)
            parts.append(b"b")
    elif isinstance(value, _Persistent):
        _encode(value.identity, parts)
        parts.append(b"Q")
    else:
        parts.append(_scalar(value))


def _scalar(value: Any) -> bytes:
    if value is None:
        return b"N"
    if type(value) is bool:
        return b"\x88" if value else b"\x89"
    if type(value) is int:
        nbytes = value.bit_length() // 8 + 1
        if nbytes < 256:
            return b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little", signed=True)
    if type(value) is float:
        return b"G" + struct.pack(">d", value)
    if type(value) is str:
        text = value.encode("utf-8", errors="surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    raise CheckpointError(
        f"a {type(value).__module__}.{type(value).__qualname__} has no plain form for torch",
        expected="None, bool, int, float, str, or lists, tuples and dicts of these",
    )


def dtype_name(dtype: torch.dtype) -> Named:
    """A dtype, as torch pickles it."""
    return Named("torch", str(dtype).removeprefix("torch."))


def size(shape: Sequence[int]) -> Called:
    """A `torch.Size`."""
    return Called(Named("torch", "Size"), (tuple(shape),))


def tensor_archive(tensor: torch.Tensor) -> list[Buffer]:
    """What `torch.save` writes of a contiguous CPU tensor; pieces of it are the tensor's memory.

    Raises:
        CheckpointError: torch has no form for the dtype here.
    """
    name = next((name for name, dtype in STORAGES.items() if dtype == tensor.dtype), None)
    kind = Named("torch", name) if name else Named("torch.storage", "UntypedStorage")
    numel = tensor.numel() * (1 if name else tensor.element_size())
    storage = _Persistent(("storage", kind, "0", "cpu", numel))
    stride = torch.empty(tensor.shape, device="meta").stride()
    hooks = Called(Named("collections", "OrderedDict"), ())
    arguments = (storage, 0, tuple(tensor.shape), stride, False, hooks)
    if name:
        rebuilt = Called(Named("torch._utils", "_rebuild_tensor_v2"), arguments)
    else:
        typed = (*arguments, dtype_name(tensor.dtype))
        rebuilt = Called(Named("torch._utils", "_rebuild_tensor_v3"), typed)
    data: Any = bytes_of(tensor.detach()).numpy()
    return _archive(encode(rebuilt), {"data/0": memoryview(data)})


def value_archive(value: Any) -> list[Buffer]:
    """What `torch.save` writes of a plain value.

    Raises:
        CheckpointError: it is not plain.
    """
    return _archive(encode(value), {})


def _archive(pickle: bytes, storages: Mapping[str, Buffer]) -> list[Buffer]:
    entries: dict[str, Buffer] = {
        "data.pkl": pickle,
        ".format_version": _FORMAT_VERSION,
        "byteorder": b"little",
        **storages,
        "version": _VERSION,
    }
    return stored_zip({f"{_FOLDER}/{name}": data for name, data in entries.items()})


def stored_zip(entries: Mapping[str, Buffer], *, wide_from: int = _WIDE) -> list[Buffer]:
    """A zip archive of entries that are stored, in pieces; 64-bit forms from `wide_from` on."""
    pieces: list[Buffer] = []
    directory: list[bytes] = []
    at = 0
    for name, data in entries.items():
        encoded, nbytes, crc32 = name.encode(), len(data), zlib.crc32(data)
        wide = nbytes >= wide_from or at >= wide_from
        version = _ZIP64_VERSION if wide else _ZIP_VERSION
        shown = _WIDE if wide else nbytes
        local_extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if wide else b""
        local = struct.pack(
            "<4s5H3I2H", b"PK\x03\x04", version, _UTF8, 0, 0, _EPOCH_DATE, crc32, shown, shown,
            len(encoded), len(local_extra),
        )  # fmt: skip
        extra = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, at) if wide else b""
        directory.append(
            struct.pack(
                "<4s6H3I5H2I", b"PK\x01\x02", version, version, _UTF8, 0, 0, _EPOCH_DATE, crc32,
                shown, shown, len(encoded), len(extra), 0, 0, 0, 0, _WIDE if wide else at,
            )
            + encoded
            + extra
        )  # fmt: skip
        pieces += [local + encoded + local_extra, data]
        at += len(local) + len(encoded) + len(local_extra) + nbytes
    listed = b"".join(directory)
    count, nbytes = len(directory), len(listed)
    # As torch does, the 64-bit end is always there; the other one refers to it where it has to.
    large = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count,
        nbytes, at,
    )  # fmt: skip
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at + nbytes, 1)
    shown_at = _WIDE if at >= wide_from else at
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, nbytes, shown_at, 0)
    return [*pieces, listed + large + locator + end]
