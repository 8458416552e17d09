"""What `offload doctor` looks at in the machine itself: kernel, limits, memory, processors, GPU.

[Note: stand-ins]
Everything is read below `PROC`, `SYS`, `DEV`, or from one function of the standard library or of
torch, so that each trouble can be made in a test.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from offload.cli.check import FAILED, OK, WARNING, Check
from offload.config import OffloadConfig
from offload.errors import format_bytes

PROC, SYS, DEV = Path("/proc"), Path("/sys"), Path("/dev")
_IO_URING_KERNEL = (5, 6)  # the first with all operations that the engine uses
_LOW_NOFILE = 1024
_HUGE_PAGES = "kernel/mm/transparent_hugepage/enabled"
# These drivers choose the frequency themselves; their powersave is no lowest one.
_ADAPTIVE_DRIVERS = {"intel_pstate", "amd-pstate-epp", "amd_pstate_epp"}


def examine_machine(config: OffloadConfig) -> list[Check]:
    """What was found; without a finding where the system does not say."""
    checks = [*_kernel(), *_wsl(), *_open_files(), *_huge_pages(), *_numa(), *_governor()]
    return [*checks, *_gpu(config), *_cgroup(config)]


def _kernel() -> Iterator[Check]:
    release = _text(PROC / "sys/kernel/osrelease")
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        return
    if (int(numbers[1]), int(numbers[2])) < _IO_URING_KERNEL:
        remedy = "use Linux 5.6 or later; until then kernel AIO or threads are used"
        yield Check("kernel", WARNING, f"{release}: too old for io_uring", remedy)
    else:
        yield Check("kernel", OK, release)


def _wsl() -> Iterator[Check]:
    if "microsoft" in _text(PROC / "sys/kernel/osrelease").lower():
        yield Check(
            "wsl",
            WARNING,
            "a Linux inside Windows: its memory is a share of the machine's, page-locked memory is "
            "limited, and /mnt/c is slow",
            "raise memory in .wslconfig, and name nvme paths on the Linux disk, not below /mnt",
        )


def _open_files() -> Iterator[Check]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LOW_NOFILE:
        remedy = "raise it: ulimit -n 4096, or nofile in /etc/security/limits.conf"
        yield Check("open files", WARNING, f"limited to {soft}", remedy)
    else:
        yield Check("open files", OK, f"limited to {soft}")


def _huge_pages() -> Iterator[Check]:
    found = re.search(r"\[(\w+)\]", _text(SYS / _HUGE_PAGES))
    if found is None:
        return
    if found[1] == "never":
        remedy = f"echo madvise | sudo tee /sys/{_HUGE_PAGES}"
        fact = "transparent huge pages are off: large host memory is slower to walk through"
        yield Check("huge pages", WARNING, fact, remedy)
    else:
        yield Check("huge pages", OK, found[1])


def _numa() -> Iterator[Check]:
    nodes = {
        path.name: _cpus(_text(path / "cpulist"))
        for path in (SYS / "devices/system/node").glob("node[0-9]*")
    }
    nodes = {name: cpus for name, cpus in nodes.items() if cpus}
    if len(nodes) < 2:
        return
    used = sorted(name for name, cpus in nodes.items() if cpus & os.sched_getaffinity(0))
    if len(used) > 1:
        yield Check(
            "numa",
            WARNING,
            f"the process may run on {len(used)} of {len(nodes)} memory nodes: what it copies may "
            "be remote memory",
            "numactl --cpunodebind=0 --membind=0 offload train ..., with the node of GPU and disk",
        )
    else:
        yield Check("numa", OK, f"bound to {used[0]} of {len(nodes)} nodes")


def _cpus(text: str) -> set[int]:
    """The numbers of a list as 0-3,8."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _governor() -> Iterator[Check]:
    folder = SYS / "devices/system/cpu/cpu0/cpufreq"
    governor, driver = _text(folder / "scaling_governor"), _text(folder / "scaling_driver")
    if not governor:
        return
    if governor == "powersave" and driver not in _ADAPTIVE_DRIVERS:
        remedy = "sudo cpupower frequency-set -g performance"
        fact = "powersave: processors stay at their lowest frequency"
        yield Check("cpu frequency", WARNING, fact, remedy)
    else:
        yield Check("cpu frequency", OK, f"{governor} ({driver})" if driver else governor)


def _gpu(config: OffloadConfig) -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError):
        return
    if torch.cuda.is_available():
        yield Check(
            "pinned memory",
            OK,
            "the host arena is page-locked in exact sizes; what torch pins itself, e.g. "
            "DataLoader(pin_memory=True), is rounded up to powers of two",
        )
        return
    is_there = (DEV / "nvidia0").exists() or (PROC / "driver/nvidia/version").exists()
    if is_there and config.tiers.device.kind != "cpu":
        build = "has no CUDA" if torch.version.cuda is None else "cannot use it (driver?)"
        yield Check(
            "gpu",
            WARNING,
            f"there is an NVIDIA GPU, and torch {torch.__version__} {build}",
            "install a torch with CUDA that the driver is new enough for (nvidia-smi), see "
            "https://pytorch.org/get-started/locally",
        )


def _cgroup(config: OffloadConfig) -> Iterator[Check]:
    limits = [
        int(text)
        for name in ("memory.max", "memory/memory.limit_in_bytes")
        if (text := _text(SYS / "fs/cgroup" / name)).isdecimal()
    ]
    limit = min(limits, default=None)
    budget = config.tiers.host.memory
    if limit is None or limit >= 1 << 60:  # version 1 writes a huge number for none
        return
    if budget != "auto" and budget > limit:
        yield Check(
            "cgroup memory",
            FAILED,
            f"limited to {format_bytes(limit)}, tiers.host.memory is {format_bytes(budget)}",
            "raise the container's memory limit, or set tiers.host.memory to auto",
        )
    else:
        yield Check("cgroup memory", OK, f"limited to {format_bytes(limit)}")


def _text(path: Path) -> str:
    """What the system says there; empty if nothing."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
