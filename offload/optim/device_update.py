"""The update of chunks on the device, beside that of other chunks on the CPU.

[Note: Device update]
What a chunk has away from the device comes to a *slot* of device memory, is updated there, and goes
back. What is at home on the device is updated where it is. Several chunks are under way at once:

    h2d      c+2  c+3
    rule     c+1  c+2      on a stream of its own
    d2h      c    c+1

Nothing is changed before all of a chunk has arrived. From then on its results are kept until they
are home: after a copy that failed, the next `start` of the chunk sends them again and applies
nothing twice. A chunk is whole in its slot, also what no gradient has touched, so it does not
matter whether the staging it came from has been read again in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from offload.errors import OffloadError
from offload.optim.chunk_update import ChunkUpdate, ChunkWork, KernelUpdate, StepSettings
from offload.optim.device_rules import DeviceRule, Rows
from offload.optim.split import FIRST_UNHOLDABLE
from offload.partition.arrays import field_tensor
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket
from offload.partition.parameters import ParameterState
from offload.schedule.update_site import NUM_SLOTS, UpdateScratch
from offload.tiers.device import DeviceLease
from offload.tiers.transfer import Transfer

if TYPE_CHECKING:
    from offload.optim.split import Precision

SCRATCH_OWNER = "update on the device"
STORED_CLASSES = ("weights", "optimizer")


@dataclass(slots=True, eq=False)
class _Slot:
    """Device memory of one chunk under way, and of the patterns of its pieces (int32)."""

    memory: torch.Tensor
    patterns: torch.Tensor


@dataclass(slots=True, eq=False)
class _Updated:
    """A chunk that `settings` has updated in its slot: the results of its staged classes, by class.

    `owners` are the parameters of the pieces, whose patterns the slot has; `transfers` bring the
    results home.
    """

    settings: StepSettings
    slot: _Slot
    results: dict[str, torch.Tensor]
    owners: list[int]
    precision: Precision
    transfers: dict[str, Transfer]


class DeviceUpdate(ChunkUpdate):
    """Updates the buckets of `on_device` on the device, the others by a kernel on the CPU.

    Its device memory is leased once, see `UpdateScratch`. The device is none that the CPU reaches.

    Raises:
        BudgetError: the device budget has no room for the scratch.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        store: BlockStore,
        rule: DeviceRule,
        kernel: KernelUpdate,
        scratch: UpdateScratch,
    ) -> None:
        super().__init__(parameters, store)
        self.on_device: Collection[int] = frozenset()
        self._rule = rule
        self._kernel = kernel
        self._scratch = scratch
        device = store.device
        # Work of its own beside forward and backward; None where there are no streams.
        self._stream = torch.cuda.Stream(device.device) if device.device.type == "cuda" else None
        self._leases: list[DeviceLease] = []
        self._slots: list[_Slot] = []
        try:
            for _ in range(NUM_SLOTS):
                memory = self._lease(scratch.slot + scratch.patterns)
                patterns = memory[scratch.slot :].view(torch.int32)
                self._slots.append(_Slot(memory[: scratch.slot], patterns))
            self._rows = Rows.over(self._lease(scratch.workspace), scratch.piece_numel)
        except BaseException:
            self.close()
            raise
        self._free = list(self._slots)
        self._updated: dict[tuple[int, int], _Updated] = {}

    def close(self) -> None:
        """Give the device memory back; nothing may be under way."""
        while self._leases:
            self._leases.pop().release()

    def runs_on_device(self, bucket: Bucket) -> bool:
        """See `ChunkUpdate.runs_on_device`."""
        return bucket.index in self.on_device

    def staged_classes(self, bucket: Bucket) -> Sequence[str]:
        """See `ChunkUpdate.staged_classes`: what is at home on the device is updated there."""
        classes = super().staged_classes(bucket)
        if not self.runs_on_device(bucket):
            return classes
        return [c for c in classes if self._store.block(bucket.index, c).home != "device"]

    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """See `ChunkUpdate.update`; on the device `start` and `finish`, one after the other."""
        if not self.runs_on_device(work.bucket):
            return self._kernel.update(work, settings)
        self.start(work, settings)
        return self.finish(work)

    def start(self, work: ChunkWork, settings: StepSettings) -> None:
        """See `ChunkUpdate.start`. At most `NUM_SLOTS` chunks may have been started at once.

        Raises:
            StorageError: a copy to the device failed, and the chunk is as it was; or one from it
                could not be started, and the results are kept.
            OffloadError: the device failed; state that is at home there is undefined.
        """
        key = work.bucket.index, work.chunk
        updated = self._updated.get(key)
        if updated is not None and updated.settings is not settings:
            self._forget(key)  # of an update that was made ahead of its step, and dropped
            updated = None
        if updated is None:
            updated = self._updated[key] = self._apply(work, settings)
        with torch.cuda.stream(self._stream):
            for name, result in updated.results.items():
                staged = work.staged[name]
                staged.transfer = self._store.device.start_copy_out(staged.tensor, result, name)
                updated.transfers[name] = staged.transfer

    def finish(self, work: ChunkWork) -> ParameterState | None:
        """See `ChunkUpdate.finish`.

        Raises:
            StorageError: a copy from the device failed; the results are kept.
        """
        key = work.bucket.index, work.chunk
        updated = self._updated[key]
        for staged in work.staged.values():
            staged.transfer.wait(self._store.deadline_seconds)
        with torch.cuda.stream(self._stream):
            largest = updated.slot.patterns[: len(updated.owners)].tolist()
        del self._updated[key]
        self._free.append(updated.slot)
        limit = FIRST_UNHOLDABLE[updated.precision]
        for owner, pattern in zip(updated.owners, largest, strict=True):
            if pattern >= limit:
                return self._parameters[owner]
        return None

    def abandon(self) -> None:
        """See `ChunkUpdate.abandon`."""
        for key in list(self._updated):
            self._forget(key)

    def _forget(self, key: tuple[int, int]) -> None:
        updated = self._updated.pop(key)
        self._give_back(updated.slot, updated.transfers.values())

    def _lease(self, nbytes: int) -> torch.Tensor:
        self._leases.append(self._store.device.lease(nbytes, SCRATCH_OWNER))
        return self._leases[-1].tensor

    def _apply(self, work: ChunkWork, settings: StepSettings) -> _Updated:
        """Bring a chunk to the device and update it there."""
        if not self._free:
            raise OffloadError(
                "no slot for an update on the device is free: copies of earlier chunks hang",
                remedy="load a checkpoint, and set placement.update = 'cpu'",
            )
        slot = self._free.pop()
        device = self._store.device
        try:
            blocks = self._fetched(work, slot)
            with self._after_current():
                for staged in work.staged.values():
                    device.make_current_wait(staged.transfer)
                owners = self._run(work, blocks, settings, slot.patterns)
        except BaseException:
            self._give_back(slot, [staged.transfer for staged in work.staged.values()])
            raise
        results = {name: blocks[name] for name in STORED_CLASSES if name in work.staged}
        return _Updated(settings, slot, results, owners, cast("Precision", work.bucket.dtype), {})

    def _fetched(self, work: ChunkWork, slot: _Slot) -> dict[str, torch.Tensor]:
        """The chunk blocks on the device, uint8, by class: what is staged is on its way."""
        blocks = {}
        offset = 0
        for name in self._store.classes(work.bucket.index):
            staged = work.staged.get(name)
            if staged is None:
                block = self._store.block(work.bucket.index, name)
                blocks[name] = self._store.on_device(block, work.chunk)
                continue
            nbytes = staged.tensor.numel()
            blocks[name] = slot.memory[offset : offset + nbytes]
            staged.transfer = self._store.device.start_copy_in(blocks[name], staged.tensor, name)
            offset += nbytes
        return blocks

    def _run(
        self,
        work: ChunkWork,
        blocks: Mapping[str, torch.Tensor],
        settings: StepSettings,
        patterns: torch.Tensor,
    ) -> list[int]:
        """Update the segments piece by piece; the parameter of each piece, in order."""
        fields = {
            field.name: (blocks[name], field)
            for name in blocks
            for field in self._store.block(work.bucket.index, name).layout.element_fields(
                work.chunk
            )
        }
        precision = cast("Precision", work.bucket.dtype)
        owners: list[int] = []
        try:
            for segment in work.segments:
                tensors = {
                    name: field_tensor(*place, segment.start_in_chunk, segment.numel)
                    for name, place in fields.items()
                }
                state = self._parameters[segment.param]
                if state.edited:
                    _follow_edit(tensors)
                scalars = self._rule.scalars(
                    settings.hyper[segment.param], state.steps + 1, settings.gradient_scale
                )
                for start in range(0, segment.numel, self._scratch.piece_numel):
                    stop = min(start + self._scratch.piece_numel, segment.numel)
                    piece = {name: tensor[start:stop] for name, tensor in tensors.items()}
                    rows = self._rows.first(stop - start)
                    self._rule.update(precision, piece, scalars, rows, patterns[len(owners)])
                    owners.append(segment.param)
        except RuntimeError as error:  # of torch: memory, or the device itself
            raise OffloadError(
                f"the update of bucket {work.bucket.index} on {self._store.device.device} failed: "
                f"{error}",
                remedy="load a checkpoint, and set placement.update = 'cpu'",
            ) from error
        return owners

    @contextlib.contextmanager
    def _after_current(self) -> Iterator[None]:
        """Queue work of the device on the stream of updates, after what the caller has queued."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._store.device.device))
        with torch.cuda.stream(self._stream):
            yield

    def _give_back(self, slot: _Slot, transfers: Iterable[Transfer]) -> None:
        """Take a slot back once its copies have ended; a hung copy keeps it for good."""
        ended = True
        for transfer in transfers:
            with contextlib.suppress(OffloadError):
                transfer.wait(self._store.deadline_seconds)
            ended = ended and transfer.done()
        if ended:
            self._free.append(slot)


def _follow_edit(tensors: Mapping[str, torch.Tensor]) -> None:
    """Make what completes an edited weight say exactly what the weight says."""
    if "remainder" in tensors:
        tensors["remainder"].zero_()
    elif "master" in tensors:
        tensors["master"].copy_(tensors["weight"])
