"""The system calls that Python code makes on some folders: counted, and one of them failed or hung.

[Note: os layer] While an `OsLayer` is active, the functions of `os` and `fcntl` that touch files
are wrapped. A call counts when one of its paths or descriptors lies in a watched folder. Python
itself repeats a call after EINTR (PEP 475), below this layer: that is tested through strace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

from offload.native import DiskCalls

READS = ("pread", "preadv", "read")
WRITES = ("pwrite", "pwritev", "write")
TRANSFERS = (*READS, *WRITES)
SYNCS = ("fsync", "fdatasync")
# What a save must not survive without an error: without it something is missing on the disk.
VITAL = (*WRITES, *SYNCS, "posix_fallocate", "copy_file_range", "rename", "replace", "link")
_CALLS = (
    *(*TRANSFERS, *SYNCS, "posix_fallocate", "ftruncate", "copy_file_range"),
    *("open", "mkdir", "rmdir", "unlink", "rename", "replace", "link", "scandir"),
    *("stat", "lstat", "fstat", "statvfs", "fstatvfs"),
)
_LOCKS = ("flock", "ioctl")  # of fcntl
_HANG_SECONDS = 10.0  # nobody waits so long
_FREED_SECONDS = 0.1
_NEVER_HANG = ("fstat", "fstatvfs", "flock")  # they ask the kernel, not the disk
_TWO_NAMES = ("rename", "replace", "link", "copy_file_range")


@dataclass(frozen=True)
class Call:
    """One call that counted: its name, and the path it is about."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@dataclass(frozen=True)
class Fault:
    """What happens to a call: an error in its place or after it, half or none of its bytes.

    Or it hangs until it is freed.
    """

    name: str
    errno: int = 0
    late: bool = False  # the call is made, and its answer is the error
    half: bool = False
    zero: bool = False
    hangs: bool = False

    def concerns(self, call: Call) -> bool:
        """Whether it can happen to this call at all."""
        if self.hangs:
            is_config = call.name == "stat" and call.path.endswith("/nvme")  # looks at its paths
            return call.name not in _NEVER_HANG and not is_config
        if self.half or self.zero:
            return call.name in TRANSFERS
        if self.late:
            return call.name in (*VITAL, "mkdir", "unlink")
        return True


class OsLayer:
    """See [Note: os layer]. A context manager; only one is active at a time.

    Attributes:
        calls: every call that counted.
        roots: the watched folders, without symbolic links.
        hit: the call that the fault happened to.
        repeated: files whose fsync was tried again after it had failed, without a new write.
        waits: calls that hung, and for which somebody waited for very long.
    """

    def __init__(self, folders: Sequence[Path], *, fault: Fault | None = None, nth: int = 0):
        self.calls: list[Call] = []
        self.hit: Call | None = None
        self.repeated: list[str] = []
        self.waits: list[str] = []
        self._freed = threading.Event()
        self.roots = tuple(os.path.realpath(folder) for folder in folders)
        self._fault = fault
        self._nth = nth
        self._lock = threading.Lock()
        self._pauses = threading.local()
        self._originals: list[tuple[Any, str, Any]] = []
        self._unsynced: set[tuple[int, int]] = set()  # (device, inode): their fsync has failed

    def __enter__(self) -> Self:
        for module, names in ((os, _CALLS), (fcntl, _LOCKS)):
            for name in names:
                original = getattr(module, name)
                self._originals.append((module, name, original))
                setattr(module, name, self._wrapped(name, original))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    def free(self) -> None:
        """Let the call that hangs go on, and its thread come to an end with it."""
        self._freed.set()
        time.sleep(_FREED_SECONDS)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Neither count nor disturb what this thread does meanwhile."""
        self._pauses.on = True
        try:
            with calls_in_place():
                yield
        finally:
            self._pauses.on = False

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            paused = getattr(self._pauses, "on", False) or _is_rmtree(name)
            path = None if paused else self._watched(name, args, options)
            if path is None:
                return original(*args, **options)
            fault = self._count(Call(name, path))
            if name in SYNCS:
                return self._sync(path, original, args[0], fault)
            if name in WRITES:
                self._unsynced.discard(self._identity(args[0]))
            return original(*args, **options) if fault is None else act(fault, path, args, options)

        def act(fault: Fault, path: str, args: Any, options: Any) -> Any:
            if fault.hangs:
                self._hang(name, path)
                return original(*args, **options)
            if fault.zero:
                return b"" if name in ("pread", "read") else 0
            if fault.half:
                return original(*_halved(name, args), **options)
            if fault.late:
                original(*args, **options)
            raise OSError(fault.errno, os.strerror(fault.errno), path)

        return call

    def _sync(
        self, path: str, original: Callable[..., Any], descriptor: int, fault: Fault | None
    ) -> None:
        identity = self._identity(descriptor)
        # A folder may get new names, which are new data; and the number of a file that is gone.
        is_file = stat.S_ISREG(self._original("fstat")(descriptor).st_mode)
        if is_file and identity in self._unsynced:
            self.repeated.append(path)
        if fault is not None and fault.hangs:
            self._hang("fsync", path)
        if fault is None or fault.late or fault.hangs:
            original(descriptor)
        if fault is not None and not fault.hangs:
            if is_file:
                self._unsynced.add(identity)
            raise OSError(fault.errno, os.strerror(fault.errno), path)

    def _hang(self, name: str, path: str) -> None:
        if not self._freed.wait(_HANG_SECONDS):
            self.waits.append(f"{name} {path}")

    def _count(self, call: Call) -> Fault | None:
        with self._lock:
            self.calls.append(call)
            if self._fault is None or len(self.calls) != self._nth:
                return None
            if not self._fault.concerns(call):
                return None
            self.hit = call
            return self._fault

    def _identity(self, descriptor: int) -> tuple[int, int]:
        status = self._original("fstat")(descriptor)
        return status.st_dev, status.st_ino

    def _original(self, name: str) -> Any:
        return next(made for _, each, made in self._originals if each == name)

    def _watched(self, name: str, args: Sequence[Any], options: dict[str, Any]) -> str | None:
        """The first watched path among the arguments, or None."""
        folder = options.get("dir_fd")
        for argument in args[: 2 if name in _TWO_NAMES else 1]:
            path = _path_of(argument, folder)
            if any(path == root or path.startswith(root + "/") for root in self.roots):
                return path
        return None


def calls_in_place() -> contextlib.AbstractContextManager[object]:
    """While entered, disk calls are made in the thread that asks for them."""
    return mock.patch.object(DiskCalls, "_offer", lambda _, call: call.run())


def _path_of(argument: Any, folder: int | None) -> str:
    """The path of a descriptor or a name; "" where it has none."""
    if not isinstance(argument, int):
        path = os.fspath(argument) if isinstance(argument, str | os.PathLike) else ""
        if not path.startswith("/proc/self/fd/"):
            if folder is not None and folder >= 0:
                path = f"{_path_of(folder, None)}/{path}"
            return os.path.normpath(Path.cwd() / path)
        argument = int(path.rpartition("/")[2])
    try:
        return str(Path(f"/proc/self/fd/{argument}").readlink())
    except OSError:
        return ""


def _is_rmtree(name: str) -> bool:
    """Whether shutil.rmtree looks at a file; it leaves a descriptor open if that fails."""
    return name == "fstat" and sys._getframe(2).f_globals.get("__name__") == "shutil"


def _halved(name: str, args: Sequence[Any]) -> list[Any]:
    """The arguments of a transfer, for half of its bytes: at least one."""
    first, buffer, *rest = args
    if name in ("preadv", "pwritev"):
        view = memoryview(buffer[0]).cast("B")
        return [first, [view[: max(1, len(view) // 2)]], *rest]
    if name in ("pread", "read"):
        return [first, max(1, buffer // 2), *rest]
    view = memoryview(buffer).cast("B")
    return [first, view[: max(1, len(view) // 2)], *rest]
