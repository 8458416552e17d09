"""The backing files of an NVMe store: which bytes of which file an extent is."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from offload.native import DiskCalls
from offload.tiers.pins import BackingFile
from offload.tiers.records import checksum_seed
from offload.tiers.run_folder import (
    StorePath,
    check_disk_room,
    close_paths,
    disk_bytes_free,
    give_back_range,
    keep_ranges,
    warn_of_memory,
)

if TYPE_CHECKING:
    from offload.native.files import IoFile
    from offload.tiers.extents import Extent
    from offload.tiers.transfer import AsyncIo

_SALT_BYTES = 8


class BackingFiles:
    """Files on one or several paths, by index in the order in which they were made.

    Not thread-safe, but for reading what has been made. A disk that hangs when files are made is an
    error after `deadline_seconds`.

    Attributes:
        paths: the folders, as the user gave them.

    Raises:
        StorageError: a path does not exist, or is not usable.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], io: AsyncIo, deadline_seconds: float
    ) -> None:
        self.paths: list[StorePath] = []
        self._io = io
        self._disk = DiskCalls(deadline_seconds)
        self._files: list[BackingFile] = []
        self._salts: list[bytes] = []  # by file
        try:
            for path in paths:
                look = partial(StorePath, path)
                self.paths.append(self._disk.make("open", path, look, discard=StorePath.close))
        except BaseException:
            self.close()
            raise
        warn_of_memory(self.paths)

    def __getitem__(self, index: int) -> BackingFile:
        return self._files[index]

    def bytes_free(self) -> int:
        """Bytes free on the disks of the paths."""
        return disk_bytes_free(self.paths)

    def check_room(self, needed: Mapping[int, int]) -> None:
        """Raise DiskFullError unless there is room for so many bytes by path."""
        check_disk_room(self.paths, needed)

    def create(self, needed: Mapping[int, int]) -> dict[int, int]:
        """Allocate one file of so many bytes a path, all or none; their indices by path.

        Raises:
            DiskFullError, StorageError: see `StorePath.create`.
        """
        files: dict[int, IoFile] = {}
        try:
            for home, nbytes in needed.items():
                path = self.paths[home]
                create = partial(self._create, path, nbytes)
                files[home] = self._disk.make("allocate", path.path, create, discard=_close)
        except BaseException:
            for file in files.values():
                file.close()
            raise
        indices = {}
        for home, file in files.items():
            indices[home] = len(self._files)
            self._files.append(BackingFile(file, self.paths[home]))
            self._salts.append(secrets.token_bytes(_SALT_BYTES))
        return indices

    def _create(self, path: StorePath, nbytes: int) -> IoFile:
        return self._io.from_fd(path.create(nbytes), path.path)

    def seed(self, extent: Extent, generation: int) -> int:
        """The CRC seed of a version; see [Note: checksum seeds]."""
        return checksum_seed(self._salts[extent.file], extent.offset, generation)

    def give_back(self, extent: Extent) -> None:
        """Give the blocks of an extent back to the disk. Raises OSError: it cannot."""
        give_back_range(self._files[extent.file].io.fd, extent.offset, extent.nbytes)

    def trim(self, kept: Iterable[Extent]) -> None:
        """Of files that have got a name, only these extents stay on the disk.

        To be called before `close`: no other name of theirs than a checkpoint's stays.
        """
        ranges: dict[int, list[tuple[int, int]]] = {}
        for extent in kept:
            ranges.setdefault(extent.file, []).append((extent.offset, extent.nbytes))
        # The descriptors stay open while a disk that hangs has not answered.
        held = [file.io.descriptors for file in self._files]

        def trim() -> None:
            for path in self.paths:
                path.remove_run_folder()
            for index, descriptors in enumerate(held):
                if descriptors is not None:
                    keep_ranges(descriptors.buffered, ranges.get(index, ()))

        self._disk.tidy("trim", self._where, trim)

    def close(self) -> None:
        """Give all files up, and close the paths. A forked child leaves everything alone.

        Descriptors outlive this while a request on them is in flight.
        """
        files = self._files

        def close() -> None:
            while files:
                files.pop().io.close()
            close_paths(self.paths)

        self._disk.tidy("close", self._where, close)
        self._disk.close()

    @property
    def _where(self) -> str:
        return ", ".join(path.path for path in self.paths)


def _close(file: IoFile) -> None:
    file.close()
