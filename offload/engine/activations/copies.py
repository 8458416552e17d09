"""One saved tensor's bytes on their way off the device, and back.

[Note: Activation places]

    LEAVING --> ON_HOST --> WRITING --> ON_BOTH --> ON_NVME --> READING --> ON_BOTH

  LEAVING   the copy from the device is in flight; the tensor's own memory is held, and is what
            somebody gets who wants the tensor now (*forwarding*)
  ON_HOST   a host piece has the bytes
  WRITING   the same, and a write from it is in flight: forwarding again
  ON_BOTH   a host piece and a record have the bytes; the piece may be dropped for another tensor
  ON_NVME   a record has the bytes
  READING   the same, and a read into a host piece is in flight
  RETURNED  the tensor is on the device again, for good: nowhere else was room

A pending place (LEAVING, WRITING, READING) owns exactly one transfer; `settle` ends it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import Enum

import torch

from offload.engine.activations.views import View
from offload.errors import DeadlineError, OffloadError
from offload.tiers.device import DeviceTier
from offload.tiers.host_share import HostPiece
from offload.tiers.nvme import NvmeStore, Record
from offload.tiers.record_pool import RecordPool
from offload.tiers.transfer import Transfer, Urgency


class Place(Enum):
    """Where the bytes are; see [Note: Activation places]."""

    LEAVING = "leaving"
    ON_HOST = "on host"
    WRITING = "writing"
    ON_BOTH = "on both"
    ON_NVME = "on nvme"
    READING = "reading"
    RETURNED = "returned"


# The copies of a store by place and number.
CopiesAt = dict[Place, dict[int, "ActivationCopy"]]


@dataclass(frozen=True, slots=True)
class Lanes:
    """What moves bytes: the device tier, and the NVMe store with its extents if it is used."""

    device: DeviceTier
    nvme: NvmeStore | None
    records: RecordPool | None
    deadline_seconds: float


class ActivationCopy:
    """The bytes of one saved tensor. Not thread-safe: the store calls it under its lock.

    Attributes:
        number: counts the copies of a store; the later one was saved later.
        view: how the bytes lie in memory.
        place: see [Note: Activation places].
        arrived: the bytes on the device, if they are there or on their way, for the next unpack.
        is_stuck: a write has failed; the host keeps the bytes.
    """

    def __init__(
        self,
        number: int,
        view: View,
        tensor: torch.Tensor,
        piece: HostPiece,
        lanes: Lanes,
        copies_at: CopiesAt,
    ) -> None:
        self.number = number
        self.view = view
        self.name = f"activation {number} ({view.dtype}, {list(view.size)})"
        self.arrived: torch.Tensor | None = None
        self.is_stuck = False
        self._lanes = lanes
        self._piece: HostPiece | None = piece
        self._record: Record | None = None
        self._arrivals: list[Transfer] = []  # copies from the piece that may be in flight
        try:
            source = view.bytes_of(tensor)
            self._transfer: Transfer | None = lanes.device.start_copy_out(
                self._bytes(), source, self.name
            )
        except BaseException:
            piece.release()
            raise
        self._source: torch.Tensor | None = source
        self.place = Place.LEAVING
        self._copies_at: CopiesAt | None = copies_at
        copies_at[self.place][number] = self

    @property
    def nbytes(self) -> int:
        """Bytes of the saved elements."""
        return self.view.nbytes

    @property
    def done(self) -> bool:
        """Whether `settle` would not wait."""
        return self._transfer is None or self._transfer.done()

    @property
    def is_busy(self) -> bool:
        """Whether a transfer may still use the host piece."""
        return not self.done or any(not arrival.done() for arrival in self._arrivals)

    def settle(self) -> None:
        """Wait for the transfer in flight; does nothing in a settled place.

        Raises:
            DeadlineError: it is still in flight.
            StorageError: it has failed. What could not leave or be written, or read, is where it
                was before.
        """
        if self._transfer is None:
            return
        try:
            self._transfer.wait(self._lanes.deadline_seconds)
        except DeadlineError:
            raise
        except OffloadError:
            self._transfer = None
            self._undo()
            raise
        self._transfer = None
        self._source = None
        self._move(Place.ON_HOST if self.place is Place.LEAVING else Place.ON_BOTH)

    def start_write(self, record: Record) -> None:
        """Start to write the host's bytes to `record`, which is the copy's from here on.

        Raises:
            StorageError: the write cannot be started; nothing has changed.
        """
        assert self.place is Place.ON_HOST
        assert self._piece is not None
        assert self._lanes.nvme is not None
        self._transfer = self._lanes.nvme.start_write(record, self._piece.tensor)
        self._record = record
        self._move(Place.WRITING)

    def start_read(self, piece: HostPiece) -> None:
        """Start to read the bytes from nvme into `piece`, which is the copy's from here on.

        Raises:
            StorageError: the read cannot be started; nothing has changed.
        """
        assert self.place is Place.ON_NVME
        assert self._record is not None
        assert self._lanes.nvme is not None
        # Read ahead by few copies, so before weights that are fetched ahead.
        self._transfer = self._lanes.nvme.start_read(
            self._record, piece.tensor, urgency=Urgency.PLANNED
        )
        self._piece = piece
        self._move(Place.READING)

    def drop_host(self) -> None:
        """Give the host piece up; the record keeps the bytes."""
        assert self.place is Place.ON_BOTH
        assert not self.is_busy
        self._release_piece()
        self._move(Place.ON_NVME)

    def start_arrival(self) -> Transfer:
        """Start to copy the bytes from the host to new device memory, which is `arrived`."""
        assert self._piece is not None
        assert self.place not in (Place.LEAVING, Place.READING)
        memory = self.view.new_bytes(self._lanes.device.device)
        arrival = self._lanes.device.start_copy_in(memory, self._bytes(), self.name)
        arrival.expedite(Urgency.PLANNED)
        self._arrivals.append(arrival)
        self.arrived = memory
        return arrival

    def make_arrived(self) -> torch.Tensor:
        """The bytes on the device, for work that this thread queues next.

        The place is one in which the host has the bytes, or LEAVING.
        """
        if self._source is not None:
            return self._source
        if self.arrived is None:
            self.start_arrival()
        assert self.arrived is not None
        for arrival in self._arrivals:
            self._lanes.device.make_current_wait(arrival)
        self._arrivals = [arrival for arrival in self._arrivals if not arrival.done()]
        return self.arrived

    def return_to_device(self) -> None:
        """Bring the bytes back for good, and give the host piece up."""
        assert self.place is Place.ON_HOST
        self.make_arrived()
        self.settle_arrivals()
        self._release_piece()
        self._move(Place.RETURNED)

    def settle_arrivals(self) -> None:
        """Wait until no copy from the host piece is in flight."""
        while self._arrivals:
            self._arrivals[-1].wait(self._lanes.deadline_seconds)
            self._arrivals.pop()

    def leave(self) -> None:
        """Nobody wants the bytes: stand in no list of copies any more."""
        if self._copies_at is not None:
            del self._copies_at[self.place][self.number]
            self._copies_at = None

    def drain(self) -> None:
        """Wait for every transfer; what became of it does not matter.

        Raises:
            DeadlineError: one did not end.
        """
        for settle in (self.settle_arrivals, self.settle):
            try:
                settle()
            except DeadlineError:
                raise
            except OffloadError:
                pass

    def release(self) -> None:
        """Give everything back; nobody wants the bytes, and no transfer is in flight."""
        assert not self.is_busy
        with contextlib.suppress(OffloadError):  # of a write or read that nobody needs any more
            self.settle()
        self.arrived = self._source = None
        if self._piece is not None:
            self._release_piece()
        if self._record is not None:
            self._release_record()

    def _move(self, place: Place) -> None:
        if self._copies_at is not None:
            del self._copies_at[self.place][self.number]
            self._copies_at[place][self.number] = self
        self.place = place

    def _undo(self) -> None:
        if self.place is Place.LEAVING:
            self.arrived, self._source = self._source, None
            self._release_piece()
            self._move(Place.RETURNED)
        elif self.place is Place.WRITING:
            self._release_record()
            self.is_stuck = True
            self._move(Place.ON_HOST)
        elif self.place is Place.READING:
            self._release_piece()
            self._move(Place.ON_NVME)

    def _bytes(self) -> torch.Tensor:
        assert self._piece is not None
        return self._piece.tensor[: self.nbytes]

    def _release_piece(self) -> None:
        assert self._piece is not None
        self._piece.release()
        self._piece = None

    def _release_record(self) -> None:
        assert self._record is not None
        assert self._lanes.records is not None
        self._lanes.records.give_back(self._record)
        self._record = None
