from __future__ import annotations

import ctypes
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, OffloadError
from offload.native import IoEngine
from offload.tiers.host import HostArena, HostLease, HostSegment
from offload.tiers.host_share import HostShare
from tests.threads import run_in_threads
from tests.tiers.conftest import RunScript

PAGE = 4096


def test_lease_is_exact_and_page_rounded_in_the_budget(arena: HostArena) -> None:
    lease = arena.lease(5000, "weights")
    assert lease.nbytes == 5000
    assert lease.tensor.shape == (5000,)
    assert lease.tensor.dtype == torch.uint8
    assert lease.padded.shape == (8192,)
    assert lease.address % PAGE == 0
    assert lease.tensor.data_ptr() == lease.address
    assert arena.used_bytes == arena.peak_bytes == 8192
    lease.release()
    assert (arena.used_bytes, arena.peak_bytes) == (0, 8192)
    assert repr(lease) == "HostLease('weights', 5000 bytes, released)"


def test_views_share_the_lease(arena: HostArena) -> None:
    lease = arena.lease(2 * PAGE, "weights")
    view = lease.view(torch.float32, PAGE, 8)
    view.copy_(torch.arange(8.0))
    assert torch.equal(lease.tensor[PAGE : PAGE + 32].view(torch.float32), torch.arange(8.0))
    with pytest.raises(AssertionError, match="view beyond the lease"):
        lease.view(torch.float32, 2 * PAGE - 4, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * PAGE)), max_size=60))
def test_leases_never_overlap_and_bytes_are_conserved(steps: list[tuple[bool, int]]) -> None:
    with HostArena(16 * PAGE) as arena:
        leases: list[HostLease] = []
        peak = 0
        for number, (give_back, nbytes) in enumerate(steps):
            if give_back and leases:
                leases.pop(nbytes % len(leases)).release()
            elif (lease := arena.try_lease(nbytes, f"owner {number}")) is not None:
                lease.tensor.fill_(len(leases) % 251)
                leases.append(lease)
            spans = sorted((each.address, each.address + each.padded.numel()) for each in leases)
            assert all(low[1] <= high[0] for low, high in pairwise(spans))
            assert all(
                arena.address <= low and high <= arena.address + 16 * PAGE for low, high in spans
            )
            assert arena.used_bytes == sum(high - low for low, high in spans) <= arena.budget_bytes
            peak = max(peak, arena.used_bytes)
            assert arena.peak_bytes == peak
        for lease in leases:
            lease.release()
        assert arena.used_bytes == 0
        arena.lease(16 * PAGE, "all").release()  # everything has been merged again


def test_double_release_is_an_assertion_and_harmless(arena: HostArena) -> None:
    lease, other = arena.lease(PAGE, "a"), arena.lease(PAGE, "b")
    lease.release()
    with pytest.raises(AssertionError, match="lease of a released twice"):
        lease.release()
    assert arena.used_bytes == PAGE
    other.release()


def test_budget_error_says_who_holds_what(arena: HostArena) -> None:
    held = [arena.lease(1 << 20, "staging") for _ in range(3)] + [arena.lease(1 << 20, "weights 7")]
    assert arena.try_lease(5 << 20, "bucket 9") is None
    with pytest.raises(BudgetError) as caught:
        arena.lease(5 << 20, "bucket 9")
    error = caught.value
    assert (error.tier, error.owner) == ("host", "bucket 9")
    assert (error.requested_bytes, error.free_bytes, error.budget_bytes) == (
        5 << 20,
        4 << 20,
        8 << 20,
    )
    assert "staging 3 x (3.00 MiB in all), weights 7 1 x (1.00 MiB in all)" in str(error)
    assert "longest free range" not in str(error)
    held[0].release()
    with pytest.raises(BudgetError, match=r"longest free range is 4\.00 MiB"):
        arena.lease(5 << 20, "bucket 9")  # 5 MiB are free, but in two pieces
    assert arena.used_bytes == 3 << 20


def test_many_owners_are_summed_up() -> None:
    with HostArena(16 * PAGE) as arena:
        for number in range(11):
            arena.lease(PAGE, f"owner {number}")
        assert arena.owners().endswith(", 3 more owners")


def test_budget_is_rounded_down_to_pages_and_has_a_minimum() -> None:
    with HostArena(3 * PAGE - 1) as arena:
        assert arena.budget_bytes == 2 * PAGE
    with pytest.raises(ValueError, match="below one lease"):
        HostArena(PAGE - 1)
    with pytest.raises(BudgetError, match="the system maps no more"):
        HostArena(1 << 60)


def test_leases_from_many_threads() -> None:
    with HostArena(64 * PAGE) as arena:

        def work(value: int) -> None:
            for _ in range(200):
                lease = arena.try_lease(1 + value * PAGE, f"thread {value}")
                if lease is not None:
                    lease.tensor.fill_(value)
                    assert bool((lease.tensor == value).all())
                    lease.release()

        run_in_threads(*(partial(work, value) for value in range(1, 5)))
        assert arena.used_bytes == 0


def _resident_kib() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Rss:"))


def test_pretouch_keeps_contents_and_close_gives_the_pages_back() -> None:
    arena = HostArena(64 << 20)
    lease = arena.lease(PAGE, "weights")
    lease.tensor.fill_(7)
    before = _resident_kib()
    arena.pretouch()
    assert _resident_kib() - before > 60 << 10
    assert bool((lease.tensor == 7).all())
    arena.close()
    arena.close()
    assert _resident_kib() - before < 4 << 10  # although `lease` still exists
    with pytest.raises(AssertionError, match="closed arena"):
        arena.lease(PAGE, "late")


def test_registers_with_an_io_engine(io: IoEngine, arena: HostArena) -> None:
    assert isinstance(arena.register_with(io), str)


def test_a_forked_child_does_not_take_the_memory_away(run_script: RunScript) -> None:
    script = """
import os, sys
from offload.tiers.host import HostArena
arena = HostArena(1 << 20)
lease = arena.lease(4096, "weights")
lease.tensor.fill_(7)
if (child := os.fork()) == 0:
    arena.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert bool((lease.tensor == 7).all())
"""
    assert run_script(script).wait(timeout=60) == 0


class NotedMemory:
    """What an I/O engine is asked to register."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def register(self, address: int, nbytes: int) -> str:
        self.ranges.append((address, nbytes))
        return "ok"

    def unregister(self, address: int) -> None:
        (known,) = [each for each in self.ranges if each[0] == address]
        self.ranges.remove(known)


def test_an_arena_grows_by_a_registered_segment_that_is_taken_first() -> None:
    noted = NotedMemory()
    with HostArena(4 * PAGE) as arena:
        assert arena.register_with(noted) == "ok"
        old = arena.lease(PAGE, "old")
        old.tensor.fill_(7)
        arena.grow(3 * PAGE - 1)
        assert arena.budget_bytes == 7 * PAGE
        start, nbytes = noted.ranges[1]
        assert (noted.ranges[0], nbytes) == ((arena.address, 4 * PAGE), 3 * PAGE)
        new = arena.lease(2 * PAGE, "new")
        assert start <= new.address < start + nbytes
        assert arena.try_lease(6 * PAGE, "no segment is that long") is None
        rest = [arena.lease(PAGE, "rest"), arena.lease(3 * PAGE, "rest")]
        assert arena.used_bytes == arena.peak_bytes == 7 * PAGE
        with pytest.raises(BudgetError, match="only 0 bytes"):
            arena.lease(PAGE, "more")
        new.tensor.fill_(9)
        assert old.tensor.unique().tolist() == [7]
        for lease in (old, new, *rest):
            lease.release()
        assert arena.used_bytes == 0
        arena.lease(3 * PAGE, "the new segment").release()
        arena.lease(4 * PAGE, "the old segment").release()


def test_an_arena_shrinks_by_what_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, noted = _Cudart(), NotedMemory()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with HostArena(4 * PAGE) as arena:
        arena.register_with(noted)
        arena.page_lock()
        segment = arena.grow(2 * PAGE)
        lease = arena.lease(PAGE, "in the segment")
        lease.tensor.fill_(7)
        with pytest.raises(AssertionError, match="a segment that is leased from"):
            arena.shrink(segment)
        assert arena.budget_bytes == 6 * PAGE
        lease.release()
        arena.shrink(segment)
        assert arena.budget_bytes == 4 * PAGE
        assert noted.ranges == [(arena.address, 4 * PAGE)]
        assert list(cudart.registered) == [arena.address]
        assert not lease.tensor.any()  # its pages have gone back to the system
        arena.lease(4 * PAGE, "all that is left")
        with pytest.raises(BudgetError):
            arena.lease(PAGE, "more")
    assert not cudart.registered


def test_fit_gives_back_what_is_free_and_keeps_what_is_leased(arena: HostArena) -> None:
    held = [arena.lease(1 << 20, f"block {number}") for number in range(6)]
    for number, lease in enumerate(held):
        lease.tensor.fill_(number + 1)
    arena.fit([held[1], held[2], held[4]], 3 * PAGE)
    assert arena.budget_bytes == (3 << 20) + 3 * PAGE
    assert arena.used_bytes == 3 << 20
    assert [int(held[number].tensor.unique()) for number in (0, 3, 5)] == [1, 4, 6]
    room = arena.lease(3 * PAGE, "staging")
    assert arena.try_lease(PAGE, "more") is None
    assert all(
        room.address + 3 * PAGE <= held[number].address
        or held[number].address + (1 << 20) <= room.address
        for number in range(6)
    )
    room.release()
    with pytest.raises(AssertionError, match="released twice"):
        held[1].release()
    arena.fit([held[0], held[3], held[5]], 0)
    assert (arena.budget_bytes, arena.used_bytes) == (0, 0)
    with pytest.raises(BudgetError):
        arena.lease(PAGE, "anything")
    assert arena.grow(PAGE).nbytes == PAGE
    arena.lease(PAGE, "again").release()


def resident_bytes(segment: HostSegment) -> int:
    """Bytes of a segment that have memory of the system's, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_ubyte * (segment.nbytes // PAGE))()
    assert (
        libc.mincore(ctypes.c_void_p(segment.address), ctypes.c_size_t(segment.nbytes), vector) == 0
    )
    return sum(each & 1 for each in vector) * PAGE


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_fit_gives_memory_to_the_system(backend: Any) -> None:
    if IoEngine.probe()[backend] != "ok":
        pytest.skip(f"no {backend} here")
    with IoEngine(backend=backend) as io, HostArena(8 << 20) as arena:
        arena.register_with(io)
        held = [arena.lease(1 << 20, f"block {number}") for number in range(8)]
        for lease in held:
            lease.tensor.fill_(7)
        (segment,) = arena._segments
        assert resident_bytes(segment) == 8 << 20
        arena.fit(held[2:5], 0)
        assert resident_bytes(segment) == 5 << 20
        assert segment.parts == [(0, 2 << 20), (5 << 20, 8 << 20)]


def test_fit_registers_each_part_that_is_left() -> None:
    noted = NotedMemory()
    with HostArena(4 * PAGE) as arena:
        arena.register_with(noted)
        held = [arena.lease(PAGE, f"block {number}") for number in range(4)]
        arena.fit([held[1]], 2 * PAGE)
        room = arena._segments[-1]
        assert noted.ranges == [
            (arena.address, PAGE),
            (arena.address + 2 * PAGE, 2 * PAGE),
            (room.address, 2 * PAGE),
        ]
        arena.fit([held[3]], PAGE)
        assert noted.ranges[:2] == [(arena.address, PAGE), (arena.address + 2 * PAGE, PAGE)]
        assert sum(nbytes for _, nbytes in noted.ranges) == arena.budget_bytes


def test_fit_locks_the_pages_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = _Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with HostArena(4 * PAGE) as arena:
        arena.page_lock()
        held = [arena.lease(PAGE, f"block {number}") for number in range(4)]
        arena.fit([held[1]], 2 * PAGE)
        start = arena.address
        room = arena._segments[-1]
        assert sorted(cudart.registered) == sorted([start, start + 2 * PAGE, room.address])
    assert not cudart.registered


def test_fit_that_cannot_map_changes_nothing(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = arena.lease(PAGE, "block")
    before = arena.budget_bytes
    with pytest.raises(BudgetError, match="the system maps no more"):
        arena.fit([lease], 1 << 60)
    assert arena.budget_bytes == before
    assert not lease.released


def test_a_share_apart_leaves_no_hole() -> None:
    with HostArena(4 * PAGE) as arena:
        share = HostShare(arena, 3 * PAGE + 5, "a share", apart=True)
        assert (arena.budget_bytes, arena.used_bytes, share.nbytes) == (
            7 * PAGE,
            3 * PAGE,
            3 * PAGE,
        )
        other = arena.lease(PAGE, "beside it")
        piece = share.take(2 * PAGE)
        assert piece is not None
        with pytest.raises(OffloadError, match="8192 bytes of a share cannot be given back"):
            share.close()
        piece.release()
        share.close()
        assert (arena.budget_bytes, arena.used_bytes) == (4 * PAGE, PAGE)
        other.release()
        arena.grow(3 * PAGE)
        arena.lease(3 * PAGE, "as long as the share was").release()


class _Cudart:
    """What CUDA has registered; it refuses ranges of `refused_bytes`."""

    refused_bytes = 0

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        del flags
        if nbytes == self.refused_bytes:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_an_arena_is_registered_once_a_segment_until_it_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = _Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with HostArena(4 * PAGE) as arena:
        arena.page_lock()
        arena.grow(2 * PAGE)
        assert sorted(cudart.registered.values()) == [2 * PAGE, 4 * PAGE]
    assert not cudart.registered


def test_what_cannot_be_page_locked_stays_pageable_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = _Cudart()
    cudart.refused_bytes = 2 * PAGE
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with HostArena(4 * PAGE) as arena:
        arena.page_lock()
        with pytest.warns(UserWarning, match=r"cannot page-lock 8\.00 KiB.*ulimit -l"):
            arena.grow(2 * PAGE)
        assert arena.budget_bytes == 6 * PAGE
        arena.lease(4 * PAGE, "all").release()
        assert list(cudart.registered.values()) == [4 * PAGE]
    assert not cudart.registered


def test_a_driver_that_does_not_load_leaves_the_arena_pageable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> object:
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "cudart", fail)
    with HostArena(4 * PAGE) as arena, pytest.warns(UserWarning, match="Found no NVIDIA driver"):
        arena.page_lock()
