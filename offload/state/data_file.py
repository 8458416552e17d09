"""The data files of a checkpoint: blocks of bytes, each with a checksum.

Blocks go from the memory that has them to the disk and back without a copy, by the engine's own
I/O: around the page cache, several at a time. Where the file system can share blocks between files
(FICLONERANGE), what is in a file already is not moved at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from offload.errors import CheckpointError, DeadlineError, OffloadError, listed
from offload.native import DiskCalls, IoEngine, IoFile, Ticket
from offload.state import durable, manifest
from offload.state.manifest import ZEROS, BlockRecord, Manifest
from offload.tiers.extents import round_up_to_page
from offload.tiers.host import HostArena
from offload.tiers.run_folder import allocate
from offload.tiers.transfer import DEFAULT_DEADLINE_SECONDS

# In flight at once: enough to keep a disk busy while the next are prepared.
DEPTH = 4
_MAX_OPEN_FILES = 16
_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)


class DataFileWriter:
    """The data file that is the checkpoint's own: blocks one after the other.

    Room for `capacity_bytes` is allocated at once, more when it is needed. System calls are made
    by `disk`. Errors leave the file to whoever removes its folder.

    Raises:
        DiskFullError, StorageError: it cannot be created, or a write failed.
    """

    def __init__(self, io: IoEngine, disk: DiskCalls, path: Path, capacity_bytes: int) -> None:
        self.path = path
        self.nbytes = 0
        self._io = io
        self._disk = disk
        self._allocated_bytes = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        create = partial(io.open, str(path), flags=flags, mode=durable.PRIVATE_FILE_MODE)
        self._file = disk.make("create", path, create, discard=IoFile.close)
        try:
            self._allocate(capacity_bytes)
        except BaseException:
            self._file.close()
            raise

    def start_write(self, tensor: torch.Tensor) -> tuple[int, Ticket]:
        """Start to write a block (uint8, 1-D, on the CPU): its offset, and whom to wait for.

        The ticket's `wait` returns the CRC32C of the block, continued from 0.
        """
        offset = self._take(tensor.numel())
        address = tensor.data_ptr()
        with durable.storage_errors("write", self.path, what=self.path.name, offset=offset):
            ticket = self._io.start_write(
                self._file, offset, address, tensor.numel(), checksum_seed=0
            )
        return offset, ticket

    def clone(self, source: IoFile, offset: int, nbytes: int) -> int | None:
        """Share a block with a file that has it; its offset here, or None: that is not possible.

        Source: ioctl_ficlonerange(2).
        """
        target = round_up_to_page(self.nbytes)
        fields = (source.fd, offset, nbytes, target)
        arguments = b"".join(ctypes.c_uint64(value) for value in fields)
        try:
            self._on_disk("clone", lambda fd: fcntl.ioctl(fd, _FICLONERANGE, arguments))
        except DeadlineError:
            raise
        except OSError:
            return None  # another file system, or one that cannot
        return self._take(nbytes)

    def finish(self) -> None:
        """Give up what was allocated in vain, and sync. No write may be in flight."""
        with durable.storage_errors("truncate", self.path, what=self.path.name):
            self._on_disk("truncate", lambda fd: os.ftruncate(fd, self.nbytes))
        self._disk.make("fsync", self.path, partial(self._io.fsync, self._file))

    def close(self) -> None:
        """Close the file; its descriptors outlive that while a write is in flight."""
        self._file.close()

    def _on_disk(self, operation: str, call: Callable[[int], object]) -> None:
        descriptors = self._file.descriptors  # open until the call has ended
        assert descriptors is not None
        self._disk.make(operation, self.path, lambda: call(descriptors.buffered))

    def _take(self, nbytes: int) -> int:
        offset = round_up_to_page(self.nbytes)
        self.nbytes = offset + nbytes
        self._allocate(self.nbytes)
        return offset

    def _allocate(self, nbytes: int) -> None:
        missing = nbytes - self._allocated_bytes
        if missing <= 0:
            return
        with durable.storage_errors("allocate", self.path, what="checkpoint", nbytes=nbytes):
            self._on_disk("allocate", lambda fd: allocate(fd, self._allocated_bytes, missing))
        self._allocated_bytes = nbytes


class DataFileReader:
    """Reads the blocks of a checkpoint and verifies them. A context manager.

    Args:
        folder: of the checkpoint.
        content: its manifest.
        io: reads; None: an I/O engine of its own, which ends with it.
        deadline_seconds: how long a disk may take to answer.
    """

    def __init__(
        self,
        folder: Path,
        content: Manifest,
        io: IoEngine | None = None,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> None:
        self._folder = folder
        self._content = content
        self._own_io: IoEngine | None = None
        self._io = io
        self.deadline_seconds = deadline_seconds
        self._disk = DiskCalls(deadline_seconds)
        self._files: OrderedDict[int, IoFile] = OrderedDict()  # last used last

    def start(self, index: int, tensor: torch.Tensor) -> Reading:
        """Start to read block number `index` into its bytes in memory: uint8, 1-D.

        Raises:
            CheckpointError: its file has another length than the manifest says.
            StorageError: it cannot be read.
        """
        block = self._content.blocks[index]
        assert tensor.numel() == block.nbytes, "memory of exactly its bytes"
        if block.file == ZEROS:
            tensor.zero_()
            return Reading(self, index, None)
        file = self._open(block.file)
        ticket = self._engine.start_read(
            file, block.offset, tensor.data_ptr(), block.nbytes, checksum_seed=block.seed
        )
        return Reading(self, index, ticket)

    def read_all(
        self, indices: Iterable[int], known: Mapping[int, torch.Tensor] = MappingProxyType({})
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Read blocks, some ahead, each into memory that is good until the next: uint8, 1-D.

        Those that are `known` come from there.

        Raises:
            CheckpointError, StorageError: as `start` and `Reading.finish`.
        """
        wanted = list(indices)
        missing = [index for index in wanted if index not in known]
        with self._reading_ahead(missing) as found:
            for index in wanted:
                yield (index, known[index]) if index in known else next(found)

    @contextlib.contextmanager
    def _reading_ahead(
        self, indices: list[int]
    ) -> Iterator[Generator[tuple[int, torch.Tensor], None, None]]:
        largest = max((self._content.blocks[index].nbytes for index in indices), default=1)
        slot_bytes = round_up_to_page(max(largest, 1))
        num_slots = min(DEPTH + 1, max(len(indices), 1))
        with HostArena(num_slots * slot_bytes) as arena:
            slots = [arena.lease(slot_bytes, "checkpoint") for _ in range(num_slots)]
            blocks = self._read_ahead(indices, [slot.tensor for slot in slots])
            try:
                yield blocks
            finally:
                blocks.close()
                for slot in slots:
                    slot.release()

    def _read_ahead(
        self, indices: list[int], slots: list[torch.Tensor]
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        under_way: deque[tuple[Reading, torch.Tensor]] = deque()
        ahead = enumerate(indices)
        try:
            for _ in indices:
                # One slot is with whoever asked for the block before.
                for number, index in itertools.islice(
                    ahead, max(len(slots) - 1, 1) - len(under_way)
                ):
                    memory = slots[number % len(slots)][: self._content.blocks[index].nbytes]
                    under_way.append((self.start(index, memory), memory))
                reading, memory = under_way[0]
                reading.finish()
                under_way.popleft()
                yield reading.index, memory
        finally:
            for reading, _ in under_way:
                reading.abandon()

    def describe(self, index: int) -> str:
        """A block for messages: its file, its offset, and whose bytes it has."""
        block = self._content.blocks[index]
        names = [
            f"{record.field} of {record.name!r}"
            for record in self._content.tensors
            if any(piece.block == index for piece in record.pieces)
        ]
        path = self._folder / manifest.data_file_name(block.file)
        return f"{path}, offset {block.offset}: {listed(names)}"

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()
        self._disk.close()
        if self._own_io is not None:
            self._own_io.close()
            self._own_io = None

    @property
    def _engine(self) -> IoEngine:
        if self._io is not None:
            return self._io
        if self._own_io is None:
            self._own_io = IoEngine()
        return self._own_io

    def _open(self, index: int) -> IoFile:
        file = self._files.get(index)
        if file is not None:
            self._files.move_to_end(index)
            return file
        if len(self._files) == _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        path = self._folder / manifest.data_file_name(index)
        open_file = partial(self._engine.open, str(path), flags=os.O_RDONLY | os.O_NONBLOCK)
        file = self._disk.make("open", path, open_file, discard=IoFile.close)
        try:
            with durable.storage_errors("read", path, what=path.name):
                nbytes = durable.regular_file_nbytes(file.fd)
            if nbytes != self._content.files[index]:
                raise CheckpointError(
                    f"{path}: damaged: the file has {nbytes} bytes",
                    expected=f"the {self._content.files[index]} of the manifest",
                )
        except BaseException:
            file.close()
            raise
        self._files[index] = file
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Reading:
    """A block on its way to memory; made by `DataFileReader.start`."""

    def __init__(self, reader: DataFileReader, index: int, ticket: Ticket | None) -> None:
        self.index = index
        self._reader = reader
        self._ticket = ticket

    def finish(self) -> None:
        """Wait for the bytes, and verify them.

        Raises:
            CheckpointError: they are not those that were saved; names the file and the tensors.
            StorageError: they could not be read.
        """
        block: BlockRecord = self._reader._content.blocks[self.index]
        if self._ticket is None:
            return
        try:
            checksum = self._ticket.wait(self._reader.deadline_seconds)
        except OffloadError as error:
            error.add_note(self._reader.describe(self.index))
            raise
        if checksum != block.crc32c:
            raise CheckpointError(
                f"{self._reader.describe(self.index)}: damaged: CRC32C is {checksum:08x}, of what "
                f"was saved {block.crc32c:08x}"
            )

    def abandon(self) -> bool:
        """Wait for the end, whatever it is; False: it hangs, and keeps its memory."""
        if self._ticket is None:
            return True
        with contextlib.suppress(OffloadError):
            self._ticket.wait(self._reader.deadline_seconds)
        return self._ticket.done()
