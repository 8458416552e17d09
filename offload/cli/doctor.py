"""`offload doctor`: can training run here? Each check has a remedy.

A check fails when training cannot run, and warns when it runs with less speed or safety.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from offload.cli.check import FAILED, OK, WARNING, Check
from offload.cli.doctor_disk import examine_folder
from offload.cli.doctor_machine import examine_machine
from offload.config import OffloadConfig, available_host_bytes, resolve_host_budget
from offload.errors import OffloadError, format_bytes

_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
_LOW_MEMLOCK_BYTES = 64 << 20
_CAP_IPC_LOCK = 1 << 14


def examine(config: OffloadConfig, paths: Sequence[str] = ()) -> list[Check]:
    """Return what was found for `config`, its NVMe paths and the further `paths`."""
    checks = [_platform(), _python(), _torch(), _device(config), *_native(config), _memlock()]
    checks += examine_machine(config)
    checks += _host_budget(config)
    for path in (*config.tiers.nvme.paths, *map(Path, paths)):
        checks += examine_folder(path)
    has_torch = all(check.status != FAILED for check in checks if check.name == "torch")
    if config.run is not None and has_torch:
        checks.append(_plan(config))
    return checks


def render(checks: Sequence[Check]) -> None:
    """Print a line for each check, and its remedy on the next."""
    colours = {OK: "green", WARNING: "yellow", FAILED: "red"}
    for check in checks:
        status = click.style(f"{check.status:8}", fg=colours[check.status])
        click.echo(f"{status} {check.name}: {check.fact}")
        if check.remedy:
            click.echo(f"         remedy: {check.remedy}")


def render_json(checks: Sequence[Check]) -> None:
    """Print one JSON object: whether training can run, and each check."""
    can_run = all(check.status != FAILED for check in checks)
    click.echo(json.dumps({"can_run": can_run, "checks": [asdict(c) for c in checks]}, indent=2))


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


def _plan(config: OffloadConfig) -> Check:
    """Whether the state of the config's model has room."""
    from offload.cli.trainable import model_to_plan
    from offload.engine.planning import plan

    try:
        made = plan(model_to_plan(config), config)
    except OffloadError as error:
        return Check("plan", FAILED, str(error), "mend that, then see `offload plan`")
    if not made.fits:
        return Check("plan", FAILED, f"the state does not fit\n{made}", "see the table")
    return Check("plan", OK, "weights, gradients and optimizer state fit")
