"""Backing files that leave nothing behind, and the paths they lie on.

[Note: backing files]

A backing file has no name: O_TMPFILE, so its blocks are free when its last descriptor is closed,
also by SIGKILL, unless a checkpoint has given it a name. It is locked with flock as long as its
process lives: what is in it and in no checkpoint is that process's.

A run folder `offload-<pid>-<random>` (0700) has names of files that belong to this process alone:
the anchors of those that a checkpoint refers to ([Note: anchors]), made with the first of them.
Where the file system has no O_TMPFILE, files are made there and unlinked at once; a file system
that cannot unlink open files keeps them. The folder goes when the store closes; a kill leaves it.
It holds a file `lock` that its process keeps locked with flock: whoever can take the lock of a
folder knows that its process is gone and sweeps it. That holds across containers and reused process
numbers, so jobs share a path safely (P7).

A creator and a sweeper can meet between mkdir, open and flock. The creator therefore looks again,
with the lock in hand, whether the lock file is still there, and starts over with a new name if not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errno_codes
import fcntl
import os
import re
import secrets
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from offload.errors import DiskFullError, StorageError
from offload.native.disk_calls import report_progress

_RUN_FOLDER_NAME = re.compile(r"offload-\d+-[0-9a-f]{16}")
_BACKING_FILE_NAME = re.compile(r"extents-\d+")
_LOCK_NAME = "lock"
_CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_TMPFILE = (errno_codes.EOPNOTSUPP, errno_codes.EISDIR, errno_codes.EINVAL)
_NO_ROOM = (errno_codes.ENOSPC, errno_codes.EDQUOT)
_MAX_ATTEMPTS = 16
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_WHAT = "the NVMe tier"  # in messages
_ALLOCATION_BYTES = 4 << 30  # at once: some take long for it
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h


class StorePath:
    """One folder that the user gave for backing files; holds a descriptor of it until `close()`.

    Raises:
        StorageError: it does not exist, is no folder, or cannot be opened; with the remedy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._pid = os.getpid()
        self._run_folder: RunFolder | None = None
        self._lock = threading.Lock()  # of the run folder: a checkpoint is written beside training
        self._is_closing = False
        self._has_unnamed_files = True
        try:
            # The user's own path may go through links; nothing below it may.
            self._fd = os.open(os.path.realpath(path, strict=True), _FOLDER_FLAGS)
            try:
                self.device = os.fstat(self._fd).st_dev  # paths on one device share its free bytes
                sweep(self._fd)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise _refusal(error, "open", self.path) from error
        self.file_system = _file_system(self.device)

    @property
    def is_memory(self) -> bool:
        """Whether files here are in memory (tmpfs) and count against it."""
        return self.file_system in _MEMORY_FILE_SYSTEMS

    @property
    def can_link(self) -> bool:
        """Whether files here can be given a name, as far as is known."""
        return self._has_unnamed_files

    def bytes_free(self) -> int:
        """Bytes that a user without privileges may still allocate here.

        The reserve of the super-user is left alone, also by the super-user.

        Raises:
            StorageError: the system does not tell.
        """
        try:
            status = os.fstatvfs(self._fd)
        except OSError as error:
            raise _refusal(error, "statvfs", self.path) from error
        return status.f_bavail * status.f_frsize

    def create(self, nbytes: int) -> int:
        """Create a nameless backing file with `nbytes` allocated on the disk; return a descriptor.

        Raises:
            DiskFullError: there is no room; everything was given back.
            StorageError: the path refuses files; nothing is left.
        """
        try:
            fd = self._create()
        except OSError as error:
            raise _refusal(error, "create", self.path) from error
        try:
            allocate(fd, 0, nbytes)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)  # a failed fallocate keeps the blocks it got, as long as the file lives
            if error.errno in _NO_ROOM:
                raise DiskFullError(
                    path=self.path,
                    needed_bytes=nbytes,
                    free_bytes=self.bytes_free(),
                    errno=error.errno,
                    what=_WHAT,
                ) from error
            raise _refusal(error, "allocate", self.path, nbytes) from error
        return fd

    def anchor(self, fd: int) -> None:
        """Let a file of this path have a name in the run folder; see [Note: anchors].

        Raises:
            OSError: that is not possible.
        """
        self._open_run_folder().anchor(fd)

    def is_anchored(self, fd: int) -> bool:
        """Whether a file has its anchor."""
        return self._run_folder is not None and self._run_folder.is_anchored(fd)

    def remove_run_folder(self) -> None:
        """Remove the run folder, if there is one, and with it the anchors; there will be none."""
        with self._lock:
            self._is_closing = True
            if self._run_folder is not None:
                self._run_folder.close()

    def close(self) -> None:
        """Also remove the run folder. A forked child leaves everything alone."""
        if self._fd < 0 or os.getpid() != self._pid:
            return
        self.remove_run_folder()
        os.close(self._fd)
        self._fd = -1

    def _open_run_folder(self) -> RunFolder:
        with self._lock:
            if self._is_closing:
                raise OSError(errno_codes.EBADF, f"{self.path} is being closed")
            if self._run_folder is None:
                self._run_folder = RunFolder(self._fd)
            return self._run_folder

    def _create(self) -> int:
        if self._has_unnamed_files:
            # Without O_EXCL, which would forbid to link it.
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            try:
                return os.open(".", flags, 0o600, dir_fd=self._fd)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            self._has_unnamed_files = False
        return self._open_run_folder().create()


def disk_of(path: Path) -> int:
    """`st_dev` of the file system on which a file of this path would be made."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists()).stat().st_dev


def link(fd: int, name: str, folder_fd: int) -> None:
    """Give an open file a name in a folder. Raises OSError."""
    # With a folder it is linkat(2), which alone can follow the link that stands for the file.
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Give a part of a file its blocks, which truncating it to size would only promise (P12).

    Where the file system cannot do it, glibc writes to every block.

    Raises:
        OSError: ENOSPC, say; some of it may be allocated.
    """
    end = offset + nbytes
    while offset < end:
        piece = min(end - offset, _ALLOCATION_BYTES)
        os.posix_fallocate(fd, offset, piece)
        report_progress()
        offset += piece


def give_back_range(fd: int, offset: int, nbytes: int) -> None:
    """Give the blocks of a part of a file back to the disk; it reads as zeros from here on.

    Raises:
        OSError: the file system cannot; nothing changed.

    Source: fallocate(2).
    """
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    library = ctypes.CDLL(None, use_errno=True)
    if library.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(nbytes)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def keep_ranges(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Give all but these (offset, bytes) of a file that has a name back to the disk.

    Where the file system cannot do that, they stay.
    """
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        if not status.st_nlink:
            return
        start = 0
        for offset, nbytes in sorted([*ranges, (status.st_size, 0)]):
            if offset > start:
                give_back_range(fd, start, offset - start)
                report_progress()
            start = max(start, offset + nbytes)


def disk_bytes_free(paths: Sequence[StorePath]) -> int:
    """Bytes free on the disks of these paths, each disk counted once."""
    return sum({path.device: path.bytes_free() for path in paths}.values())


def check_disk_room(paths: Sequence[StorePath], needed: Mapping[int, int]) -> None:
    """Raise DiskFullError unless each disk has room for what its paths need (index -> bytes)."""
    on_device: Counter[int] = Counter()
    for index, nbytes in needed.items():
        on_device[paths[index].device] += nbytes
    for index in needed:
        path = paths[index]
        if on_device[path.device] > path.bytes_free():
            raise DiskFullError(
                path=path.path,
                needed_bytes=on_device[path.device],
                free_bytes=path.bytes_free(),
            )


def warn_of_memory(paths: Sequence[StorePath]) -> None:
    """Warn, once for all of them, of paths that are not on a disk."""
    names = ", ".join(path.path for path in paths if path.is_memory)
    if names:
        warnings.warn(
            f"tiers.nvme.paths {names}: tmpfs is memory, which this tier does not save; it counts "
            "against the machine's memory, not against tiers.host.memory",
            RuntimeWarning,
            stacklevel=3,
        )


def close_paths(paths: Iterable[StorePath]) -> None:
    """Close every path."""
    for path in paths:
        path.close()


class RunFolder:
    """A locked folder of this process; see [Note: backing files]. Raises OSError."""

    def __init__(self, parent_fd: int) -> None:
        self._parent_fd = parent_fd
        self._pid = os.getpid()
        self._num_files = 0
        for _ in range(_MAX_ATTEMPTS):
            self.name = f"offload-{self._pid}-{secrets.token_hex(8)}"
            os.mkdir(self.name, 0o700, dir_fd=parent_fd)
            try:
                if self._lock():
                    return
            except BaseException:
                _remove_folder(parent_fd, self.name, None)
                raise
        raise OSError(errno_codes.EBUSY, "every new run folder was swept by another process")

    def _lock(self) -> bool:
        """Open and lock the new folder; False = a sweeper was faster."""
        with contextlib.ExitStack() as cleanup:
            try:
                self._fd = os.open(self.name, _FOLDER_FLAGS, dir_fd=self._parent_fd)
                cleanup.callback(os.close, self._fd)
                self._lock_fd = os.open(_LOCK_NAME, _CREATE_FLAGS, 0o600, dir_fd=self._fd)
                cleanup.callback(os.close, self._lock_fd)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(_LOCK_NAME, dir_fd=self._fd, follow_symlinks=False)
            except (FileNotFoundError, BlockingIOError):
                return False
            cleanup.pop_all()
            return True

    def create(self) -> int:
        """Create a file, unlinked at once; return its descriptor."""
        name = f"extents-{self._num_files}"
        self._num_files += 1
        fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=self._fd)
        with contextlib.suppress(OSError):  # where open files cannot be unlinked, close() does it
            os.unlink(name, dir_fd=self._fd)
        return fd

    def anchor(self, fd: int) -> None:
        """Give a file a name here, unless it has one."""
        if not self.is_anchored(fd):
            link(fd, _anchor_name(fd), self._fd)

    def is_anchored(self, fd: int) -> bool:
        """Whether a file has a name here: somebody may have removed it."""
        with contextlib.suppress(OSError):
            there = os.stat(_anchor_name(fd), dir_fd=self._fd, follow_symlinks=False)
            return os.path.samestat(there, os.fstat(fd))
        return False

    def close(self) -> None:
        """Remove the folder; a second call, or one in a forked child, does nothing.

        The lock goes with its last descriptor: LOCK_UN in a child would free it for the parent too.
        """
        if self._fd < 0 or os.getpid() != self._pid:
            return
        _remove_folder(self._parent_fd, self.name, self._fd)
        os.close(self._fd)
        os.close(self._lock_fd)
        self._fd = -1


def _anchor_name(fd: int) -> str:
    return f"extents-{os.fstat(fd).st_ino}"


def sweep(parent_fd: int) -> list[str]:
    """Remove the run folders of processes that are gone; return their names.

    Only folders of this user that carry the name pattern are looked at; foreign files in them stay.
    """
    with os.scandir(parent_fd) as entries:
        names = [entry.name for entry in entries if _RUN_FOLDER_NAME.fullmatch(entry.name)]
    return [name for name in names if _sweep_one(parent_fd, name)]


def _sweep_one(parent_fd: int, name: str) -> bool:
    """Remove one run folder unless its process lives; never raises for what others do to it."""
    with contextlib.ExitStack() as cleanup, contextlib.suppress(OSError):
        folder_fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent_fd)
        cleanup.callback(os.close, folder_fd)
        if os.fstat(folder_fd).st_uid != os.geteuid():
            return False
        try:
            lock_fd = os.open(
                _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd
            )
        except FileNotFoundError:  # killed between mkdir and open, or a creator that will retry
            os.rmdir(name, dir_fd=parent_fd)
            return True
        cleanup.callback(os.close, lock_fd)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_folder(parent_fd, name, folder_fd)
        return True
    return False


def _remove_folder(parent_fd: int, name: str, folder_fd: int | None) -> None:
    """Unlink what run folders contain, the lock last, and the folder if it is empty then.

    If that cannot be seen, all of it stays for the next sweep.
    """
    if folder_fd is not None:
        try:
            with os.scandir(folder_fd) as entries:
                found = [entry.name for entry in entries]
        except OSError:
            return
        names = [name for name in found if _BACKING_FILE_NAME.fullmatch(name)]
        for file_name in (*names, _LOCK_NAME):
            with contextlib.suppress(OSError):
                os.unlink(file_name, dir_fd=folder_fd)
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent_fd)


def _file_system(device: int) -> str:
    """Return the type of the mounted file system with this `st_dev`; "" if it is not listed.

    Source: proc_pid_mountinfo(5).
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == wanted:
                return source.split()[0]
    return ""


def _refusal(error: OSError, operation: str, path: str, nbytes: int | None = None) -> StorageError:
    """Translate what the system said about a path, with what to do about it."""
    code = error.errno or errno_codes.EIO
    remedies = {
        errno_codes.ENOENT: "create the folder, and check that its disk is mounted",
        errno_codes.ENOTDIR: "give a folder in tiers.nvme.paths, not a file",
        errno_codes.ELOOP: "mend the circle of symbolic links",
        errno_codes.EROFS: "mount the file system for writing, or give another path",
        errno_codes.EACCES: f"give user {os.geteuid()} the right to write there",
        errno_codes.EPERM: f"give user {os.geteuid()} the right to write there",
        errno_codes.EFBIG: "raise the limit of file sizes (ulimit -f), or stripe over more paths",
        errno_codes.EMFILE: "raise the limit of open files (ulimit -n)",
        errno_codes.EIO: "look at the disk (dmesg, smartctl), or give another path",
    }
    return StorageError(
        operation=operation,
        path=path,
        nbytes=nbytes,
        errno=code,
        what=_WHAT,
        remedy=remedies.get(code, "give another folder in tiers.nvme.paths"),
    )
