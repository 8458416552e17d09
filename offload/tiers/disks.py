"""Which disk a path lies on, for messages: who reads them has to look at a device."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-7]{3})")
_NUM_FIELDS = 5  # up to the mount point


class Disk(NamedTuple):
    """A mounted file system: its device or source, where it is mounted, and its type."""

    device: str
    mount_point: str
    file_system: str

    def __str__(self) -> str:
        return f"{self.device} ({self.file_system}, mounted at {self.mount_point})"


@functools.lru_cache(maxsize=256)
def disk_of(path: str, root: Path = Path("/")) -> Disk | None:
    """The disk that `path` lies on; None: the system does not tell. Never raises.

    The answer is kept: a file system that hangs later would not answer any more. `root` is where
    `proc` is found. Source: proc_pid_mountinfo(5).
    """
    found: Disk | None = None
    with contextlib.suppress(OSError):
        real = Path(os.path.realpath(path))
        text = (root / "proc/self/mountinfo").read_text(errors="replace")
        for line in text.splitlines():
            mount, _, source = line.partition(" - ")
            mount_fields, source_fields = mount.split(), source.split()
            if len(mount_fields) < _NUM_FIELDS or len(source_fields) < 2:
                continue
            mount_point = _unescaped(mount_fields[4])
            is_deeper = found is None or len(mount_point) >= len(found.mount_point)
            if is_deeper and real.is_relative_to(mount_point):
                found = Disk(_unescaped(source_fields[1]), mount_point, source_fields[0])
    return found


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
