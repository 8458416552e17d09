"""CRC32C (Castagnoli) in Python: the same checksums as the native library, only slower.

[Note: checksums]
A checksum is the CRC32C of the bytes, in the usual form (reflected polynomial 0x82F63B78, initial
value and final exclusive-or 0xFFFFFFFF), and continues as `zlib.crc32` does:
``crc32c(a + b) == crc32c(b, seed=crc32c(a))``. A request's blocks are checked apart, in any order,
and `crc32c_combine` joins them, so that the result never depends on the block size.
Source: RFC 3720 appendix B.4 (test vectors); G. Castagnoli et al., IEEE Trans. Comm. 41 (1993).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np

_POLYNOMIAL = 0x82F63B78
_NUM_TABLES = 16
_MASK = 0xFFFFFFFF


@cache
def _slicing_tables() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the (16, 256) tables of the slicing method; table k advances a byte by k more bytes.

    Source: M. Kounavis, F. Berry, "A Systematic Approach to Building High Performance
    Software-based CRC Generators", 2005.
    """
    tables = np.zeros((_NUM_TABLES, 256), dtype=np.uint32)
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        tables[0, byte] = crc
    for k in range(1, _NUM_TABLES):
        previous = tables[k - 1]
        tables[k] = tables[0][previous & 0xFF] ^ (previous >> np.uint32(8))
    return tables


@numba.njit(nogil=True, cache=True, fastmath=False)
def _crc32c_kernel(
    data: np.ndarray[Any, np.dtype[np.uint8]],  # (nbytes,)
    seed: int,
    tables: np.ndarray[Any, np.dtype[np.uint32]],  # (16, 256)
) -> int:
    crc = np.uint32(seed) ^ np.uint32(0xFFFFFFFF)
    nbytes = data.size
    middle = nbytes - nbytes % 16
    for i in range(0, middle, 16):
        acc = (
            tables[15, data[i] ^ np.uint8(crc & np.uint32(0xFF))]
            ^ tables[14, data[i + 1] ^ np.uint8((crc >> np.uint32(8)) & np.uint32(0xFF))]
            ^ tables[13, data[i + 2] ^ np.uint8((crc >> np.uint32(16)) & np.uint32(0xFF))]
            ^ tables[12, data[i + 3] ^ np.uint8(crc >> np.uint32(24))]
        )
        acc ^= tables[11, data[i + 4]] ^ tables[10, data[i + 5]] ^ tables[9, data[i + 6]]
        acc ^= tables[8, data[i + 7]] ^ tables[7, data[i + 8]] ^ tables[6, data[i + 9]]
        acc ^= tables[5, data[i + 10]] ^ tables[4, data[i + 11]] ^ tables[3, data[i + 12]]
        crc = acc ^ tables[2, data[i + 13]] ^ tables[1, data[i + 14]] ^ tables[0, data[i + 15]]
    for i in range(middle, nbytes):
        crc = tables[0, data[i] ^ np.uint8(crc & np.uint32(0xFF))] ^ (crc >> np.uint32(8))
    return int(crc ^ np.uint32(0xFFFFFFFF))


def crc32c_python(address: int, nbytes: int, seed: int = 0) -> int:
    """Return the CRC32C of `nbytes` bytes at `address`, continuing from `seed`."""
    if nbytes == 0:
        return seed
    data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
    return int(_crc32c_kernel(data, seed, _slicing_tables()))


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials modulo the (reflected) polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if (a >> bit) & 1:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product & _MASK


@cache
def _zeros_operator(nbytes: int) -> int:
    """Return x^(8 nbytes) modulo the polynomial: the factor that appends `nbytes` zero bytes."""
    result, power, exponent = 1 << 31, 1 << 30, 8 * nbytes
    while exponent:
        if exponent & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        exponent >>= 1
    return result


def crc32c_combine_python(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC32C of a concatenation from those of its two parts."""
    return _multiply(_zeros_operator(second_nbytes), first) ^ second
