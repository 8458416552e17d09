"""CRC32C: published values, the library against Python, and the rule of continuation."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.native import LIBRARY_AVAILABLE, crc32c, crc32c_combine
from offload.native.checksums import crc32c_combine_python, crc32c_python

needs_library = pytest.mark.skipif(not LIBRARY_AVAILABLE, reason="the library was not built")
IMPLEMENTATIONS = [
    pytest.param(crc32c, crc32c_combine, marks=needs_library, id="library"),
    pytest.param(crc32c_python, crc32c_combine_python, id="python"),
]


def address_of(data: bytes | np.ndarray) -> int:
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    return data.ctypes.data


@pytest.mark.parametrize(("checksum", "combine"), IMPLEMENTATIONS)
def test_published_values(checksum, combine):
    # RFC 3720, appendix B.4, and the check value of the CRC catalogue.
    vectors = {
        b"123456789": 0xE3069283,
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
    }
    for data, expected in vectors.items():
        assert checksum(address_of(data), len(data)) == expected
    assert checksum(address_of(b"x"), 0, 123) == 123


@pytest.mark.parametrize(("checksum", "combine"), IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=0, max_size=300),
    cut=st.integers(0, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_continues_and_combines(checksum, combine, data, cut, seed):
    cut = min(cut, len(data))
    buffer = np.frombuffer(data + b"\0", dtype=np.uint8)
    base = buffer.ctypes.data
    whole = checksum(base, len(data), seed)
    first = checksum(base, cut, seed)
    assert checksum(base + cut, len(data) - cut, first) == whole
    second = checksum(base + cut, len(data) - cut, 0)
    assert combine(first, second, len(data) - cut) == whole


@needs_library
@pytest.mark.parametrize("nbytes", [4096, 12_287, 12_288, 36_864, 1_000_003])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_library_equals_python(nbytes, start):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + 8, dtype=np.uint8)
    address = data.ctypes.data + start
    assert crc32c(address, nbytes, 17) == crc32c_python(address, nbytes, 17)


def test_every_flipped_bit_is_seen():
    data = np.arange(5000, dtype=np.uint16).view(np.uint8).copy()
    before = crc32c(data.ctypes.data, data.size)
    for position in range(0, data.size, 997):
        data[position] ^= 1 << (position % 8)
        assert crc32c(data.ctypes.data, data.size) != before
        data[position] ^= 1 << (position % 8)
    assert crc32c(data.ctypes.data, data.size) == before
