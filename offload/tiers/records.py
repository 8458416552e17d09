"""Records of the NVMe tier, the seeds of their checksums, and their errors.

[Note: records]

record      one piece of state under a name, of a fixed size; has at most one current extent
generation  how often the record was committed; 0 = never, then it cannot be read
commit      a write that settled well: the record's current extent flips to the one just written
held        of a write: it settles without a commit. The new version is the record's shadow until
            it is committed or dropped; reads return the current one meanwhile

[Note: checksum seeds]

The CRC32C of a version is kept in memory, continued from a seed that is made of the backing file,
the extent's offset and the generation. Bytes of another extent (a misdirected write) or of an
earlier version (a lost write) do not match it, even if they were valid where they belong (P4).
"""

from __future__ import annotations

import errno as errno_codes
import hashlib
import os

import torch

from offload.errors import ChecksumError, StorageError
from offload.tiers.disks import disk_of
from offload.tiers.extents import Extent, round_up_to_page
from offload.tiers.transfer import Transfer

_CRC_MASK = 0xFFFFFFFF


class Record:
    """One piece of state in the store; see [Note: records]. Made by `NvmeStore.reserve`.

    `nbytes` are transferred; `extent_bytes` is that rounded up to pages. Multiples of 4096 are
    fast. `home` is the index, in the store, of `path`, which the record was dealt to.
    """

    __slots__ = (
        "checksum",
        "current",
        "extent_bytes",
        "generation",
        "home",
        "name",
        "nbytes",
        "path",
        "pending",
        "shadow",
        "shadow_checksum",
    )

    def __init__(self, name: str, nbytes: int) -> None:
        assert nbytes > 0, "a record of nothing"
        self.name = name
        self.nbytes = nbytes
        self.extent_bytes = round_up_to_page(nbytes)
        self.home = 0  # the store deals it to a path
        self.path = ""
        # These change under the store's lock:
        self.generation = 0
        self.current: Extent | None = None
        self.checksum = 0  # of the current version
        self.pending: Transfer | None = None  # the write in flight
        self.shadow: Extent | None = None  # taken for a held write, or holding what it has written
        self.shadow_checksum = 0

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.nbytes} bytes, generation {self.generation})"


def checksum_seed(salt: bytes, offset: int, generation: int) -> int:
    """Return the 32-bit CRC seed of a version; see [Note: checksum seeds].

    `salt` stands for the backing file, `offset` is the extent's, in bytes. The generation is added
    and not hashed, so that two generations in one extent never share a seed.
    """
    place = hashlib.blake2s(salt + offset.to_bytes(8, "little"), digest_size=4).digest()
    return (int.from_bytes(place, "little") + generation) & _CRC_MASK


def buffer_address(record: Record, tensor: torch.Tensor) -> int:
    """Return the address of a buffer for `record`, which must be uint8, 1-D, on the host."""
    assert tensor.dtype == torch.uint8
    assert tensor.dim() == 1
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    assert tensor.numel() in (record.nbytes, record.extent_bytes), (
        f"buffer of {tensor.numel()} bytes for {record!r}"
    )
    return tensor.data_ptr()


def named_error(
    error: StorageError, record: Record, operation: str, extent: Extent, path: str
) -> StorageError:
    """Return `error` of the I/O engine as one that names the record."""
    remedy = "look at the disk (dmesg, smartctl)"
    if error.errno == errno_codes.ENOSPC:  # the space was allocated before
        remedy = "free space in the thin volume or snapshot below the file system"
    tries = f", after {error.num_tries} tries" if error.num_tries > 1 else ""
    named = StorageError(
        operation=operation,
        path=path,
        offset=extent.offset,
        nbytes=record.nbytes,
        errno=error.errno,
        what=record.name,
        on=_disk_and_file(path, extent),
        detail=f"{os.strerror(error.errno or errno_codes.EIO)}{tries}",
        remedy=f"{remedy}; the record keeps its last committed version",
    )
    named.num_tries = error.num_tries
    named.__cause__ = error
    return named


def checksum_error(
    record: Record, path: str, extent: Extent, *, found: int, expected: int
) -> ChecksumError:
    """Return the error of a read whose bytes are not those that were written."""
    return ChecksumError(
        operation="read",
        path=path,
        offset=extent.offset,
        nbytes=record.nbytes,
        what=record.name,
        on=_disk_and_file(path, extent),
        detail=f"CRC32C is {found:#010x}, of what was written {expected:#010x}: "
        "a flipped bit, or a misdirected or lost write",
        remedy="do not trust this disk (smartctl, memory test); resume from a checkpoint",
    )


def _disk_and_file(path: str, extent: Extent) -> str:
    """Where an extent is: the disk, and which of the run's backing files, which have no names."""
    disk = disk_of(path)
    where = f"{disk}, " if disk is not None else ""
    return f"{where}backing file number {extent.file} of this run"
