"""The backing files of an NVMe store: which bytes of which file an extent is."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

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

    Not thread-safe, but for reading what has been made.

    Attributes:
        paths: the folders, as the user gave them.

    Raises:
        StorageError: a path does not exist, or is not usable.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], io: AsyncIo) -> None:
        self.paths: list[StorePath] = []
        self._io = io
        self._files: list[BackingFile] = []
        self._salts: list[bytes] = []  # by file
        try:
            self.paths.extend(map(StorePath, paths))
        except BaseException:
            close_paths(self.paths)
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
                files[home] = self._io.from_fd(path.create(nbytes), path.path)
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
        for path in self.paths:
            path.remove_run_folder()
        ranges: dict[int, list[tuple[int, int]]] = {}
        for extent in kept:
            ranges.setdefault(extent.file, []).append((extent.offset, extent.nbytes))
        for index, file in enumerate(self._files):
            keep_ranges(file.io.fd, ranges.get(index, ()))

    def close(self) -> None:
        """Give all files up, and close the paths. A forked child leaves everything alone.

        Descriptors outlive this while a request on them is in flight.
        """
        for file in self._files:
            file.io.close()
        close_paths(self.paths)
