"""How much host memory the engine may hold.

[Note: host budget]
`auto` is HOST_SHARE of what is available now, never of the machine's total. Available is the
least of
- MemAvailable of /proc/meminfo, and
- for each control group that the process is in, and each of its ancestors: limit minus usage,
  where usage leaves out inactive file pages, which the kernel drops before it lets anyone fail.
The rest is left to torch's own allocations (activations), the page cache and other programs.

[Note: host room]
Whether memory runs short while a run goes on is another question: `host_room_bytes` is what can
still be allocated before the kernel has to fail somebody. There no file page counts as used, not
even an active one: a group that reads files is always near its limit, and harmed by nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HOST_SHARE = 0.6
_KIB = 1024


class _Files(NamedTuple):
    """The files of a control group that say what it may use and what it uses.

    `cache` are keys of memory.stat: file pages that the kernel drops at once, and the others.
    """

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, str]


_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that are available now; see [Note: host budget].

    `root` is where `proc` and `sys` are found.
    """
    rooms = [_meminfo_bytes(root, "MemAvailable"), *_cgroup_rooms(root, num_cache_keys=1)]
    return max(0, min(rooms))


def host_room_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that can be allocated before memory runs out; see [Note: host room]."""
    rooms = [_meminfo_bytes(root, "MemAvailable"), *_cgroup_rooms(root, num_cache_keys=2)]
    return max(0, min(rooms))


def free_swap_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of swap space that nobody uses."""
    return _meminfo_bytes(root, "SwapFree", absent=0)


def _meminfo_bytes(root: Path, key: str, *, absent: int | None = None) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * _KIB
    assert absent is not None, f"every Linux since 3.14 reports {key}"
    return absent


def _cgroup_rooms(root: Path, *, num_cache_keys: int) -> Iterator[int]:
    """Yield limit minus usage of every control group that limits this process's memory."""
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = _V2
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            files = _V1
            bases = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        # In a container the path may be the host's, and the mount shows only the group itself.
        relative = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for group in (relative, *relative.parents):
                room = _group_room_bytes(base / group, files, files.cache[:num_cache_keys])
                if room is not None:
                    yield room


def _group_room_bytes(group: Path, files: _Files, cache: tuple[str, ...]) -> int | None:
    """Return the room of one control group; None where it sets no limit."""
    limits = []
    for name in files.limits:
        with contextlib.suppress(OSError):
            text = (group / name).read_text().strip()
            limits += [int(text)] if text != "max" else []
    if not limits:
        return None
    try:
        used_bytes = int((group / files.usage).read_text())
        statistics = (group / "memory.stat").read_text()
    except OSError:
        return None
    for line in statistics.splitlines():
        key, _, value = line.partition(" ")
        if key in cache:
            used_bytes -= int(value)
    return min(limits) - used_bytes
