"""Lowers the memory limit of a training while it runs: it must shrink, and go on.

A process trains with its state on the host by `auto`, in a memory control group of its own (cgroup
v1). Before some step the limit falls to a little above what is used, less than the next step takes.
The process must not be killed, must say that it has shrunk, and must end with the bits of the run
without a limit. A seed draws when the limit falls, how much it leaves, and the configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fault._squeezed import BREAKS, Job
from fault.result import Row

_GROUPS = Path("/sys/fs/cgroup/memory")
_TRIALS = 20
_PARTLY = "weights and gradients stay"  # what is left of the arena has holes
_MIB = 1 << 20
_CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": {"compute": "bf16"}},
    "step by itself": {"overlap": {"optimizer": False}},
    "threads": {"io": {"backend": "threads"}},
    _PARTLY: {"placement": {"weights": "host", "gradients": "host"}},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `fault.result`."""
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """See `fault.result`."""
    with (
        tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as folder,
        _group() as group,
    ):
        if isinstance(group, str):
            yield Row("limit lowered", skipped=group)
        elif options.teeth:
            for broken in BREAKS:
                yield _trials(Path(folder), group, _PARTLY, random.Random(options.seed), 1, broken)
        else:
            drawn = random.Random(options.seed)
            num_trials = options.trials or _TRIALS
            for place, name in enumerate(_CONFIGS):
                count = len(range(place, num_trials, len(_CONFIGS)))
                if count:
                    yield _trials(Path(folder), group, name, drawn, count)


@contextlib.contextmanager
def _group() -> Iterator[Path | str]:
    """A memory control group, or why there is none."""
    path = _GROUPS / f"offload-faults-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        yield f"no memory control group (cgroup v1) can be made: {error}"
        return
    try:
        yield path
    finally:
        path.rmdir()


def _trials(
    folder: Path,
    group: Path,
    name: str,
    drawn: random.Random,
    num_trials: int,
    broken: str = "",
) -> Row:
    row = Row(f"limit lowered: {name}", broken=broken)
    began = time.perf_counter()
    status, calm = _train(Job(str(folder), config=_CONFIGS[name]))
    if status or calm["num_shrinks"]:
        row.problems.append(f"without a limit: status {status}, {calm}")
        return row
    for _ in range(num_trials):
        at, left = drawn.randrange(2, 4), drawn.randrange(4 * _MIB, 32 * _MIB)
        job = Job(str(folder), str(group), at=at, left=left, broken=broken, config=_CONFIGS[name])
        (group / "memory.limit_in_bytes").write_text("-1")
        status, found = _train(job)
        row.trials += 1
        where = f"{left / _MIB:.1f} MiB left at step {at}"
        if status:
            row.problems.append(f"{where}: the process ended with {status}")
        elif not found["num_shrinks"]:
            row.problems.append(f"{where}: nothing has shrunk")
        elif found["digest"] != calm["digest"]:
            row.undetected += 1
            row.details.append(f"{where}: other bits")
        elif found["budget_bytes"] >= found["held_bytes"]:
            row.problems.append(f"{where}: the budget is still {found['budget_bytes']}")
    row.seconds = time.perf_counter() - began
    return row


def _train(job: Job) -> tuple[int, dict[str, Any]]:
    """Exit status and outcome of a training, which is in the group from its start."""
    procs = f"{job.group}/cgroup.procs" if job.group else "/dev/null"
    program = [sys.executable, str(Path(__file__).with_name("_squeezed.py"))]
    done = subprocess.run(
        ["sh", "-c", 'echo $$ > "$0"; exec "$@"', procs, *program, json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # Freed activations go back to the system at once, so that each step needs them anew.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode not in (0, -signal.SIGKILL) and not job.broken:
        raise RuntimeError(done.stderr)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}
