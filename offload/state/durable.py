"""Files that are whole or absent.

[Note: durable order] A file's bytes are synced before its name exists, a name is synced (by
syncing its folder) before anything refers to it, and only then does the caller get its answer.
fsync is never tried twice on the same data: after a failed fsync the kernel may have dropped the
dirty pages, and a second call would report success for bytes that are gone.
Source: RELIABILITY promises P1, P2; "Can Applications Recover from fsync Failures?" (ATC 2020).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from offload.errors import DiskFullError, StorageError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PRIVATE_FILE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700
# Linux transfers at most 0x7ffff000 bytes a call; a smaller piece keeps the dirty page cache
# bounded between syncs.
_PIECE_BYTES = 64 << 20
# As in the I/O engine. EINTR is repeated by Python itself (PEP 475).
_MAX_RETRIES = 200  # without progress
_RETRY_SECONDS = 1e-3


@contextlib.contextmanager
def storage_errors(
    operation: str, path: Path, *, what: str, offset: int | None = None, nbytes: int | None = None
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` with the file, bytes and tensor.

    Raises:
        DiskFullError: no space or quota is left.
        StorageError: any other failed system call.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        if code in _DISK_FULL:
            free = 0
            with contextlib.suppress(OSError):
                free = _free_bytes(path.parent)
            raise DiskFullError(
                path=path,
                needed_bytes=nbytes or 0,
                free_bytes=free,
                operation=operation,
                errno=code,
                what=what,
                remedy=f"free space on the file system of {path.parent}, or save elsewhere",
            ) from error
        raise StorageError(
            operation=operation,
            path=path,
            offset=offset,
            nbytes=nbytes,
            errno=code,
            what=what,
            detail=error.strerror,
        ) from error


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write every byte of `data` (uint8, 1-D) at `offset`, continuing short and refused writes.

    Raises:
        OSError: a system call failed.
    """
    done = 0
    while done < len(data):
        written = _accepted(os.pwrite, descriptor, data[done : done + _PIECE_BYTES], offset + done)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepted no byte of a write")
        done += written


def read_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Fill `data` (uint8, 1-D, writable) from `offset`.

    Raises:
        OSError: a system call failed, or (EIO) the file ends early.
    """
    done = 0
    while done < len(data):
        got = _accepted(os.preadv, descriptor, [data[done : done + _PIECE_BYTES]], offset + done)
        if got == 0:
            raise OSError(errno.EIO, f"short: the file ends {len(data) - done} bytes early")
        done += got


def _accepted(call: Callable[..., int], *arguments: object) -> int:
    """Make the system call until it is not refused with EAGAIN, for a while; its result."""
    for _ in range(_MAX_RETRIES):
        with contextlib.suppress(BlockingIOError):
            return call(*arguments)
        time.sleep(_RETRY_SECONDS)
    return call(*arguments)


def sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it survive a power cut. Raises StorageError."""
    with storage_errors("fsync", path, what="folder"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path, *, mode: int = PRIVATE_FOLDER_MODE) -> None:
    """Create a folder and its missing parents, durably; an existing folder stays as it is.

    Raises:
        StorageError: it cannot be created.
    """
    with storage_errors("create", path, what="folder"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def pending_name(path: Path) -> Path:
    """A fresh name beside `path` for the bytes that will become it."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def create_exclusive(path: Path, *, mode: int = PRIVATE_FILE_MODE) -> int:
    """Open a new file for reading and writing.

    Raises:
        OSError: a system call failed, or the name exists, also as a symbolic link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, mode)


def write_file(path: Path, data: bytes, *, mode: int = PRIVATE_FILE_MODE) -> None:
    """Replace `path` with `data`, atomically and durably (see [Note: durable order]).

    Raises:
        StorageError: a system call failed; `path` is what it was before, and nothing else is left
            behind.
    """
    pending = pending_name(path)
    with storage_errors("write", path, what=path.name, nbytes=len(data)):
        descriptor = create_exclusive(pending, mode=mode)
        try:
            write_all(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
            pending.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                pending.unlink()
            raise
        finally:
            os.close(descriptor)
    sync_folder(path.parent)


def read_small_file(path: Path, *, limit_bytes: int) -> bytes:
    """The bytes of a regular file of at most `limit_bytes`; symbolic links are not followed.

    Raises:
        StorageError: the file is missing, unreadable, no regular file, or larger than the limit.
    """
    with storage_errors("read", path, what=path.name):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            nbytes = regular_file_nbytes(descriptor)
            if nbytes > limit_bytes:
                raise OSError(errno.EFBIG, f"{nbytes} bytes, more than the limit of {limit_bytes}")
            data = bytearray(nbytes)
            read_all(descriptor, memoryview(data), 0)
            return bytes(data)
        finally:
            os.close(descriptor)


def regular_file_nbytes(descriptor: int) -> int:
    """Size of an open regular file.

    Raises:
        OSError: (EINVAL) it is something else: a device, a pipe, a folder.
    """
    status = os.fstat(descriptor)
    # S_IFREG is 0o100000 of the 0o170000 type bits.
    if status.st_mode & 0o170000 != 0o100000:
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def free_bytes(folder: Path) -> int:
    """Bytes that this process may still allocate on the file system of `folder`.

    Raises:
        StorageError: the system does not tell.
    """
    with storage_errors("statvfs", folder, what="free space"):
        return _free_bytes(folder)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
