"""An accelerator without hardware: streams whose arrows are checked, copies that end late.

[Note: happens before]

The CPU runs an op when it is called, so it cannot show that a kernel would have run too early. What
can be checked is the order that the arrows of [Note: streams] give. Each stream has a vector clock;
an event is a copy of it, and waiting for an event takes over what is larger. Two things are ordered
exactly if the clock of the second contains the tick of the first, however long copies take. What
the host has seen to be over, whatever it queues next comes after.

    checked when                        against
    an op uses memory of the tier       the last copy into it
    a copy into the tier starts         every op that has used that memory
    a copy out starts                   the op that made what is copied

A `RaceError` says which arrow is missing. The bytes are late as well: memory of the slab is NaN
until the copy into it ends, and after its release.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch

from offload.tiers.accelerator import AcceleratorTier, Event, Stream
from offload.tiers.device import DeviceLease
from offload.tiers.memory import map_shared
from offload.tiers.simulated import SimulatedIo
from offload.tiers.transfer import CopyLane, LaneTotals, TicketTransfer, Transfer

_POISON = 0xFF
_DEFAULT = "compute"

Clock = dict[str, int]
Range = tuple[int, int]  # addresses [start, end)


class RaceError(AssertionError):
    """Two uses of one piece of device memory are not ordered: an arrow is missing."""


class SimulatedCopy(TicketTransfer):
    """A copy on the virtual clock. `end` is its event; waits of the host are counted.

    Where an event would order it, its bytes are there at once, but a host that asks may be told for
    a while that it has not ended.
    """

    end: Clock
    tier: SimulatedAccelerator
    _is_seen = True

    def done(self) -> bool:
        if not self._is_seen and self.tier.random.random() < 0.5:
            return False
        if super().done():
            self._see()
            return True
        return False

    def wait(self, timeout: float | None = None) -> None:
        if not self._is_seen or not super().done():
            self.tier.host_waits[self.lane] += 1
        try:
            super().wait(timeout)
        finally:
            if super().done():  # well or not
                self._see()

    def order(self) -> None:
        """End the copy without the host's knowing."""
        self._is_seen = self._is_seen and super().done()
        super().wait()

    def _see(self) -> None:
        self._is_seen = True
        self.tier.see(self.end)


class SimulatedAccelerator(AcceleratorTier):
    """An accelerator whose memory is the host's; see [Note: happens before].

    Attributes:
        host_waits: by lane, how often the host has waited for a copy that had not ended.
        random: decides what the host is told.
    """

    def __init__(
        self, budget_bytes: int, io: SimulatedIo, *, deadline_seconds: float = 60.0, seed: int = 0
    ) -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self.host_waits: Counter[str] = Counter()
        self.random = random.Random(seed)
        self._io = io
        self._deadline_seconds = deadline_seconds
        self._thread = threading.local()
        self._clocks: dict[str, Clock] = {}
        self._seen: Clock = {}  # by the host
        self._leased: set[Range] = set()  # beside the slab
        self._uses: dict[tuple[Range, str], int] = {}  # of leases, by stream: the last tick
        self._results: dict[tuple[Range, str], int] = {}  # those uses that have written
        self._arrived: dict[Range, Clock] = {}  # what was copied into leases, and its end
        self._made: dict[int, tuple[str, int]] = {}  # by address, not leased: where and when
        self._in_flight: list[Transfer] = []
        self._order = threading.RLock()  # of the clocks and what they are compared with

    @contextlib.contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """A block in which this thread queues its work on the stream of that name."""
        before = self._current()
        self._thread.stream = name
        try:
            yield
        finally:
            self._thread.stream = before

    def synchronize(self, waiting: str, *, after: str) -> None:
        """What a user does between two streams: `waiting` goes on after `after`."""
        self._wait(waiting, self._record(after))

    def see(self, event: Clock) -> None:
        """The host knows that the event is over."""
        with self._order:
            _merge(self._seen, event)

    def use(self, tensor: torch.Tensor) -> None:
        """An op that is about to run has the tensor among its arguments.

        Raises:
            RaceError: it would run before the copy of what it uses has ended.
        """
        with self._order:
            at = self._place(tensor)
            if at is None:
                return
            stream, tick = self._tick()
            for place, end in self._arrived.items():
                if _overlap(place, at) and not _is_before(end, self._clock(stream)):
                    raise RaceError(
                        f"an op on stream {stream} does not wait for its copy: A2 or A3"
                    )
            self._uses[at, stream] = tick

    def make(self, tensor: torch.Tensor) -> None:
        """An op has run, and the tensor is its result."""
        with self._order:
            at = self._place(tensor)
            stream, tick = self._tick()
            if at is None:
                self._made[tensor.untyped_storage().data_ptr()] = stream, tick
            else:
                self._results[at, stream] = tick

    def make_current_wait(self, transfer: Transfer) -> None:
        if isinstance(transfer, SimulatedCopy):
            self._wait(self._current(), transfer.end)  # A2
            transfer.order()
        else:
            transfer.wait()

    def try_lease(self, nbytes: int, owner: str, *, beside: bool = False) -> DeviceLease | None:
        lease = super().try_lease(nbytes, owner, beside=beside)
        if lease is not None:
            with self._order:
                place = _range_of(lease.tensor)
                if self._allocation(place[0]) is None:
                    self._leased.add(place)
        return lease

    def lanes(self) -> LaneTotals:
        totals = self._io.lanes()
        return {lane: totals[lane] for lane in ("h2d", "d2h")}

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.frombuffer(map_shared(nbytes), dtype=torch.uint8)

    def _current(self) -> Stream:
        return getattr(self._thread, "stream", _DEFAULT)

    def _lane_stream(self, lane: CopyLane) -> Stream:
        return lane

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        return self.on_stream("beside")

    def _record(self, stream: Stream) -> Event:
        with self._order:
            return dict(self._clock(cast("str", stream)))

    def _wait(self, stream: Stream, event: Event) -> None:
        with self._order:
            _merge(self._clock(cast("str", stream)), cast("Clock", event))

    def _copy(self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane, what: str) -> Transfer:
        with self._order:
            self._check_copy(dst, src, lane)
            clock = self._clock(lane)
            clock[lane] += 1
            end = dict(clock)
            into = self._place(dst)
            if into is not None:
                self._forget(into)
                self._arrived[into] = end
        ticket = self._io.start_copy(dst.data_ptr(), src.data_ptr(), dst.numel(), lane=lane)
        transfer = SimulatedCopy(
            ticket,
            lane,
            dst.numel(),
            what=what,
            buffers=(dst, src),
            deadline_seconds=self._deadline_seconds,
            timeline=self.timeline,
        )
        transfer.end, transfer.tier = end, self
        with self._lock:
            self._in_flight = [each for each in self._in_flight if not each.done()]
            self._in_flight.append(transfer)
        return transfer

    def _check_copy(self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane) -> None:
        clock = self._clock(lane)
        into, of = self._place(dst), self._place(src)
        for (place, stream), tick in self._uses.items():
            if into is not None and _overlap(place, into) and clock.get(stream, 0) < tick:
                raise RaceError(
                    f"a copy into memory that stream {stream} still uses: A1 or A4, or A5"
                )
        made = [self._made.get(src.untyped_storage().data_ptr(), (lane, 0))]
        made += [
            (stream, tick)
            for (place, stream), tick in self._results.items()
            if of is not None and _overlap(place, of)
        ]
        for stream, tick in made:
            if lane == "d2h" and clock.get(stream, 0) < tick:
                raise RaceError(f"a copy out of what stream {stream} has not made yet: A1 or A5")

    def _forget(self, place: Range) -> None:
        """What was done with this memory is of no consequence any more."""
        self._uses = {k: tick for k, tick in self._uses.items() if not _overlap(k[0], place)}
        self._results = {k: tick for k, tick in self._results.items() if not _overlap(k[0], place)}
        self._arrived = {p: end for p, end in self._arrived.items() if not _overlap(p, place)}

    def _take_back(self, lease: DeviceLease, memory: torch.Tensor) -> None:
        super()._take_back(lease, memory)
        ctypes.memset(memory.data_ptr(), _POISON, memory.numel())
        with self._order:
            place = _range_of(lease.tensor)
            if place in self._leased:  # the system may have it back
                self._leased.remove(place)
                self._forget(place)

    def _clock(self, stream: str) -> Clock:
        """The clock of what is queued next on the stream."""
        clock = self._clocks.setdefault(stream, {stream: 0})
        _merge(clock, self._seen)
        return clock

    def _tick(self) -> tuple[str, int]:
        stream = cast("str", self._current())
        clock = self._clock(stream)
        clock[stream] += 1
        return stream, clock[stream]

    def _place(self, tensor: torch.Tensor) -> Range | None:
        """The leased bytes that a tensor may use: a parameter's, or its own of an allocation."""
        if not tensor.numel():
            return None
        storage = tensor.untyped_storage()
        start, nbytes = storage.data_ptr(), storage.nbytes()
        whole = self._allocation(start)
        if whole is None:
            return None
        if nbytes >= whole[1] - whole[0]:
            return _range_of(tensor)
        return start, start + nbytes

    def _allocation(self, address: int) -> Range | None:
        """The slab, or the lease beside it, that an address lies in."""
        slab = self._slab
        if slab is not None and slab.data_ptr() <= address < slab.data_ptr() + slab.numel():
            return _range_of(slab)
        return next((each for each in self._leased if each[0] <= address < each[1]), None)


def _range_of(tensor: torch.Tensor) -> Range:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def _merge(clock: Clock, event: Clock) -> None:
    for stream, tick in event.items():
        clock[stream] = max(clock.get(stream, 0), tick)


def _overlap(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _is_before(event: Clock, clock: Clock) -> bool:
    return all(clock.get(stream, 0) >= tick for stream, tick in event.items())
