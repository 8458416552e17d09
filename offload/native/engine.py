"""The asynchronous I/O engine of a process: files, memory copies, tickets.

[Note: request ownership]
A request owns its part of memory from `start_*` until it has ended, that is until every one of its
blocks has: also when one of them failed, and also when a wait for it ran into its deadline. A
ticket that is dropped unwaited leaves its request to the engine, which keeps the file open for it.
The memory is the caller's: it must stay mapped, and be MAP_SHARED if the process forks.

[Note: fork]
An engine belongs to the process that made it. In a forked child nothing is submitted, closed or
joined: finalizers do nothing there, calls raise EngineStateError.
"""

from __future__ import annotations

import contextlib
import errno as errno_codes
import math
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

from offload.errors import (
    ConfigError,
    DeadlineError,
    EngineStateError,
    StorageError,
    UnsupportedPlatformError,
)
from offload.native import library
from offload.native.core import (
    BULK_URGENCY,
    CopyLane,
    CopyRequest,
    Core,
    CoreSettings,
    Outcome,
    Request,
)
from offload.native.fault_spec import FaultSpec
from offload.native.files import Descriptors, IoFile

Backend = Literal["auto", "io_uring", "libaio", "threads", "python"]
BACKENDS = ("io_uring", "libaio", "threads", "python")  # in the order in which auto tries them
# Blocks that keep one disk busy: with 8 MiB each, tools/bench/io.py reaches the throughput of 16;
# tools/bench/urgent.py shows what an urgent read waits behind them.
HELD_DEPTH = 4
_BLOCK_ALIGNMENT = 4096
_ADDRESS_LIMIT = 1 << 63
_MAX_COUNT = 4096
_MAX_BLOCK_BYTES = 1 << 30
_FINALIZER_SECONDS = 1.0  # what hangs longer is left to the end of the process
_WAIT_SLICE_SECONDS = 0.25  # so that signal handlers run during a wait
_missing_library_was_told = False

_R = TypeVar("_R")


class _Entry(NamedTuple):
    """What a request in flight holds on to, beside its ticket."""

    handle: object
    descriptors: Descriptors | None


class Ticket:
    """One request in flight; keeps its file and engine alive."""

    __slots__ = ("__weakref__", "_engine", "_entry", "_outcome", "_path", "_request", "_started")

    def __init__(
        self, engine: IoEngine, request: Request | CopyRequest, entry: _Entry, path: str
    ) -> None:
        """Made by the engine's `start_*`."""
        self._engine = engine
        self._request = request
        self._entry = entry
        self._path = path
        self._outcome: Outcome | None = None
        self._started = time.monotonic()

    def done(self) -> bool:
        """Whether the request has ended, well or not; never blocks or raises."""
        return self._outcome is not None or self._engine._is_done(self._entry)

    def expedite(self, urgency: int) -> None:
        """Make what has not been given to the disk yet at least so urgent; never blocks or raises.

        `urgency` as in `IoEngine.start_read`. Nothing happens in a forked child.
        """
        if self._outcome is None:
            self._engine._expedite(self._entry, urgency)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the bytes' CRC32C, continued from the seed (0: none asked).

        Idempotent: a second call returns or raises the same. `timeout` is in seconds.

        Raises:
            StorageError: the request failed; its buffer is free, its content undefined.
            DeadlineError: it has not ended within `timeout`; it still owns its buffer.
            EngineStateError: in a forked child.
        """
        outcome = self._outcome or self._await(math.inf if timeout is None else timeout)
        if outcome is None:
            age = time.monotonic() - self._started
            raise DeadlineError(
                operation=self._operation,
                path=self._path,
                offset=self._offset,
                nbytes=self._request.nbytes,
                detail=f"still in flight {age:.1f} s after its start",
                remedy="check the disk; if it is only slow, raise io.deadline_seconds",
            )
        if outcome.errno:
            raise StorageError(
                operation=self._operation,
                path=self._path,
                offset=self._offset,
                nbytes=self._request.nbytes,
                errno=outcome.errno,
                detail=self._failure(outcome),
            )
        return outcome.checksum

    def span(self) -> tuple[float, float] | None:
        """When it was begun and when it ended, in seconds of time.perf_counter; None: not known."""
        return self._engine._span(self._entry)

    @property
    def _operation(self) -> str:
        request = self._request
        return request.operation if isinstance(request, Request) else f"copy {request.lane}"

    @property
    def _offset(self) -> int | None:
        return self._request.offset if isinstance(self._request, Request) else None

    def _failure(self, outcome: Outcome) -> str:
        where = f"in the block at offset {outcome.offset}"
        if not outcome.short:
            return f"{os.strerror(outcome.errno)} {where}"
        reading = self._operation == "read"
        return f"short, {'the file ends' if reading else 'nothing more is taken'} {where}"

    def _await(self, timeout: float) -> Outcome | None:
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            outcome = self._engine._wait(self._entry, min(left, _WAIT_SLICE_SECONDS))
            if outcome is not None:
                self._outcome = outcome
                self._entry = self._entry._replace(descriptors=None)
                return outcome
            if left == 0.0:
                return None

    def __del__(self) -> None:
        # Absent where __init__ raised or the interpreter is going away.
        with contextlib.suppress(AttributeError, TypeError):
            self._engine._drop(self._entry)

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "ended"
        return f"Ticket({self._operation} {self._path!r}, {self._request.nbytes} bytes, {state})"


class IoEngine:
    """Asynchronous reads, writes and copies on its own threads; several per process are fine.

    `backend` is the one chosen. A request is cut in blocks of `block_bytes`, of which `queue_depth`
    are in flight at once; the defaults were measured with tools/bench/io.py. `threads` do the
    system calls (backends threads and python) or the checksums (the others), `copy_threads` the
    memory copies. Blocks are started in the order of their requests' urgency, of equals in that of
    their start, reads and writes taking turns; they end in any order. But for those of the first
    class only `held_depth` are in flight at once, see [Note: order] in
    native/src/request_queue.hpp. `fault` is the hook of tests, see [Note: fault specification].

    Raises:
        ConfigError: a setting is out of range, or `fault` cannot be read.
        UnsupportedPlatformError: the backend asked for does not work here; the message says why.
    """

    backend: str

    def __init__(
        self,
        *,
        backend: Backend = "auto",
        queue_depth: int = 16,
        threads: int = 4,
        block_bytes: int = 8 << 20,
        copy_threads: int = 1,
        held_depth: int = HELD_DEPTH,
        fault: str | None = None,
    ) -> None:
        settings = CoreSettings(
            backend, queue_depth, threads, block_bytes, copy_threads, held_depth, fault
        )
        _check(settings)
        self._pid = os.getpid()
        self._closed = False
        self._orphans: deque[_Entry] = deque()  # in flight, without a ticket
        self._core = _make_core(settings)
        self._finalizer = weakref.finalize(self, _finish, self._core, self._pid)
        self.backend = self._core.backend

    @staticmethod
    def probe() -> dict[str, str]:
        """Return for each backend "ok", or the reason why it does not work here."""
        reasons = {name: library.probe(name) for name in BACKENDS if name != "python"}
        return {**reasons, "python": "ok"}

    def open(self, path: str, *, flags: int, mode: int = 0o600, direct: bool = True) -> IoFile:
        """Open a file with `flags`, O_CLOEXEC and O_NOFOLLOW; `direct` asks for O_DIRECT as well.

        Raises:
            StorageError: the system refused; nothing is left open.
        """
        return IoFile.open(path, flags=flags, mode=mode, direct=direct)

    def from_fd(self, fd: int, path: str, *, direct: bool = True) -> IoFile:
        """Take over a descriptor; `path` is its name in messages."""
        return IoFile(fd, path, direct=direct)

    def register(self, address: int, nbytes: int) -> str:
        """Prepare memory that many requests will use (io_uring: fixed buffers, pages locked).

        Best effort: returns "ok", or the reason why it is used unprepared. Memory that is
        registered must be unregistered before it is unmapped, or the engine be closed.
        """
        return self._living_core().register(address, nbytes)

    def unregister(self, address: int) -> None:
        """Undo `register(address, ...)`; no request on that memory may be in flight."""
        if not self._closed and self._pid == os.getpid():
            self._core.unregister(address)

    def start_read(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = BULK_URGENCY,
    ) -> Ticket:
        """Start to read exactly `nbytes` bytes; any alignment works, multiples of 4096 are fast.

        `urgency`: the lower, the sooner; the upper 8 of its 64 bits are its class.

        Raises:
            StorageError: the request is not possible (EINVAL); nothing was started.
            EngineStateError: the engine or the file is closed, or belongs to the parent process.
        """
        return self._start("read", file, offset, address, nbytes, checksum_seed, urgency)

    def start_write(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = BULK_URGENCY,
    ) -> Ticket:
        """Start to write `nbytes` bytes; durable only after `fsync`. Raises as `start_read`."""
        return self._start("write", file, offset, address, nbytes, checksum_seed, urgency)

    def start_copy(
        self,
        dst_address: int,
        src_address: int,
        nbytes: int,
        *,
        lane: CopyLane,
        urgency: int = BULK_URGENCY,
    ) -> Ticket:
        """Start to copy memory that does not overlap. Raises as `start_read`."""
        core = self._living_core()
        request = CopyRequest(lane, dst_address, src_address, nbytes, urgency)
        if lane not in ("h2d", "d2h") or not 0 <= nbytes < _ADDRESS_LIMIT:
            raise StorageError(
                operation=f"copy {lane}", path="memory", nbytes=nbytes, errno=errno_codes.EINVAL
            )
        entry = _Entry(_started(core.start_copy, request, f"copy {lane}", "memory", nbytes), None)
        return Ticket(self, request, entry, "memory")

    def fsync(self, file: IoFile) -> None:
        """Make written data durable; never to be repeated on the same data after an error.

        Raises:
            StorageError: the data may be lost.
        """
        core = self._living_core()
        descriptors = _descriptors(file)  # kept open until the call has ended
        try:
            core.fsync(descriptors.buffered)
        except OSError as error:
            raise StorageError(operation="fsync", path=file.path, errno=error.errno) from error

    def lanes(self) -> dict[str, tuple[int, float]]:
        """Return lane -> (bytes moved, seconds with at least one block in flight), cumulative."""
        return self._living_core().lanes()

    def close(self, timeout: float = 60.0) -> None:
        """Wait until all requests have ended, then end the threads; a second call does nothing.

        Raises:
            DeadlineError: requests are still in flight after `timeout` seconds; nothing is closed.
        """
        if self._closed or self._pid != os.getpid():
            return
        if not self._core.close(timeout):
            raise DeadlineError(
                operation="close",
                path=f"the {self.backend} engine",
                detail=f"requests are still in flight after {timeout:.1f} s",
            )
        self._closed = True
        self._finalizer.detach()
        self._sweep_orphans()

    def _start(
        self,
        operation: Literal["read", "write"],
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        checksum_seed: int | None,
        urgency: int,
    ) -> Ticket:
        core = self._living_core()
        self._sweep_orphans()
        descriptors = _descriptors(file)
        request = Request(
            operation,
            descriptors.buffered,
            descriptors.direct,
            file.alignment,
            file.memory_alignment,
            offset,
            address,
            nbytes,
            checksum_seed,
            urgency,
        )
        if min(offset, nbytes) < 0 or offset + nbytes >= _ADDRESS_LIMIT or address <= 0:
            raise StorageError(
                operation=operation,
                path=file.path,
                offset=offset,
                nbytes=nbytes,
                errno=errno_codes.EINVAL,
            )
        entry = _Entry(_started(core.start, request, operation, file.path, nbytes), descriptors)
        return Ticket(self, request, entry, file.path)

    def _living_core(self) -> Core:
        if self._closed:
            raise EngineStateError("the I/O engine is closed", remedy="make a new one")
        self._check_process()
        return self._core

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise EngineStateError(
                f"the I/O engine belongs to process {self._pid}, this is its child {os.getpid()}",
                remedy="make an own engine in the child",
            )

    def _is_done(self, entry: _Entry) -> bool:
        return self._pid == os.getpid() and self._core.done(entry.handle)

    def _expedite(self, entry: _Entry, urgency: int) -> None:
        if self._pid == os.getpid():
            self._core.expedite(entry.handle, urgency)

    def _wait(self, entry: _Entry, timeout: float) -> Outcome | None:
        self._check_process()
        return self._core.wait(entry.handle, timeout)

    def _span(self, entry: _Entry) -> tuple[float, float] | None:
        return self._core.span(entry.handle) if self._pid == os.getpid() else None

    def _drop(self, entry: _Entry) -> None:
        """A ticket goes away: free its request now, or when it has ended."""
        if self._pid == os.getpid():
            if self._core.done(entry.handle):
                self._core.forget(entry.handle)
            else:
                self._orphans.append(entry)

    def _sweep_orphans(self) -> None:
        for _ in range(len(self._orphans)):
            with contextlib.suppress(IndexError):
                self._drop(self._orphans.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"IoEngine({self.backend}{', closed' if self._closed else ''})"


def _finish(core: Core, pid: int) -> None:
    """Close the core of an engine that was not closed, at its end or the interpreter's."""
    if pid == os.getpid():
        core.close(_FINALIZER_SECONDS)


def _check(settings: CoreSettings) -> None:
    problems = []
    if settings.backend not in ("auto", *BACKENDS):
        problems.append(f"backend {settings.backend!r} is none of auto, {', '.join(BACKENDS)}")
    for name in ("queue_depth", "threads", "copy_threads", "held_depth"):
        value = getattr(settings, name)
        if not 1 <= value <= _MAX_COUNT:
            problems.append(f"{name} is {value}, not between 1 and {_MAX_COUNT}")
    if settings.block_bytes % _BLOCK_ALIGNMENT or not 0 < settings.block_bytes <= _MAX_BLOCK_BYTES:
        problems.append(
            f"block_bytes is {settings.block_bytes}, no positive multiple of {_BLOCK_ALIGNMENT} "
            f"up to {_MAX_BLOCK_BYTES}"
        )
    try:
        FaultSpec(settings.fault or "")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems=problems, source="the I/O engine's settings")


def _make_core(settings: CoreSettings) -> Core:
    if settings.backend != "python" and library.LIBRARY_AVAILABLE:
        return library.NativeCore(settings)
    if settings.backend not in ("auto", "python"):
        raise UnsupportedPlatformError(
            f"I/O backend {settings.backend} is not available: {library.UNAVAILABLE_REASON}",
            remedy="install offload where a C++20 compiler is, or use backend auto or python",
        )
    if settings.backend == "auto":
        _tell_missing_library()
    from offload.native.fallback import PythonCore

    return PythonCore(settings)


def _tell_missing_library() -> None:
    global _missing_library_was_told  # noqa: PLW0603  a process is told once, not an engine
    if not _missing_library_was_told:
        _missing_library_was_told = True
        warnings.warn(
            f"offload does its I/O in Python, which costs more CPU time: "
            f"{library.UNAVAILABLE_REASON}; to get the native library, install offload where a "
            f'C++20 compiler is; backend = "python" chooses this without a warning',
            RuntimeWarning,
            stacklevel=4,
        )


def _descriptors(file: IoFile) -> Descriptors:
    if file.descriptors is None:
        raise EngineStateError(f"{file.path} is closed", remedy="open it again")
    return file.descriptors


def _started(
    start: Callable[[_R], object], request: _R, operation: str, path: str, nbytes: int
) -> object:
    try:
        return start(request)
    except OSError as error:
        raise StorageError(
            operation=operation, path=path, nbytes=nbytes, errno=error.errno
        ) from error
