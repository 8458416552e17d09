"""`offload report` reads a run's metrics, whole, cut off or continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from offload.cli.main import main
from offload.cli.report import read_outcome
from offload.errors import OffloadError
from offload.telemetry import (
    JsonlWriter,
    LaneReport,
    RetryReport,
    ShrinkReport,
    StepReport,
    TierReport,
    UpdateReport,
)


def step(number: int, *, loss: float, faults: int = 0) -> dict[str, Any]:
    report = StepReport(
        step=number,
        tiers={"device": TierReport(1 << 20, 1 << 10, 1 << 19)},
        lanes={"nvme_read": LaneReport(4096, 0.25), "cpu": LaneReport(0, 0.5)},
        bound_seconds=0.5,
        measured_seconds=2.0,
        faults=faults,
        update=UpdateReport((0, 2), 3, "measured"),
        critical="nvme_read",
        retries=RetryReport(number, "read of a chunk failed") if number > 2 else RetryReport(),
        shrinks=ShrinkReport(1, 7, 8, "memory ran short") if number == 4 else ShrinkReport(),
    )
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tokens_per_second": 50.0,
        "report": report.to_dict(),
    }


def start(number: int) -> dict[str, Any]:
    placed_bytes = {"device": {"weights": 1 << 20}, "nvme": {"optimizer": 3 << 20}}
    return {"kind": "start", "step": number, "placed_bytes": placed_bytes}


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "held_out_loss": loss}


def write_run(folder: Path, *entries: dict[str, Any]) -> Path:
    with JsonlWriter(folder / "metrics.jsonl") as metrics:
        for entry in (start(0), *entries):
            metrics.write(entry)
    return folder


def test_a_resumed_run_counts_a_repeated_step_once(tmp_path: Path) -> None:
    first = [evaluation(0, 4.0), step(1, loss=3.5), step(2, loss=9.0, faults=7), evaluation(2, 9.0)]
    resumed = [start(1), step(2, loss=3.0), evaluation(2, 3.0)]
    outcome = read_outcome(write_run(tmp_path, *first, *resumed))
    assert outcome.losses == [3.5, 3.0]
    assert [report.faults for report in outcome.reports] == [0, 0]
    assert (outcome.tokens, outcome.seconds) == (200, 4.0)
    assert outcome.held_out_loss_fall == 0.25


def test_a_run_that_began_anew_leaves_the_earlier_one_out(tmp_path: Path) -> None:
    earlier = [step(1, loss=9.0), step(2, loss=9.0), evaluation(2, 9.0)]
    outcome = read_outcome(write_run(tmp_path, *earlier, start(0), step(1, loss=3.0)))
    assert outcome.losses == [3.0]
    assert outcome.held_out_after is None


def test_the_command_prints_the_summary(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(write_run(tmp_path, step(1, loss=3.0)))])
    assert result.exit_code == 0, result.output
    for part in ("critical lane nvme_read", "3.00 MiB", "efficiency 25%", "bottleneck cpu"):
        assert part in result.output
    (row,) = (line for line in result.output.splitlines() if "nvme_read" in line and "ms" in line)
    assert "88%" in row, "it was busy for an eighth of the step"
    assert "updated on the device: 2 of 5 buckets (measured)" in result.output


def test_the_command_prints_errors_that_nobody_was_told_of(tmp_path: Path) -> None:
    run = write_run(tmp_path, *(step(number, loss=3.0) for number in range(1, 6)))
    result = CliRunner().invoke(main, ["report", str(run)])
    assert "something was made again: 12, the last one: read of a chunk failed" in result.output
    assert result.output.count("memory ran short") == 1


def test_a_run_without_a_step(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(write_run(tmp_path))])
    assert (result.exit_code, result.output.splitlines()[0]) == (0, "no step was taken")


@pytest.mark.parametrize("content", [None, '{"kind": "other"}\n', "[1]\n", "not json\n"])
def test_what_is_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(OffloadError, match=r"metrics\.jsonl"):
        read_outcome(tmp_path)
    assert CliRunner().invoke(main, ["report", str(tmp_path)]).exit_code == 2
