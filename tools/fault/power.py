"""Power cuts at random moments, while it trains and saves, on an ext4 file system of its own.

The same process as in `kill`, but state on NVMe and checkpoints are on a loop-mounted ext4 which
is shut down under it, its journal flushed in every second cut and lost in the others, with data
ordered or not. Then it is unmounted and mounted again, and the next process resumes. Needs root.

What must hold is what must hold after `kill`; and at the end the file system is whole and every
byte of it is given back.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault import _broken, _job
from fault._chain import Chains
from fault._job import Life, Uninterrupted
from fault._loop import JOURNAL_FLUSHED, JOURNAL_LOST, STRICT, LoopDisk
from fault.result import Row

TRIALS = 200
SCENARIOS = tuple(dataclasses.replace(s, name=f"cut, {s.name}") for s in _job.SCENARIOS)
BREAKS = {
    _broken.nothing_is_synced: SCENARIOS[0],
    _broken.data_is_not_synced: SCENARIOS[0],
    _broken.manifest_is_not_synced: SCENARIOS[0],
    _broken.folders_are_not_synced: SCENARIOS[0],
    _broken.acknowledged_too_early: SCENARIOS[0],
}
TEETH_TRIALS = 40
_DISK_BYTES = 192 << 20
_MOUNT_OPTIONS = (f"{STRICT},data=ordered", f"{STRICT},data=writeback")
_SLACK_BYTES = 1 << 20  # folders do not shrink
_LINGER_SECONDS = 0.02  # of a process without a disk: it must not acknowledge anything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the file with the file system is."""
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Cut the power of one disk under each scenario."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        folder = Path(name)
        with LoopDisk(folder / "image", folder / "disk", _DISK_BYTES) as disk:
            runs = Uninterrupted()
            trials = options.trials or TRIALS
            if options.teeth:
                for prepare, scenario in BREAKS.items():
                    chains = Chains(scenario, runs, disk.folder / "chain", draw)
                    chains.row.broken = prepare.__name__.replace("_", " ")
                    yield cut_power(disk, chains, options.trials or TEETH_TRIALS, prepare=prepare)
                return
            for scenario in SCENARIOS:
                chains = Chains(scenario, runs, disk.folder / "chain", draw)
                yield cut_power(disk, chains, -(-trials // len(SCENARIOS)))


def cut_power(disk: LoopDisk, chains: Chains, trials: int, **options: Any) -> Row:
    """Cut the power under `trials` lives."""
    began = time.perf_counter()
    disk.unmount()
    disk.mount(_MOUNT_OPTIONS[0])
    before_bytes = disk.used_bytes()

    def cut(life: Life, draw: random.Random) -> None:
        chains.wait_a_while(life)
        disk.cut((JOURNAL_FLUSHED, JOURNAL_LOST)[chains.row.trials % 2])
        if draw.random() < 0.5:
            time.sleep(_LINGER_SECONDS)

    def recover() -> None:
        disk.unmount()
        disk.mount(chains.draw.choice(_MOUNT_OPTIONS))

    for _ in range(trials):
        chains.disturbed(cut, recover=recover, **options)
    chains.undisturbed(num_steps=2)
    chains.chain.restart()
    disk.unmount()
    wrong = disk.check()
    disk.mount(_MOUNT_OPTIONS[0])
    if wrong:
        chains.row.problems.append(f"e2fsck: {wrong}")
    leaked_bytes = disk.used_bytes() - before_bytes
    if leaked_bytes > _SLACK_BYTES:
        chains.row.problems.append(f"{leaked_bytes} bytes stay in use when all is removed")
    chains.row.seconds = time.perf_counter() - began
    return chains.row
