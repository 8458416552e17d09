"""Training models larger than memory under a hard memory cgroup, as `offload train` does it.

    python tools/bench/larger_than_memory.py --path DISK [--sizes 1b 3b] [--steps 3]

Needs root, or the right to make memory cgroups (version 1 or 2). A process that takes more than the
limit is killed; nothing swaps. The model is that of configs/llama-3b_cpu_nvme.toml: for 3b as it
stands, for smaller sizes with fewer layers and budgets for their limit. It is made deferred: at no
time is more of it in memory than the budgets say.

    size   parameters   limit     disk    run again, to compare every loss, with
    3b     3.0 billion  10 GiB    45 GB
    1b     1.0 billion   4 GiB    15 GB   20 GiB and as much state in memory as that holds
    150m   0.15 billion  1.5 GiB   3 GB   3 GiB
    small  tiny          1.5 GiB          3 GiB

The high-water mark is the cgroup's; it counts page cache, too, which the kernel gives up under the
limit. Peak RSS is that of the process. Efficiency is that of `engine.report()`: bound by measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tomllib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _process import (
    GIB,
    MIB,
    MemoryLimit,
    at_least,
    folder,
    in_fresh_process,
    make_parser,
    memory_limit,
    print_table,
    status_bytes,
)

GB = 1e9
CONFIG = Path(__file__).parents[2] / "configs" / "llama-3b_cpu_nvme.toml"


@dataclass(frozen=True)
class Limit:
    """A memory limit, and the budgets of the tiers under it, in MiB; 0: as in the file."""

    memory: int
    device: int = 0
    host: int = 0
    fills_memory: bool = False  # with state, as far as the budgets reach


@dataclass(frozen=True)
class Size:
    """The fields of the model that differ from the file's, and the limits to run it under."""

    fields: dict[str, int]
    limits: tuple[Limit, ...]


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BASE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 6}
BASE |= {"num_attention_heads": 12, "num_key_value_heads": 4}
SIZES = {
    "small": Size(TINY, (Limit(1536, 8, 32), Limit(3072, 64, 128, fills_memory=True))),
    "150m": Size(BASE, (Limit(1536, 96, 256), Limit(3072, 512, 1024, fills_memory=True))),
    "1b": Size(
        {"num_hidden_layers": 10},
        (Limit(4 * 1024, 512, 1536), Limit(20 * 1024, 4096, 12_288, fills_memory=True)),
    ),
    "3b": Size({}, (Limit(10 * 1024),)),
}


def configuration(size: Size, limit: Limit, options: argparse.Namespace, output: str) -> Any:
    """The file's configuration with what differs."""
    config: dict[str, Any] = tomllib.loads(CONFIG.read_text())
    config["tiers"]["nvme"]["paths"] = [output]
    if limit.device:
        config["tiers"]["device"]["memory"] = limit.device * MIB
        config["tiers"]["host"]["memory"] = limit.host * MIB
        del config["run"]["expect"]  # it holds for the budgets of the file
    if limit.fills_memory:
        del config["placement"]
    config["run"]["hf_config"] |= size.fields
    config["run"] |= {"steps": options.steps, "sequence_length": options.sequence}
    config["run"]["output"] = str(Path(output) / "run")
    return config


def train(path: str) -> dict[str, Any]:
    """Run a configuration in this process; its peak memory, seconds and steps.

    Raises:
        SystemExit: what the run expects of itself does not hold.
    """
    from offload.cli.train import METRICS_NAME, run
    from offload.telemetry import read_jsonl

    config = json.loads(Path(path).read_text())
    started = time.perf_counter()
    status = run(config)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"offload train has ended with {status}")
    entries = read_jsonl(Path(config["run"]["output"]) / METRICS_NAME)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    return {
        "seconds": seconds,
        "peak_rss": status_bytes("VmHWM"),
        "placed": next(entry["placed_bytes"] for entry in entries if entry["kind"] == "start"),
        "losses": [step["loss"] for step in steps],
        "held_out": [entry["held_out_loss"] for entry in entries if entry["kind"] == "eval"],
        "reports": [step["report"] for step in steps],
    }


def measure(name: str, limit: Limit, options: argparse.Namespace) -> dict[str, Any]:
    """A size under a limit, in a fresh process; the result holds the cgroup's peak."""
    limiting: AbstractContextManager[MemoryLimit | None] = nullcontext()
    if not options.unlimited:
        limiting = memory_limit(limit.memory * MIB)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as output:
        config = Path(output) / "config.json"
        config.write_text(json.dumps(configuration(SIZES[name], limit, options, output)))
        try:
            with limiting as cgroup:
                found = in_fresh_process(
                    __file__,
                    "train",
                    [f"--config={config}"],
                    environment={"OMP_NUM_THREADS": str(options.threads)},
                    cgroup=cgroup.folder if cgroup else None,
                )
                found["cgroup_peak"] = cgroup.peak_bytes if cgroup else 0
        except OSError as error:
            sys.exit(f"error: no memory cgroup can be made here (root can): {error}")
    return found


def row_of(name: str, limit: Limit, found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run."""
    reports = found["reports"]
    lanes = [report["lanes"] for report in reports]
    state = {
        kind: sum(tier.get(kind, 0) for tier in found["placed"].values())
        for kind in ("weights", "optimizer", "gradients")
    }
    return {
        "size": name,
        "limit_bytes": limit.memory * MIB,
        "parameters": state["weights"] // 2,
        "state_bytes": state["weights"] + state["optimizer"],
        "cgroup_peak_bytes": found["cgroup_peak"],
        "peak_rss_bytes": found["peak_rss"],
        "nvme_bytes": max(report["tiers"]["nvme"]["peak_bytes"] for report in reports),
        "step_seconds": statistics.median(report["measured_seconds"] for report in reports),
        "efficiency": statistics.median(report["efficiency"] for report in reports),
        "read_bytes": statistics.mean(lane["nvme_read"]["bytes"] for lane in lanes),
        "written_bytes": statistics.mean(lane["nvme_write"]["bytes"] for lane in lanes),
        "seconds": found["seconds"],
        "losses": found["losses"],
        "held_out": found["held_out"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    headings: tuple[str, ...] = ("size", "parameters", "limit GiB", "cgroup peak GiB")
    headings += ("peak RSS GiB", "state GB", "s a step", "efficiency", "read GB", "written GB")
    print_table(
        (*headings, "losses"),
        [
            [
                row["size"],
                f"{row['parameters'] / 1e6:.0f}M",
                f"{row['limit_bytes'] / GIB:.1f}",
                f"{row['cgroup_peak_bytes'] / GIB:.2f}",
                f"{row['peak_rss_bytes'] / GIB:.2f}",
                f"{row['state_bytes'] / GB:.1f}",
                f"{row['step_seconds']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['read_bytes'] / GB:.2f}",
                f"{row['written_bytes'] / GB:.2f}",
                " ".join(f"{loss:.4f}" for loss in row["losses"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Run every size; print a table and a line of JSON; 1 if a loss depends on the limit."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", type=folder, default=tempfile.gettempdir(), help="on the disk")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["1b", "3b"])
    parser.add_argument("--steps", type=at_least(1), default=3)
    parser.add_argument("--sequence", type=at_least(2), default=512)
    parser.add_argument("--threads", type=at_least(1), default=os.cpu_count())
    parser.add_argument("--unlimited", action="store_true", help="no cgroup, to try the script")
    parser.add_argument("--run", choices=("train",), help="internal")
    parser.add_argument("--config", help="internal")
    options = parser.parse_args()
    if options.run:
        found = train(options.config)
        print(json.dumps(found), flush=True)
        return
    rows, equal = [], True
    for name in options.sizes:
        of_size = []
        for limit in SIZES[name].limits:
            found = measure(name, limit, options)
            of_size.append(row_of(name, limit, found))
            print(f"{name} under {limit.memory} MiB: {found['seconds']:.0f} s", file=sys.stderr)
        equal = equal and len({tuple(row["losses"] + row["held_out"]) for row in of_size}) == 1
        rows += of_size
    show(rows)
    print(f"\nlosses of a size under its limits are {'equal' if equal else 'NOT EQUAL'}")
    print(json.dumps({"rows": rows, "losses_equal": equal}))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
