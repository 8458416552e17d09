"""Builds that are broken on purpose, for the teeth of `model`: the machine that must see each."""

from __future__ import annotations

from typing import Any

from fault._broken_steps import (
    Break,
    break_function,
    flip_at_once,
    forget_failed_write,
    never,
    pin_nothing,
)
from offload.engine.paging.page_in import PageIn
from offload.engine.paging.pager import Pager
from offload.errors import StorageError
from offload.partition.blocks import BlockStore
from offload.partition.late import LateTransfers
from offload.partition.shadows import Shadows
from offload.tiers.accelerator import AcceleratorTier
from offload.tiers.device import DeviceTier
from offload.tiers.extents import ExtentPool, FreeRanges
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore


def _release_although_it_is_read(_: Any) -> Any:
    def broken(pool: ExtentPool, extent: Any) -> None:
        pool._release(extent)

    return broken


def _take_failures_for_success(finish: Any) -> Any:
    def broken(store: NvmeStore, transfer: Any, checksum: int, failure: StorageError | None) -> Any:
        del failure
        return finish(store, transfer, checksum, None)

    return broken


def _do_not_look_at_checksums(finish: Any) -> Any:
    def broken(store: NvmeStore, transfer: Any, checksum: int, failure: StorageError | None) -> Any:
        if transfer.operation == "read":
            checksum = transfer.expected
        return finish(store, transfer, checksum, failure)

    return broken


def _commit_what_is_held(finish: Any) -> Any:
    def broken(store: NvmeStore, transfer: Any, checksum: int, failure: StorageError | None) -> Any:
        was_held, transfer.held = transfer.held, False
        if was_held:
            transfer.record.shadow = None
        return finish(store, transfer, checksum, failure)

    return broken


def _forget_the_extent(_: Any) -> Any:
    def broken(store: NvmeStore, record: Any) -> None:
        record.shadow = None
        store._num_holdable[record.extent_bytes] += 1

    return broken


def _unpin_nothing(_: Any) -> Any:
    def broken(store: NvmeStore, pin: Any) -> None:
        store._pins[pin.extent] -= 1

    return broken


def _cut_one_page_short(cut: Any) -> Any:
    def broken(ranges: FreeRanges, index: int, nbytes: int) -> int:
        start = int(cut(ranges, index, nbytes))
        if (
            nbytes > 4096
            and index < len(ranges._starts)
            and ranges._starts[index] == start + nbytes
        ):
            ranges._starts[index] -= 4096
        return start

    return broken


def _count_holds_as_nothing(_: Any) -> Any:
    def broken(tier: DeviceTier, nbytes: int) -> bool:
        return bool(tier.used_bytes - tier._held_bytes + nbytes <= tier.budget_bytes)

    return broken


def _keep_everything(_: Any) -> Any:
    return lambda *_args: []


def _lose_a_page_of_the_slab(take_back: Any) -> Any:
    def broken(tier: AcceleratorTier, lease: Any, memory: Any) -> None:
        take_back(tier, lease, memory[:4096] if memory.numel() > 4096 else memory)

    return broken


def _keep_void(adopt: Any) -> Any:
    def broken(store: BlockStore, block: Any, chunk: int, write: Any) -> None:
        void = set(store._void)
        adopt(store, block, chunk, write)
        store._void = void

    return broken


def _copy_the_home(_: Any) -> Any:
    def broken(shadows: Shadows, block: Any, chunk: int) -> bool:
        del chunk
        return block.home == "nvme" and shadows._store.in_place(block)

    return broken


def _evict_what_is_pinned(_: Any) -> Any:
    def broken(pager: Pager) -> Any:
        return next(iter(pager._present), None)

    return broken


def _do_not_wait(_: Any) -> Any:
    def broken(page_in: PageIn) -> None:
        page_in.advance()
        while not page_in._all_started:
            page_in._start_reads(wait=True)

    return broken


STORE, ARENA, DEVICE = "NVMe store", "host arena", "device tier"
ACCELERATOR, BLOCKS, PAGER = "accelerator tier", "blocks and held versions", "pager"

BREAKS: dict[str, tuple[str, Break]] = {
    "a retired extent is free while it is read": (
        STORE,
        break_function(ExtentPool, "put_back", _release_although_it_is_read),
    ),
    "a version is current before its write has settled": (
        STORE,
        break_function(NvmeStore, "start_write", flip_at_once),
    ),
    "a write that failed counts": (
        STORE,
        break_function(NvmeStore, "finish", _take_failures_for_success),
    ),
    "checksums are not looked at": (
        STORE,
        break_function(NvmeStore, "finish", _do_not_look_at_checksums),
    ),
    "a held write commits by itself": (
        STORE,
        break_function(NvmeStore, "finish", _commit_what_is_held),
    ),
    "the extent of a dropped version is lost": (
        STORE,
        break_function(NvmeStore, "drop_shadow", _forget_the_extent),
    ),
    "a pinned extent is written again": (STORE, break_function(NvmeStore, "pin", pin_nothing)),
    "what is unpinned does not come back": (
        STORE,
        break_function(NvmeStore, "unpin", _unpin_nothing),
    ),
    "leases overlap by a page": (ARENA, break_function(FreeRanges, "_cut", _cut_one_page_short)),
    "memory of a segment is not given up": (ARENA, break_function(HostArena, "shrink", never)),
    "held bytes are not counted": (
        DEVICE,
        break_function(DeviceTier, "_admits", _count_holds_as_nothing),
    ),
    "memory that is kept is not given up": (
        DEVICE,
        break_function(DeviceTier, "_shed", _keep_everything),
    ),
    "a part of a lease does not come back to the slab": (
        ACCELERATOR,
        break_function(AcceleratorTier, "_take_back", _lose_a_page_of_the_slab),
    ),
    "a failed write is dropped, not repeated": (
        BLOCKS,
        break_function(BlockStore, "_finish", forget_failed_write),
    ),
    "a chunk is read while it is written": (BLOCKS, break_function(BlockStore, "_settle", never)),
    "what is committed stays void": (
        BLOCKS,
        break_function(BlockStore, "adopt_write", _keep_void),
    ),
    "a held version is made in its home": (
        BLOCKS,
        break_function(Shadows, "_is_copied", _copy_the_home),
    ),
    "memory of a late transfer is never given back": (
        BLOCKS,
        break_function(LateTransfers, "collect", never),
    ),
    "a pinned page is evicted": (PAGER, break_function(Pager, "_victim", _evict_what_is_pinned)),
    "an edit is not written home": (PAGER, break_function(Pager, "write_back", never)),
    "a page stays as it is when its home is newer": (
        PAGER,
        break_function(Pager, "drop_stale", never),
    ),
    "a page is used before it has come": (PAGER, break_function(PageIn, "finish", _do_not_wait)),
}
