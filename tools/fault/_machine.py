"""Loop disks, mounts and cgroups for `hostile`: made, and taken away again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
_BLKIO = Path("/sys/fs/cgroup/blkio")


class SkippedError(Exception):
    """This machine or user cannot do it; says why."""


def command(*words: str | Path) -> str:
    """Run a command and return what it prints.

    Raises:
        SkippedError: it does not exist, or refuses.
    """
    name = str(words[0])
    if shutil.which(name) is None:
        raise SkippedError(f"no {name} here")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SkippedError(f"{name}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def require_root() -> None:
    """Raises SkippedError for another user."""
    if os.geteuid() != 0:
        raise SkippedError("needs root")


@contextlib.contextmanager
def mounted(folder: Path, *options: str | Path) -> Iterator[Path]:
    """`mount OPTIONS folder`, and unmount it at the end."""
    require_root()
    folder.mkdir(exist_ok=True)
    command("mount", *options, folder)
    try:
        yield folder
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    """Also while a process that has just ended still has files there."""
    for left in reversed(range(100)):
        done = subprocess.run(["umount", folder], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if left == 0:
            raise RuntimeError(f"{folder} stays mounted: {done.stderr}")
        time.sleep(0.1)


@contextlib.contextmanager
def loop_device(image: Path, nbytes: int, *options: str) -> Iterator[str]:
    """A block device over a new, sparse file; its name."""
    require_root()
    with image.open("wb") as file:
        file.truncate(nbytes)
    device = command("losetup", *options, "--show", "-f", image)
    try:
        yield device
    finally:
        command("losetup", "-d", device)
        image.unlink()


@contextlib.contextmanager
def disk(
    folder: Path, file_system: str, nbytes: int = 64 * MIB, *options: str
) -> Iterator[tuple[Path, str]]:
    """A file system of its own on a loop device made with `options`: its folder, the device."""
    with loop_device(folder.with_suffix(".image"), nbytes, *options) as device:
        command(f"mkfs.{file_system}", "-q", device)
        with mounted(folder, "-t", file_system, device):
            yield folder, device


@contextlib.contextmanager
def throttled(device: str, bytes_per_second: int) -> Iterator[Path]:
    """A cgroup whose members read and write a device so slowly; cgroup v1."""
    require_root()
    if not (_BLKIO / "blkio.throttle.read_bps_device").exists():
        raise SkippedError("no cgroup v1 blkio here")
    group = _BLKIO / f"offload-faults-{os.getpid()}"
    group.mkdir()
    try:
        number = Path(device).stat().st_rdev
        for direction in ("read", "write"):
            rule = f"{os.major(number)}:{os.minor(number)} {bytes_per_second}"
            (group / f"blkio.throttle.{direction}_bps_device").write_text(rule)
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Nothing writes to the file system of `folder` while entered."""
    require_root()
    command("fsfreeze", "-f", folder)
    try:
        yield
    finally:
        command("fsfreeze", "-u", folder)
