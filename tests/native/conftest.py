from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
import pytest

from offload.native import BACKENDS, IoEngine

PROBED = IoEngine.probe()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if PROBED[name] != "ok":
        pytest.skip(f"{name}: {PROBED[name]}")
    return name


class Memory:
    """Page-aligned MAP_SHARED memory with random content."""

    def __init__(self, nbytes: int, seed: int | None) -> None:
        self.map = mmap.mmap(-1, nbytes)
        self.array = np.frombuffer(self.map, dtype=np.uint8)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if seed is not None:
            self.array[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)

    def part(self, start: int, nbytes: int) -> bytes:
        return self.array[start : start + nbytes].tobytes()


@pytest.fixture
def make_memory() -> Callable[..., Memory]:
    def make(nbytes: int, seed: int | None = None) -> Memory:
        return Memory(nbytes, seed)

    return make
