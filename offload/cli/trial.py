"""A few steps of training, and how near they come to what the lanes can do.

[Note: two bounds]
A step's bound is that of the cost model over the bytes that its lanes have moved. The speeds are
those of the lanes measured alone: that is what the machine can do. The bound of `engine.report()`
takes the best speeds that the steps themselves have shown. Where it is much higher, lanes are
slower beside each other and beside the computation than they are alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.cli.built_in import NUM_TOKENS, build_built_in, built_in_config
from offload.cli.interrupt import StopRequest
from offload.cli.models import opened_model, vocabulary_size
from offload.cli.progress import Progress, describe_step
from offload.cli.steps import MicroBatch, take_step
from offload.cli.summary import (
    STEADY_STEP,
    Outcome,
    lanes_per_step,
    mean_idle_share,
    median_bound,
    median_efficiency,
)
from offload.config import OffloadConfig
from offload.engine.planning import device_is_host_memory
from offload.errors import OffloadError
from offload.partition.arrays import TORCH_DTYPES
from offload.schedule.cost import bound_of_step
from offload.state.session import OffloadEngine, initialize
from offload.telemetry import StepReport, note_speeds

WARM_UP_STEPS = STEADY_STEP - 1
_LONG_SECONDS = 60.0  # of a large model, fewer steps are measured; one at least


@dataclass(slots=True)
class Trial:
    """What was trained, and its steps.

    Attributes:
        model: its class.
        numel: its parameters' elements.
        outcome: of all steps taken, with the bounds that the lanes set alone.
        shown: the same reports with the engine's own bounds.
    """

    model: str
    numel: int
    outcome: Outcome
    shown: list[StepReport] = field(default_factory=list)

    @property
    def steady_shown(self) -> list[StepReport]:
        """Of `shown`, the steps of `outcome.steady`."""
        return self.shown[len(self.shown) - len(self.outcome.steady) :]

    @property
    def tokens_per_second(self) -> float:
        """Of the median steady step."""
        outcome = self.outcome
        seconds = statistics.median(report.measured_seconds for report in outcome.steady)
        return outcome.tokens / len(outcome.reports) / seconds

    def to_dict(self) -> dict[str, Any]:
        """The steady steps in plain values: each of them, and their medians and means."""
        steady = self.outcome.steady
        found: dict[str, Any] = {
            "model": self.model,
            "parameters": self.numel,
            "placed_bytes": {tier: dict(held) for tier, held in self.outcome.placed_bytes.items()},
            "steps": [report.to_dict() for report in steady],
        }
        if not steady:
            return found
        return found | {
            "measured_seconds": statistics.median(each.measured_seconds for each in steady),
            "bound_seconds": median_bound(steady),
            "efficiency": median_efficiency(steady),
            "critical": steady[-1].critical,
            "bottleneck": steady[-1].bottleneck,
            "shown_bound_seconds": median_bound(self.steady_shown),
            "shown_efficiency": median_efficiency(self.steady_shown),
            "tokens_per_second": self.tokens_per_second,
            "lanes": {
                name: dataclasses.asdict(lane) | {"idle_share": mean_idle_share(steady, name)}
                for name, lane in lanes_per_step(steady).items()
            },
        }


def run_trial(
    config: OffloadConfig,
    alone: Mapping[str, float],
    *,
    steps: int,
    progress: Progress,
    stop: StopRequest,
) -> Trial:
    """Take `WARM_UP_STEPS` and `steps` more with the model of `[run]`, or the built-in one.

    Tokens are random, and nothing of the training is kept. After a minute no step is begun, once
    one has been measured.

    Args:
        config: as for `offload train`.
        alone: bytes/s by lane, of the lanes measured alone; a lane that is not there counts with
            the best speed that it shows.
        steps: to measure, at most.
        progress: shows the steps.
        stop: ends the trial after the step that is under way.

    Raises:
        OffloadError: the model cannot be made or placed, or no step was finite.
    """
    torch.manual_seed(config.training.seed)
    subject = _open(config)
    with subject.engine as engine:
        num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
        trial = Trial(type(engine.module).__name__, num_parameters, Outcome(engine.plan.bytes))
        started = time.perf_counter()
        for number in range(1, WARM_UP_STEPS + steps + 1):
            takes_long = time.perf_counter() - started > _LONG_SECONDS
            if stop or (takes_long and number > STEADY_STEP):
                break
            _step(subject, trial, progress, number)
        if not trial.shown and not stop:
            raise OffloadError(
                "no step was taken: in each of them a gradient was infinite or NaN",
                remedy="lower precision.initial_loss_scale, or compute in bf16",
            )
    speeds: dict[str, float] = {}
    for report in trial.shown:
        note_speeds(speeds, report.lanes)
    speeds.update(alone)
    shared_cores = device_is_host_memory(config)
    for report in trial.shown:
        bound, critical = bound_of_step(report.lanes, speeds, shared_cores=shared_cores)
        trial.outcome.reports.append(
            dataclasses.replace(report, bound_seconds=bound, critical=critical)
        )
    return trial


@dataclass(frozen=True, slots=True)
class _Subject:
    """An engine, and what draws its micro-batches, of `num_tokens` each."""

    engine: OffloadEngine
    draw: Callable[[], MicroBatch]
    num_tokens: int


def _open(config: OffloadConfig) -> _Subject:
    run = config.run
    if run is None or (run.model is None and not run.hf_config):
        config = built_in_config(config)
        model = build_built_in(config)
        shape, dtype = (NUM_TOKENS, model.width), TORCH_DTYPES[config.precision.compute]
        return _Subject(
            initialize(model, config),
            lambda: {"hidden": torch.randn(shape, dtype=dtype)},
            NUM_TOKENS,
        )
    with opened_model(run) as named:
        vocabulary = vocabulary_size(named)
        engine = initialize(named, config)

    def draw() -> MicroBatch:
        tokens = torch.randint(vocabulary, (run.batch, run.sequence_length))
        return {"input_ids": tokens, "labels": tokens}

    return _Subject(engine, draw, run.batch * run.sequence_length)


def _step(subject: _Subject, trial: Trial, progress: Progress, number: int) -> None:
    engine = subject.engine
    started = time.perf_counter()
    count = engine.config.training.gradient_accumulation_steps
    losses, taken = take_step(engine, [subject.draw() for _ in range(count)])
    rate = count * subject.num_tokens / (time.perf_counter() - started)
    report = engine.report()
    if taken:
        trial.shown.append(report)
        trial.outcome.tokens += count * subject.num_tokens
    loss = statistics.mean(losses)
    progress.step(number, describe_step(report, loss=loss, tokens_per_second=rate))
