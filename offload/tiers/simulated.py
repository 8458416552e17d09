"""Tiers without hardware: real bytes, modelled time.

[Note: virtual clock]

Nothing here sleeps. Time is a number that moves only when somebody waits for a transfer, or says
with `advance` that something else took time (compute). A lane moves one quantum after the other, in
the order of [Note: urgency]; when a transfer's last one is through, the lane's latency and seeded
jitter say when it ends, so that ends come in another order than starts.

A transfer's bytes move at its end and not before. Until then the target holds 0xFF, which is NaN in
every float type. So a wait that is missing shows as wrong data, in every run with the same seed.
A queue that is empty while somebody waits is a deadlock, and raises as a passed deadline.

[Note: random faults]

A test names the attempt that fails; a simulation of many seeds draws it. `RandomFaults` stands in
the place of a specification, and says afterwards what it has done.
"""

from __future__ import annotations

import ctypes
import errno as errno_codes
import heapq
import itertools
import math
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from offload.errors import DeadlineError, StorageError
from offload.native import crc32c
from offload.native.fault_spec import FaultAction, FaultSpec
from offload.native.files import IoFile
from offload.native.request_order import RequestOrder
from offload.tiers.device import CpuDeviceTier
from offload.tiers.transfer import CopyLane, LaneTotals, Urgency

_POISON = 0xFF
_LANES = ("h2d", "d2h", "nvme_read", "nvme_write")


class VirtualClock:
    """Time in seconds that stands still unless it is moved; see [Note: virtual clock].

    Thread-safe; ends run in the thread that moves the time, one after the other.
    """

    def __init__(self) -> None:
        self.now_seconds = 0.0
        self.lock = threading.RLock()  # held while ends run
        self._order = itertools.count()  # ends at one time run in the order of their start
        self._ends: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, seconds: float, end: Callable[[], None]) -> None:
        """Call `end` when the time is `seconds`."""
        with self.lock:
            heapq.heappush(self._ends, (seconds, next(self._order), end))

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, for work that is not a transfer; what ends meanwhile, ends."""
        self.run_until(lambda: False, self.now_seconds + seconds)

    def run_until(self, condition: Callable[[], bool], limit_seconds: float) -> bool:
        """Move the time on until `condition`, at most to `limit_seconds`; return if it holds."""
        with self.lock:
            while not condition():
                if not self._ends or self._ends[0][0] > limit_seconds:
                    if math.isfinite(limit_seconds):
                        self.now_seconds = max(self.now_seconds, limit_seconds)
                    return condition()
                seconds, _, end = heapq.heappop(self._ends)
                self.now_seconds = max(self.now_seconds, seconds)
                end()
            return True


@dataclass(frozen=True, slots=True)
class LaneModel:
    """A lane moves one quantum after the other; a transfer also takes its latency, which overlaps.

    `jitter_seconds` is the most that is added to a latency at random: ends change their order.
    `stalls` is the share of transfers that take up to `stall_seconds` longer than that, as on a
    disk that collects garbage.
    """

    bytes_per_second: float = 1e9
    latency_seconds: float = 1e-4
    jitter_seconds: float = 1e-2
    quantum_bytes: int = 8 << 20
    stalls: float = 0.0
    stall_seconds: float = 0.0

    def draw_latency(self, drawn: random.Random) -> float:
        """The latency of one transfer, in seconds."""
        latency = self.latency_seconds + drawn.uniform(0.0, self.jitter_seconds)
        if self.stalls and drawn.random() < self.stalls:
            latency += drawn.uniform(0.0, self.stall_seconds)
        return latency


class Faults(Protocol):
    """What decides which attempt fails, and how."""

    def next(self, operation: str) -> FaultAction | None:
        """Count one attempt of `operation`; return what to do to it."""


class RandomFaults:
    """Faults by seed; see [Note: random faults].

    Args:
        seed: of what is drawn.
        rates: the probability of each kind of fault, by (operation, kind), the kind and its value
            as in [Note: fault specification]; the first that is drawn acts.
        most: how often each kind may act; absent: without limit.

    Attributes:
        is_on: whether any acts from here on.
        acted: how often each (operation, kind) has acted.
    """

    def __init__(
        self,
        seed: int,
        rates: Mapping[tuple[str, FaultAction], float],
        *,
        most: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.is_on = True
        self.acted: Counter[tuple[str, str]] = Counter()
        self._rates = dict(rates)
        self._most = most
        self._random = random.Random(seed)

    def count(self, kind: str) -> int:
        """How often a kind of fault has acted."""
        return sum(count for (_, of), count in self.acted.items() if of == kind)

    def next(self, operation: str) -> FaultAction | None:
        """Draw whether this attempt fails."""
        for (affected, action), rate in self._rates.items():
            if not self.is_on or affected not in ("any", operation):
                continue
            may = self.count(action.kind) < self._most.get(action.kind, sys.maxsize)
            if self._random.random() < rate and may:
                self.acted[operation, action.kind] += 1
                return action
        return None


@dataclass(slots=True, eq=False)
class _Movement:
    """A request on its way through a lane. `through` is called when its last byte is."""

    lane: str
    urgency: int
    quantum_bytes: int
    left_bytes: int
    through: Callable[[], None]

    @property
    def next_nbytes(self) -> int:
        return min(self.quantum_bytes, self.left_bytes)


class SimulatedTicket:
    """A request on the virtual clock; the interface of the I/O engine's tickets."""

    def __init__(self, clock: VirtualClock, operation: str, path: str, nbytes: int) -> None:
        self._clock = clock
        self.movement: _Movement | None = None
        self._operation = operation
        self._path = path
        self._nbytes = nbytes
        self.ended = False
        self.errno = 0
        self.checksum = 0

    def done(self) -> bool:
        return self.ended

    def expedite(self, urgency: int) -> None:
        """Make the quanta that have not begun at least so urgent."""
        if self.movement is not None:
            self.movement.urgency = min(self.movement.urgency, urgency)

    def span(self) -> None:
        """Virtual time is not comparable with that of the rest."""

    def wait(self, timeout: float | None = None) -> int:
        """Move the clock on to the end, at most by `timeout` virtual seconds; return the CRC32C.

        Raises:
            StorageError: the request failed.
            DeadlineError: it has not ended by then, or can never end.
        """
        limit = math.inf if timeout is None else self._clock.now_seconds + timeout
        if not self._clock.run_until(self.done, limit):
            raise DeadlineError(
                operation=self._operation,
                path=self._path,
                nbytes=self._nbytes,
                detail=f"still in flight at virtual time {self._clock.now_seconds:g} s",
            )
        if self.errno:
            raise StorageError(
                operation=self._operation, path=self._path, nbytes=self._nbytes, errno=self.errno
            )
        return self.checksum


class SimulatedIo:
    """An I/O engine on a virtual clock, with the interface of `offload.native.IoEngine`.

    Files are real. `seed` decides the order of ends, `fault` what fails: `Faults`, or text; for its
    language see [Note: fault specification] in `offload.native.fault_spec` ("short" has no effect
    here).
    """

    backend = "simulated"

    def __init__(
        self,
        clock: VirtualClock | None = None,
        *,
        lanes: Mapping[str, LaneModel] | None = None,
        seed: int = 0,
        fault: str | Faults | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        self._models = {lane: LaneModel() for lane in _LANES} | dict(lanes or {})
        self._random = random.Random(seed)
        self._fault: Faults = FaultSpec(fault or "") if isinstance(fault, str | None) else fault
        self._waiting = {lane: RequestOrder[_Movement]() for lane in self._models}
        self._is_moving = dict.fromkeys(self._models, False)
        self._totals: LaneTotals = dict.fromkeys(self._models, (0, 0.0))

    def open(self, path: str, *, flags: int, mode: int = 0o600, direct: bool = True) -> IoFile:
        """Open a real file; never O_DIRECT. Raises StorageError."""
        del direct
        return IoFile.open(path, flags=flags, mode=mode, direct=False)

    def from_fd(self, fd: int, path: str, *, direct: bool = True) -> IoFile:
        """Take over a descriptor; `path` is its name in messages."""
        del direct
        return IoFile(fd, path, direct=False)

    def register(self, address: int, nbytes: int) -> str:
        """There is nothing to prepare."""
        del address, nbytes
        return "ok"

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        del address

    def fsync(self, file: IoFile) -> None:
        """Make written data durable. Raises StorageError."""
        action = self._fault.next("fsync")
        if action is not None and action.kind == "errno":
            raise StorageError(operation="fsync", path=file.path, errno=action.value)
        os.fsync(file.fd)

    def start_read(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = Urgency.BULK,
    ) -> SimulatedTicket:
        """Start a read; the target is poison until it ends."""
        ctypes.memset(address, _POISON, nbytes)

        def move(action: FaultAction | None) -> int:
            moved = nbytes
            if not _is(action, "lost"):
                moved = os.preadv(file.fd, [_memory(address, nbytes)], offset + _shift(action))
            if _is(action, "corrupt"):
                _flip(address)
            if moved != nbytes:
                raise OSError(errno_codes.EIO, "short")
            return 0 if checksum_seed is None else crc32c(address, nbytes, checksum_seed)

        return self._start("nvme_read", "read", file.path, nbytes, urgency, move)

    def start_write(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = Urgency.BULK,
    ) -> SimulatedTicket:
        """Start a write; the source is read when it ends."""

        def move(action: FaultAction | None) -> int:
            if not _is(action, "lost"):
                os.pwritev(file.fd, [_memory(address, nbytes)], offset + _shift(action))
            if _is(action, "corrupt"):
                first = ctypes.c_uint8.from_address(address).value
                os.pwrite(file.fd, bytes([first ^ _POISON]), offset)
            return 0 if checksum_seed is None else crc32c(address, nbytes, checksum_seed)

        return self._start("nvme_write", "write", file.path, nbytes, urgency, move)

    def start_copy(
        self,
        dst_address: int,
        src_address: int,
        nbytes: int,
        *,
        lane: CopyLane,
        urgency: int = Urgency.BULK,
    ) -> SimulatedTicket:
        """Start a memory copy; the target is poison until it ends."""
        ctypes.memset(dst_address, _POISON, nbytes)

        def move(action: FaultAction | None) -> int:
            if not _is(action, "lost"):
                ctypes.memmove(dst_address, src_address, nbytes)
            return 0

        return self._start(lane, "copy", "memory", nbytes, urgency, move)

    def lanes(self) -> LaneTotals:
        """Return lane -> (bytes moved, virtual seconds in which the lane was occupied)."""
        return dict(self._totals)

    def close(self, timeout: float = 60.0) -> None:
        """End everything that is in flight within `timeout` virtual seconds."""
        self.clock.advance(timeout)

    def _start(
        self,
        lane: str,
        operation: str,
        path: str,
        nbytes: int,
        urgency: int,
        move: Callable[[FaultAction | None], int],
    ) -> SimulatedTicket:
        ticket = SimulatedTicket(self.clock, operation, path, nbytes)
        action = self._fault.next(operation)
        model = self._models[lane]
        seconds = nbytes / model.bytes_per_second
        latency = model.draw_latency(self._random)
        if action is not None and action.kind == "delay":
            latency += action.value / 1e3

        def end() -> None:
            try:
                if action is not None and action.kind == "errno":
                    raise OSError(action.value, os.strerror(action.value))
                ticket.checksum = move(action)
            except OSError as error:
                ticket.errno = error.errno or errno_codes.EIO
            else:
                total_bytes, busy_seconds = self._totals[lane]
                self._totals[lane] = (total_bytes + nbytes, busy_seconds + seconds)
            ticket.ended = True

        def through() -> None:
            if not _is(action, "drop"):
                self.clock.at(self.clock.now_seconds + latency, end)

        ticket.movement = _Movement(lane, urgency, model.quantum_bytes, nbytes, through)
        with self.clock.lock:
            self._waiting[lane].add(ticket.movement)
            if not self._is_moving[lane]:
                self._move_next(lane)
        return ticket

    def _move_next(self, lane: str) -> None:
        """The lane is free: begin the next quantum. Under the clock's lock."""
        waiting = self._waiting[lane]
        movement = waiting.take()
        self._is_moving[lane] = movement is not None
        if movement is None:
            return
        nbytes, urgency = movement.next_nbytes, movement.urgency
        movement.left_bytes -= nbytes
        is_last = not movement.left_bytes
        if is_last:
            waiting.remove(movement)

        def moved() -> None:
            waiting.end(urgency, nbytes)
            if is_last:
                movement.through()
            self._move_next(lane)

        seconds = nbytes / self._models[lane].bytes_per_second
        self.clock.at(self.clock.now_seconds + seconds, moved)


class SimulatedDeviceTier(CpuDeviceTier):
    """A device whose copies take virtual time and move their bytes only when they end.

    `host_addressable` may be set to False, to find code that takes a device for host memory.
    """

    def __init__(
        self, budget_bytes: int, io: SimulatedIo, *, host_addressable: bool = True
    ) -> None:
        super().__init__(budget_bytes, io)
        self.host_addressable = host_addressable
        self.clock = io.clock


def _is(action: FaultAction | None, kind: str) -> bool:
    return action is not None and action.kind == kind


def _shift(action: FaultAction | None) -> int:
    return action.value if action is not None and action.kind == "misdirect" else 0


def _memory(address: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * nbytes).from_address(address)


def _flip(address: int) -> None:
    ctypes.c_uint8.from_address(address).value ^= _POISON
