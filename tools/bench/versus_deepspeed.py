"""Training with optimizer state on NVMe: against DeepSpeed ZeRO-3 and plain PyTorch.

    python tools/bench/versus_deepspeed.py --venv DIR --install     once: some minutes
    python tools/bench/versus_deepspeed.py --venv DIR --path DISK [--rounds 3] [--parameters-too]

A Llama of 374M parameters, bf16 with fp32 masters, 256 tokens a step: the same definition, data
and seed for all. DeepSpeed 0.19 runs on its CPU accelerator in an environment of its own. The sides
take turns on the same disk, each turn in a fresh process; steps after warm-up are counted. Peak RSS
is the kernel's high-water mark of the whole process, bytes are those of /proc/PID/io.

    deepspeed default, pipelined   offload_optimizer on nvme, without and with pipeline_read/_write
    deepspeed parameters           the same as default, with offload_param on nvme
    ours                           weights and optimizer state on NVMe, 12 bytes a parameter and
                                   more, checksums on, in no more memory than deepspeed default
    ours, weights in memory        optimizer state on NVMe, 10 bytes a parameter; the weights are
                                   where deepspeed default and pipelined have theirs
    ours at ...                    given the memory that this mode of DeepSpeed has taken
    plain                          PyTorch with everything in memory, fused AdamW

What DeepSpeed swaps at once is a sub-group: its own default is a billion parameters, so that four
fp32 buffers of the whole model are in memory. --sub-group-numel sets it, for a fair comparison, to
where it takes less memory and is not slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _deepspeed
from _process import (
    MIB,
    arguments_of,
    at_least,
    folder,
    in_fresh_process,
    make_parser,
    print_table,
    status_bytes,
    timed_steps,
)

GB = 1e9
STATE_BYTES = 12  # a parameter: weight and remainder (or master), two moments
LOSS_WITHIN = 1e-2
READ_SHARE = 0.98
LR = 1e-4
WEIGHTS_IN_MEMORY = "ours, weights in memory"
TARGETS = {
    ("default", "ours"): 2.0,
    ("pipelined", "ours"): 1.6,
    ("default", WEIGHTS_IN_MEMORY): 2.0,
    ("pipelined", WEIGHTS_IN_MEMORY): 1.6,
    ("default", "ours at default"): 3.0,
    ("pipelined", "ours at pipelined"): 2.5,
}
CARRIED = ("path", "steps", "warm_up", "sequence", "sub_group_numel", "buffers", "threads")
SHAPES = {False: (1024, 24, 2816, 32_000), True: (64, 2, 192, 512)}  # by --small


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    import torch
    from _training import LlamaShape

    # transformers would take kernels.py, beside this file, for the package of that name.
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    torch.set_num_threads(options.threads)
    shape = LlamaShape(*SHAPES[options.small])
    model = shape.make(dtype=torch.bfloat16)
    numel = sum(p.numel() for p in model.parameters())
    count = options.warm_up + options.steps
    batches = (shape.ids(1, options.sequence, seed=step) for step in range(count))
    if options.run == "plain":
        found = train_plain(model, batches)
    elif options.run == "ours":
        found = train_ours(model, batches, options)
    else:
        with tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as path:
            found = _deepspeed.train(
                model,
                _deepspeed.settings(
                    options.run, path, options.sub_group_numel, options.buffers, LR
                ),
                batches,
            )
    return {"numel": numel, "peak_rss": status_bytes("VmHWM"), **found}


def train_plain(model: Any, batches: Iterator[Any]) -> dict[str, Any]:
    """Everything in memory."""
    from _training import PlainTraining

    training = PlainTraining(model, LR)

    def step(ids: Any) -> float:
        loss = training.passes(ids)
        training.update()
        return loss

    return timed_steps(batches, step)


def train_ours(model: Any, batches: Iterator[Any], options: argparse.Namespace) -> dict[str, Any]:
    """The engine under the budgets of the options, in bytes."""
    from _training import settle, tiers, train_step

    import offload

    homes = {"weights": options.weights, "gradients": "device", "optimizer": "nvme"}
    lanes = []
    with tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as path:
        config = {
            "tiers": tiers(path, options.device, options.host),
            "placement": {} if options.all_memory else homes,
            "precision": {"compute": "bf16"},
            "optimizer": {"lr": LR},
            "io": {"checksum": True},
        }
        with offload.initialize(model, config) as engine:

            def step(ids: Any) -> float:
                loss = train_step(engine, ids)
                lanes.append(engine.report().lanes["nvme_read"].bytes)
                return loss

            found: dict[str, Any] = timed_steps(batches, step)
            settle(engine)
            report = engine.report()
    held = sum(report.tiers[name].peak_bytes for name in ("device", "host"))
    return {**found, "lanes_read": lanes, "held": held}


@dataclass
class Side:
    """What the rounds of one side have given."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_rss: int = 0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    lanes_read_bytes: float = 0.0

    def add(self, found: dict[str, Any], warm_up: int) -> None:
        """Take in a round."""
        self.seconds += found["seconds"][warm_up:]
        self.losses = found["losses"]
        self.peak_rss = max(self.peak_rss, found["peak_rss"])
        read, written = zip(*found["moved"][warm_up:], strict=True)
        self.read_bytes, self.written_bytes = statistics.mean(read), statistics.mean(written)
        if "lanes_read" in found:
            self.lanes_read_bytes = statistics.mean(found["lanes_read"][warm_up:])

    @property
    def step_seconds(self) -> float:
        """The median of all its steps."""
        return statistics.median(self.seconds)


class Rounds:
    """All sides in turn; ours come after the modes of DeepSpeed whose memory they are given."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sides: dict[str, Side] = {}
        self.numel = 0
        self.overhead_bytes = 0  # of our process beside the tiers
        self.hosts: dict[str, int] = {}  # by mode of DeepSpeed: the host budget in its memory
        self.modes = _deepspeed.MODES[: 3 if options.parameters_too else 2] if options.venv else ()

    def run(self) -> None:
        """One round of every side."""
        for mode in self.modes:
            self._turn(mode, mode, [])
        device = self._device_bytes()
        found = self._turn("ours", "ours", [f"--device={device}", f"--host={self._host_bytes()}"])
        self._turn(
            WEIGHTS_IN_MEMORY,
            "ours",
            [f"--device={device}", f"--host={self._host_bytes()}", "--weights=device"],
        )
        self.overhead_bytes = max(self.overhead_bytes, found["peak_rss"] - found["held"])
        self.numel = found["numel"]
        for mode in self.modes[:2]:
            host = self.hosts.setdefault(mode, self._host_in_memory_of(mode))
            budgets = [f"--device={device}", f"--host={host}", "--all-memory"]
            self._turn(f"ours at {mode}", "ours", budgets)
        self._turn("plain", "plain", [])

    def _turn(self, name: str, run: str, arguments: list[str]) -> dict[str, Any]:
        options = self.options
        python, variables = sys.executable, {}
        if run in _deepspeed.MODES:
            venv = Path(options.venv).resolve()
            python, variables = _deepspeed.python_of(venv), _deepspeed.environment(venv)
        given = [*arguments_of(options, CARRIED), *arguments]
        if options.small:
            given.append("--small")
        found = in_fresh_process(__file__, run, given, python=python, environment=variables)
        self.sides.setdefault(name, Side()).add(found, options.warm_up)
        side = self.sides[name]
        print(
            f"{name}: {statistics.median(found['seconds'][options.warm_up :]):.2f} s a step, "
            f"peak {side.peak_rss / GB:.2f} GB",
            file=sys.stderr,
            flush=True,
        )
        return found

    def _device_bytes(self) -> int:
        """Room for all weights and gradients, and a bucket more."""
        if self.options.device:
            return int(self.options.device)
        hidden, layers, intermediate, vocabulary = SHAPES[self.options.small]
        layer = 4 * hidden**2 + 3 * hidden * intermediate
        return 4 * (layers * layer + 2 * vocabulary * hidden) * 11 // 10 + 4 * MIB

    def _host_bytes(self) -> int:
        return int(self.options.host or (32 if self.options.small else 512) * MIB)

    def _host_in_memory_of(self, mode: str) -> int:
        """The host budget with which we take as much memory as a mode of DeepSpeed has taken."""
        room = self.sides[mode].peak_rss * 97 // 100 - self.overhead_bytes - self._device_bytes()
        return max(room // MIB * MIB, self._host_bytes())


def show(rounds: Rounds) -> dict[str, Any]:
    """Print the tables and what is met; returns the numbers."""
    numel, sides = rounds.numel, rounds.sides
    print(f"{numel / 1e6:.0f}M parameters, {rounds.options.sequence} tokens a step, medians\n")
    rows = [
        [
            name if name in ("plain",) or name.startswith("ours") else f"deepspeed {name}",
            f"{side.step_seconds:.2f}",
            f"{side.peak_rss / GB:.2f}",
            f"{side.read_bytes / numel:.2f}",
            f"{side.written_bytes / numel:.2f}",
            f"{side.losses[-1]:.4f}",
        ]
        for name, side in sides.items()
    ]
    print_table(
        ("side", "s a step", "peak RSS GB", "read B/parameter", "written B/parameter", "loss"), rows
    )
    ours = sides["ours"]
    checks: list[tuple[str, float, str, float, bool]] = []
    for (mode, name), target in TARGETS.items():
        if mode in sides:
            ratio = sides[mode].step_seconds / sides[name].step_seconds
            checks.append((f"{mode} over {name}", ratio, ">=", target, ratio >= target))
    within = {
        "ours": "default",
        WEIGHTS_IN_MEMORY: "default",
        **{f"ours at {mode}": mode for mode in rounds.modes[:2]},
    }
    for name, mode in within.items():
        if mode in sides:
            taken, most = sides[name].peak_rss / GB, sides[mode].peak_rss / GB
            checks.append((f"peak RSS GB of {name}", taken, "<=", most, taken <= most))
    share = ours.lanes_read_bytes / (STATE_BYTES * numel)
    checks.append(("lanes read, of 12 B a parameter", share, ">=", READ_SHARE, share >= READ_SHARE))
    apart = max(
        max(losses) - min(losses)
        for losses in zip(*(side.losses for side in sides.values()), strict=True)
    )
    checks.append(("losses apart", apart, "<=", LOSS_WITHIN, apart <= LOSS_WITHIN))
    print()
    print_table(
        ("check", "measured", "target", "met"),
        [
            [what, f"{value:.4g}", f"{sign} {target:.4g}", "yes" if met else "no"]
            for what, value, sign, target, met in checks
        ],
    )
    return {
        "parameters": numel,
        "sides": {
            name: {
                "step_seconds": side.step_seconds,
                "peak_rss_bytes": side.peak_rss,
                "read_bytes": side.read_bytes,
                "written_bytes": side.written_bytes,
            }
            for name, side in sides.items()
        },
        "checks": {what: {"measured": value, "met": met} for what, value, _, _, met in checks},
    }


def main() -> None:
    """Measure and print tables and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--venv", help="DeepSpeed's environment")
    parser.add_argument("--install", action="store_true", help="make it, and end")
    parser.add_argument("--path", type=folder, default=tempfile.gettempdir(), help="on the disk")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=4, help="counted, a round and side")
    parser.add_argument("--warm-up", type=at_least(1), default=2, help="steps before them")
    parser.add_argument("--sequence", type=at_least(2), default=256)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--sub-group-numel", type=at_least(1), default=50_000_000)
    parser.add_argument("--buffers", type=at_least(4), default=12, help="of pipelined DeepSpeed")
    parser.add_argument("--parameters-too", action="store_true", help="DeepSpeed's weights on NVMe")
    parser.add_argument("--device", type=at_least(0), default=0, help="our budget, bytes; 0: fits")
    parser.add_argument("--host", type=at_least(0), default=0, help="our budget in bytes; 0: 512M")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--all-memory", action="store_true", help="internal: fill the budgets")
    parser.add_argument("--weights", choices=("nvme", "device"), default="nvme", help="internal")
    parser.add_argument("--run", choices=(*_deepspeed.MODES, "ours", "plain"), help="internal")
    options = parser.parse_args()
    if options.run:
        found = train(options)
        print(json.dumps(found), flush=True)
        return
    if not options.venv and (options.install or not options.small):
        parser.error("--venv DIR is needed: DeepSpeed has an environment of its own")
    if options.install:
        _deepspeed.install(Path(options.venv).resolve())
        return
    rounds = Rounds(options)
    for _ in range(options.rounds):
        rounds.run()
    print(json.dumps(show(rounds)))


if __name__ == "__main__":
    main()
