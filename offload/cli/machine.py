"""What a run was made on: for its report, which may be read elsewhere."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from offload import __version__
from offload.errors import format_bytes
from offload.state.session import OffloadEngine

_CPU_TABLE = Path("/proc/cpuinfo")


def machine_of(engine: OffloadEngine) -> dict[str, str]:
    """The machine in words, by what of it: processor, memory, device, disks' paths, versions."""
    device = next(engine.module.parameters()).device
    is_cuda = device.type == "cuda"
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores for this process",
        "memory": format_bytes(psutil.virtual_memory().total),
        "device": torch.cuda.get_device_name(device) if is_cuda else "none: host memory",
        "nvme": ", ".join(map(str, engine.config.tiers.nvme.paths)) or "none",
        "system": f"{platform.system()} {platform.release()}",
        "versions": f"offload {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }


def _processor() -> str:
    try:
        lines = _CPU_TABLE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
