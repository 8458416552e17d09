"""What the lanes of this machine have shown, kept in the user's cache folder between runs.

[Note: Machine profile]
`offload bench` measures the lanes and writes one small JSON file for each kind of configuration
(precision, optimizer, I/O, paths). It carries a *fingerprint* of all that the speeds depend on. A
profile counts only if it was made by this machine as it is now: one of another machine, of another
version, too old, damaged, or writable by others is passed over with a word that says why. It
changes what is predicted, never what is computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from offload.config import OffloadConfig
from offload.errors import StorageError
from offload.schedule.cost import SHOWN, LaneSpeeds
from offload.tiers.disks import disk_of

_FORMAT = 1
_MOST_AGE_SECONDS = 90 * 86_400
_MOST_BYTES = 1 << 20
_GIB = 1 << 30
SPEEDS = (*SHOWN, "flops")
DISK_OPERATIONS = ("read", "write", "mixed")


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes/s of one path with `depth` blocks of `block_bytes` in flight.

    `operation` is "read", "write" or "mixed": every other block read, the others written.
    """

    path: str
    operation: str
    block_bytes: int
    depth: int
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Measured speeds: bytes/s by lane (`SHOWN`), and `flops` in FLOP/s; disks by block and depth.

    `made_at` is in seconds since the epoch.
    """

    speeds: Mapping[str, float]
    disks: tuple[DiskSpeed, ...] = ()
    made_at: float = 0.0

    def lane_speeds(self) -> LaneSpeeds:
        """The speeds as the cost model takes them; what was not measured is as it has it."""
        return LaneSpeeds(**self.speeds)


class Found(NamedTuple):
    """A profile that counts, or None; and why, in words."""

    profile: MachineProfile | None
    note: str


def profile_path(config: OffloadConfig) -> Path:
    """The file of this configuration's profile; it need not exist.

    Source: XDG Base Directory Specification.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    key = json.dumps(_settings(config), sort_keys=True).encode()
    return base / "offload" / f"machine-{hashlib.sha256(key).hexdigest()[:12]}.json"


def fingerprint(config: OffloadConfig) -> dict[str, Any]:
    """All that the speeds depend on, in plain values."""
    from offload import __version__

    kind = config.tiers.device.kind
    gpu = None
    if kind != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name("cuda" if kind == "auto" else kind)
    return {
        **_settings(config),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB),
        "gpu": gpu,
        "disks": [list(disk_of(path) or ()) for path in map(str, config.tiers.nvme.paths)],
        "torch": torch.__version__,
        "offload": __version__,
    }


def _settings(config: OffloadConfig) -> dict[str, Any]:
    io = config.io.model_dump(mode="json", exclude={"deadline_seconds", "retries"})
    return {
        "paths": [os.path.realpath(path) for path in config.tiers.nvme.paths],
        "device": config.tiers.device.kind,
        "compute": config.precision.compute,
        "optimizer": config.optimizer.name,
        "moments": config.optimizer.moments,
        "io": io,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def find_profile(config: OffloadConfig) -> Found:
    """The profile that `offload bench` has kept for this configuration, if it counts here."""
    try:
        path = profile_path(config)
        entry = _read(path)
    except FileNotFoundError:
        return Found(None, "this machine has not been measured: run `offload bench`")
    except (OSError, RuntimeError, ValueError) as error:
        return Found(None, f"the measurements are not used: {error}; run `offload bench`")
    now, then = fingerprint(config), entry["fingerprint"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if changed:
        return Found(
            None,
            f"the measurements in {path} are not used, because they are of another "
            f"{', '.join(changed)}: run `offload bench`",
        )
    age_seconds = time.time() - entry["made_at"]
    if not 0 <= age_seconds + 1 <= _MOST_AGE_SECONDS:
        return Found(None, f"the measurements in {path} are too old: run `offload bench`")
    disks = tuple(DiskSpeed(**each) for each in entry["disks"])
    return Found(
        MachineProfile(entry["speeds"], disks, entry["made_at"]), f"speeds as measured in {path}"
    )


def _read(path: Path) -> dict[str, Any]:
    """The entry, checked.

    Raises:
        OSError, ValueError: it cannot be read, or trusted; the message says why.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError(f"{path} is no profile")
        if status.st_uid not in {os.geteuid(), 0} or status.st_mode & 0o022:
            raise ValueError(f"{path} can be written by others")
        try:
            entry = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged") from error
    if not _is_valid(entry):
        raise ValueError(f"{path} is damaged")
    return dict(entry)


def _is_valid(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        return False
    speeds, disks = entry.get("speeds"), entry.get("disks")
    if not isinstance(entry.get("fingerprint"), dict) or not _is_positive(entry.get("made_at")):
        return False
    if not isinstance(speeds, dict) or not isinstance(disks, list):
        return False
    return (
        speeds.keys() <= set(SPEEDS)
        and all(map(_is_positive, speeds.values()))
        and all(map(_is_disk_speed, disks))
    )


def _is_disk_speed(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != set(DiskSpeed.__dataclass_fields__):
        return False
    counts = (entry["block_bytes"], entry["depth"])
    return (
        isinstance(entry["path"], str)
        and entry["operation"] in DISK_OPERATIONS
        and all(isinstance(count, int) and count > 0 for count in counts)
        and _is_positive(entry["bytes_per_second"])
    )


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def keep_profile(config: OffloadConfig, profile: MachineProfile) -> Path:
    """Write the profile for later runs, atomically and for this user only; returns its file.

    Raises:
        StorageError: the cache folder cannot be written to; the profile that was there stays.
    """
    entry = {
        "format": _FORMAT,
        "fingerprint": fingerprint(config),
        "made_at": profile.made_at,
        "speeds": dict(profile.speeds),
        "disks": [asdict(each) for each in profile.disks],
    }
    path, temporary = profile_path(config), None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made with mode 0600.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(entry, file, indent=1)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        raise StorageError(
            operation="write",
            path=str(path),
            errno=error.errno or 0,
            what="the machine's profile",
            remedy="set XDG_CACHE_HOME to a folder that can be written to",
        ) from error
    return path
