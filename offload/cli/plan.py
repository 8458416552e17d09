"""`offload plan`: where training state would live, whether it fits, and what a step would take."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from offload.cli.measuring import sample
from offload.cli.trainable import model_to_plan
from offload.config import OffloadConfig, available_host_bytes, load_config
from offload.engine.planning import device_is_host_memory, on_meta
from offload.engine.profile import find_profile
from offload.engine.rehearsal import measure_operations, rehearse
from offload.errors import ConfigError, OffloadError, format_bytes
from offload.partition.arrays import TORCH_DTYPES
from offload.schedule.cost import LaneSpeeds
from offload.schedule.footprint import STATE_CLASSES, TIERS
from offload.schedule.forecast import Workload
from offload.schedule.plan import Plan
from offload.state.session import plan as plan_state

_SAMPLE_BYTES = 16 << 20  # of each lane: a second or so on one slow disk
_SAMPLE_PASSES = 3
_MOST_MEMORY_SHARE = 1 / 4  # of what is available, for the operations that are measured
_DAYS_A_YEAR = 365


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be planned.

    Attributes:
        target: a configuration (TOML, JSON), a Hugging Face directory, or its config.json.
        config: beside a model: the configuration.
        batch: sequences of a micro-batch; None: what `[run]` says.
        sequence_length: their tokens; the same.
        may_measure: whether lanes that `offload bench` has not measured are measured shortly.
    """

    target: Path
    config: Path | None = None
    batch: int | None = None
    sequence_length: int | None = None
    may_measure: bool = True


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and all that `offload plan` says of it.

    Attributes:
        plan: with its forecast.
        config: that it is of.
        tokens: of one optimizer step; None: not known.
        source: where the speeds come from, in words.
        activation_bytes: that autograd holds of one micro-batch; None: not counted.
        compute_source: how the seconds of compute were found, in words.
        alternatives: if it does not fit: placements that do, and their seconds a step.
    """

    plan: Plan
    config: OffloadConfig
    tokens: int | None
    source: str
    activation_bytes: int | None = None
    compute_source: str = ""
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def disk_days(self) -> float | None:
        """Days until the disks have been written as often as they are rated for."""
        nvme = self.config.tiers.nvme
        daily = self.plan.forecast.terabytes_a_day
        if nvme.endurance_tbw is None or not daily:
            return None
        return nvme.endurance_tbw * len(nvme.paths) / daily

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain values; sizes in bytes, times in seconds."""
        plan, forecast = self.plan, self.plan.forecast
        return {
            "fits": plan.fits,
            "tiers": {
                tier: {
                    **plan.bytes[tier],
                    "moving": plan.moving_bytes(tier),
                    "peak": plan.peak_bytes[tier],
                    "least": plan.need_bytes[tier],
                    "budget": plan.budget_bytes[tier],
                }
                for tier in TIERS
            },
            "shortfalls": [
                {
                    "tier": short.tier,
                    "need_bytes": short.need_bytes,
                    "have_bytes": short.have_bytes,
                    "remedy": short.remedy,
                }
                for short in plan.shortfalls
            ],
            "alternatives": [
                {"placement": words, "step_seconds": seconds}
                for words, seconds in self.alternatives
            ],
            "num_buckets": len(plan.buckets),
            "step_seconds": forecast.step_seconds,
            "bottleneck": forecast.bottleneck,
            "lanes": {
                lane: {"bytes": forecast.lane_bytes.get(lane, 0), "seconds": seconds}
                for lane, seconds in forecast.lane_seconds.items()
            },
            "tokens": self.tokens,
            "hiding_tokens": forecast.hiding_tokens,
            "nvme_terabytes_a_day": forecast.terabytes_a_day,
            "disk_days": self.disk_days,
            "activation_bytes": self.activation_bytes,
            "speeds": self.source,
            "compute": self.compute_source,
        }

    def lines(self) -> list[str]:
        """The tables and sentences for people."""
        forecast = self.plan.forecast
        found = [str(self.plan)]
        found += [
            f"or with {words}: fits, about {seconds:.3g} s a step"
            for words, seconds in self.alternatives
        ]
        found += ["", f"{'lane':<12}{'a step':>12}{'seconds':>12}"]
        found += [
            f"{lane:<12}{_moved(forecast.lane_bytes, lane):>12}{seconds:>12.3g}"
            for lane, seconds in forecast.lane_seconds.items()
        ]
        found.append(self.source)
        if self.tokens is None:
            found.append("compute is not counted: give --batch and --sequence-length")
        elif forecast.hiding_tokens is not None:
            found.append(
                f"{self.tokens:,} tokens a step; with {forecast.hiding_tokens:,} compute takes as "
                "long as the other lanes beside it"
            )
            found.append(self.compute_source)
        if self.activation_bytes is None:
            found.append("activations are not counted")
        else:
            amount = format_bytes(self.activation_bytes)
            found.append(f"activations of one micro-batch: {amount}, beside these budgets")
        return found + self._endurance_lines()

    def _endurance_lines(self) -> list[str]:
        daily = self.plan.forecast.terabytes_a_day
        if not daily:
            return []
        said = f"{daily:.3g} TB a day are written to nvme"
        if self.disk_days is None:
            return [f"{said}; set tiers.nvme.endurance_tbw to see how long the disks last"]
        years = self.disk_days / _DAYS_A_YEAR
        return [
            f"{said}: the disks' endurance lasts {self.disk_days:,.0f} days ({years:.1f} years)"
        ]


def _moved(lane_bytes: Mapping[str, int], lane: str) -> str:
    return format_bytes(lane_bytes[lane]) if lane in lane_bytes else ""


def make_plan(request: Request) -> Planned:
    """Plan what is asked for; reads no weights and nothing from the network.

    Raises:
        ConfigError: the target is neither a configuration nor a model, or has problems.
        OffloadError: a parameter that the engine cannot take.
    """
    model, config = _model_and_config(request)
    shape = _shape(request, config)
    speeds, source = _speeds(config, request.may_measure)
    workload, activation_bytes, how = _workload(model, config, shape, request.may_measure)
    planned = plan_state(model, config, speeds=speeds, workload=workload)
    alternatives: tuple[tuple[str, float], ...] = ()
    if not planned.fits:
        alternatives = _alternatives(model, config, speeds, workload)
    return Planned(planned, config, workload.tokens, source, activation_bytes, how, alternatives)


def _workload(
    model: nn.Module, config: OffloadConfig, shape: tuple[int, int] | None, may_measure: bool
) -> tuple[Workload, int | None, str]:
    """What a step computes, the activations of a micro-batch, and how they were found in words."""
    run, steps = config.run, config.training.gradient_accumulation_steps
    recompute = run is not None and run.gradient_checkpointing
    if shape is None:
        return Workload(recompute=recompute), None, ""
    workload = Workload(math.prod(shape) * steps, recompute=recompute)
    device = _device(config)
    ids = (shape, torch.int64)
    try:
        rehearsal = rehearse(
            model.train(),
            {"input_ids": ids, "labels": ids},
            device=device,
            dtype=TORCH_DTYPES[config.precision.compute],
        )
    except OffloadError as error:
        return workload, None, f"compute by its FLOPs: {error}"
    activation_bytes = rehearsal.activation_bytes
    if not may_measure:
        return workload, activation_bytes, "compute by its FLOPs"
    most_bytes = int(available_host_bytes() * _MOST_MEMORY_SHARE)
    try:
        seconds = measure_operations(rehearsal, device=device, most_bytes=most_bytes)
    except OffloadError as error:
        return workload, activation_bytes, f"compute by its FLOPs: {error}"
    workload = replace(workload, compute_seconds=steps * seconds)
    return workload, activation_bytes, "compute as its operations were measured, each alone"


def _device(config: OffloadConfig) -> torch.device:
    if device_is_host_memory(config):
        return torch.device("cpu")
    kind = config.tiers.device.kind
    return torch.device("cuda" if kind == "auto" else kind)


def _model_and_config(request: Request) -> tuple[nn.Module, OffloadConfig]:
    target = request.target
    if not target.exists():
        raise ConfigError(problems=[f"{target} does not exist: give a configuration or a model"])
    if target.is_dir() or _is_model_config(target):
        return on_meta(target), load_config(request.config)
    if request.config is not None:
        raise ConfigError(problems=[f"{target} is a configuration, too: give --config a model's"])
    config = load_config(target)
    model = model_to_plan(config, source=str(target))
    return (on_meta(Path(model)) if isinstance(model, str) else model), config


def _is_model_config(path: Path) -> bool:
    """Whether a file is a Hugging Face config.json rather than a configuration of offload."""
    if path.suffix != ".json":
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and ("architectures" in content or "model_type" in content)


def _shape(request: Request, config: OffloadConfig) -> tuple[int, int] | None:
    """Sequences and tokens in each of a micro-batch."""
    run = config.run
    batch, length = request.batch, request.sequence_length
    if run is not None:
        batch, length = batch or run.batch, length or run.sequence_length
    return None if length is None else (batch or 1, length)


def _speeds(config: OffloadConfig, may_measure: bool) -> tuple[LaneSpeeds, str]:
    """The lane speeds, and where they come from in words."""
    found = find_profile(config)
    if found.profile is not None:
        return found.profile.lane_speeds(), found.note
    if not may_measure:
        return LaneSpeeds(), f"an estimate at low speeds of any machine: {found.note}"
    try:
        profile = sample(config, size_bytes=_SAMPLE_BYTES, passes=_SAMPLE_PASSES)
    except OffloadError as error:
        return LaneSpeeds(), f"an estimate at low speeds of any machine: {error}"
    return profile.lane_speeds(), f"an estimate from a short measurement: {found.note}"


def _alternatives(
    model: nn.Module, config: OffloadConfig, speeds: LaneSpeeds, workload: Workload
) -> tuple[tuple[str, float], ...]:
    """What fits if some of the classes whose tier is named were `auto`: the fewest that do."""
    named = [name for name in STATE_CLASSES if getattr(config.placement, name) != "auto"]
    for count in range(1, len(named) + 1):
        found = []
        for freed in itertools.combinations(named, count):
            placement = config.placement.model_copy(update=dict.fromkeys(freed, "auto"))
            other = config.model_copy(update={"placement": placement})
            planned = plan_state(model, other, speeds=speeds, workload=workload)
            if planned.fits:
                words = ", ".join(f'placement.{name} = "auto"' for name in freed)
                found.append((words, planned.step_seconds))
        if found:
            return tuple(sorted(found, key=lambda each: each[1]))
    return ()


def run(request: Request, *, as_json: bool) -> bool:
    """Print the plan; returns whether it fits.

    Raises:
        OffloadError: as `make_plan`.
    """
    planned = make_plan(request)
    if as_json:
        click.echo(json.dumps(planned.to_dict()))
    else:
        click.echo("\n".join(planned.lines()))
    return planned.plan.fits
