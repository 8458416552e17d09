"""Tiles: how a parameter larger than the device budget comes to the device, and its gradient home.

[Note: Tiles]
A *tile* is a range of rows of a parameter with two dimensions: [out, in] of a linear layer,
[vocabulary, width] of an embedding. The parameter stays one parameter in a bucket of its own, with
one home, one optimizer state, one name; only linear and embedding ops see it by tiles, see
tiling/ops.py:

    home --(chunks that the tile overlaps)--> slot --> op on the slot    the next tile behind it
    tile of the gradient --> its range of the home (gradients.py)         never the whole gradient

Two *slots* of the largest tile are leased for the engine's life and lent to one op at a time, in
turn to its tiles: one is computed with while the other fills. A chunk that ends inside a tile stays
staged for the next one, so a pass reads every chunk once.

Tiles never change: the same tiles give the same bits wherever the parameter is at home.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from offload.engine.tiling.tiled import Arriving, Rows, TiledParameter
from offload.errors import OffloadError
from offload.partition.arrays import field_tensor
from offload.partition.blocks import Block, BlockStore
from offload.partition.staging import Staged
from offload.tiers.transfer import Transfer, Urgency
from offload.tiers.uninterrupted import UninterruptedLock

if TYPE_CHECKING:
    from offload.engine.paging.pager import Pager
    from offload.schedule.plan import TiledWeight

NUM_SLOTS = 2  # of the largest tile: one in use, one arriving
_STAGED_CHUNKS = 2  # at a time; the plan's ring of weight chunks has twice as many


class TileSlots:
    """The device memory of an engine's tiles, lent to one op at a time.

    Attributes:
        arriving: where tiles of gradients go, see `GradientSlots.arriving`; the engine sets it.
    """

    arriving: Arriving

    def __init__(
        self,
        slot_bytes: int,
        pager: Pager,
        store: BlockStore,
        *,
        prefetch: bool,
    ) -> None:
        self._pager = pager
        self._store = store
        self._prefetch = prefetch
        self._leases = [store.device.lease(slot_bytes, "tiles") for _ in range(NUM_SLOTS)]
        self._lock = UninterruptedLock()

    @contextlib.contextmanager
    def lent(
        self, tiled: TiledParameter, order: Sequence[Rows], user: str
    ) -> Iterator[Iterator[tuple[Rows, torch.Tensor]]]:
        """The tiles in `order`, ascending, each with its values on the device until the next one.

        Raises:
            EngineStateError: the engine is closed.
            StorageError: an edit could not be written home; on iteration, a read failed. All
                staging has been given back when the block ends.
        """
        page = self._pager.pages[tiled.bucket]
        self._pager.begin_tiles(page, user)
        with self._lock:
            stream = _TileStream(tiled, order, page.block, self._store, self._pager)
            try:
                yield self._walk(stream, order)
            finally:
                stream.close()

    def _walk(
        self, stream: _TileStream, order: Sequence[Rows]
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        for number, rows in enumerate(order):
            started = time.perf_counter()
            values = stream.finish(number, self._leases[number % NUM_SLOTS].tensor)
            if self._prefetch and number + 1 < len(order):
                stream.start(number + 1, self._leases[(number + 1) % NUM_SLOTS].tensor)
            self._pager.stall_seconds += time.perf_counter() - started
            yield rows, values


def open_tiles(
    planned: Sequence[TiledWeight],
    pager: Pager,
    store: BlockStore,
    *,
    prefetch: bool,
) -> TileSlots | None:
    """Lease the slots, and let the planned parameters come by tiles; None if there are none.

    Raises:
        BudgetError: the device has no room; the plan has counted it.
    """
    if not planned:
        return None
    slots = TileSlots(max(each.tile_bytes for each in planned), pager, store, prefetch=prefetch)
    for each in planned:
        page = pager.pages[each.bucket]
        (paged,) = page.parameters
        paged.tiles = TiledParameter(paged.state, each.bucket, each.tile_rows, slots)
        page.is_tiled = True
    return slots


class _Piece(NamedTuple):
    """Elements of a chunk that belong to a tile, and where they start in both."""

    chunk: int
    start_in_chunk: int
    start_in_tile: int
    numel: int


@dataclass(slots=True, eq=False)
class _StagedChunk:
    staged: Staged
    copies: list[Transfer] = field(default_factory=list)


class _TileStream:
    """The way of some tiles of one parameter to the slots, home -> staging -> slot.

    `start(n, slot)` starts what it can of tile n without waiting, `finish(n, slot)` waits for the
    rest. `close` waits for what is in flight and gives all staging back, also after an error.
    """

    def __init__(
        self,
        tiled: TiledParameter,
        order: Sequence[Rows],
        block: Block,
        store: BlockStore,
        pager: Pager,
    ) -> None:
        self._tiled = tiled
        self._block = block
        self._store = store
        self._pager = pager
        self._order = order
        self._pieces = [self._pieces_of(rows) for rows in order]
        self._uses_left: dict[int, int] = {}
        for piece in (piece for pieces in self._pieces for piece in pieces):
            self._uses_left[piece.chunk] = self._uses_left.get(piece.chunk, 0) + 1
        self._to_load = deque(self._uses_left)  # chunks, ascending
        self._staged: dict[int, _StagedChunk] = {}
        self._num_copied = [0] * len(order)  # pieces of each tile whose copy has been started
        self._copies: list[list[Transfer]] = [[] for _ in order]

    def start(self, number: int, slot: torch.Tensor) -> None:
        """Start to read the tile's chunks, and to copy those that have been read."""
        if self._block.home == "device":
            return
        self._release_ended()
        pieces = self._pieces[number]
        while self._to_load and self._to_load[0] <= pieces[-1].chunk:
            if not self._start_load(wait=False):
                break
        while self._num_copied[number] < len(pieces):
            held = self._staged.get(pieces[self._num_copied[number]].chunk)
            if held is None or not held.staged.transfer.done():
                return
            self._copy_next(number, slot)

    def finish(self, number: int, slot: torch.Tensor) -> torch.Tensor:
        """The tile's values in its slot, for device work that is queued next.

        Raises:
            StorageError: a read failed.
            BudgetError: there is no staging although nothing is under way.
        """
        target = self._target(number, slot)
        if self._block.home == "device":
            self._copy_from_device(number, target)
            return target
        while self._num_copied[number] < len(self._pieces[number]):
            chunk = self._pieces[number][self._num_copied[number]].chunk
            while chunk not in self._staged:
                self._load_next()
            self._staged[chunk].staged.transfer.wait(self._store.deadline_seconds)
            self._copy_next(number, slot)
        for copy in self._copies[number]:
            self._store.device.make_current_wait(copy)
        self._release_ended()
        return target

    def close(self) -> None:
        """Wait for what is in flight, so that nothing outlives its buffers; give staging back."""
        deadline = time.monotonic() + self._store.deadline_seconds
        for chunk in self._staged.values():
            transfers = (chunk.staged.transfer, *chunk.copies)
            for transfer in transfers:
                with contextlib.suppress(OffloadError):
                    transfer.wait(max(0.0, deadline - time.monotonic()))
            if all(transfer.done() for transfer in transfers):
                chunk.staged.release()
        self._staged.clear()

    def _pieces_of(self, rows: Rows) -> list[_Piece]:
        begin, end = (row * self._tiled.row_numel for row in rows)
        chunks = self._block.bucket.chunks
        step = chunks[0].numel  # of every chunk but the last
        return [
            _Piece(
                chunk.index,
                max(begin - chunk.start, 0),
                max(chunk.start - begin, 0),
                min(end, chunk.start + chunk.numel) - max(begin, chunk.start),
            )
            for chunk in chunks[begin // step : -(-end // step)]
        ]

    def _target(self, number: int, slot: torch.Tensor) -> torch.Tensor:
        rows = self._order[number]
        shape = (rows.stop - rows.start, self._tiled.row_numel)
        dtype = self._tiled.state.parameter.dtype
        return slot[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)

    def _source(self, chunk_block: torch.Tensor, piece: _Piece) -> torch.Tensor:
        (weight,) = self._block.layout.element_fields(piece.chunk)
        return field_tensor(chunk_block, weight, piece.start_in_chunk, piece.numel)

    def _copy_from_device(self, number: int, target: torch.Tensor) -> None:
        lease, layout = self._block.device_lease, self._block.layout
        assert lease is not None
        flat = target.view(-1)
        for piece in self._pieces[number]:
            start = layout.chunk_offset_bytes[piece.chunk]
            chunk_block = lease.tensor[start : start + layout.chunk_nbytes[piece.chunk]]
            part = flat[piece.start_in_tile : piece.start_in_tile + piece.numel]
            part.copy_(self._source(chunk_block, piece))

    def _copy_next(self, number: int, slot: torch.Tensor) -> None:
        piece = self._pieces[number][self._num_copied[number]]
        chunk = self._staged[piece.chunk]
        source = self._source(chunk.staged.tensor, piece).view(torch.uint8)
        start = piece.start_in_tile * self._block.bucket.itemsize
        target = slot[start : start + source.numel()]
        copy = self._store.device.start_copy_in(target, source, self._block.name)
        copy.expedite(Urgency.PLANNED)
        chunk.copies.append(copy)
        self._copies[number].append(copy)
        self._num_copied[number] += 1
        self._uses_left[piece.chunk] -= 1

    def _start_load(self, *, wait: bool) -> bool:
        if len(self._staged) >= _STAGED_CHUNKS:
            return False
        staged = self._store.start_load(
            self._block, self._to_load[0], wait=wait, urgency=Urgency.PLANNED
        )
        if staged is None:
            return False
        self._staged[self._to_load.popleft()] = _StagedChunk(staged)
        return True

    def _load_next(self) -> None:
        """Start to load the next chunk, after whatever has to end for its staging.

        Chunks are taken in order, so all that are staged belong to tiles before: only their last
        copies can be under way.
        """
        for index, chunk in list(self._staged.items()):
            if not self._uses_left[index]:
                self._release(index, chunk)
        while not self._start_load(wait=True):
            if not self._pager.finish_one():
                raise self._store.no_staging([self._block], self._to_load[0])

    def _release_ended(self) -> None:
        for index, chunk in list(self._staged.items()):
            if not self._uses_left[index] and all(copy.done() for copy in chunk.copies):
                self._release(index, chunk)

    def _release(self, index: int, chunk: _StagedChunk) -> None:
        for copy in chunk.copies:
            copy.wait(self._store.deadline_seconds)
        del self._staged[index]
        chunk.staged.release()
