"""Versions of records that stay as they are, whatever is written later.

[Note: pins]
A record's next version goes to another extent anyway. A *pin* keeps the extent of the version that
is current now from being used again until `NvmeStore.unpin`: copy on write, at the price of one
more extent and of no I/O. Several pins may be on one extent. What a pin says suffices to read the
version without the store: the file, where in it, and the checksum with its seed.

A backing file has no name. One that is given a name (`BackingFile.link`) outlives its process: that
is how a checkpoint on the same file system is made. When the store closes, such a file keeps what
is pinned, and the rest of it goes back to the disk.

[Note: anchors]
A file that was made without a name can get others as long as it has one; when the last one has gone
it never gets another. So its first name is not a checkpoint's, which may fail or be deleted, but an
*anchor* in the run folder of its path ([Note: backing files]). The anchor goes when the store
closes, and after SIGKILL with the next run on the path. Where there can be no anchor, the file is
given the other name without one.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from offload.native.files import IoFile
from offload.tiers.extents import Extent
from offload.tiers.records import Record
from offload.tiers.run_folder import StorePath, link


class BackingFile:
    """One file of the tier, on `path`, and its names; see [Note: anchors].

    Attributes:
        io: what reads and writes it.
        is_doubtful: it is not to get more names: what is in it may not reach the disk.
    """

    def __init__(self, io: IoFile, path: StorePath) -> None:
        self.io = io
        self.is_doubtful = False
        self._path = path
        self._had_name = False

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.io.fd)
        return status.st_dev, status.st_ino

    @property
    def device(self) -> int | None:
        """`st_dev` of the disk on which it can get a name, as far as is known; None: nowhere."""
        is_lost = self._had_name and not os.fstat(self.io.fd).st_nlink
        can_link = self._path.can_link and not is_lost and not self.is_doubtful
        return self._path.device if can_link else None

    def link(self, path: Path) -> None:
        """Give the file a name, which must be free; the folder has to be synced after it.

        Raises:
            OSError: another file system, one that cannot name files without a name, or a file
                whose last name has gone.
        """
        with contextlib.suppress(OSError):
            self._path.anchor(self.io.fd)
            self._had_name = True
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link(self.io.fd, path.name, folder)
            self._had_name = True
        finally:
            os.close(folder)

    def num_names(self) -> int:
        """How many names it has beside the anchor."""
        count = os.fstat(self.io.fd).st_nlink
        # Looked for after that: one that goes in between counts as a name too much, which keeps
        # extents, and never as one too few.
        return count - self._path.is_anchored(self.io.fd)


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
    file: BackingFile
