"""What `offload doctor` looks at in a folder: its file system, room, O_DIRECT and speed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from offload.cli.check import FAILED, OK, WARNING, Check
from offload.errors import format_bytes

_LOW_SPACE_BYTES = 1 << 30
_MEASURED_BYTES = 32 << 20
_MEASURED_SECONDS = 1.0  # of a disk so slow that it does not write that much
_PIECE_BYTES = 4 << 20
_SLOW_BYTES_PER_SECOND = 300e6  # of a SATA SSD: about 500; of a hard disk 100 to 250
MOUNTS = Path("/proc/self/mounts")
IN_MEMORY = {"tmpfs", "ramfs"}
_FOREIGN = {"9p", "drvfs", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "vboxsf", "fuse.sshfs"}


def examine_folder(path: Path) -> Iterator[Check]:
    """What was found in a folder for the nvme tier."""
    name = f"path {path}"
    if not path.is_dir():
        yield Check(name, FAILED, "is no directory", f"mkdir -p {path}")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        yield Check(name, FAILED, "is not writable", "change its owner or mode, or choose another")
        return
    kind = file_system(path)
    free_bytes = shutil.disk_usage(path).free
    fact = f"{kind}, {format_bytes(free_bytes)} free"
    if kind in IN_MEMORY:
        yield Check(name, WARNING, f"{fact}: this is memory, not disk", "name a folder on a disk")
    elif kind in _FOREIGN:
        remedy = "name a folder on a local disk (under WSL: not below /mnt)"
        yield Check(name, WARNING, f"{fact}: not a local disk of this system", remedy)
    elif kind == "overlay":
        remedy = "mount a folder of a disk into the container, and name that"
        yield Check(name, WARNING, f"{fact}: a container's own layer", remedy)
    elif free_bytes < _LOW_SPACE_BYTES:
        yield Check(name, WARNING, fact, "free space there, or name another folder")
    else:
        yield Check(name, OK, fact)
    yield _direct(path)
    if kind not in IN_MEMORY and free_bytes > 2 * _MEASURED_BYTES:
        yield _speed(path)


def _direct(path: Path) -> Check:
    name = f"O_DIRECT {path}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return _direct_of_named_file(path, name)
        return _no_direct(name, error)
    return Check(name, OK, "works")


def _direct_of_named_file(path: Path, name: str) -> Check:
    target = path / f".offload-doctor-{os.getpid()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        os.close(os.open(target, flags | os.O_DIRECT, 0o600))
    except OSError as error:
        return _no_direct(name, error)
    finally:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
    return Check(name, OK, "works, with files that have a name until the run ends")


def _no_direct(name: str, error: OSError) -> Check:
    return Check(
        name,
        WARNING,
        f"not possible ({error.strerror}): I/O goes through the page cache, 2 to 8 times slower",
        "name a folder on ext4 or xfs",
    )


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, from the longest mount point."""
    resolved, best, kind = str(path.resolve()), "", "unknown"
    for line in MOUNTS.read_text(encoding="utf-8").splitlines():
        _, mount, mounted_kind, *_ = line.split()
        point = mount.replace(r"\040", " ").rstrip("/")
        if len(point) >= len(best) and f"{resolved}/".startswith(f"{point}/"):
            best, kind = point, mounted_kind
    return kind


def _speed(path: Path) -> Check:
    """A short measure of sequential writes, past the page cache where that is possible."""
    name = f"speed {path}"
    try:
        written_bytes, seconds = _written(path)
    except OSError as error:
        return Check(name, WARNING, f"cannot be measured: {error.strerror}", "see the path above")
    speed = written_bytes / seconds
    fact = f"writes {speed / 1e9:.2f} GB/s ({format_bytes(written_bytes)}, a first look)"
    if speed < _SLOW_BYTES_PER_SECOND:
        remedy = "name a folder on an NVMe disk; `offload bench` measures it properly"
        return Check(name, WARNING, f"{fact}: steps will wait for it", remedy)
    return Check(name, OK, fact)


def _written(path: Path) -> tuple[int, float]:
    """Bytes that were written to a file without a name, and the seconds until they were safe."""
    target = path / f".offload-doctor-speed-{os.getpid()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        file = os.open(target, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        target.unlink(missing_ok=True)  # some file systems create it, and refuse O_DIRECT then
        file = os.open(target, flags, 0o600)
    try:
        target.unlink()
        written = 0
        with mmap.mmap(-1, _PIECE_BYTES) as piece:
            piece.write(os.urandom(_PIECE_BYTES))  # some disks compress
            started = time.perf_counter()
            while written < _MEASURED_BYTES and time.perf_counter() - started < _MEASURED_SECONDS:
                written += os.write(file, piece)
            os.fsync(file)
        return written, time.perf_counter() - started
    finally:
        os.close(file)
