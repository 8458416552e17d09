"""One checkpoint on its way to the disk; see [Note: Saving] in state.saver."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from offload import __version__
from offload.errors import DeadlineError, DiskFullError, StorageError
from offload.native import DiskCalls, IoEngine, Ticket
from offload.partition.layout import SLOT_ALIGNMENT_BYTES, round_up
from offload.partition.snapshot import BlockKey, MappedTensor, Version
from offload.partition.staging import StagingLease
from offload.state import durable, folders, manifest, plain
from offload.state.data_file import DEPTH, DataFileWriter
from offload.state.manifest import ZEROS, BlockRecord, Manifest, PieceRecord, TensorRecord
from offload.state.safetensors_stream import bytes_of
from offload.state.source import SnapshotSource
from offload.tiers.extents import round_up_to_page
from offload.tiers.pins import BackingFile, Pin
from offload.tiers.transfer import Transfer
from offload.tiers.uninterrupted import let_signals_in

# Bytes of the manifest to reserve for one tensor or block when the free space is checked.
_MANIFEST_BYTES_PER_ENTRY = 256
_POLL_SECONDS = 0.002
_NOT_WRITTEN = BlockRecord(ZEROS, 0, 0, 0, 0)
CopyKey = tuple[str, str, str]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be saved beside the snapshot.

    Attributes:
        root, tag: where.
        sequence: greater than that of any checkpoint in `root`.
        values: plain values of the moment; the snapshot's `late_values` are added.
        copies: small tensors by kind, name and field: on the CPU, nobody changes them.
        portable: nothing is linked.
    """

    root: Path
    tag: str
    sequence: int
    values: Mapping[str, Any]
    copies: Mapping[CopyKey, torch.Tensor]
    portable: bool


@dataclass(frozen=True, slots=True, eq=False)
class Linked:
    """A checkpoint that refers to extents; `release` unpins all of them.

    Attributes:
        folder: of the checkpoint.
        files: the backing files that have the extents, in the order of their numbers there.
        origin: who has chosen its name.
    """

    folder: Path
    files: Sequence[BackingFile]
    origin: str
    release: Callable[[], None]

    def is_there(self) -> bool:
        """Whether the folder is still this checkpoint's: it names the same files."""
        if not (self.folder / manifest.MANIFEST_NAME).exists():
            return False
        for number, file in enumerate(self.files, start=1):
            try:
                status = (self.folder / manifest.data_file_name(number)).stat()
            except OSError:
                return False
            if (status.st_dev, status.st_ino) != file.identity:
                return False
        return True


@dataclass(slots=True, eq=False)
class _Copy:
    """An extent that is copied to the block number `index`; its memory while it is."""

    index: int
    pin: Pin
    unpin: Callable[[], None]
    lease: StagingLease | None = None
    transfer: Transfer | None = None

    @property
    def nbytes(self) -> int:
        return self.pin.record.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        assert self.lease is not None, "there is memory for it"
        return self.lease.tensor[: self.nbytes]

    def end(self, deadline_seconds: float) -> None:
        """Wait for the read, if there is one, and let go; of what hangs, never."""
        if self.transfer is not None:
            with contextlib.suppress(OSError):
                self.transfer.wait(deadline_seconds)
            if not self.transfer.done():
                return
        self.unpin()
        if self.lease is not None:
            self.lease.release()


class CheckpointWriter:
    """Writes one checkpoint: `begin` in the thread that trains, then `run` in any, or `give_up`.

    The first two give everything up if they raise, and let the engine go on.

    Args:
        io: writes.
        snapshot, request: what.
        disk: makes its system calls.
        deadline_seconds: how long a write, or a wait for memory, may take.
        note_linked: is told, in whatever thread, what the checkpoint refers to as soon as it has
            its name; also if `run` raises after that, or before, where the disk hung.
    """

    def __init__(
        self,
        io: IoEngine,
        snapshot: SnapshotSource,
        request: Request,
        disk: DiskCalls,
        deadline_seconds: float,
        note_linked: Callable[[Linked], object],
    ) -> None:
        self._disk = disk
        self._note_linked = note_linked
        self._io = io
        self._snapshot = snapshot
        self._request = request
        self._deadline_seconds = deadline_seconds
        self._cleanup = contextlib.ExitStack()
        self._unpinning = contextlib.ExitStack()  # of what is linked
        self._written: os.stat_result | None = None  # the manifest
        self._has_settled_pins = False
        self._records: list[BlockRecord] = []
        self._index: dict[BlockKey, int] = {}
        self._files: list[BackingFile] = []  # linked; number 0 is the checkpoint's own file
        self._linked: dict[tuple[int, int], int] = {}  # backing file -> its number here
        self._to_copy: deque[_Copy] = deque()
        self._reading: deque[_Copy] = deque()
        # The memory is its write's until that has settled.
        self._writing: deque[tuple[int, Ticket, Callable[[], None], torch.Tensor]] = deque()

    def begin(self) -> None:
        """Allocate room, and write what is exposed; see [Note: Snapshot].

        Raises:
            DiskFullError: there is too little room.
            BudgetError, StorageError: something could not be read or written.
        """
        request, snapshot = self._request, self._snapshot
        with self._giving_up():
            self._on_disk("create", partial(durable.make_folder, request.root))
            self._on_disk("sweep", partial(folders.sweep, request.root))
            self._device = self._on_disk("stat", request.root.stat).st_dev
            own_bytes = self._own_bytes()
            self._check_room(own_bytes)
            self._pending = self._enter_pending()
            path = self._pending / manifest.data_file_name(0)
            self._own = DataFileWriter(self._io, self._disk, path, own_bytes)
            self._cleanup.callback(self._tidy, "close", self._own.close)
            self._cleanup.callback(self._abandon)
            for key in snapshot.exposed:
                self._capture(key)
            self._settle(0)

    def run(self, after_capture: Callable[[], object]) -> None:
        """Write the rest and make it durable. `after_capture` is called when training may go on.

        Raises:
            CheckpointError: a weight was edited meanwhile.
            BudgetError, StorageError: something could not be read or written.
        """
        with self._giving_up():
            for key in self._snapshot.blocks:
                let_signals_in()  # of a save that is not asynchronous
                self._capture(key)
            copies = self._write_copies()
            self._settle(0)
            late_values = self._snapshot.late_values()
            self._snapshot.check_unedited()
            self._snapshot.end_capture()
            after_capture()
            self._copy_pinned()
            self._own.finish()
            for file in self._files:
                self._sync(file)
            self._publish(copies, late_values)
            self._cleanup.close()

    def give_up(self) -> None:
        """Let go of everything; of extents only if the checkpoint has not got its name."""
        try:
            self._cleanup.close()
        finally:
            # Behind a rename that hangs, which may still give it its name.
            self._tidy("look at", self._settle_pins)
            self._snapshot.end_capture()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.give_up()
            raise

    def _on_disk(
        self,
        operation: str,
        call: Callable[[], _T],
        discard: Callable[[_T], object] | None = None,
    ) -> _T:
        return self._disk.make(operation, self._request.root, call, discard=discard)

    def _tidy(self, operation: str, call: Callable[[], object]) -> None:
        self._disk.tidy(operation, self._request.root, call)

    def _enter_pending(self) -> Path:
        pending = folders.pending_folder(self._request.root, self._request.tag)
        leave = partial(pending.__exit__, None, None, None)
        path = self._on_disk("create", pending.__enter__, lambda _: leave())
        self._cleanup.callback(self._tidy, "remove", leave)
        return path

    def _sync(self, file: BackingFile) -> None:
        try:
            self._on_disk("fsync", partial(self._io.fsync, file.io))
        except OSError:
            file.is_doubtful = True  # one more fsync would say nothing
            raise

    def _own_bytes(self) -> int:
        """Bytes of what will probably be copied."""
        snapshot = self._snapshot
        blocks = [*snapshot.exposed, *snapshot.blocks]
        if not self._request.portable:
            blocks = [key for key in blocks if snapshot.device_of(key) != self._device]
        copied = sum(round_up_to_page(snapshot.nbytes(key)) for key in blocks)
        return copied + round_up_to_page(
            sum(
                round_up(copy.numel() * copy.element_size(), SLOT_ALIGNMENT_BYTES)
                for copy in self._request.copies.values()
            )
        )

    def _check_room(self, own_bytes: int) -> None:
        snapshot = self._snapshot
        num_entries = len(snapshot.tensors) + len(snapshot.blocks) + len(self._request.copies)
        needed = own_bytes + _MANIFEST_BYTES_PER_ENTRY * num_entries
        free = self._on_disk("statvfs", partial(durable.free_bytes, self._request.root))
        if needed > free:
            raise DiskFullError(
                path=self._request.root,
                needed_bytes=needed,
                free_bytes=free,
                what="checkpoint",
                remedy=f"free space on the file system of {self._request.root}, or save elsewhere",
            )

    # -- blocks ------------------------------------------------------------------------------------

    def _capture(self, key: BlockKey) -> None:
        ask = partial(self._snapshot.capture, key)
        version = self._as_soon_as_possible(ask, self._snapshot.nbytes(key))
        index = self._index[key] = len(self._records)
        self._records.append(_NOT_WRITTEN._replace(nbytes=version.nbytes))
        if version.pin is not None:
            try:
                number = self._link(version)
            except BaseException:
                version.release()
                raise
            if number is None:
                self._to_copy.append(_Copy(index, version.pin, version.release))
            else:
                pin = version.pin
                self._records[index] = BlockRecord(
                    number, pin.extent.offset, version.nbytes, pin.seed, pin.checksum
                )
                self._unpinning.callback(version.release)
        elif version.tensor is not None:
            self._start_write(index, version.tensor, version.release)

    def _link(self, version: Version) -> int | None:
        """The number of the file that the pinned extent is in; None: it has to be copied."""
        pin = version.pin
        if pin is None or self._request.portable or not self._snapshot.has_checksums:
            return None
        identity = pin.file.identity
        if identity not in self._linked:
            if pin.file.device != self._device:
                return None
            number = 1 + len(self._files)
            path = self._pending / manifest.data_file_name(number)
            try:
                self._on_disk("link", partial(pin.file.link, path))
            except DeadlineError:
                raise
            except OSError:
                return None
            self._linked[identity] = number
            self._files.append(pin.file)
        return self._linked[identity]

    def _start_write(self, index: int, tensor: torch.Tensor, release: Callable[[], None]) -> None:
        try:
            offset, ticket = self._own.start_write(tensor)
        except BaseException:
            release()
            raise
        self._records[index] = BlockRecord(0, offset, tensor.numel(), 0, 0)
        self._writing.append((index, ticket, release, tensor))
        self._settle(DEPTH)

    def _settle(self, num_left: int) -> None:
        """Wait for the oldest writes until so many are left."""
        while len(self._writing) > num_left:
            index, ticket, release, _ = self._writing[0]
            checksum = ticket.wait(self._deadline_seconds)
            self._writing.popleft()
            release()
            self._records[index] = self._records[index]._replace(crc32c=checksum)

    def _abandon(self) -> None:
        """Let go of everything; what a transfer still reads or fills, when it has ended."""
        limit = time.monotonic() + self._deadline_seconds  # for all: a disk that hangs costs one
        for copy in (*self._reading, *self._to_copy):
            copy.end(max(limit - time.monotonic(), 0))
        while self._writing:
            _, ticket, release, _ = self._writing.popleft()
            with contextlib.suppress(OSError):
                ticket.wait(max(limit - time.monotonic(), 0))
            if ticket.done():
                release()

    def _write_copies(self) -> list[TensorRecord]:
        """Write what is in no block as one block: tensor after tensor, whole pages."""
        copies = self._request.copies
        index, offset = len(self._records), 0
        records = []
        for (kind, name, field), copy in copies.items():
            nbytes = copy.numel() * copy.element_size()
            pieces = (PieceRecord(index, offset, nbytes),) if nbytes else ()
            shape = tuple(copy.shape)
            records.append(TensorRecord(kind, name, field, str(copy.dtype), shape, None, pieces))
            offset += round_up(nbytes, SLOT_ALIGNMENT_BYTES)
        if offset:
            packed = torch.zeros(round_up_to_page(offset), dtype=torch.uint8)
            for record, copy in zip(records, copies.values(), strict=True):
                for piece in record.pieces:
                    part = packed[piece.offset : piece.offset + piece.nbytes]
                    part.copy_(bytes_of(copy.contiguous()))
            self._records.append(_NOT_WRITTEN)
            self._start_write(index, packed, lambda: None)
        return records

    # -- pinned extents that are copied ------------------------------------------------------------

    def _copy_pinned(self) -> None:
        """Copy extents: shared with their file where the file system can, else read and written."""
        can_clone = self._snapshot.has_checksums
        while self._to_copy:
            let_signals_in()
            copy = self._to_copy[0]
            can_clone = can_clone and self._clone(copy)
            if not can_clone:
                ask = partial(self._snapshot.try_lease, copy.nbytes)
                copy.lease = self._as_soon_as_possible(ask, copy.nbytes)
                copy.transfer = self._snapshot.start_read(copy.pin, copy.tensor)
                self._reading.append(copy)
            self._to_copy.popleft()
            if len(self._reading) > DEPTH:
                self._write_oldest()
        while self._reading:
            self._write_oldest()
        self._settle(0)

    def _clone(self, copy: _Copy) -> bool:
        """Share an extent, if the file system can."""
        pin = copy.pin
        offset = self._own.clone(pin.file.io, pin.extent.offset, copy.nbytes)
        if offset is None:
            return False
        self._records[copy.index] = BlockRecord(0, offset, copy.nbytes, pin.seed, pin.checksum)
        copy.unpin()
        return True

    def _write_oldest(self) -> None:
        """Write the extent that has been read longest; nobody needs it where it was any more."""
        copy = self._reading[0]
        assert copy.transfer is not None
        assert copy.lease is not None
        copy.transfer.wait(self._deadline_seconds)
        self._reading.popleft()
        copy.unpin()
        self._start_write(copy.index, copy.tensor, copy.lease.release)

    def _as_soon_as_possible(self, ask: Callable[[], _T | None], nbytes: int) -> _T:
        """What `ask` gives as soon as there is host memory, which training may have for a while."""
        limit = time.monotonic() + self._deadline_seconds
        while True:
            answer = ask()
            if answer is not None:
                return answer
            if self._writing:
                self._settle(len(self._writing) - 1)
            elif self._reading:
                self._write_oldest()
            elif time.monotonic() > limit:
                raise self._snapshot.no_lease(nbytes)
            else:
                time.sleep(_POLL_SECONDS)

    # -- the end -----------------------------------------------------------------------------------

    def _publish(self, copies: list[TensorRecord], late_values: Mapping[str, object]) -> None:
        request = self._request
        tensors = [self._tensor_record(tensor) for tensor in self._snapshot.tensors]
        files = [self._own.nbytes]
        files += [os.fstat(file.io.fd).st_size for file in self._files]
        content = Manifest(
            tag=request.tag,
            sequence=request.sequence,
            offload_version=__version__,
            torch_version=str(torch.__version__),
            files=tuple(files),
            blocks=tuple(self._records),
            tensors=(*tensors, *copies),
            values={**request.values, **plain.encode(dict(late_values), where="optimizer")},
        )
        path = self._pending / manifest.MANIFEST_NAME
        data = manifest.encode(content)
        self._on_disk("write", partial(durable.write_file, path, data))
        self._written = self._on_disk("stat", path.stat)
        self._on_disk("rename", self._rename)
        with contextlib.suppress(StorageError):
            self._on_disk("write", partial(folders.write_hint, request.root, request.tag))

    def _rename(self) -> None:
        try:
            folders.publish(self._pending, self._request.root, self._request.tag)
        finally:
            self._settle_pins()

    def _settle_pins(self) -> None:
        """If the checkpoint has its name, also after an error, its extents are its own."""
        if self._has_settled_pins:
            return
        self._has_settled_pins = True
        if self._written is not None and self._files and self._may_have_its_name(self._written):
            final = self._request.root / self._request.tag
            origin = str(self._request.values["origin"])
            self._note_linked(Linked(final, self._files, origin, self._unpinning.close))
        else:
            self._unpinning.close()

    def _may_have_its_name(self, written: os.stat_result) -> bool:
        """Whether the manifest is in its place, or a disk that fails does not say so."""
        final = self._request.root / self._request.tag
        try:
            there = (final / manifest.MANIFEST_NAME).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return (there.st_dev, there.st_ino) == (written.st_dev, written.st_ino)

    def _tensor_record(self, tensor: MappedTensor) -> TensorRecord:
        return TensorRecord(
            tensor.kind,
            tensor.name,
            tensor.field,
            str(tensor.dtype),
            tensor.shape,
            tensor.stride,
            tuple(
                PieceRecord(self._index[piece.block], piece.offset, piece.nbytes)
                for piece in tensor.pieces
            ),
        )
