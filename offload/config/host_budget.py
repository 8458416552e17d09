"""How much host memory the engine may hold.

[Note: host budget]
`auto` is HOST_SHARE of what is available now, never of the machine's total. Available is the
least of
- MemAvailable of /proc/meminfo, and
- for each control group that the process is in, and each of its ancestors: limit minus usage,
  where usage leaves out inactive file pages, which the kernel drops before it lets anyone fail.
The rest is left to torch's own allocations (activations), the page cache and other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

HOST_SHARE = 0.6
_KIB = 1024


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that are available now; see [Note: host budget].

    `root` is where `proc` and `sys` are found.
    """
    rooms = [_mem_available_bytes(root), *_cgroup_room_bytes(root)]
    return max(0, min(rooms))


def _mem_available_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * _KIB
    raise AssertionError("every Linux since 3.14 reports MemAvailable")


def _cgroup_room_bytes(root: Path) -> Iterator[int]:
    """Yield limit minus usage of every control group that limits this process's memory."""
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            bases = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        # In a container the path may be the host's, and the mount shows only the group itself.
        relative = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for group in (relative, *relative.parents):
                room = _group_room_bytes(base / group, *names)
                if room is not None:
                    yield room


def _group_room_bytes(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    """Return the room of one control group; None where it sets no limit."""
    try:
        limit_text = (group / limit).read_text().strip()
        used_bytes = int((group / usage).read_text())
        statistics = (group / "memory.stat").read_text()
    except OSError:
        return None
    if limit_text == "max":
        return None
    for line in statistics.splitlines():
        key, _, value = line.partition(" ")
        if key == inactive:
            used_bytes -= int(value)
    return int(limit_text) - used_bytes
