"""The core in Python: threads that call preadv and pwritev. Same results as the library, slower.

Used where the native library was not built. Blocks are taken in the order of `RequestOrder`; a
request ends when its last block has.
"""

from __future__ import annotations

import ctypes
import errno as errno_codes
import itertools
import os
import threading
import time
from dataclasses import dataclass, field

from offload.native.checksums import crc32c_combine_python, crc32c_python
from offload.native.core import LANES, CopyRequest, CoreSettings, Outcome, Request
from offload.native.fault_spec import FaultAction, FaultSpec
from offload.native.request_order import RequestOrder

_RETRIED = (errno_codes.EINTR, errno_codes.EAGAIN)
_MAX_RETRIES = 200  # without progress, 1 ms apart
_RETRY_SECONDS = 1e-3


class _ShortError(Exception):
    """A read met the end of the file, or a write moved nothing."""


@dataclass(slots=True)
class _Block:
    """One part of a request; `index` orders the checksums."""

    task: _Task
    index: int
    start: int  # bytes from the request's start
    nbytes: int
    direct: bool
    urgency: int  # of the request when it was taken


@dataclass(slots=True, eq=False)
class _Task:
    """A request with its progress. All fields but `request` are guarded by the core's lock."""

    request: Request | CopyRequest
    blocks: list[tuple[int, int, bool]]  # (start, nbytes, direct)
    urgency: int
    checksums: list[int] = field(default_factory=list)
    num_taken: int = 0
    num_open: int = 0  # taken and not ended
    errno: int = 0
    error_offset: int = 0
    short: bool = False
    checksum: int = 0
    ended: bool = False
    began_at: float = 0.0
    ended_at: float = 0.0

    @property
    def exhausted(self) -> bool:
        return self.errno != 0 or self.num_taken == len(self.blocks)

    @property
    def lane(self) -> str:
        request = self.request
        return f"nvme_{request.operation}" if isinstance(request, Request) else request.lane

    @property
    def next_nbytes(self) -> int:
        return self.blocks[self.num_taken][1]


class _LaneClock:
    """Bytes and busy seconds of one lane: busy while at least one block is in flight."""

    def __init__(self) -> None:
        self.num_bytes, self._busy_seconds, self._in_flight, self._since = 0, 0.0, 0, 0.0

    def begin(self) -> None:
        if self._in_flight == 0:
            self._since = time.monotonic()
        self._in_flight += 1

    def end(self, nbytes: int) -> None:
        self._in_flight -= 1
        self.num_bytes += nbytes
        if self._in_flight == 0:
            self._busy_seconds += time.monotonic() - self._since

    def read(self) -> tuple[int, float]:
        open_seconds = time.monotonic() - self._since if self._in_flight else 0.0
        return self.num_bytes, self._busy_seconds + open_seconds


class PythonCore:
    """See the module and `offload.native.core.Core`."""

    backend = "python"

    def __init__(self, settings: CoreSettings) -> None:
        self._block_bytes = settings.block_bytes
        self._fault = FaultSpec(settings.fault or "")
        self._changed = threading.Condition()
        depth, threads = settings.held_depth, settings.threads
        self._queues: dict[str, RequestOrder[_Task]] = {
            "file": RequestOrder(
                max_blocks=threads - 1 if depth < threads else threads,
                max_bytes=depth * settings.block_bytes,
            ),
            "copy": RequestOrder(),
        }
        self._lanes = {lane: _LaneClock() for lane in LANES}
        self._num_in_flight = 0
        self._closing = False
        counts = {"file": settings.threads, "copy": settings.copy_threads}
        self._threads = [
            threading.Thread(target=self._run, args=(kind,), daemon=True, name=f"offload-{kind}")
            for kind, count in counts.items()
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, request: Request) -> object:
        return self._enqueue(
            _Task(request, _split(request, self._block_bytes), request.urgency), "file"
        )

    def start_copy(self, request: CopyRequest) -> object:
        starts = range(0, request.nbytes, self._block_bytes)
        blocks = [(at, min(self._block_bytes, request.nbytes - at), False) for at in starts]
        return self._enqueue(_Task(request, blocks, request.urgency), "copy")

    def _enqueue(self, task: _Task, kind: str) -> _Task:
        with self._changed:
            task.checksums = [0] * len(task.blocks)
            if task.blocks:
                self._num_in_flight += 1
                self._queues[kind].add(task)
                self._changed.notify_all()
            else:
                _settle(task)
        return task

    def expedite(self, handle: object, urgency: int) -> None:
        assert isinstance(handle, _Task)
        with self._changed:
            handle.urgency = min(handle.urgency, urgency)
            self._changed.notify_all()

    def done(self, handle: object) -> bool:
        assert isinstance(handle, _Task)
        return handle.ended

    def wait(self, handle: object, timeout: float) -> Outcome | None:
        assert isinstance(handle, _Task)
        with self._changed:
            if not self._changed.wait_for(lambda: handle.ended, timeout):
                return None
            return Outcome(handle.errno, handle.error_offset, handle.checksum, handle.short)

    def span(self, handle: object) -> tuple[float, float] | None:
        assert isinstance(handle, _Task)
        return (handle.began_at, handle.ended_at) if handle.ended else None

    def forget(self, handle: object) -> None:
        """Nothing to free: the garbage collector does it."""

    def register(self, address: int, nbytes: int) -> str:
        del address, nbytes
        return "the python backend has no fixed buffers"

    def unregister(self, address: int) -> None:
        """Nothing was registered."""

    def fsync(self, fd: int) -> None:
        action = self._fault.next("fsync")
        if action is not None and action.kind == "errno":
            raise OSError(action.value, os.strerror(action.value))
        os.fsync(fd)

    def lanes(self) -> dict[str, tuple[int, float]]:
        with self._changed:
            return {name: clock.read() for name, clock in self._lanes.items()}

    def close(self, timeout: float) -> bool:
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_in_flight == 0, timeout):
                return False
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        return True

    def _run(self, kind: str) -> None:
        while (block := self._take(kind)) is not None:
            request = block.task.request
            action = self._fault.next(_operation(request))
            error, checksum, short = 0, 0, False
            try:
                if isinstance(request, Request):
                    _transfer(request, block, action, self._fault)
                    if request.checksum_seed is not None:
                        checksum = crc32c_python(request.address + block.start, block.nbytes)
                else:
                    _copy(request, block, action)
            except _ShortError:
                error, short = errno_codes.EIO, True
            except OSError as failure:
                error = failure.errno or errno_codes.EIO
            if action is not None and action.kind == "drop":
                continue
            self._end(block, error, checksum, short=short)

    def _take(self, kind: str) -> _Block | None:
        """Return the next block to work on, or None when the core closes."""
        queue = self._queues[kind]
        with self._changed:
            while (task := queue.take()) is None:
                if self._closing:
                    return None
                self._changed.wait()
            index = task.num_taken
            if index == 0:
                task.began_at = time.monotonic()
            task.num_taken += 1
            task.num_open += 1
            if task.exhausted:
                queue.remove(task)
            self._lanes[task.lane].begin()
            start, nbytes, direct = task.blocks[index]
            return _Block(task, index, start, nbytes, direct, task.urgency)

    def _end(self, block: _Block, error: int, checksum: int, *, short: bool) -> None:
        task = block.task
        with self._changed:
            self._lanes[task.lane].end(0 if error else block.nbytes)
            queue = self._queues["file" if isinstance(task.request, Request) else "copy"]
            queue.end(block.urgency, block.nbytes)
            task.checksums[block.index] = checksum
            task.num_open -= 1
            if error and not task.errno:
                task.errno, task.short = error, short
                base = task.request.offset if isinstance(task.request, Request) else 0
                task.error_offset = base + block.start
                queue.remove(task)
            if task.num_open == 0 and task.exhausted:
                _settle(task)
                self._num_in_flight -= 1
            self._changed.notify_all()


def _operation(request: Request | CopyRequest) -> str:
    return request.operation if isinstance(request, Request) else "copy"


def _settle(task: _Task) -> None:
    request = task.request
    if task.errno == 0 and isinstance(request, Request) and request.checksum_seed is not None:
        crc = request.checksum_seed
        for checksum, (_, nbytes, _) in zip(task.checksums, task.blocks, strict=True):
            crc = crc32c_combine_python(crc, checksum, nbytes)
        task.checksum = crc
    task.ended_at = time.monotonic()
    task.began_at = task.began_at or task.ended_at  # there was nothing to begin
    task.ended = True


def _split(request: Request, block_bytes: int) -> list[tuple[int, int, bool]]:
    """Cut a request into (start, nbytes, direct): prefix, blocks of the aligned middle, suffix."""
    alignment, end = request.alignment, request.offset + request.nbytes
    middle = -(-request.offset // alignment) * alignment
    middle_end = end // alignment * alignment
    at_middle = request.address + middle - request.offset
    direct = request.direct_fd >= 0 and at_middle % request.memory_alignment == 0
    if not direct or middle >= middle_end:
        middle, middle_end, direct = request.offset, end, False
    cuts = [request.offset, *range(middle, middle_end, block_bytes), middle_end, end]
    return [
        (low - request.offset, high - low, direct and middle <= low < middle_end)
        for low, high in itertools.pairwise(cuts)
        if high > low
    ]


def _transfer(
    request: Request, block: _Block, action: FaultAction | None, fault: FaultSpec
) -> None:
    """Move one block completely. Raises OSError or _ShortError."""
    call = os.preadv if request.operation == "read" else os.pwritev
    num_done = num_retries = 0
    direct = block.direct
    while num_done < block.nbytes:
        position = block.start + num_done
        nbytes = block.nbytes - num_done
        offset, address = request.offset + position, request.address + position
        if action is not None and action.kind == "short":
            nbytes = min(nbytes, max(1, action.value))
        whole = offset % request.alignment == 0 and nbytes % request.alignment == 0
        whole = whole and address % request.memory_alignment == 0
        fd = request.direct_fd if direct and whole else request.fd
        try:
            moved = _attempt(call, fd, offset, address, nbytes, action)
        except OSError as error:
            num_retries += 1
            if error.errno == errno_codes.EINVAL and fd == request.direct_fd:
                direct = False  # the file system refuses O_DIRECT after all
            elif error.errno in _RETRIED and num_retries <= _MAX_RETRIES:
                time.sleep(_RETRY_SECONDS)
            else:
                raise
        else:
            if moved == 0:
                raise _ShortError
            if action is not None and action.kind == "corrupt":
                _corrupt(request, offset, address)
            num_done, num_retries = num_done + moved, 0
        if num_done < block.nbytes:
            action = fault.next(request.operation)


def _attempt(
    call: object, fd: int, offset: int, address: int, nbytes: int, action: FaultAction | None
) -> int:
    """Make one system call, with a fault. Returns the bytes moved."""
    assert callable(call)
    kind, value = (action.kind, action.value) if action is not None else ("", 0)
    if kind == "errno":
        raise OSError(value, os.strerror(value))
    if kind == "lost":
        return nbytes
    if kind == "misdirect":
        offset += value
    if kind == "delay":
        time.sleep(value / 1e3)
    return int(call(fd, [(ctypes.c_uint8 * nbytes).from_address(address)], offset))


def _corrupt(request: Request, offset: int, address: int) -> None:
    byte = ctypes.c_uint8.from_address(address)
    if request.operation == "read":
        byte.value ^= 0xFF
    else:
        os.pwrite(request.fd, bytes([byte.value ^ 0xFF]), offset)


def _copy(request: CopyRequest, block: _Block, action: FaultAction | None) -> None:
    if action is not None and action.kind == "errno":
        raise OSError(action.value, os.strerror(action.value))
    if action is not None and action.kind == "delay":
        time.sleep(action.value / 1e3)
    if action is None or action.kind != "lost":
        target, source = request.dst_address + block.start, request.src_address + block.start
        ctypes.memmove(target, source, block.nbytes)
