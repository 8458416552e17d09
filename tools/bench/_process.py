"""What the benchmarks share about processes: memory and disk traffic of one, fresh ones, limits.

Standard library only: a side may run in an environment without this project.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, e.g. VmHWM or VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Let VmHWM start again from what is in use now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process has read from disks and written to them; caches are not counted."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def timed_steps(batches: Iterable[Any], step: Callable[[Any], float]) -> dict[str, list[Any]]:
    """Seconds, loss, and bytes read and written by this process, of a step on each batch."""
    found: dict[str, list[Any]] = {"seconds": [], "losses": [], "moved": []}
    for batch in batches:
        before, started = disk_bytes(), time.perf_counter()
        found["losses"].append(step(batch))
        found["seconds"].append(time.perf_counter() - started)
        found["moved"].append(
            [now - early for now, early in zip(disk_bytes(), before, strict=True)]
        )
    return found


def arguments_of(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The options `names` as they stand, as arguments of a command line."""
    return [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]


def in_fresh_process(
    script: str,
    side: str,
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    cgroup: Path | None = None,
) -> dict[str, Any]:
    """Run `script --run side` in a process of its own; what it prints last is its result.

    The process is in `cgroup` from before Python starts.

    Raises:
        SystemExit: it failed; what it wrote to stderr is shown.
    """
    command = [python, script, "--run", side, *arguments]
    if cgroup is not None:
        enter = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    done = subprocess.run(
        command,
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        killed = done.returncode == -signal.SIGKILL
        why = "was killed, as the memory limit does" if killed else "failed"
        sys.exit(f"{tail}\nerror: {Path(script).name} --run {side} {why} ({done.returncode})")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@dataclass(frozen=True)
class MemoryLimit:
    """A memory cgroup, of version 1 or 2."""

    folder: Path
    peak_file: str

    @property
    def peak_bytes(self) -> int:
        """The most that its processes have held, page cache included."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryLimit]:
    """A memory cgroup of `nbytes`, without swap where the kernel counts it.

    Raises:
        OSError: none can be made here.
    """
    unified = (CGROUPS / "cgroup.controllers").exists()
    parent = CGROUPS if unified else CGROUPS / "memory"
    if unified:
        (parent / "cgroup.subtree_control").write_text("+memory")
    folder = parent / f"offload-bench-{os.getpid()}-{nbytes}"
    folder.mkdir()
    try:
        if unified:
            (folder / "memory.max").write_text(str(nbytes))
            swap, peak = "memory.swap.max", "memory.peak"
        else:
            (folder / "memory.limit_in_bytes").write_text(str(nbytes))
            swap, peak = "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes"
        if (folder / swap).exists():
            (folder / swap).write_text("0" if unified else str(nbytes))
        yield MemoryLimit(folder, peak)
    finally:
        folder.rmdir()


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number that is not below `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


def folder(text: str) -> str:
    """The type of an option: a folder that exists and can be written to."""
    if not Path(text).is_dir() or not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder that can be written to")
    return text


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in markdown; the first column is text, the others are numbers."""
    print("| " + " | ".join(headings) + " |")
    print("|---" + "|---:" * (len(headings) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
