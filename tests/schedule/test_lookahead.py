from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import DoesNotFitError
from offload.schedule.lookahead import LookaheadPlan, plan_lookahead
from offload.schedule.trace import CLOSE, OPEN, Event, Trace, TraceRecorder


def sequential(buckets: list[int]) -> Trace:
    recorder = TraceRecorder()
    for bucket in buckets:
        recorder.open(bucket)
        recorder.close(bucket)
    return recorder.finish()


@st.composite
def nested_traces(draw: st.DrawFn) -> Trace:
    """Opens and closes of up to 6 buckets, nested, overlapping and repeated."""
    recorder = TraceRecorder()
    open_now: list[int] = []
    for opens in draw(st.lists(st.booleans(), max_size=30)):
        if opens or not open_now:
            bucket = draw(st.integers(0, 5))
            recorder.open(bucket)
            open_now.append(bucket)
        else:
            recorder.close(open_now.pop(draw(st.integers(0, len(open_now) - 1))))
    return recorder.finish()


def widest_open_set(trace: Trace, sizes: dict[int, int], resident: frozenset[int]) -> int:
    counts = dict.fromkeys(sizes, 0)
    widest = 0
    for kind, bucket in trace.events:
        counts[bucket] += 1 if kind is OPEN else -1
        widest = max(widest, sum(sizes[b] for b in sizes if counts[b] and b not in resident))
    return widest


def replay(
    trace: Trace,
    plan: LookaheadPlan,
    sizes: dict[int, int],
    capacity: int,
    resident: frozenset[int],
    present: frozenset[int],
    depth: int,
) -> None:
    """Runs the plan as the engine does and checks every rule of the contract."""
    held = set(present)
    open_counts = dict.fromkeys(sizes, 0)
    unopened: set[int] = set()
    for position, action in enumerate([plan.start, *plan.actions], start=-1):
        event = trace.events[position] if position >= 0 else None
        if event is None or event.kind is CLOSE:
            assert event is None or action == ((), ())
        opening = {event.bucket} if event is not None and event.kind is OPEN else set()
        evict, fetch = set(action.evict), set(action.fetch)
        assert len(evict) == len(action.evict)
        assert len(fetch) == len(action.fetch)
        assert not (evict | fetch) & resident
        assert evict <= held, "only what is present is evicted"
        assert not any(open_counts[b] for b in evict), "an open bucket is not evicted"
        assert not evict & opening
        assert not evict & unopened, "what is prefetched is used before it is evicted"
        held -= evict
        assert not fetch & held, "only what is absent is fetched"
        held |= fetch
        assert sum(sizes[b] for b in held) <= capacity
        if event is not None:
            open_counts[event.bucket] += 1 if event.kind is OPEN else -1
        unopened = (unopened | fetch) - opening
        assert opening <= held | resident, "a bucket is present when it opens"
        upcoming: list[int] = []
        for kind, bucket in trace.events[position + 1 :]:
            fresh = kind is OPEN and bucket not in resident and not open_counts[bucket]
            if fresh and bucket not in upcoming:
                upcoming.append(bucket)
        ahead = [b for b in upcoming[:depth] if b in fetch]
        assert fetch - opening == set(ahead), "prefetches stay within the window"
        nearer = upcoming[: upcoming.index(ahead[-1])] if ahead else []
        assert held.issuperset(nearer), "the nearest are fetched first"
    assert held == plan.present_at_end


@given(data=st.data(), trace=nested_traces())
def test_every_plan_keeps_the_contract(data: st.DataObject, trace: Trace) -> None:
    sizes = {b: data.draw(st.integers(1, 5), label=f"size {b}") for b in range(6)}
    resident = data.draw(st.frozensets(st.integers(0, 5)))
    slack = data.draw(st.integers(0, 12))
    capacity = widest_open_set(trace, sizes, resident) + slack
    depth = data.draw(st.integers(0, 4))
    present = frozenset[int]()
    for bucket in data.draw(st.frozensets(st.integers(0, 5))) - resident:
        if sum(sizes[b] for b in present | {bucket}) <= capacity:
            present |= {bucket}
    plan = plan_lookahead(
        trace, sizes, capacity_bytes=capacity, resident=resident, depth=depth, present=present
    )
    replay(trace, plan, sizes, capacity, resident, present, depth)


def fewest_fetches(buckets: tuple[int, ...], capacity: int) -> int:
    """Brute force over all choices of victims, on demand, for equal sizes."""

    @functools.cache
    def search(at: int, held: frozenset[int]) -> int:
        if at == len(buckets):
            return 0
        if buckets[at] in held:
            return search(at + 1, held)
        if len(held) < capacity:
            return 1 + search(at + 1, held | {buckets[at]})
        return 1 + min(search(at + 1, held - {v} | {buckets[at]}) for v in held)

    return search(0, frozenset())


@given(
    buckets=st.lists(st.integers(0, 4), max_size=12),
    capacity=st.integers(1, 4),
)
def test_demand_fetches_are_the_fewest_possible(buckets: list[int], capacity: int) -> None:
    plan = plan_lookahead(
        sequential(buckets), dict.fromkeys(range(5), 7), capacity_bytes=7 * capacity, depth=0
    )
    assert plan.num_fetches == fewest_fetches(tuple(buckets), capacity)


@given(
    buckets=st.lists(st.integers(0, 4), max_size=12),
    capacity=st.integers(2, 4),
    depth=st.integers(1, 3),
)
def test_prefetching_costs_no_more_than_the_room_it_takes(
    buckets: list[int], capacity: int, depth: int
) -> None:
    plan = plan_lookahead(
        sequential(buckets), dict.fromkeys(range(5), 1), capacity_bytes=capacity, depth=depth
    )
    least = fewest_fetches(tuple(buckets), capacity)
    assert plan.num_fetches >= least
    if depth < capacity:
        assert plan.num_fetches <= fewest_fetches(tuple(buckets), capacity - depth)


def test_forward_and_backward_keep_the_turning_point() -> None:
    order = [0, 1, 2, 3, 3, 2, 1, 0]
    plan = plan_lookahead(sequential(order), dict.fromkeys(range(4), 1), capacity_bytes=2, depth=1)
    assert [(p, *a) for p, a in enumerate(plan.actions) if a != ((), ())] == [
        (0, (), (1,)),
        (2, (0,), (2,)),
        (4, (1,), (3,)),
        (10, (3,), (1,)),
        (12, (2,), (0,)),
    ]
    assert plan.start == ((), (0,))
    assert plan.present_at_end == {0, 1}


def test_nothing_overtakes_a_bucket_that_finds_no_room() -> None:
    plan = plan_lookahead(sequential([0, 1, 2]), {0: 3, 1: 5, 2: 1}, capacity_bytes=5, depth=2)
    # Bucket 2 would fit beside 0, but 1 would throw it out again.
    assert [a for a in plan.actions if a != ((), ())] == [((0,), (1,)), ((1,), (2,))]
    assert plan.num_fetches == 3


def test_buckets_that_are_open_together_are_refused_by_name() -> None:
    trace = Trace((Event(OPEN, 0), Event(OPEN, 2), Event(CLOSE, 2), Event(CLOSE, 0)))
    with pytest.raises(DoesNotFitError) as caught:
        plan_lookahead(trace, {0: 30, 2: 80}, capacity_bytes=109, depth=2)
    assert "110 bytes" in str(caught.value)
    assert "bucket 0: 30 bytes" in caught.value.table
    assert "bucket 2: 80 bytes" in caught.value.table
    assert "at least 1 bytes" in caught.value.table
    assert plan_lookahead(
        trace, {0: 30, 2: 80}, capacity_bytes=30, resident=frozenset({2}), depth=2
    ).start == ((), (0,))


def test_what_is_present_at_the_start_is_not_fetched_again() -> None:
    trace = sequential([0, 1, 2])
    first = plan_lookahead(trace, dict.fromkeys(range(3), 1), capacity_bytes=2, depth=1)
    again = plan_lookahead(
        trace,
        dict.fromkeys(range(3), 1),
        capacity_bytes=2,
        depth=1,
        present=first.present_at_end,
    )
    assert again.num_fetches < first.num_fetches
