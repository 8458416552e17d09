"""`offload report`: a run's outcome, read back from the metrics that it wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offload.cli.summary import Outcome
from offload.errors import OffloadError
from offload.telemetry import StepReport, read_jsonl


def read_outcome(run_dir: str | os.PathLike[str]) -> Outcome:
    """Return what the run has done until now; of a step that was repeated after resuming, the last.

    Raises:
        OffloadError: the folder has no metrics, or they are no metrics of a run.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        entries = read_jsonl(path)
        return _outcome(entries)
    except FileNotFoundError as error:
        raise OffloadError(
            f"{path} does not exist",
            expected="the output folder of `offload train` (run.output)",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise OffloadError(f"{path} is not the metrics file of a run: {error!r}") from error


def _outcome(entries: list[dict[str, Any]]) -> Outcome:
    of_kind: dict[str, list[dict[str, Any]]] = {"start": [], "step": [], "eval": [], "summary": []}
    for entry in entries:
        of_kind[entry["kind"]].append(entry)
    if not of_kind["start"]:
        return Outcome(placed_bytes={})
    steps = {entry["step"]: entry for entry in of_kind["step"]}
    evaluations = {entry["step"]: entry["held_out_loss"] for entry in of_kind["eval"]}
    outcome = Outcome(placed_bytes=of_kind["start"][-1]["placed_bytes"])
    for number in sorted(steps):
        outcome.reports.append(StepReport.from_dict(steps[number]["report"]))
        outcome.losses.append(steps[number]["loss"])
    outcome.seconds = sum(report.measured_seconds for report in outcome.reports)
    outcome.tokens = round(
        sum(
            steps[number]["tokens_per_second"] * report.measured_seconds
            for number, report in zip(sorted(steps), outcome.reports, strict=True)
        )
    )
    outcome.held_out_before = evaluations.get(0)
    later = [step for step in evaluations if step > 0]
    outcome.held_out_after = evaluations[max(later)] if later else None
    return outcome
