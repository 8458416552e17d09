"""What to evict and what to fetch at each event of a trace, decided before the step runs.

[Note: Lookahead]
  paged bucket   one that has no home on the device: it is fetched there and evicted from there.
  present        a paged bucket from the start of its fetch to its eviction; `sizes` of the present
                 buckets never exceed `capacity_bytes`.
  window         the next `depth` distinct paged buckets that open and are not open now.

At each open the plan fetches the bucket itself if it is absent, then the absent buckets of the
window, nearest first. Room is made by evicting the present bucket whose next open is farthest away
(L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966), never an
open one, and for a prefetch never one that opens before the prefetched bucket does. Hence what is
prefetched is still present when it opens: everything that opens in between is nearer, so it is
present already. With `depth` 0 and equal sizes the number of fetches is the least possible.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from offload.errors import DoesNotFitError, format_bytes
from offload.schedule.trace import OPEN, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet


class Actions(NamedTuple):
    """What to start at one event: all evictions, then the fetches in order."""

    evict: tuple[int, ...]
    fetch: tuple[int, ...]


NO_ACTIONS = Actions((), ())


@dataclass(frozen=True, slots=True)
class LookaheadPlan:
    """The movements of one step; validated when it is made, so the executor decides nothing.

    Attributes:
        start: started before the first event.
        actions: `actions[i]` is started before event i takes effect; empty unless it is an open.
        present_at_end: the paged buckets that are left on the device after the last event.
        peak_bytes: most bytes that are present at once.
    """

    start: Actions
    actions: tuple[Actions, ...]
    present_at_end: frozenset[int]
    peak_bytes: int

    @property
    def num_fetches(self) -> int:
        """Fetches in the whole step."""
        return len(self.start.fetch) + sum(len(action.fetch) for action in self.actions)


def plan_lookahead(
    trace: Trace,
    sizes: Mapping[int, int],
    *,
    capacity_bytes: int,
    resident: AbstractSet[int] = frozenset(),
    depth: int,
    present: AbstractSet[int] = frozenset(),
) -> LookaheadPlan:
    """Plans the fetches and evictions of one step.

    Args:
        trace: the events of the step.
        sizes: bytes of each bucket of the trace on the device.
        capacity_bytes: device room for paged buckets; the `resident` ones are outside of it.
        resident: buckets that are always on the device: neither fetched nor evicted.
        depth: how many distinct paged buckets ahead are prefetched; 0 fetches on demand only.
        present: paged buckets that are on the device when the step begins.

    Raises:
        DoesNotFitError: buckets that are open at the same time exceed the capacity; names them.
    """
    validate_open_sets(trace, sizes, capacity_bytes=capacity_bytes, resident=resident)
    pager = _Pager(trace, sizes, capacity_bytes, set(present - resident))
    window = _Window(trace, resident, depth)
    start = pager.move(0, None, window.buckets(pager.open_counts))
    actions = []
    for position, event in enumerate(trace.events):
        if event.bucket in resident:
            actions.append(NO_ACTIONS)
        elif event.kind is OPEN:
            pager.open_counts[event.bucket] += 1
            window.pass_open(position)
            upcoming = window.buckets(pager.open_counts)
            actions.append(pager.move(position, event.bucket, upcoming))
        else:
            pager.open_counts[event.bucket] -= 1
            actions.append(NO_ACTIONS)
    return LookaheadPlan(start, tuple(actions), frozenset(pager.present), pager.peak_bytes)


def validate_open_sets(
    trace: Trace,
    sizes: Mapping[int, int],
    *,
    capacity_bytes: int,
    resident: AbstractSet[int] = frozenset(),
) -> None:
    """Checks that the paged buckets that are open together always fit.

    Raises:
        DoesNotFitError: they do not; the table names the largest such set and its bytes.
    """
    counts: Counter[int] = Counter()
    open_bytes = 0
    worst_bytes = 0
    worst: tuple[int, ...] = ()
    for kind, bucket in trace.events:
        if bucket in resident:
            continue
        if kind is OPEN:
            counts[bucket] += 1
            open_bytes += sizes[bucket] if counts[bucket] == 1 else 0
            if open_bytes > worst_bytes:
                worst_bytes = open_bytes
                worst = tuple(sorted(+counts))
        else:
            counts[bucket] -= 1
            open_bytes -= 0 if counts[bucket] else sizes[bucket]
    if worst_bytes > capacity_bytes:
        rows = "\n".join(f"  bucket {b}: {sizes[b]} bytes" for b in worst)
        raise DoesNotFitError(
            fact=(
                f"{len(worst)} buckets that are in use at the same time need {worst_bytes} bytes "
                f"({format_bytes(worst_bytes)}) of tier device, which has {capacity_bytes} bytes "
                f"({format_bytes(capacity_bytes)}) for paged buckets"
            ),
            table=(
                f"{rows}\nraise tiers.device.memory by at least {worst_bytes - capacity_bytes} "
                f"bytes, or lower partition.bucket_elements"
            ),
        )


class _Window:
    """The next open of each paged bucket, while the trace is walked."""

    def __init__(self, trace: Trace, resident: AbstractSet[int], depth: int) -> None:
        self._trace = trace
        self._depth = depth
        # Positions of opens, ascending, one for each bucket that opens again in this step.
        self._next_opens = sorted(trace.next_open(0, b) for b in trace.buckets - resident)

    def pass_open(self, position: int) -> None:
        """The nearest open takes place."""
        assert self._next_opens[0] == position, "opens are passed in order"
        del self._next_opens[0]
        following = self._trace.next_open(position + 1, self._trace.events[position].bucket)
        if following < len(self._trace):
            insort(self._next_opens, following)

    def buckets(self, open_counts: Counter[int]) -> Iterator[int]:
        """The next buckets that are not open, nearest first, `depth` at most."""
        upcoming = (self._trace.events[position].bucket for position in self._next_opens)
        return islice((bucket for bucket in upcoming if not open_counts[bucket]), self._depth)


class _Pager:
    """The state of the device while the trace is walked."""

    def __init__(
        self,
        trace: Trace,
        sizes: Mapping[int, int],
        capacity_bytes: int,
        present: set[int],
    ) -> None:
        self._trace = trace
        self._sizes = sizes
        self._capacity_bytes = capacity_bytes
        self.present = present
        self.present_bytes = sum(sizes[bucket] for bucket in present)
        self.peak_bytes = self.present_bytes
        self.open_counts: Counter[int] = Counter()
        assert self.present_bytes <= capacity_bytes, "what is present fits"

    def move(self, position: int, opened: int | None, upcoming: Iterator[int]) -> Actions:
        """Makes `opened` present, then the `upcoming` buckets until one finds no room."""
        evicted: list[int] = []
        fetched: list[int] = []
        if opened is not None and opened not in self.present:
            victims = self._victims(position, opened, position)
            assert victims is not None, "validate_open_sets has checked the open buckets"
            self._exchange(victims, opened, evicted, fetched)
        for bucket in upcoming:
            if bucket in self.present:
                continue
            victims = self._victims(position, bucket, self._trace.next_open(position, bucket))
            if victims is None:
                break
            self._exchange(victims, bucket, evicted, fetched)
        return Actions(tuple(evicted), tuple(fetched)) if evicted or fetched else NO_ACTIONS

    def _exchange(
        self, victims: list[int], bucket: int, evicted: list[int], fetched: list[int]
    ) -> None:
        # A victim is never a bucket fetched at this same event: those open sooner than `bucket`.
        assert not set(victims) & set(fetched), "what is fetched at an event stays"
        self.present.difference_update(victims)
        self.present.add(bucket)
        self.present_bytes += self._sizes[bucket] - sum(self._sizes[v] for v in victims)
        self.peak_bytes = max(self.peak_bytes, self.present_bytes)
        evicted.extend(victims)
        fetched.append(bucket)

    def _victims(self, position: int, bucket: int, not_before: int) -> list[int] | None:
        """The fewest evictions, farthest next open first, that make room; None if there are none.

        Only buckets that next open after `not_before` are victims.
        """
        excess = self.present_bytes + self._sizes[bucket] - self._capacity_bytes
        if excess <= 0:
            return []
        ranked = sorted(
            (
                (self._trace.next_open(position, candidate), candidate)
                for candidate in self.present
                if not self.open_counts[candidate]
            ),
            reverse=True,
        )
        chosen: list[int] = []
        for opens_at, candidate in ranked:
            if excess <= 0 or opens_at <= not_before:
                break
            chosen.append(candidate)
            excess -= self._sizes[candidate]
        if excess > 0:
            return None
        return self._spare(chosen, -excess)

    def _spare(self, chosen: list[int], surplus: int) -> list[int]:
        """Drops victims that are not needed after all, nearest next open first."""
        kept = []
        for candidate in reversed(chosen):
            if self._sizes[candidate] <= surplus:
                surplus -= self._sizes[candidate]
            else:
                kept.append(candidate)
        return kept[::-1]
