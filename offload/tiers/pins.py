"""Versions of records that stay as they are, whatever is written later.

[Note: pins]
A record's next version goes to another extent anyway. A *pin* keeps the extent of the version that
is current now from being used again until `NvmeStore.unpin`: copy on write, at the price of one
more extent and of no I/O. Several pins may be on one extent. What a pin says suffices to read the
version without the store: the file, where in it, and the checksum with its seed.

A backing file has no name. One that is given a name (`Pin.link`) outlives its process: that is how
a checkpoint on the same file system is made. When the store closes, such a file keeps what is
pinned, and the rest of it goes back to the disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from offload.native.files import IoFile
from offload.tiers.extents import Extent
from offload.tiers.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """One version of a record; made by `NvmeStore.pin`.

    Attributes:
        record: whose version it is.
        extent: where the version is in `file`; the first `record.nbytes` of it.
        generation: of the version.
        seed, checksum: the CRC32C of its bytes, continued from the seed, is `checksum`.
        file: the backing file.
    """

    record: Record
    extent: Extent
    generation: int
    seed: int
    checksum: int
    file: IoFile


def link(file: IoFile, path: Path) -> None:
    """Give a backing file a name, which must be free; the folder has to be synced after it.

    Raises:
        OSError: another file system, one that cannot name files without a name, or a file whose
            last name has gone: it cannot get another one.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a folder it is linkat(2), which alone can follow the link that stands for the file.
        source = f"/proc/self/fd/{file.fd}"
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def file_identity(file: IoFile) -> tuple[int, int]:
    """Device and inode of a backing file."""
    status = os.fstat(file.fd)
    return status.st_dev, status.st_ino
