"""`offload bench`: what the lanes of this machine can do, and how near training comes to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.cli.interrupt import EXIT_SIGNAL, StopRequest
from offload.cli.lanes import Bandwidth, measure
from offload.cli.measuring import measure_disks, measure_flops, profile_of
from offload.cli.progress import Progress
from offload.cli.summary import (
    STEADY_STEP,
    describe_bound,
    median_bound,
    median_efficiency,
    print_tables,
)
from offload.cli.trial import WARM_UP_STEPS, Trial, run_trial
from offload.config import OffloadConfig
from offload.engine.profile import DiskSpeed, MachineProfile, keep_profile
from offload.errors import OffloadError, format_bytes


def run(
    config: OffloadConfig,
    paths: Sequence[str] = (),
    *,
    size_bytes: int,
    passes: int,
    steps: int,
    as_json: bool,
) -> int:
    """Measure the lanes, then `steps` training steps (0: none), and print both.

    What the lanes show is kept for `offload plan`; where it cannot be, a line says so. Further
    `paths` are striped with those of the config. Returns the exit code: 128 plus the signal's
    number when Ctrl-C or SIGTERM ended the training after the step that was under way.

    Raises:
        OffloadError: what keeps a lane from being measured, or the model from being trained.
    """
    config = _with_paths(config, paths)
    console = Console()
    lanes = list(measure(config, size_bytes=size_bytes, passes=passes))
    disks = list(measure_disks(config, size_bytes=size_bytes, passes=passes))
    profile = profile_of(lanes, measure_flops(config, passes), disks)
    kept = _keep(config, profile)
    if not as_json:
        console.print(_lane_table(lanes))
        if disks:
            console.print(_disk_table(disks))
        rate = f"compute {profile.speeds['flops'] / 1e9:,.1f} GFLOP/s in {config.precision.compute}"
        console.print(f"{rate}\n{kept}", highlight=False, soft_wrap=True)
    trial = None
    with StopRequest() as stop:
        if steps:
            total = WARM_UP_STEPS + steps
            with Progress(Console(stderr=True), steps=total, log_every=total) as progress:
                alone = {lane.lane: lane.best_bytes_per_second for lane in lanes}
                trial = run_trial(config, alone, steps=steps, progress=progress, stop=stop)
    if as_json:
        training = None if trial is None else trial.to_dict()
        found = {
            "lanes": [asdict(lane) for lane in lanes],
            "disks": [asdict(disk) for disk in disks],
            "flops": profile.speeds["flops"],
            "profile": kept,
            "training": training,
        }
        print(json.dumps(found))
    elif trial is not None:
        _print_trial(console, trial)
    return 0 if stop.signal_number is None else EXIT_SIGNAL + stop.signal_number


def _keep(config: OffloadConfig, profile: MachineProfile) -> str:
    """Keep the profile, and say where, or why not."""
    try:
        return f"kept for `offload plan` in {keep_profile(config, profile)}"
    except OffloadError as error:
        return f"not kept for `offload plan`: {error}"


def _with_paths(config: OffloadConfig, paths: Sequence[str]) -> OffloadConfig:
    known = config.tiers.nvme.paths
    further = [str(path) for path in map(Path, paths) if path not in known]
    if not further:
        return config
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    tiers = plain.setdefault("tiers", {})
    tiers.setdefault("nvme", {})["paths"] = [*map(str, known), *dict.fromkeys(further)]
    return OffloadConfig(**plain)


def _lane_table(lanes: Sequence[Bandwidth]) -> Table:
    table = Table(title="lanes, each alone", title_justify="left")
    for name in ("lane", "where", "moved", "best", "median"):
        is_text = name in ("lane", "where")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "where")
    for lane in lanes:
        table.add_row(
            lane.lane,
            lane.where,
            format_bytes(lane.nbytes),
            f"{lane.best_bytes_per_second / 1e9:.2f} GB/s",
            f"{lane.median_bytes_per_second / 1e9:.2f} GB/s",
        )
    return table


def _disk_table(disks: Sequence[DiskSpeed]) -> Table:
    table = Table(title="disks, by block size and blocks in flight", title_justify="left")
    depths = sorted({disk.depth for disk in disks})
    for name in ("path", "operation", "block"):
        table.add_column(name, no_wrap=name != "path")
    for depth in depths:
        table.add_column(f"{depth} in flight", justify="right", no_wrap=True)
    speed = {(d.path, d.operation, d.block_bytes, d.depth): d.bytes_per_second for d in disks}
    for path, operation, block_bytes in dict.fromkeys(key[:3] for key in speed):
        cells = [speed.get((path, operation, block_bytes, depth)) for depth in depths]
        shown = ["" if cell is None else f"{cell / 1e9:.2f} GB/s" for cell in cells]
        table.add_row(path, operation, format_bytes(block_bytes), *shown)
    return table


def _print_trial(console: Console, trial: Trial) -> None:
    outcome = trial.outcome
    if not outcome.reports:
        console.print("no training step was taken")
        return
    print_tables(console, outcome)
    steady = outcome.steady
    faults = sum(report.faults for report in outcome.reports[STEADY_STEP - 1 :])
    shown = trial.steady_shown
    lines = [
        f"{trial.model}, {trial.numel / 1e6:,.1f}M parameters: {len(steady)} steps after "
        f"{len(outcome.reports) - len(steady)} that warmed up, "
        f"{trial.tokens_per_second:,.0f} tokens/s, {faults} faults",
        describe_bound(steady),
        f"at the best speeds of the steps themselves: bound "
        f"{median_bound(shown):.3f} s, efficiency {median_efficiency(shown):.0%}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
