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

from bisect import bisect_left, insort
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
    pager = _Pager(trace, sizes, capacity_bytes, present - resident)
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
        present: AbstractSet[int],
    ) -> None:
        self._trace = trace
        self._sizes = sizes
        self._capacity_bytes = capacity_bytes
        self.present = {bucket: trace.next_open(0, bucket) for bucket in present}
        # The same as (next open, bucket), ascending: the best victim is last.
        self._ranked = sorted((opens_at, bucket) for bucket, opens_at in self.present.items())
        self.present_bytes = sum(sizes[bucket] for bucket in present)
        self.peak_bytes = self.present_bytes
        self.open_counts: Counter[int] = Counter()
        assert self.present_bytes <= capacity_bytes, "what is present fits"

    def move(self, position: int, opened: int | None, upcoming: Iterator[int]) -> Actions:
        """Makes `opened` present, then the `upcoming` buckets until one finds no room."""
        evicted: list[int] = []
        fetched: list[int] = []
        if opened is not None:
            if opened in self.present:
                self._drop(opened)
            else:
                victims = self._victims(opened, position)
                assert victims is not None, "validate_open_sets has checked the open buckets"
                self._evict(victims, evicted)
                fetched.append(opened)
            self._add(opened, self._trace.next_open(position + 1, opened))
        for bucket in upcoming:
            if bucket in self.present:
                continue
            opens_at = self._trace.next_open(position, bucket)
            victims = self._victims(bucket, opens_at)
            if victims is None:
                break
            # What is fetched at this event opens sooner than `bucket`: it is no victim.
            assert not set(victims) & set(fetched), "what is fetched at an event stays"
            self._evict(victims, evicted)
            fetched.append(bucket)
            self._add(bucket, opens_at)
        return Actions(tuple(evicted), tuple(fetched)) if evicted or fetched else NO_ACTIONS

    def _add(self, bucket: int, opens_at: int) -> None:
        self.present[bucket] = opens_at
        insort(self._ranked, (opens_at, bucket))
        self.present_bytes += self._sizes[bucket]
        self.peak_bytes = max(self.peak_bytes, self.present_bytes)

    def _drop(self, bucket: int) -> None:
        opens_at = self.present.pop(bucket)
        del self._ranked[bisect_left(self._ranked, (opens_at, bucket))]
        self.present_bytes -= self._sizes[bucket]

    def _evict(self, victims: list[int], evicted: list[int]) -> None:
        for victim in victims:
            self._drop(victim)
        evicted.extend(victims)

    def _victims(self, bucket: int, not_before: int) -> list[int] | None:
        """Evictions, farthest next open first, that make room for `bucket`; None if too few.

        Only buckets that are not open and next open after `not_before` are victims.
        """
        excess = self.present_bytes + self._sizes[bucket] - self._capacity_bytes
        if excess <= 0:
            return []
        chosen: list[int] = []
        for opens_at, candidate in reversed(self._ranked):
            if excess <= 0 or opens_at <= not_before:
                break
            if not self.open_counts[candidate]:
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
