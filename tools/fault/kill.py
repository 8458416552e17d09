"""SIGKILL at random moments and before exact system calls, while it trains and saves.

A process trains a tiny model, with its state on NVMe and in memory in turns, saves a checkpoint at
every step, and reports each one that was acknowledged. It is killed at random moments of loading,
steps and saves; and, by `strace`, before its first, second, ... call of each system call that a
save depends on, until there is none left. The next process resumes, and

- what it loads is never older than the last checkpoint that was acknowledged (lost);
- it has, bit for bit, the state that a run without interruption has at that step (mixed);
- its first save leaves nothing of the killed ones. In the folder of `tiers.nvme.paths` a killed
  process leaves at most its run folder, which the next one removes, and one that ends nothing
  (problems).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fault import _broken, _job, _strace
from fault._chain import Chains
from fault._job import PLACEMENTS, Life, Uninterrupted
from fault.result import Row

TRIALS = 1000
SCENARIOS = tuple(dataclasses.replace(s, name=f"killed, {s.name}") for s in _job.SCENARIOS)
BREAKS = {
    _broken.written_in_place: SCENARIOS[1],
    _broken.nothing_is_swept: SCENARIOS[0],
    _broken.acknowledged_too_early: SCENARIOS[0],
    _broken.pins_are_ignored: SCENARIOS[2],
    _broken.old_ones_go_first: SCENARIOS[3],
}
TEETH_TRIALS = 60
SAVES_BEFORE_REUSE = 8  # an extent that is free waits for its turn to be written again
# What changes the file system; what only reads, asks or writes bytes, for one scenario only.
CALLS = (
    *("copy_file_range", "fallocate", "fdatasync", "fsync", "ftruncate", "ioctl", "linkat"),
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "rmdir", "unlink", "unlinkat"),
)
OTHER_CALLS = ("io_submit", "io_uring_enter", "openat", "pwrite64", "write")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to work, and how to kill."""
    parser.add_argument(
        "--path", type=Path, default=Path("/var/tmp"), help="a folder on the disk to test"
    )
    parser.add_argument(
        "--only", choices=("moments", "calls"), help="random moments, or exact system calls"
    )


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Kill at random moments, then at exact ones."""
    draw = random.Random(options.seed)
    if options.only != "moments" and not _strace.available():
        sys.exit("error: killing before exact system calls needs strace; else: --only moments")
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        folder = Path(name)
        runs = Uninterrupted()
        if options.teeth:
            yield from broken_builds(
                runs,
                folder,
                draw,
                options.trials or TEETH_TRIALS,
                exact=options.only != "moments",
            )
            return
        trials = -(-(options.trials or TRIALS) // len(SCENARIOS))
        for number, scenario in enumerate(SCENARIOS):
            if options.only != "calls":
                yield at_random_moments(
                    Chains(scenario, runs, folder / f"moments-{number}", draw), trials
                )
        for number, scenario in enumerate(SCENARIOS):
            if options.only != "moments":
                calls = (*CALLS, *OTHER_CALLS) if number == 0 else CALLS
                chains = Chains(scenario, runs, folder / f"calls-{number}", draw)
                yield before_each_call(chains, calls)


def at_random_moments(chains: Chains, trials: int, *, after_saves: int = 0, **options: Any) -> Row:
    """Kill `trials` lives, after so many saves."""
    began = time.perf_counter()

    def cut(life: Life, _draw: random.Random) -> None:
        chains.wait_a_while(life, after_saves=after_saves)

    for _ in range(trials):
        chains.disturbed(cut, **options)
        _judge_left(chains, most=1)
    chains.undisturbed(num_steps=2)
    _judge_left(chains, most=0)
    chains.row.seconds = time.perf_counter() - began
    return chains.row


def _judge_left(chains: Chains, most: int) -> None:
    """In the folder of the tier there are at most so many run folders, and nothing else."""
    nvme = chains.chain.nvme
    left = [path.name for path in nvme.iterdir()] if nvme.exists() else []
    if len(left) > most or not all(name.startswith("offload-") for name in left):
        chains.row.problems.append(f"{chains.chain}: processes leave {left}")


def broken_builds(
    runs: Uninterrupted, folder: Path, draw: random.Random, trials: int, *, exact: bool
) -> Iterator[Row]:
    """A row for each way to break it; what is too short for random moments is killed exactly."""
    for prepare, scenario in BREAKS.items():
        chains = Chains(scenario, runs, folder / prepare.__name__, draw)
        chains.row.broken = prepare.__name__.replace("_", " ")
        after_saves = SAVES_BEFORE_REUSE if prepare is _broken.pins_are_ignored else 0
        yield at_random_moments(chains, trials, prepare=prepare, after_saves=after_saves)
    if exact:
        chains = Chains(SCENARIOS[1], runs, folder / "exact", draw)
        chains.row.broken = "old one goes first"
        yield before_each_call(chains, ["rename"], prepare=_broken.old_one_goes_first)


def before_each_call(chains: Chains, calls: Sequence[str], **options: Any) -> Row:
    """Kill before the first, second, ... call of each of `calls`, until there is none."""
    began = time.perf_counter()
    chains.row.name += ", before each system call"
    counts = {}
    for call in calls:
        number = 1
        while _is_killed_before(chains, call, number, **options):
            number += 1
            _judge_left(chains, most=1)
            if call in CALLS and not options:
                chains.undisturbed(num_steps=1)  # the very next save sweeps
        chains.row.trials -= 1  # the last one was not killed
        if number > 1:
            counts[call] = number - 1
    chains.row.remark = ", ".join(f"{count} {call}" for call, count in counts.items())
    chains.row.seconds = time.perf_counter() - began
    return chains.row


def _is_killed_before(chains: Chains, call: str, number: int, **options: Any) -> bool:
    """A life of two steps and saves, unless it comes to the `number`-th call."""
    gate, opened = os.pipe()

    def cut(life: Life, _draw: random.Random) -> None:
        if life.wait_for("loaded", "fresh"):
            with _strace.killed_before(call, number, life.pid):
                os.write(opened, b".")
                life.wait_for("end")

    try:
        life = chains.disturbed(cut, num_steps=2, gate=gate, placement=PLACEMENTS[0], **options)
    finally:
        os.close(gate)
        os.close(opened)
    last = life.reports[-1]["kind"] if life.reports else "none"
    return last in {"loaded", "fresh", "saving", "saved", "swept"}
