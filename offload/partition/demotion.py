"""Blocks that leave host memory for NVMe while a run goes on.

[Note: Demotion]
    reserve   records for every chunk, whose room on the disks is checked first
    write     the chunks, from their homes themselves: no memory is taken
    commit    their home is nvme from here on, all of them at once

Until the commit nothing has moved: after an error the blocks are where they were, whole. What has
been reserved by then is kept for the next try, because files are not given back.

Nobody else uses the blocks meanwhile: between two steps, with nothing pending, held or in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload.errors import OffloadError
from offload.tiers.transfer import Transfer, wait_all

if TYPE_CHECKING:
    from offload.partition.blocks import Block, BlockStore
    from offload.tiers.nvme import NvmeStore, Record

_WRITES_IN_FLIGHT = 8


class Demotion:
    """Moves blocks of a store from host to nvme; see [Note: Demotion].

    `spare`: shadow extents of each size that later writes of the blocks use.
    """

    def __init__(self, store: BlockStore, *, spare: int) -> None:
        self._store = store
        self._spare = spare
        self._records: dict[Block, list[Record]] = {}

    def reserve(self, blocks: Sequence[Block]) -> None:
        """Allocate what the blocks will take on the disks.

        Raises:
            BudgetError: more than the capacity of the nvme tier.
            StorageError: see `NvmeStore.reserve`.
        """
        new = [block for block in blocks if block not in self._records]
        sizes = [size for block in new for size in self._store.record_sizes(block)]
        records = iter(self._nvme.reserve(sizes, spare=self._spare))
        for block in new:
            self._records[block] = [next(records) for _ in block.layout.chunk_nbytes]

    def write(self, blocks: Sequence[Block]) -> None:
        """Write every chunk of the blocks to its record, and wait.

        Raises:
            StorageError: a write failed; the blocks stay where they are.
        """
        in_flight: list[Transfer] = []
        try:
            for block in blocks:
                assert block.home == "host"
                for chunk, record in enumerate(self._records[block]):
                    if len(in_flight) == _WRITES_IN_FLIGHT:
                        in_flight.pop(0).wait(self._store.deadline_seconds)
                    tensor = self._store.home(block, chunk)
                    in_flight.append(self._nvme.start_write(record, tensor))
        finally:
            wait_all(in_flight)

    def commit(self, blocks: Sequence[Block]) -> None:
        """The blocks, which have been written, live on nvme; their leases have been released."""
        for block in blocks:
            self._store.move_to_nvme(block, self._records.pop(block))

    @property
    def _nvme(self) -> NvmeStore:
        if self._store.nvme is None:
            raise OffloadError("state cannot leave the host", remedy="name tiers.nvme.paths")
        return self._store.nvme
