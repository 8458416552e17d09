"""`offload report`: a run's outcome, read back from the metrics that it wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.cli.summary import Outcome
from offload.errors import OffloadError
from offload.telemetry import StepReport, read_jsonl


@dataclass(slots=True)
class RunRecord:
    """What a run has written of itself.

    Attributes:
        outcome: the run in sum.
        steps: the metrics of each step that counts, by number, in their order.
        held_out: the losses of the evaluations, by the steps taken before.
        machine: what it was made on, in words; {} where it does not say.
    """

    outcome: Outcome
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)


def read_outcome(run_dir: str | os.PathLike[str]) -> Outcome:
    """Return what the run has done until now; see `read_run`."""
    return read_run(run_dir).outcome


def read_run(run_dir: str | os.PathLike[str]) -> RunRecord:
    """Return what the run has done until now, as its last start tells it.

    Raises:
        OffloadError: the folder has no metrics, or they are no metrics of a run.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        entries = read_jsonl(path)
        return _record(entries)
    except FileNotFoundError as error:
        raise OffloadError(
            f"{path} does not exist",
            expected="the output folder of `offload train` (run.output)",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise OffloadError(f"{path} is not the metrics file of a run: {error!r}") from error


def _record(entries: list[dict[str, Any]]) -> RunRecord:
    """Return the run; a start at step n continues from there: what came after n is void."""
    outcome = Outcome(placed_bytes={})
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, float] = {}
    machine: dict[str, str] = {}
    for entry in entries:
        if entry["kind"] == "start":
            outcome.placed_bytes = entry["placed_bytes"]
            machine = dict(entry.get("machine", {}))
            steps = {number: step for number, step in steps.items() if number <= entry["step"]}
            held_out = {
                number: loss for number, loss in held_out.items() if number <= entry["step"]
            }
        elif entry["kind"] == "step":
            steps[entry["step"]] = entry
        elif entry["kind"] == "eval":
            held_out[entry["step"]] = entry["held_out_loss"]
        elif entry["kind"] != "summary":
            raise ValueError(f"unknown kind {entry['kind']!r}")
    tokens = 0.0
    steps = dict(sorted(steps.items()))
    record = RunRecord(outcome, steps, dict(sorted(held_out.items())), machine)
    for step in steps.values():
        report = StepReport.from_dict(step["report"])
        outcome.reports.append(report)
        outcome.losses.append(step["loss"])
        outcome.seconds += report.measured_seconds
        tokens += step["tokens_per_second"] * report.measured_seconds
    outcome.tokens = round(tokens)
    outcome.held_out_before = held_out.pop(0, None)
    outcome.held_out_after = held_out[max(held_out)] if held_out else None
    return record
