"""Which request's block is next: the order of the C++ library's queue, in Python.

The order, and why it is that, stands in native/src/request_queue.hpp, [Note: order]. The Python
core and the simulated engine follow it too, so that what holds of one holds of all.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Generic, Protocol, TypeVar

from offload.native.core import urgency_class

MAX_PASSED = 16  # blocks


class Ordered(Protocol):
    """A request with blocks left to take."""

    urgency: int

    @property
    def lane(self) -> str:
        """Requests of one lane keep their order; lanes take turns."""

    @property
    def next_nbytes(self) -> int:
        """Bytes of its next block."""


_T = TypeVar("_T", bound=Ordered)


class RequestOrder(Generic[_T]):
    """The requests that wait for something that carries them out, of one or several lanes.

    A block that is not of the first class is taken only if with it at most `max_blocks` blocks and
    `max_bytes` bytes are in flight, half as many bytes beside blocks of an earlier class; or none
    but it. Not thread-safe.
    """

    def __init__(self, *, max_blocks: float = math.inf, max_bytes: float = math.inf) -> None:
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._waiting: list[_T] = []  # the oldest first
        self._last_lane = ""
        self._num_passed = 0
        self._num_in_flight: Counter[int] = Counter()  # blocks by class
        self._num_bytes = 0  # in flight

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, request: _T) -> None:
        """A request waits."""
        self._waiting.append(request)

    def remove(self, request: _T) -> None:
        """It has no blocks left to take; nothing if it does not wait."""
        self._waiting = [each for each in self._waiting if each is not request]

    def take(self) -> _T | None:
        """Return the request whose next block is in flight from now on; None: none may be."""
        request = self._choose()
        if request is None:
            return None
        oldest = self._waiting[0]
        if request is oldest:
            self._num_passed = 0
        elif request.urgency < oldest.urgency:
            self._num_passed += 1
        self._last_lane = request.lane
        self._num_in_flight[urgency_class(request.urgency)] += 1
        self._num_bytes += request.next_nbytes
        return request

    def end(self, urgency: int, nbytes: int) -> None:
        """A block that was taken with this urgency and so many bytes is no longer in flight."""
        self._num_in_flight[urgency_class(urgency)] -= 1
        self._num_bytes -= nbytes

    def _choose(self) -> _T | None:
        if not self._waiting:
            return None
        if self._num_passed >= MAX_PASSED:
            return self._waiting[0]
        firsts: dict[str, _T] = {}
        for request in self._waiting:
            first = firsts.get(request.lane)
            if first is None or request.urgency < first.urgency:
                firsts[request.lane] = request
        chosen = min(
            firsts.values(),
            key=lambda each: (urgency_class(each.urgency), each.lane == self._last_lane),
        )
        return chosen if self._may_start(chosen) else None

    def _may_start(self, request: _T) -> bool:
        own = urgency_class(request.urgency)
        num_blocks = self._num_in_flight.total()
        if own == 0 or num_blocks == 0:
            return True
        beside_urgent = any(self._num_in_flight[each] for each in range(own))
        max_bytes = self._max_bytes / 2 if beside_urgent else self._max_bytes
        return num_blocks < self._max_blocks and self._num_bytes + request.next_nbytes <= max_bytes
