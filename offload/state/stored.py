"""A checkpoint on disk, read: which one, and its tensors, each after its checksums have matched."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from offload.errors import CheckpointError, DeadlineError
from offload.native import DiskCalls, IoEngine
from offload.state import folders
from offload.state.data_file import DataFileReader
from offload.state.manifest import Manifest, TensorRecord
from offload.state.saver import wait_for_saves
from offload.tiers.transfer import DEFAULT_DEADLINE_SECONDS

# Blocks of which several tensors are pieces are read once, if these are asked for in a row.
_MAX_CACHED_BYTES = 64 << 20


class StoredCheckpoint:
    """The tensors of one checkpoint folder. A context manager: it keeps some of its files open.

    Args:
        folder: the checkpoint's own folder.
        content: its manifest.
        io: reads; None: an I/O engine of its own.
        deadline_seconds: how long a disk may take to answer.

    Attributes:
        folder, content: as given.
        reader: of its blocks.
    """

    def __init__(
        self,
        folder: Path,
        content: Manifest,
        io: IoEngine | None = None,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> None:
        self.folder = folder
        self.content = content
        self.reader = DataFileReader(folder, content, io, deadline_seconds)
        self._cached: OrderedDict[int, torch.Tensor] = OrderedDict()  # oldest first
        self._users = Counter(piece.block for record in content.tensors for piece in record.pieces)

    def records(self) -> list[TensorRecord]:
        """What it holds, block by block."""
        return sorted(self.content.tensors, key=lambda record: record.pieces[:1])

    def verify(self) -> None:
        """Read everything once, a few blocks at a time.

        Raises:
            DamagedError: a file or a tensor is damaged, and named, or cannot be read.
        """
        with self.reading():
            for _ in self.reader.read_all(self.blocks()):
                pass

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A block of which an error means that this checkpoint cannot be read.

        Raises:
            DamagedError: with that error.
            DeadlineError: as it is: a disk that hangs says nothing about the checkpoint.
        """
        try:
            yield
        except DeadlineError:
            raise
        except (CheckpointError, OSError) as error:
            raise DamagedError(error) from error

    def blocks(self) -> list[int]:
        """The numbers of the blocks that tensors are made of, in the order of the files."""
        return sorted(self._users, key=lambda index: self.content.blocks[index])

    def read(self, record: TensorRecord) -> torch.Tensor:
        """One tensor, newly allocated, on the CPU, row-major.

        Raises:
            CheckpointError: its file or the tensor itself is damaged.
            StorageError: the file cannot be read.
        """
        flat = torch.empty(record.nbytes, dtype=torch.uint8)
        filled = 0
        for piece, block in zip(record.pieces, self._blocks_of(record), strict=True):
            part = flat[filled : filled + piece.nbytes]
            part.copy_(block[piece.offset : piece.offset + piece.nbytes])
            filled += piece.nbytes
        tensor = flat.view(self.dtype(record))
        if record.stride is None or not tensor.numel():
            return tensor.view(record.shape)
        return tensor.as_strided(record.shape, record.stride).contiguous()

    @staticmethod
    def dtype(record: TensorRecord) -> torch.dtype:
        """The dtype of a tensor."""
        dtype: torch.dtype = getattr(torch, record.dtype.removeprefix("torch."))
        return dtype

    def _blocks_of(self, record: TensorRecord) -> Iterator[torch.Tensor]:
        """The block of each piece, in order; each is good until the next."""
        wanted = [piece.block for piece in record.pieces]
        known = {index: self._cached[index] for index in wanted if index in self._cached}
        for index, memory in self.reader.read_all(wanted, known=known):
            if index not in known and self._users[index] > 1:
                self._keep(index, memory)
            yield memory

    def _keep(self, index: int, memory: torch.Tensor) -> None:
        """Keep a copy of a block that other tensors will want, if it is not too large."""
        if memory.numel() > _MAX_CACHED_BYTES:
            return
        held = sum(block.numel() for block in self._cached.values())
        while self._cached and held + memory.numel() > _MAX_CACHED_BYTES:
            held -= self._cached.popitem(last=False)[1].numel()
        self._cached[index] = memory.clone()

    def close(self) -> None:
        """Close its files."""
        self._cached.clear()
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DamagedError(Exception):
    """A checkpoint cannot be read, because of `error`; another one may be whole."""

    def __init__(self, error: CheckpointError | OSError) -> None:
        super().__init__(str(error))
        self.error = error


_T = TypeVar("_T")


def first_whole(
    root: Path,
    tag: str | None,
    use: Callable[[StoredCheckpoint], _T],
    *,
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
) -> _T:
    """What `use` makes of the newest checkpoint in `root` (of that tag) that it can read.

    It raises DamagedError where it cannot; each newer, damaged one is named in a warning. What
    this process is still writing there is waited for.

    Raises:
        CheckpointError: there is none; or the one of the tag is damaged.
        StorageError: the one of the tag cannot be read.
    """
    wait_for_saves(root)
    with DiskCalls(deadline_seconds) as disk:
        found, damaged = disk.make(
            "list", root, lambda: folders.candidates(root, tag) if root.is_dir() else ([], [])
        )
    for folder, content in found:
        with StoredCheckpoint(folder, content, deadline_seconds=deadline_seconds) as stored:
            try:
                used = use(stored)
            except DamagedError as failure:
                if tag is not None:
                    raise failure.error from None
                damaged.append(str(failure.error))
                continue
        _warn_of(damaged)
        return used
    raise _none_left(root, tag, damaged)


def find(root: Path, tag: str | None) -> StoredCheckpoint:
    """The newest checkpoint in `root` (of that tag) of which every byte verifies; still open.

    Raises:
        CheckpointError, StorageError: as `first_whole`.
    """

    def verified(stored: StoredCheckpoint) -> tuple[Path, Manifest]:
        stored.verify()
        return stored.folder, stored.content

    return StoredCheckpoint(*first_whole(root, tag, verified))


def _warn_of(damaged: list[str]) -> None:
    for line in damaged:
        warnings.warn(f"passed over a damaged checkpoint: {line}", RuntimeWarning, stacklevel=5)


def _none_left(root: Path, tag: str | None, damaged: list[str]) -> CheckpointError:
    wanted = f"checkpoint {tag!r}" if tag is not None else "checkpoint"
    return CheckpointError(
        "\n  ".join([f"no undamaged {wanted} in {root}", *damaged]),
        remedy="name a directory that save_checkpoint wrote to",
    )
