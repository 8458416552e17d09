from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.tiers.extents import Extent, ExtentPool, FreeRanges, RoundRobin, round_up_to_page


@pytest.mark.parametrize(
    ("nbytes", "rounded"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)]
)
def test_round_up_to_page(nbytes: int, rounded: int) -> None:
    assert round_up_to_page(nbytes) == rounded


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=80))
def test_free_ranges_against_a_bitmap(size: int, steps: list[tuple[bool, int]]) -> None:
    """First fit, no overlap, conservation, neighbours merged."""
    ranges = FreeRanges(size)
    taken = [False] * size
    leases: list[tuple[int, int]] = []
    for give_back, number in steps:
        if give_back and leases:
            start, length = leases.pop(number % len(leases))
            ranges.put_back(start, length)
            taken[start : start + length] = [False] * length
        else:
            fits = [s for s in range(size - number + 1) if not any(taken[s : s + number])]
            start = ranges.take(number)
            assert start == (fits[0] if fits else None)
            if start is not None:
                leases.append((start, number))
                taken[start : start + number] = [True] * number
        covered = [False] * size
        for low, high in ranges.ranges():
            covered[low:high] = [True] * (high - low)
        assert covered == [not each for each in taken]
        edges = [edge for pair in ranges.ranges() for edge in pair]
        assert edges == sorted(set(edges)), "free ranges touch: not merged"
        assert ranges.largest == max((h - low for low, h in ranges.ranges()), default=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=80))
def test_the_best_fit_is_the_shortest_range_that_is_long_enough(
    size: int, steps: list[tuple[bool, int]]
) -> None:
    ranges = FreeRanges(size)
    leases: list[tuple[int, int]] = []
    for give_back, number in steps:
        if give_back and leases:
            ranges.put_back(*leases.pop(number % len(leases)))
            continue
        fitting = [(high - low, low) for low, high in ranges.ranges() if high - low >= number]
        start = ranges.take_best(number)
        assert start == (min(fitting)[1] if fitting else None)
        if start is not None:
            leases.append((start, number))
        free = sum(high - low for low, high in ranges.ranges())
        assert free + sum(length for _, length in leases) == size


@pytest.mark.parametrize("wrong", [(0, 4), (2, 4), (6, 4), (12, 8), (-4, 4), (4, 12)])
def test_returning_what_is_free_fails(wrong: tuple[int, int]) -> None:
    ranges = FreeRanges(16)
    assert ranges.take(12) == 0
    ranges.put_back(0, 4)  # free now: [0, 4) and [12, 16)
    if wrong == (6, 4):
        ranges.put_back(6, 4)
    with pytest.raises(AssertionError, match="returned twice or never taken"):
        ranges.put_back(*wrong)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_extent_pool_conserves_extents(data: st.DataObject) -> None:
    """Free + current + retired is all; an extent that is read is never taken."""
    pool = ExtentPool(8)
    everything = [Extent(index % 2, index * 8, 8) for index in range(5)]
    for extent in everything:
        pool.add(extent, extent.file)
    current: list[Extent] = []
    retired: list[Extent] = []
    readers: Counter[Extent] = Counter()
    for _ in range(data.draw(st.integers(0, 40))):
        step = data.draw(st.sampled_from(["take", "put_back", "begin_read", "end_read"]))
        if step == "take":
            home = data.draw(st.integers(0, 1))
            extent = pool.take(home)
            free = set(everything) - set(current) - set(retired)
            if extent is None:
                assert not free
            else:
                assert extent in free
                assert extent.file == home or all(each.file != home for each in free)
                current.append(extent)
        elif step == "put_back" and current:
            extent = current.pop(data.draw(st.integers(0, len(current) - 1)))
            pool.put_back(extent)
            if readers[extent]:
                retired.append(extent)
        elif step == "begin_read" and current:
            extent = data.draw(st.sampled_from(current))
            pool.begin_read(extent)
            readers[extent] += 1
        elif step == "end_read" and readers.total():
            extent = data.draw(st.sampled_from(sorted((+readers), key=repr)))
            pool.end_read(extent)
            readers[extent] -= 1
            if extent in retired and not readers[extent]:
                retired.remove(extent)
        assert pool.num_free == len(everything) - len(current) - len(retired)


def test_an_extent_is_not_returned_twice() -> None:
    pool = ExtentPool(8)
    pool.add(Extent(0, 0, 8), 0)
    extent = pool.take(0)
    assert extent is not None
    pool.put_back(extent)
    with pytest.raises(AssertionError, match="returned twice"):
        pool.put_back(extent)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.sampled_from([4096, 8192, 12288]), max_size=40),
    st.integers(0, 5),
)
def test_extents_are_dealt_evenly_and_counted(num_paths: int, sizes: list[int], spare: int) -> None:
    dealer = RoundRobin(num_paths)
    homes = [(dealer.deal(size), size) for size in sizes]
    shadows = dealer.deal_shadows(sizes, spare=spare)
    for size, count in Counter(sizes).items():
        num_shadows = sum(1 for _, each in shadows if each == size)
        assert num_shadows == min(spare, count)
        on_path = Counter(home for home, each in homes + shadows if each == size)
        counts = [on_path[path] for path in range(num_paths)]
        assert max(counts) - min(counts) <= 1


def test_later_records_share_the_shadows_of_earlier_ones() -> None:
    dealer = RoundRobin(1)
    dealt = [len(dealer.deal_shadows([4096] * count, spare=4)) for count in (3, 2, 5)]
    assert dealt == [3, 1, 0]
    assert dealer.deal_shadows([8192], spare=4) == [(0, 8192)]


def test_alternating_sizes_use_all_paths() -> None:
    dealer = RoundRobin(2)
    homes = [(dealer.deal(size), size) for size in [4096, 8192] * 4]
    assert Counter(homes) == {(0, 4096): 2, (1, 4096): 2, (0, 8192): 2, (1, 8192): 2}


def test_a_copied_dealer_goes_on_alone() -> None:
    dealer = RoundRobin(2)
    assert dealer.deal(4096) == 0
    assert dealer.copy().deal(4096) == 1
    assert dealer.deal(4096) == 1
