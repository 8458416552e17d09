"""The native library through ctypes: found, checked and wrapped as a core."""

from __future__ import annotations

from offload.native.core import CopyRequest, CoreSettings, Outcome, Request

LIBRARY_AVAILABLE = False
UNAVAILABLE_REASON = "the native library was not built"


def probe(backend: str) -> str:
    """Return "ok", or the reason why `backend` does not work here."""
    del backend
    return UNAVAILABLE_REASON


class NativeCore:
    backend = "auto"

    def __init__(self, settings: CoreSettings) -> None:
        raise NotImplementedError

    def start(self, request: Request) -> object:
        raise NotImplementedError

    def start_copy(self, request: CopyRequest) -> object:
        raise NotImplementedError

    def done(self, handle: object) -> bool:
        raise NotImplementedError

    def wait(self, handle: object, timeout: float) -> Outcome | None:
        raise NotImplementedError

    def forget(self, handle: object) -> None:
        raise NotImplementedError

    def register(self, address: int, nbytes: int) -> str:
        raise NotImplementedError

    def fsync(self, fd: int) -> None:
        raise NotImplementedError

    def lanes(self) -> dict[str, tuple[int, float]]:
        raise NotImplementedError

    def close(self, timeout: float) -> bool:
        raise NotImplementedError


def crc32c(address: int, nbytes: int, seed: int = 0) -> int:
    """Return the CRC32C of `nbytes` bytes at `address`, continuing from `seed`."""
    from offload.native.checksums import crc32c_python

    return crc32c_python(address, nbytes, seed)


def crc32c_combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC32C of a concatenation from those of its two parts."""
    from offload.native.checksums import crc32c_combine_python

    return crc32c_combine_python(first, second, second_nbytes)
