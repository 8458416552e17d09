"""Poison: memory that absent parameters point at. It reads as NaN and cannot be written."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any, cast

import torch

_PATTERN = b"\xff"  # NaN in fp32, bf16 and fp16
_PIECE_BYTES = 1 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)


# Mappings of this process, by their length; they hold nothing and are never given back, because a
# parameter may outlive its engine.
_mappings: dict[int, int] = {}


def _address_of(nbytes: int) -> int:
    """The address of at least `nbytes` of poison."""
    length = 1 << max(nbytes - 1, _PIECE_BYTES - 1).bit_length()
    known = next((address for size, address in _mappings.items() if size >= length), None)
    if known is None:
        known = _mappings[length] = _map(length)
    return known


def _map(length: int) -> int:
    descriptor = os.memfd_create("offload-poison", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, _PATTERN * _PIECE_BYTES)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _call(None, length, flags, -1)
        for start in range(0, length, _PIECE_BYTES):
            _call(base + start, _PIECE_BYTES, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        return base
    finally:
        os.close(descriptor)


def _call(address: int | None, nbytes: int, flags: int, descriptor: int) -> int:
    got: int | None = _libc.mmap(address, nbytes, mmap.PROT_READ, flags, descriptor, 0)
    if got is None or got == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping {nbytes} bytes of poison: {os.strerror(code)}")
    return got


def is_poison(address: int) -> bool:
    """Whether what is at `address` is poison."""
    return any(start <= address < start + length for length, start in _mappings.items())


def poison_storage(nbytes: int, device: torch.device, *, enabled: bool) -> torch.UntypedStorage:
    """A storage of `nbytes` over poison; what it points at is never freed.

    It reads as NaNs and takes 1 MiB of real memory, whatever its length. A device that is not the
    CPU, or `enabled` False, gets a storage without memory instead: there a missed fault is an error
    of the device or a crash.

    Raises:
        OSError: the system refuses the mapping.
    """
    if not enabled or device.type != "cpu" or not nbytes:
        return torch.UntypedStorage(0, device=device)
    make: Callable[..., torch.UntypedStorage] = cast(
        "Any", torch._C._construct_storage_from_data_pointer
    )
    return make(_address_of(nbytes), device, nbytes)
