"""`offload doctor`: can training run here? Each check has a remedy.

A check fails when training cannot run, and warns when it runs with less speed or safety.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from offload.config import OffloadConfig, available_host_bytes, resolve_host_budget
from offload.errors import format_bytes

OK, WARNING, FAILED = "ok", "warning", "failed"
_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
_LOW_MEMLOCK_BYTES = 64 << 20
_LOW_SPACE_BYTES = 1 << 30
_CAP_IPC_LOCK = 1 << 14
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `status` is OK, WARNING or FAILED; `remedy` is empty when OK."""

    name: str
    status: str
    fact: str
    remedy: str = ""


def examine(config: OffloadConfig, paths: Sequence[str] = ()) -> list[Check]:
    """Return what was found for `config`, its NVMe paths and the further `paths`."""
    checks = [_platform(), _python(), _torch(), _device(config), *_native(config), _memlock()]
    checks += _host_budget(config)
    for path in (*config.tiers.nvme.paths, *map(Path, paths)):
        checks += _directory(path)
    return checks


def render(checks: Sequence[Check]) -> None:
    """Print a line for each check, and its remedy on the next."""
    colours = {OK: "green", WARNING: "yellow", FAILED: "red"}
    for check in checks:
        status = click.style(f"{check.status:8}", fg=colours[check.status])
        click.echo(f"{status} {check.name}: {check.fact}")
        if check.remedy:
            click.echo(f"         remedy: {check.remedy}")


def _platform() -> Check:
    fact = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return Check("platform", FAILED, fact, "use a 64-bit Linux")
    return Check("platform", OK, fact)


def _python() -> Check:
    fact = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        return Check("python", FAILED, fact, "install Python 3.11 or later")
    return Check("python", OK, fact)


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", FAILED, f"cannot be imported: {error}", "pip install 'torch>=2.11'")
    version = str(torch.__version__)
    numbers = version.split("+", maxsplit=1)[0].split(".")[:2]
    if tuple(map(int, numbers)) < _OLDEST_TORCH:
        return Check("torch", FAILED, f"version {version}", "pip install 'torch>=2.11'")
    return Check("torch", OK, f"version {version}, {torch.get_num_threads()} threads")


def _device(config: OffloadConfig) -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("device", FAILED, "unknown without torch", "see torch above")
    kind, count = config.tiers.device.kind, torch.cuda.device_count()
    wanted = int(kind.partition(":")[2] or 0) if kind.startswith("cuda") else None
    if wanted is not None and wanted >= count:
        return Check(
            "device",
            FAILED,
            f"tiers.device.kind is {kind}, torch sees {count} CUDA devices",
            "set tiers.device.kind to auto or cpu, or install a torch with CUDA and its driver",
        )
    if count and kind != "cpu":
        properties = torch.cuda.get_device_properties(wanted or 0)
        fact = f"{properties.name}, {format_bytes(properties.total_memory)}"
        return Check("device", OK, fact)
    return Check("device", OK, f"cpu, {os.cpu_count()} cores; host memory serves as device memory")


def _native(config: OffloadConfig) -> Iterator[Check]:
    from offload.native import LIBRARY_AVAILABLE, IoEngine

    if LIBRARY_AVAILABLE:
        yield Check("native library", OK, "loaded")
    else:
        yield Check(
            "native library",
            WARNING,
            "absent: disk I/O runs in Python and costs more processor time",
            "install g++ and then offload again",
        )
    reasons = IoEngine.probe()
    wanted = config.io.backend
    chosen = wanted if wanted != "auto" else next(n for n, r in reasons.items() if r == "ok")
    for name, reason in reasons.items():
        if reason == "ok":
            yield Check(f"io {name}", OK, "works" + (", is used" if name == chosen else ""))
        elif name == chosen:
            remedy = "set io.backend to auto"
            yield Check(f"io {name}", FAILED, f"io.backend asks for it, but: {reason}", remedy)
        else:
            yield Check(f"io {name}", OK, f"not here: {reason}")


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or _has_ipc_lock():
        return Check("memlock", OK, "not limited")
    fact = f"limited to {format_bytes(soft)}"
    if soft < _LOW_MEMLOCK_BYTES:
        return Check(
            "memlock",
            WARNING,
            f"{fact}: host memory cannot be registered with io_uring or page-locked for a GPU",
            "raise it: ulimit -l unlimited, or memlock in /etc/security/limits.conf",
        )
    return Check("memlock", OK, fact)


def _has_ipc_lock() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_IPC_LOCK)
    return False


def _host_budget(config: OffloadConfig) -> Iterator[Check]:
    available_bytes, budget_bytes = available_host_bytes(), resolve_host_budget(config)
    fact = f"{format_bytes(budget_bytes)} of {format_bytes(available_bytes)} available"
    if budget_bytes > available_bytes:
        remedy = "lower tiers.host.memory, set it to auto, or free memory"
        yield Check("host budget", FAILED, fact, remedy)
        return
    yield Check("host budget", OK, fact)
    device_bytes = config.tiers.device.memory
    on_host = config.tiers.device.kind == "cpu"
    if on_host and device_bytes != "auto" and budget_bytes + device_bytes > available_bytes:
        yield Check(
            "host and device budget",
            FAILED,
            f"together {format_bytes(budget_bytes + device_bytes)}, both in host memory",
            "lower tiers.device.memory or tiers.host.memory",
        )


def _directory(path: Path) -> Iterator[Check]:
    name = f"path {path}"
    if not path.is_dir():
        yield Check(name, FAILED, "is no directory", f"mkdir -p {path}")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        yield Check(name, FAILED, "is not writable", "change its owner or mode, or choose another")
        return
    kind = _file_system(path)
    free_bytes = shutil.disk_usage(path).free
    fact = f"{kind}, {format_bytes(free_bytes)} free"
    if kind in _MEMORY_FILE_SYSTEMS:
        yield Check(name, WARNING, f"{fact}: this is memory, not disk", "name a folder on a disk")
    elif free_bytes < _LOW_SPACE_BYTES:
        yield Check(name, WARNING, fact, "free space there, or name another folder")
    else:
        yield Check(name, OK, fact)
    yield _direct(path)


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


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, from the longest mount point."""
    resolved, best, kind = str(path.resolve()), "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, mounted_kind, *_ = line.split()
        point = mount.replace(r"\040", " ").rstrip("/")
        if len(point) >= len(best) and f"{resolved}/".startswith(f"{point}/"):
            best, kind = point, mounted_kind
    return kind
