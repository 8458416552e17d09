"""An ext4 file system in a file, whose power can be cut.

A cut is EXT4_IOC_SHUTDOWN: from then on nothing reaches the file system, and what its journal does
not hold is gone at the next mount. Of dirty pages none survives; of the journal, what `fsync` has
committed, or with `JOURNAL_FLUSHED` also what was about to be.
Source: fs/ext4/ioctl.c (EXT4_GOING_FLAGS_*), xfstests' generic/388.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import Self

JOURNAL_FLUSHED, JOURNAL_LOST = 1, 2
_EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
# Without what ext4 does for programs that forget to sync: it writes the data of a file that is
# renamed over another, and commits its journal every five seconds.
STRICT = "noauto_da_alloc,commit=300"
_BUSY_SECONDS = 30.0


class LoopDisk:
    """`nbytes` of ext4 in `image`, mounted at `folder`; a context manager.

    Raises:
        SystemExit: it cannot be mounted here; it says why.
    """

    def __init__(self, image: Path, folder: Path, nbytes: int) -> None:
        self.image, self.folder = image, folder
        if os.geteuid() != 0:
            raise SystemExit("error: cutting power needs root: it mounts a file system of its own")
        with image.open("wb") as file:
            file.truncate(nbytes)
        _run("mkfs.ext4", "-q", "-F", str(image))
        folder.mkdir()

    def __enter__(self) -> Self:
        self.mount("rw")
        return self

    def __exit__(self, *error: object) -> None:
        if os.path.ismount(self.folder):
            self.unmount()

    def mount(self, options: str) -> None:
        """Mount it with some of ext4's options."""
        _run("mount", "-t", "ext4", "-o", f"loop,{options}", str(self.image), str(self.folder))

    def unmount(self) -> None:
        """Unmount it, waiting for the descriptors of a process that has been killed."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while subprocess.run(["umount", self.folder], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                _run("umount", str(self.folder))
            time.sleep(0.01)

    def cut(self, flag: int) -> None:
        """Cut the power; what is open gives errors."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(descriptor)

    def used_bytes(self) -> int:
        """Bytes that are allocated."""
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def check(self) -> str:
        """What e2fsck finds wrong with the unmounted file system; "" is nothing."""
        command = ["e2fsck", "-f", "-n", str(self.image)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode else ""


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(f"error: cutting power needs {command[0]}") from error
    if done.returncode:
        said = done.stderr.strip()
        raise SystemExit(f"error: cannot cut power here: {' '.join(command)} says: {said}")
