"""Reads and writes of records: transfers whose outcome the store takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from offload.tiers.transfer import Ticket, TicketTransfer

if TYPE_CHECKING:
    import torch

    from offload.errors import StorageError
    from offload.tiers.extents import Extent
    from offload.tiers.records import Record
    from offload.timeline import Timeline

Operation = Literal["read", "write"]


class StoreTransfer(TicketTransfer):
    """A read or write of one record's extent.

    Attributes:
        record, operation, extent: what is moved where.
        expected: CRC32C of what is read.
        held: a write that does not commit.
    """

    def __init__(
        self,
        ticket: Ticket,
        store: Finisher,
        record: Record,
        operation: Operation,
        extent: Extent,
        tensor: torch.Tensor,
        deadline_seconds: float,
        urgency: int,
    ) -> None:
        super().__init__(
            ticket,
            f"nvme_{operation}",
            record.nbytes,
            what=record.name,
            buffers=(tensor,),
            deadline_seconds=deadline_seconds,
            urgency=urgency,
            timeline=store.timeline,
        )
        self.record = record
        self.operation = operation
        self.extent = extent
        self.expected = 0
        self.held = False
        self._store = store

    def _settled(self, checksum: int, failure: StorageError | None) -> StorageError | None:
        return self._store.finish(self, checksum, failure)


class Finisher(Protocol):
    """The store that a transfer belongs to, and where its transfers are noted."""

    timeline: Timeline

    def finish(
        self, transfer: StoreTransfer, checksum: int, failure: StorageError | None
    ) -> StorageError | None:
        """Take over the outcome of a transfer, once. Returns its error."""
        ...
