"""What `offload plan` predicts, against what is measured: peak bytes of each tier, seconds a step.

    python tools/bench/planning.py --path DIR [--rounds 5] [--steps 3] [--only NAME]

Configurations of three kinds of model (linear layers, Llama, GPT-2), of placement, of budgets and
of accumulation, on the CPU. For each one the lanes and the model's operations are measured, a
prediction is made of that, and steps are taken, in turn, `--rounds` times in one process: what else
the machine does is in both. The medians are compared. A prediction of seconds counts as good within
15%, one of peak bytes within 5%; where the optimizer step is overlapped the peak of the host has
room that a step may not come to use, so there the prediction is judged as a bound that holds.
`cores` is the CPU time of this process over the wall time: where it is much lower than one, it has
waited for others or for the disk, and its seconds prove little about compute.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _process import MIB, at_least, folder, make_parser, print_table
from _training import LlamaShape
from torch import nn

import offload
from offload.cli.measuring import sample
from offload.config import OffloadConfig, load_config
from offload.engine.rehearsal import Rehearsal, measure_operations, rehearse
from offload.schedule.forecast import Workload

SECONDS_WITHIN, BYTES_WITHIN = 0.15, 0.05
SAMPLE_BYTES = 16 * MIB
MOST_BYTES = 1 << 30
CPU = torch.device("cpu")


class Layers(nn.Module):
    """Blocks of two linear layers around each a shortcut; the loss is a mean square."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(count)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The loss of `hidden`, (tokens, width)."""
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden.float().square().mean()


def gpt2(width: int, layers: int) -> nn.Module:
    """A GPT-2 with heads of 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2048,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    module: nn.Module = GPT2LMHeadModel(config)
    return module.train()


@dataclass(frozen=True)
class Case:
    """A configuration: how its model is made, what it is given, where its state is."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    device_mib: int
    host_mib: int
    placement: Mapping[str, str]
    accumulation: int = 1
    overlap: bool = True

    def config(self, path: str) -> OffloadConfig:
        """The configuration, with its state on nvme in `path`."""
        return load_config(
            {
                "tiers": {
                    "device": {"kind": "cpu", "memory": self.device_mib * MIB},
                    "host": {"memory": self.host_mib * MIB},
                    "nvme": {"paths": [path]},
                },
                "placement": dict(self.placement),
                "training": {"gradient_accumulation_steps": self.accumulation},
                "overlap": {"optimizer": self.overlap},
            }
        )

    def draw(self) -> dict[str, torch.Tensor]:
        """Random inputs."""
        return {
            name: torch.randint(0, 256, shape)
            if dtype == torch.int64
            else torch.randn(shape, dtype=dtype)
            for name, (shape, dtype) in self.inputs.items()
        }


def ids(batch: int, length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Inputs of a language model."""
    form = ((batch, length), torch.int64)
    return {"input_ids": form, "labels": form}


def hidden(tokens: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Inputs of `Layers`."""
    return {"hidden": ((tokens, width), torch.bfloat16)}


TINY, SMALL = LlamaShape(128, 2, 344, 2048), LlamaShape(256, 6, 688, 4096)
MEDIUM = LlamaShape(768, 12, 2048, 16_384)
AWAY = dict.fromkeys(("weights", "gradients", "optimizer"), "nvme")
ON_HOST = dict.fromkeys(("weights", "gradients", "optimizer"), "host")

CASES = (
    Case("layers, device", lambda: Layers(256, 6), hidden(256, 256), 256, 64, {}),
    Case("layers, host", lambda: Layers(256, 6), hidden(256, 256), 8, 256, ON_HOST),
    Case("layers, nvme", lambda: Layers(512, 6), hidden(256, 512), 24, 160, AWAY, overlap=False),
    Case("llama tiny, auto", TINY.make, ids(2, 64), 4, 16, {}),
    Case("llama, host, 4 micro-batches", SMALL.make, ids(2, 64), 16, 256, ON_HOST, 4),
    Case("llama, optimizer nvme", SMALL.make, ids(4, 64), 64, 160,
         {"optimizer": "nvme"}, overlap=False),
    Case("llama, nvme, overlapped", SMALL.make, ids(4, 64), 24, 128, AWAY),
    Case("gpt2, device", lambda: gpt2(256, 6), ids(2, 64), 256, 64, {}),
    Case("gpt2, optimizer nvme, overlapped", lambda: gpt2(256, 6), ids(4, 64), 64, 128,
         {"optimizer": "nvme"}),
    Case("llama 120M, optimizer nvme", MEDIUM.make, ids(1, 128), 1024, 1024,
         {"optimizer": "nvme"}, overlap=False),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Medians of one case; bytes by tier as (predicted, measured)."""

    name: str
    parameters: int
    predicted: float
    measured: float
    cores: float
    peaks: dict[str, tuple[int, int]]
    is_overlapped: bool

    @property
    def seconds_error(self) -> float:
        """How much longer the prediction is than the measurement, relative to that."""
        return self.predicted / self.measured - 1

    @property
    def bytes_error(self) -> float:
        """The largest of the tiers, the host's left out where the step is overlapped."""
        return max(
            (
                predicted / measured - 1
                for tier, (predicted, measured) in self.peaks.items()
                if measured and not (tier == "host" and self.is_overlapped)
            ),
            key=abs,
            default=0.0,
        )

    def is_bounded(self) -> bool:
        """Whether no tier has held more than was predicted."""
        return all(measured <= predicted for predicted, measured in self.peaks.values())


def compare(case: Case, path: str, rounds: int, steps: int) -> Result:
    """Predict and measure one case, in turn."""
    config = case.config(path)
    with torch.device("meta"):
        shape = case.make()
    rehearsal = rehearse(shape, case.inputs, device=CPU, dtype=torch.bfloat16)
    torch.manual_seed(0)
    predicted, measured, cores = [], [], []
    with offload.initialize(case.make(), config) as engine:
        step(engine, case)
        step(engine, case)
        for _ in range(rounds):
            predicted.append(predict(shape, case, config, rehearsal))
            gc.collect()
            step(engine, case)
            started, had = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step(engine, case)
            wall = time.perf_counter() - started
            measured.append(wall / steps)
            cores.append((time.process_time() - had) / wall)
        plan, report = engine.plan, engine.report()
    return Result(
        case.name,
        sum(parameter.numel() for parameter in shape.parameters()),
        statistics.median(predicted),
        statistics.median(measured),
        statistics.median(cores),
        {tier: (plan.peak_bytes[tier], held.peak_bytes) for tier, held in report.tiers.items()},
        plan.overlap.flow_bytes > 0,
    )


def predict(shape: nn.Module, case: Case, config: OffloadConfig, rehearsal: Rehearsal) -> float:
    """Seconds a step, from lanes and operations measured now."""
    profile = sample(config, size_bytes=SAMPLE_BYTES, passes=3)
    seconds = measure_operations(rehearsal, device=CPU, most_bytes=MOST_BYTES)
    workload = Workload(1, compute_seconds=case.accumulation * seconds)
    return offload.plan(shape, config, speeds=profile.lane_speeds(), workload=workload).step_seconds


def step(engine: offload.OffloadEngine, case: Case) -> None:
    """One optimizer step on random inputs."""
    for _ in range(case.accumulation):
        output = engine(**case.draw())
        engine.backward(output if isinstance(output, torch.Tensor) else output.loss)
    engine.step()


def show(results: list[Result]) -> dict[str, Any]:
    """Print the table; return what it holds."""
    rows = []
    for each in results:
        peaks = [
            f"{each.peaks[tier][0] / MIB:.1f} / {each.peaks[tier][1] / MIB:.1f}"
            for tier in ("device", "host", "nvme")
        ]
        rows.append(
            [
                each.name,
                f"{each.parameters / 1e6:.1f}",
                *peaks,
                f"{each.bytes_error:+.1%}",
                f"{each.predicted:.4f}",
                f"{each.measured:.4f}",
                f"{each.seconds_error:+.0%}",
                f"{each.cores:.2f}",
            ]
        )
    headings = ["", "M parameters", "device MiB", "host MiB", "nvme MiB", "bytes off"]
    print_table([*headings, "predicted s", "measured s", "seconds off", "cores"], rows)
    return {
        "cases": [
            {
                "name": each.name,
                "predicted_seconds": each.predicted,
                "measured_seconds": each.measured,
                "peaks": each.peaks,
                "is_bounded": each.is_bounded(),
            }
            for each in results
        ],
        "good_seconds": sum(abs(each.seconds_error) <= SECONDS_WITHIN for each in results),
        "good_bytes": sum(abs(each.bytes_error) <= BYTES_WITHIN for each in results),
        "bounded": sum(each.is_bounded() for each in results),
        "count": len(results),
    }


def main() -> None:
    """Compare all cases, or those that are named."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", type=folder, required=True)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--steps", type=at_least(1), default=3)
    parser.add_argument("--only", help="the beginning of the names of the cases")
    options = parser.parse_args()
    cases = [case for case in CASES if case.name.startswith(options.only or "")]
    if not cases:
        sys.exit(f"error: no case begins with {options.only!r}")
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory(dir=options.path) as path:
            results.append(compare(case, path, options.rounds, options.steps))
    found = show(results)
    print(
        f"within 15% of the seconds: {found['good_seconds']} of {found['count']}; "
        f"within 5% of the bytes: {found['good_bytes']}; never more than predicted: "
        f"{found['bounded']}"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
