"""The host arena and the device tiers against lists of who has what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.errors import BudgetError, OffloadError, StorageError
from offload.native.fault_spec import FaultSpec
from offload.tiers.device import DeviceLease, DeviceTier
from offload.tiers.extents import round_up_to_page
from offload.tiers.host import HostArena, HostLease, HostSegment
from offload.tiers.host_share import HostPiece, HostShare
from offload.tiers.simulated import SimulatedDeviceTier, SimulatedIo
from offload.tiers.simulated_streams import SimulatedAccelerator
from offload.tiers.transfer import Transfer

PAGES = st.integers(1, 5)
ARENA_BYTES = SLAB_BYTES = 8 * 4096


def sign(tensor: torch.Tensor, mark: int) -> None:
    """Write a mark of its own to memory."""
    tensor.fill_(mark % 251)
    tensor[:2] = torch.tensor([mark // 251 % 251, mark // 63001], dtype=torch.uint8)


def is_signed(tensor: torch.Tensor, mark: int) -> bool:
    expected = torch.empty_like(tensor)
    sign(expected, mark)
    return torch.equal(tensor, expected)


class ArenaMachine(RuleBasedStateMachine):
    """Leases, segments that come and go, and shares with pieces of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = itertools.count(1)
        self.arena = HostArena(ARENA_BYTES)
        self.leases: dict[HostLease, int] = {}
        self.segments: list[HostSegment] = []
        self.shares: dict[HostShare, dict[HostPiece, int]] = {}
        self.apart: set[HostShare] = set()  # those for which the arena has grown
        self.budget_bytes = ARENA_BYTES

    @rule(pages=PAGES, odd=st.integers(0, 4000), visits=st.booleans())
    def lease(self, pages: int, odd: int, visits: bool) -> None:
        nbytes = pages * 4096 - odd
        take = self.arena.visit if visits else self.arena.try_lease
        lease = take(nbytes, f"owner {pages}")
        if lease is None:
            assert all(s.free.largest < pages * 4096 for s in self.arena._segments)
            return
        assert lease.tensor.numel() == nbytes
        self.leases[lease] = next(self.marks)
        sign(lease.tensor, self.leases[lease])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.leases)))
        assert is_signed(lease.tensor, self.leases.pop(lease))
        lease.release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_twice(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.leases)))
        del self.leases[lease]
        lease.release()
        try:
            lease.release()
        except AssertionError:
            return
        raise RuntimeError("a lease was released twice")

    @precondition(lambda self: len(self.segments) < 3)
    @rule(pages=PAGES)
    def grow(self, pages: int) -> None:
        self.segments.append(self.arena.grow(pages * 4096))
        self.budget_bytes += pages * 4096

    @rule()
    def shrink(self) -> None:
        for segment in self.segments:
            if segment.free.largest == segment.nbytes:
                self.segments.remove(segment)
                self.arena.shrink(segment)
                self.budget_bytes -= segment.nbytes
                return

    @precondition(lambda self: self.budget_bytes > ARENA_BYTES // 2)
    @rule(which=st.integers(0, 255), free_pages=st.integers(0, 3))
    def fit(self, which: int, free_pages: int) -> None:
        """Under memory pressure: some leases go, and what is free goes back to the system."""
        going = [lease for number, lease in enumerate(self.leases) if which >> number & 1]
        for lease in going:
            assert is_signed(lease.tensor, self.leases.pop(lease))
        self.arena.fit(going, free_pages * 4096)
        self.budget_bytes = self.arena.used_bytes + free_pages * 4096

    @precondition(lambda self: len(self.shares) < 2)
    @rule(pages=PAGES, apart=st.booleans())
    def open_share(self, pages: int, apart: bool) -> None:
        if self.arena._num_visitors and not apart:
            return  # it would wait for them to leave
        try:
            share = HostShare(self.arena, pages * 4096, "a share", apart=apart)
        except BudgetError:
            assert not apart, "the arena grows by a share that is apart"
            return
        self.shares[share] = {}
        if apart:
            self.apart.add(share)
            self.budget_bytes += share.nbytes

    @precondition(lambda self: self.shares)
    @rule(data=st.data(), nbytes=st.integers(1, 3 * 4096))
    def take_piece(self, data: st.DataObject, nbytes: int) -> None:
        share = data.draw(st.sampled_from(list(self.shares)))
        piece = share.take(nbytes)
        if piece is None:
            assert share._free.largest < round_up_to_page(nbytes)
            return
        self.shares[share][piece] = next(self.marks)
        sign(piece.tensor, self.shares[share][piece])

    @precondition(lambda self: any(self.shares.values()))
    @rule(data=st.data())
    def release_piece(self, data: st.DataObject) -> None:
        share = data.draw(st.sampled_from([s for s, pieces in self.shares.items() if pieces]))
        piece = data.draw(st.sampled_from(list(self.shares[share])))
        assert is_signed(piece.tensor, self.shares[share].pop(piece))
        piece.release()

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def close_share(self, data: st.DataObject) -> None:
        share = data.draw(st.sampled_from(list(self.shares)))
        try:
            share.close()
        except OffloadError:
            assert self.shares[share], "all its pieces are back"
            return
        assert not self.shares.pop(share), "a piece was out"
        if share in self.apart:
            self.apart.remove(share)
            self.budget_bytes -= share.nbytes

    @invariant()
    def everybody_has_his_own(self) -> None:
        for lease, mark in self.leases.items():
            assert is_signed(lease.tensor, mark), f"{lease!r} was written by somebody else"
        for share, pieces in self.shares.items():
            for piece, mark in pieces.items():
                assert is_signed(piece.tensor, mark), "a piece was written by somebody else"
            assert share.used_bytes == sum(piece.tensor.numel() for piece in pieces)

    @invariant()
    def the_budget_is_kept(self) -> None:
        used = sum(round_up_to_page(lease.nbytes) for lease in self.leases)
        used += sum(share.nbytes for share in self.shares)
        assert self.arena.used_bytes == used <= self.arena.budget_bytes
        assert self.arena.budget_bytes == self.budget_bytes
        parts = [part for segment in self.arena._segments for part in segment.parts]
        assert sum(end - start for start, end in parts) == self.budget_bytes
        assert self.arena._num_visitors == sum(lease.visits for lease in self.leases)
        free = sum(e - s for segment in self.arena._segments for s, e in segment.free.ranges())
        assert used + free == self.arena.budget_bytes, "bytes are nobody's"
        assert sum(self.arena._owners._bytes.values()) == used

    def teardown(self) -> None:
        for lease in self.leases:
            lease.release()
        for share, pieces in self.shares.items():
            for piece in pieces:
                piece.release()
            share.close()
        assert self.arena.used_bytes == 0
        assert self.arena.owners() == "nobody"
        self.arena.close()


@dataclass(eq=False)
class Copy:
    lease: DeviceLease
    into_device: bool
    host: torch.Tensor
    mark: int
    fault: str


class DeviceMachine(RuleBasedStateMachine):
    """Leases, holds and copies of a device whose copies end late, fail, or hang."""

    budget_bytes = 12 * 4096

    def __init__(self) -> None:
        super().__init__()
        self.marks = itertools.count(1)
        self.leases: dict[DeviceLease, int | None] = {}  # None: its bytes are undefined
        self.copies: dict[Transfer, Copy] = {}
        self.held_bytes = 0

    @initialize(seed=st.integers(0, 999))
    def make_tier(self, seed: int) -> None:
        self.io = SimulatedIo(seed=seed)
        self.tier = self.open_tier()

    def open_tier(self) -> DeviceTier:
        return SimulatedDeviceTier(self.budget_bytes, self.io)

    @property
    def used_bytes(self) -> int:
        leased = sum(round_up_to_page(lease.nbytes) for lease in self.leases)
        return leased + self.held_bytes

    @property
    def allocated_bytes(self) -> int:
        """What is not in the slab."""
        return self.used_bytes

    def use(self, lease: DeviceLease) -> torch.Tensor:
        """What an op that takes the lease does first."""
        return lease.tensor

    @rule(pages=PAGES, odd=st.integers(0, 4000), beside=st.booleans())
    def lease(self, pages: int, odd: int, beside: bool) -> None:
        nbytes = pages * 4096 - odd
        lease = self.tier.try_lease(nbytes, "a page", beside=beside)
        if lease is None:
            self.check_refusal(pages * 4096, beside=beside)
            return
        assert lease.tensor.numel() == nbytes
        self.leases[lease] = next(self.marks)
        sign(self.use(lease), self.leases[lease] or 0)

    def check_refusal(self, nbytes: int, *, beside: bool) -> None:
        del beside
        assert self.used_bytes + nbytes > self.tier.budget_bytes, "never by fragmentation"

    @precondition(lambda self: self.free_leases())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.free_leases()))
        del self.leases[lease]
        lease.release()

    @rule(nbytes=st.integers(1, 3 * 4096))
    def hold(self, nbytes: int) -> None:
        fits = self.used_bytes + nbytes <= self.tier.budget_bytes
        assert self.tier.try_hold(nbytes, "gradients") is fits
        self.held_bytes += nbytes if fits else 0

    @precondition(lambda self: self.held_bytes)
    @rule(part=st.integers(1, 4))
    def unhold(self, part: int) -> None:
        nbytes = -(-self.held_bytes // part)
        self.tier.unhold(nbytes)
        self.held_bytes -= nbytes

    @precondition(lambda self: self.free_leases())
    @rule(data=st.data(), inwards=st.booleans(), lot=st.integers(0, 11))
    def start_copy(self, data: st.DataObject, inwards: bool, lot: int) -> None:
        lease = data.draw(st.sampled_from(self.free_leases()))
        fault = {9: "errno=5", 10: "delay=500", 11: "drop=1"}.get(lot, "")
        if fault == "drop=1" and any(copy.fault == fault for copy in self.copies.values()):
            fault = ""
        host = torch.empty(lease.nbytes, dtype=torch.uint8)
        mark = self.leases[lease]
        if not inwards and mark is None:
            return
        if inwards:
            mark = next(self.marks)
            sign(host, mark)
        assert mark is not None
        self.io._fault = FaultSpec(f"op=copy,{fault}" if fault else "")
        if inwards:
            transfer = self.tier.start_copy_in(lease.tensor, host)
            self.leases[lease] = None
        else:
            transfer = self.tier.start_copy_out(host, lease.tensor)
        self.io._fault = FaultSpec("")
        self.copies[transfer] = Copy(lease, inwards, host, mark, fault)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(list(self.copies))))

    @rule(seconds=st.floats(0.0, 0.02))
    def compute(self, seconds: float) -> None:
        self.io.clock.advance(seconds)

    def finish(self, transfer: Transfer) -> None:
        copy = self.copies[transfer]
        try:
            transfer.wait()
        except StorageError:
            assert copy.fault in ("errno=5", "drop=1")
            if copy.fault == "errno=5":
                del self.copies[transfer]
            return
        assert copy.fault not in ("errno=5", "drop=1")
        del self.copies[transfer]
        if copy.into_device:
            self.leases[copy.lease] = copy.mark
            assert is_signed(self.use(copy.lease), copy.mark)
        else:
            assert is_signed(copy.host, copy.mark)

    def free_leases(self) -> list[DeviceLease]:
        """Those that no transfer uses."""
        busy = {copy.lease for copy in self.copies.values()}
        return [lease for lease in self.leases if lease not in busy]

    @invariant()
    def everybody_has_his_own(self) -> None:
        for lease in self.free_leases():
            mark = self.leases[lease]
            assert mark is None or is_signed(lease.tensor, mark), f"{lease!r} was overwritten"

    @invariant()
    def the_budget_is_kept(self) -> None:
        if hasattr(self, "tier"):
            tier = self.tier
            assert tier.used_bytes == self.used_bytes <= tier.budget_bytes
            assert tier.used_bytes <= tier.peak_bytes <= tier.budget_bytes
            assert self.allocated_bytes + tier._free_bytes <= tier.budget_bytes
            kept = sum(memory.numel() for each in tier._free.values() for memory in each)
            assert kept == tier._free_bytes

    def teardown(self) -> None:
        if not hasattr(self, "tier"):
            return
        for transfer in list(self.copies):
            self.finish(transfer)
        for lease in self.free_leases():
            lease.release()
            del self.leases[lease]
        hung = sum(round_up_to_page(lease.nbytes) for lease in self.leases)
        assert self.tier.used_bytes == self.held_bytes + hung
        self.tier.close()


class AcceleratorMachine(DeviceMachine):
    """As well, on a device with streams, which cuts most leases from one slab."""

    tier: SimulatedAccelerator

    def open_tier(self) -> DeviceTier:
        tier = SimulatedAccelerator(self.budget_bytes, self.io)
        tier.reserve(SLAB_BYTES)
        return tier

    def use(self, lease: DeviceLease) -> torch.Tensor:
        self.tier.enter(lease)
        self.tier.use(lease.tensor)
        self.tier.make(lease.tensor)
        return lease.tensor

    def check_refusal(self, nbytes: int, *, beside: bool) -> None:
        if self.used_bytes + nbytes <= self.tier.budget_bytes:
            assert not beside, "beside the slab never by fragmentation"
            assert self.tier._ranges.largest < nbytes

    def is_cut(self, lease: DeviceLease) -> bool:
        slab: Any = self.tier._slab
        start = slab.data_ptr()
        return bool(start <= lease.tensor.data_ptr() < start + slab.numel())

    @property
    def allocated_bytes(self) -> int:
        beside = [lease for lease in self.leases if not self.is_cut(lease)]
        return sum(round_up_to_page(lease.nbytes) for lease in beside)

    @invariant()
    def the_slab_is_whole(self) -> None:
        if hasattr(self, "tier"):
            used = sum(round_up_to_page(each.nbytes) for each in self.leases if self.is_cut(each))
            free = sum(end - start for start, end in self.tier._ranges.ranges())
            assert used + free == SLAB_BYTES
