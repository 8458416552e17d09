"""The way of a page to the device: home -> host staging -> device, chunk by chunk.

Where the CPU reaches the device, a read from nvme lands in the page itself.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from offload.errors import DeadlineError, StorageError
from offload.tiers.transfer import Transfer, Urgency

if TYPE_CHECKING:
    import torch

    from offload.engine.paging.pages import WeightPage
    from offload.partition.blocks import Block, BlockStore
    from offload.partition.staging import Staged
    from offload.tiers.device import DeviceLease


class Arrivals(Protocol):
    """Takes part in what arrives on the device; see zeroth_order.py."""

    def land(
        self, block: Block, chunk: int, staged: Staged, target: torch.Tensor
    ) -> tuple[Transfer, Staged]:
        """Start the copy of a staged chunk to its place on the device, in place of `PageIn`.

        Returns the copy, and what it holds until it ends. `staged` is given back on an error.
        """
        ...

    def settle(self) -> None:
        """Homes are about to be read or written: make them what the step before says."""
        ...

    def check_edit(self, page: WeightPage) -> None:
        """An edited page is about to be written home: raise GuardError if it must not be."""
        ...


class PageIn:
    """Brings the weights of one bucket into a device lease.

    Each chunk is read into staging (or is host memory already) and copied from there. At most
    `depth` chunks are staged at a time; a chunk's staging is given back when its copy has ended.
    From a home on the host all copies are queued at once, and nobody waits for them but the device;
    so are reads that land in the lease. Whoever holds a PageIn drives it: `advance` does what can
    be done without waiting, `finish` waits for the rest. After an error all staging is given back,
    and the lease holds nothing of use: `advance` and `finish` start again with the first chunk, or
    whoever drives it takes the lease back with `give_back`.

    `urgency` is that of its transfers; see [Note: urgency] in tiers/transfer.py. From `finish` on
    they are in demand.
    """

    def __init__(
        self,
        block: Block,
        lease: DeviceLease,
        store: BlockStore,
        *,
        depth: int,
        urgency: int,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._block = block
        self._lease = lease
        self._store = store
        self._depth = depth
        self._urgency = urgency
        self._arrivals = arrivals
        self._lands_in_lease = arrivals is None and store.device.host_addressable
        self._hung: list[Transfer] = []  # what an error has left in flight
        self._next_chunk = 0
        self._reading: deque[tuple[int, Staged]] = deque()
        self._copying: deque[tuple[Transfer, Staged]] = deque()

    def start(self, *, wait: bool) -> bool:
        """Stage the first chunk; False, and nothing started, if there is no staging.

        With `wait`, writes under way are waited for if that frees staging.
        """
        try:
            self._start_reads(wait=wait)
        except BaseException:
            self._abandon()
            raise
        return bool(self._reading)

    def advance(self) -> bool:
        """Start what can start and collect what has ended; True when all has.

        Raises:
            StorageError: a read failed.
        """
        if not all(transfer.done() for transfer in self._hung):
            return False  # `finish` waits for it
        try:
            while self._copying and self._copying[0][0].done():
                self._end_copy()
            while self._reading and self._reading[0][1].transfer.done():
                self._start_copy()
            self._start_reads()
        except BaseException:
            self._abandon()
            raise
        return not self._reading and not self._copying and self._all_started

    def finish(self) -> None:
        """Wait until device work that is queued next finds the whole page on the device.

        On an asynchronous device the last copies may still run, ordered before that work; `advance`
        collects them.

        Raises:
            StorageError: a read failed.
            BudgetError: there is no staging although nothing is under way.
        """
        self._urgency = Urgency.DEMAND
        self._outwait_hung()
        for transfer in self._in_flight:
            transfer.expedite(Urgency.DEMAND)
        self.advance()
        try:
            while self._reading or not self._all_started:
                if self._reading:
                    self._start_copy()
                elif self._copying:
                    self._end_copy()
                else:
                    self._store.stage_or_raise(self._block, self._next_chunk).release()
                self._start_reads()
            for transfer, _ in self._copying:
                self._store.device.make_current_wait(transfer)
        except BaseException:
            self._abandon()
            raise
        self.advance()

    def settle(self) -> None:
        """After `finish`: wait for the last copies and give their staging back."""
        while self._copying:
            self._end_copy()

    def give_back(self) -> None:
        """After an error: release the lease, once nothing is in flight that may still write there.

        See [Note: Late transfers]; until then nobody else gets the memory.
        """
        late = self._store.late
        late.keep((*self._hung, *self._in_flight), self._lease.release)
        late.collect()

    @property
    def _in_flight(self) -> list[Transfer]:
        reads = [staged.transfer for _, staged in self._reading]
        return [*(copy for copy, _ in self._copying), *reads]

    @property
    def _all_started(self) -> bool:
        return self._next_chunk == len(self._block.layout.chunk_nbytes)

    @property
    def _num_staged(self) -> int:
        """Chunks in staging; one at a home that the CPU reaches takes none."""
        held = (*(staged for _, staged in self._reading), *(staged for _, staged in self._copying))
        return sum(staged.lease is not None for staged in held)

    def _start_reads(self, *, wait: bool = False) -> None:
        while not self._all_started and self._num_staged < self._depth:
            staged = self._start_read(self._next_chunk, wait=wait)
            if staged is None:
                return
            self._reading.append((self._next_chunk, staged))
            self._next_chunk += 1

    def _outwait_hung(self) -> None:
        """Nothing is brought to the lease before what hangs there has ended, well or not."""
        while self._hung:
            try:
                self._hung[0].wait(self._store.deadline_seconds)
            except DeadlineError:
                raise
            except StorageError:
                pass
            self._hung.pop(0)

    def _start_read(self, chunk: int, *, wait: bool) -> Staged | None:
        if self._arrivals is not None:  # who takes part in what arrives may change it
            return self._store.start_load(self._block, chunk, wait=wait, urgency=self._urgency)
        into = self._target(chunk) if self._lands_in_lease else None
        return self._store.start_read(
            self._block, chunk, wait=wait, urgency=self._urgency, into=into
        )

    def _target(self, chunk: int) -> torch.Tensor:
        """The place of a chunk in the lease."""
        layout = self._block.layout
        start = layout.chunk_offset_bytes[chunk]
        return self._lease.tensor[start : start + layout.chunk_nbytes[chunk]]

    def _start_copy(self) -> None:
        chunk, staged = self._reading[0]
        staged.transfer.wait(self._store.deadline_seconds)
        self._reading.popleft()
        target = self._target(chunk)
        if self._has_landed(staged):
            return
        if self._arrivals is None:
            copy = self._store.device.start_copy_in(target, staged.tensor, self._block.name)
        else:
            copy, staged = self._arrivals.land(self._block, chunk, staged, target)
        copy.expedite(self._urgency)
        self._copying.append((copy, staged))

    def _has_landed(self, staged: Staged) -> bool:
        """Whether what has been read is in the lease already."""
        start, address = self._lease.tensor.data_ptr(), staged.tensor.data_ptr()
        return start <= address < start + self._lease.nbytes

    def _end_copy(self) -> None:
        transfer, staged = self._copying[0]
        transfer.wait(self._store.deadline_seconds)
        self._copying.popleft()
        staged.release()

    def _abandon(self) -> None:
        """Wait for what is in flight, so that no transfer outlives its buffers, and release all."""
        for transfer, staged in self._copying:
            staged.transfer = transfer
        held = [staged for _, staged in (*self._copying, *self._reading)]
        self._store.late.release(held, self._store.deadline_seconds)
        self._hung += [staged.transfer for staged in held if not staged.transfer.done()]
        self._copying.clear()
        self._reading.clear()
        self._next_chunk = 0
