"""The native library through ctypes: found, checked and wrapped as a core.

The structures and signatures below are those of native/include/offload_native.h; its version number
stands in both. ctypes lets other Python threads run during every call.
"""

from __future__ import annotations

import ctypes
import errno as errno_codes
import importlib.resources
import os
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from offload.errors import ConfigError, UnsupportedPlatformError
from offload.native.core import LANES, CopyRequest, CoreSettings, Outcome, Request

_FILE_NAME = "liboffload_native.so"
_ABI_VERSION = 1
_TEXT_NBYTES = 256
_NS_PER_SECOND = 1_000_000_000
_LONGEST_WAIT_SECONDS = 1e9
_OPERATIONS = {"read": 0, "write": 1}
_COPY_LANES = {"h2d": 0, "d2h": 1}


class _Options(ctypes.Structure):
    _fields_ = (
        ("backend", c_char_p),
        ("queue_depth", u32),
        ("threads", u32),
        ("copy_threads", u32),
        ("held_depth", u32),
        ("block_bytes", u64),
        ("fault", c_char_p),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("operation", c_int32),
        ("fd", c_int32),
        ("direct_fd", c_int32),
        ("alignment", u32),
        ("memory_alignment", u32),
        ("has_checksum", c_int32),
        ("checksum_seed", u32),
        ("reserved", u32),
        ("offset", u64),
        ("nbytes", u64),
        ("address", c_void_p),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        ("error", c_int32),
        ("is_short", c_int32),
        ("offset", u64),
        ("checksum", u32),
        ("reserved", u32),
    )


class _LaneReport(ctypes.Structure):
    _fields_ = (("nbytes", u64), ("busy_seconds", c_double))


_SIGNATURES: dict[str, tuple[object, ...]] = {  # name: result, arguments
    "abi_version": (u32,),
    "probe": (c_int, c_char_p, c_char_p, c_size_t),
    "engine_create": (c_int, POINTER(_Options), POINTER(c_void_p), c_char_p, c_size_t),
    "engine_backend": (c_char_p, c_void_p),
    "engine_close": (c_int, c_void_p, c_int64),
    "engine_free": (None, c_void_p),
    "register": (c_int, c_void_p, c_void_p, u64, c_char_p, c_size_t),
    "unregister": (c_int, c_void_p, c_void_p),
    "start_urgent": (c_int, c_void_p, POINTER(_Request), u64, POINTER(c_void_p)),
    "start_copy_urgent": (c_int, c_void_p, c_int, c_void_p, c_void_p, u64, u64, POINTER(c_void_p)),
    "ticket_expedite": (c_int, c_void_p, u64),
    "ticket_done": (c_int, c_void_p),
    "ticket_wait": (c_int, c_void_p, c_int64, POINTER(_Outcome)),
    "ticket_free": (None, c_void_p),
    "fsync": (c_int, c_void_p, c_int),
    "lanes": (c_int, c_void_p, POINTER(_LaneReport)),
    "crc32c": (u32, c_void_p, u64, u32),
    "crc32c_combine": (u32, u32, u32, u64),
}


# Added since that version of the interface: a library that was built before does without them.
_ADDED: dict[str, tuple[object, ...]] = {
    "ticket_span": (c_int, c_void_p, POINTER(c_int64), POINTER(c_int64)),
}


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason."""
    place = importlib.resources.files("offload.native") / _FILE_NAME
    if not place.is_file():
        return None, "the native library was not built"
    try:
        library = ctypes.CDLL(str(place))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, f"offload_{name}")
            function.restype, function.argtypes = result, arguments
        for name, (result, *arguments) in _ADDED.items():
            added = getattr(library, f"offload_{name}", None)
            if added is not None:
                added.restype, added.argtypes = result, arguments
    except AttributeError as error:
        return None, f"the native library is older than this package: {error}"
    except OSError as error:
        return None, f"the native library cannot be loaded: {error}"
    version = library.offload_abi_version()
    if version != _ABI_VERSION:
        return None, f"the native library has interface {version}, not {_ABI_VERSION}"
    return library, "ok"


_library, UNAVAILABLE_REASON = _load()
LIBRARY_AVAILABLE = _library is not None


def probe(backend: str) -> str:
    """Return "ok", or the reason why `backend` does not work here."""
    if _library is None:
        return UNAVAILABLE_REASON
    text = ctypes.create_string_buffer(_TEXT_NBYTES)
    _library.offload_probe(backend.encode(), text, _TEXT_NBYTES)
    return text.value.decode(errors="replace")


def crc32c(address: int, nbytes: int, seed: int = 0) -> int:
    """Return the CRC32C of `nbytes` bytes at `address`, continuing from `seed`."""
    if _library is not None:
        return int(_library.offload_crc32c(address, nbytes, seed))
    from offload.native.checksums import crc32c_python

    return crc32c_python(address, nbytes, seed)


def crc32c_combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the CRC32C of a concatenation from those of its two parts."""
    if _library is not None:
        return int(_library.offload_crc32c_combine(first, second, second_nbytes))
    from offload.native.checksums import crc32c_combine_python

    return crc32c_combine_python(first, second, second_nbytes)


class NativeCore:
    """An engine of the library; see `offload.native.core.Core`. Handles are its tickets."""

    backend: str

    def __init__(self, settings: CoreSettings) -> None:
        """Raises ConfigError, or UnsupportedPlatformError where the backend does not work."""
        assert _library is not None
        self._library = _library
        self._engine = c_void_p()
        options = _Options(
            backend=settings.backend.encode(),
            queue_depth=settings.queue_depth,
            threads=settings.threads,
            copy_threads=settings.copy_threads,
            held_depth=settings.held_depth,
            block_bytes=settings.block_bytes,
            fault=settings.fault.encode() if settings.fault else None,
        )
        text = ctypes.create_string_buffer(_TEXT_NBYTES)
        error = self._library.offload_engine_create(
            ctypes.byref(options), ctypes.byref(self._engine), text, _TEXT_NBYTES
        )
        reason = text.value.decode(errors="replace")
        if error == errno_codes.EINVAL:
            raise ConfigError(problems=[reason], source="the I/O engine's settings")
        if error:
            raise UnsupportedPlatformError(
                f"I/O backend {settings.backend} does not work here: {reason}",
                remedy='use backend = "auto"',
            )
        self.backend = self._library.offload_engine_backend(self._engine).decode()

    def start(self, request: Request) -> object:
        ticket = c_void_p()
        native = _Request(
            operation=_OPERATIONS[request.operation],
            fd=request.fd,
            direct_fd=request.direct_fd,
            alignment=request.alignment,
            memory_alignment=request.memory_alignment,
            has_checksum=request.checksum_seed is not None,
            checksum_seed=request.checksum_seed or 0,
            offset=request.offset,
            nbytes=request.nbytes,
            address=request.address,
        )
        _check(
            self._library.offload_start_urgent(
                self._engine, ctypes.byref(native), request.urgency, ctypes.byref(ticket)
            )
        )
        return ticket

    def start_copy(self, request: CopyRequest) -> object:
        ticket = c_void_p()
        _check(
            self._library.offload_start_copy_urgent(
                self._engine,
                _COPY_LANES[request.lane],
                request.dst_address,
                request.src_address,
                request.nbytes,
                request.urgency,
                ctypes.byref(ticket),
            )
        )
        return ticket

    def expedite(self, handle: object, urgency: int) -> None:
        self._library.offload_ticket_expedite(handle, urgency)

    def done(self, handle: object) -> bool:
        return bool(self._library.offload_ticket_done(handle))

    def wait(self, handle: object, timeout: float) -> Outcome | None:
        outcome = _Outcome()
        timeout_ns = int(min(timeout, _LONGEST_WAIT_SECONDS) * _NS_PER_SECOND)
        error = self._library.offload_ticket_wait(handle, timeout_ns, ctypes.byref(outcome))
        if error == errno_codes.ETIMEDOUT:
            return None
        _check(error)
        return Outcome(outcome.error, outcome.offset, outcome.checksum, bool(outcome.is_short))

    def span(self, handle: object) -> tuple[float, float] | None:
        read = getattr(self._library, "offload_ticket_span", None)
        began, ended = c_int64(), c_int64()
        if read is None or read(handle, ctypes.byref(began), ctypes.byref(ended)):
            return None
        return began.value / _NS_PER_SECOND, ended.value / _NS_PER_SECOND

    def forget(self, handle: object) -> None:
        self._library.offload_ticket_free(handle)

    def register(self, address: int, nbytes: int) -> str:
        text = ctypes.create_string_buffer(_TEXT_NBYTES)
        error = self._library.offload_register(self._engine, address, nbytes, text, _TEXT_NBYTES)
        if error == 0:
            return "ok"
        return text.value.decode(errors="replace") or os.strerror(error)

    def unregister(self, address: int) -> None:
        self._library.offload_unregister(self._engine, address)

    def fsync(self, fd: int) -> None:
        _check(self._library.offload_fsync(self._engine, fd))

    def lanes(self) -> dict[str, tuple[int, float]]:
        reports = (_LaneReport * len(LANES))()
        _check(self._library.offload_lanes(self._engine, reports))
        return {
            lane: (int(report.nbytes), float(report.busy_seconds))
            for lane, report in zip(LANES, reports, strict=True)
        }

    def close(self, timeout: float) -> bool:
        timeout_ns = int(min(timeout, _LONGEST_WAIT_SECONDS) * _NS_PER_SECOND)
        error = self._library.offload_engine_close(self._engine, timeout_ns)
        if error == errno_codes.ETIMEDOUT:
            return False
        _check(error)
        return True

    def __del__(self) -> None:
        # The engine frees itself only when it is closed and in its own process.
        if getattr(self, "_engine", None):
            self._library.offload_engine_free(self._engine)


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
