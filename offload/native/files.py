"""A file with two descriptors: one that goes around the page cache and one that does not.

[Note: two descriptors]
O_DIRECT asks that file offset, length and memory address are multiples of an alignment. A request
is cut into an unaligned prefix, an aligned middle and an unaligned suffix; the middle uses the
direct descriptor, the others the buffered one. The cut is at multiples of at least a page, so that
the page cache never holds a page of which a part was written directly. Where the file system
refuses O_DIRECT, or the second descriptor cannot be opened, everything is buffered.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errno_codes
import fcntl
import mmap
import os
import sys
from types import TracebackType
from typing import Self

from offload.errors import StorageError

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES = 256
_STATX_FIELD_OFFSETS = (0, 152, 156)  # stx_mask, stx_dio_mem_align, stx_dio_offset_align
_PROBE_ALIGNMENTS = (512, 4096)
_PAGE_BYTES = 4096


class Descriptors:
    """The two descriptors; closed with the last reference, so never under a request in flight."""

    __slots__ = ("__weakref__", "_pid", "buffered", "direct")

    def __init__(self, buffered: int) -> None:
        self.buffered = buffered
        self.direct = -1
        self._pid = os.getpid()

    def __del__(self) -> None:
        if self._pid != os.getpid():  # a forked child leaves its parent's files alone
            return
        for descriptor in (self.buffered, self.direct):
            if descriptor >= 0:
                # Whether data is safe is known by fsync alone; a descriptor is gone anyhow.
                with contextlib.suppress(OSError):
                    os.close(descriptor)


class IoFile:
    """An open file; made by `IoEngine.open` and `IoEngine.from_fd`.

    `direct` tells whether aligned parts go around the page cache; `alignment` is that of offsets
    and lengths, `memory_alignment` that of addresses, in bytes. After `close` the descriptors stay
    open until the last request on them has ended.
    """

    path: str
    alignment: int
    memory_alignment: int

    def __init__(self, fd: int, path: str, *, direct: bool) -> None:
        """Take ownership of `fd`; it is closed if this raises."""
        self.path = path
        self.alignment, self.memory_alignment = _PAGE_BYTES, 1
        self.descriptors: Descriptors | None = Descriptors(fd)
        if direct:
            self._open_direct(self.descriptors)

    @classmethod
    def open(cls, path: str, *, flags: int, mode: int, direct: bool) -> IoFile:
        """Open `path` with `flags`, O_CLOEXEC and O_NOFOLLOW.

        Raises:
            StorageError: the system refused; nothing is left open.
        """
        try:
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except OSError as error:
            raise StorageError(operation="open", path=path, errno=error.errno) from error
        return cls(fd, path, direct=direct)

    @property
    def fd(self) -> int:
        """The buffered descriptor; -1 after `close`."""
        return -1 if self.descriptors is None else self.descriptors.buffered

    @property
    def direct_fd(self) -> int:
        """The descriptor with O_DIRECT; -1 where there is none."""
        return -1 if self.descriptors is None else self.descriptors.direct

    @property
    def direct(self) -> bool:
        return self.direct_fd >= 0

    def _open_direct(self, descriptors: Descriptors) -> None:
        # Through /proc, because the path may be gone (O_TMPFILE) or name another file by now.
        access = fcntl.fcntl(descriptors.buffered, fcntl.F_GETFL) & os.O_ACCMODE
        try:
            fd = os.open(
                f"/proc/self/fd/{descriptors.buffered}", access | os.O_CLOEXEC | os.O_DIRECT
            )
        except OSError:
            return
        memory, offset = _statx_direct_alignment(fd) or _probe_alignment(fd)
        if offset == 0:
            os.close(fd)
            return
        descriptors.direct = fd
        self.alignment, self.memory_alignment = max(offset, _PAGE_BYTES), max(memory, 1)

    def close(self) -> None:
        """Give up the descriptors; a second call does nothing."""
        self.descriptors = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.fd < 0 else "direct" if self.direct else "buffered"
        return f"IoFile({self.path!r}, {state}, alignment={self.alignment})"


def _statx_direct_alignment(fd: int) -> tuple[int, int] | None:
    """Return (memory, offset) alignment in bytes; offset 0 = no direct I/O; None = not told.

    Source: statx(2), STATX_DIOALIGN, Linux 6.1.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        return None
    buffer = ctypes.create_string_buffer(_STATX_NBYTES)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    mask, memory, offset = (
        int.from_bytes(buffer.raw[at : at + 4], sys.byteorder) for at in _STATX_FIELD_OFFSETS
    )
    return (memory, offset) if mask & _STATX_DIOALIGN else None


def _probe_alignment(fd: int) -> tuple[int, int]:
    """Return the smallest (memory, offset) alignment that a direct read of `fd` accepts, or (0, 0).

    A file that is open for writing only cannot be asked: 4096 is taken.
    """
    with mmap.mmap(-1, 2 * _PAGE_BYTES) as memory:
        for alignment in _PROBE_ALIGNMENTS:
            with memoryview(memory) as view, view[alignment : 2 * alignment] as target:
                try:
                    os.preadv(fd, [target], alignment)
                except OSError as error:
                    if error.errno == errno_codes.EBADF:
                        return _PAGE_BYTES, _PAGE_BYTES
                    if error.errno != errno_codes.EINVAL:
                        return 0, 0
                else:
                    return alignment, alignment
    return 0, 0
