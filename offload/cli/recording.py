"""Timelines of single steps of a run: which ones, and the file that they are kept in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from offload.errors import OffloadError
from offload.state.session import OffloadEngine
from offload.telemetry import JsonlWriter, read_jsonl
from offload.timeline import StepTimeline

TIMELINE_NAME = "timeline.jsonl"
_TYPICAL_STEP = 5  # of a run: its trace is known, and the caches are warm


def steps_to_record(
    wanted: Sequence[int] | Literal["auto"], first: int, last: int
) -> frozenset[int]:
    """The numbers of the steps to record, of a run that takes those from `first` to `last`."""
    if wanted == "auto":
        return frozenset({min(first + _TYPICAL_STEP - 1, last)})
    return frozenset(wanted)


class Recorder:
    """Has an engine record the steps asked for, and appends each to a file."""

    def __init__(self, engine: OffloadEngine, path: Path, steps: frozenset[int]) -> None:
        self._engine = engine
        self._path = path
        self._steps = steps
        self._number = 0

    def begin(self, number: int) -> None:
        """Step `number` is about to be taken."""
        if number in self._steps:
            self.collect(now=True)
            self._number = number
            self._engine.record_timeline()

    def collect(self, *, now: bool = False) -> None:
        """Keep what has been recorded; with `now` nothing that comes later is waited for."""
        timeline = self._engine.recorded_timeline(now=now)
        if timeline is not None:
            with JsonlWriter(self._path) as file:
                file.write(dataclasses.replace(timeline, step=self._number).to_dict())


def read_timelines(run_dir: str | os.PathLike[str]) -> dict[int, StepTimeline]:
    """Return the recorded steps of a run by number, in their order; {} where there are none.

    Raises:
        OffloadError: the file is not one of timelines.
    """
    path = Path(run_dir) / TIMELINE_NAME
    try:
        timelines = [StepTimeline.from_dict(entry) for entry in read_jsonl(path)]
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise OffloadError(f"{path} has no timelines of a run: {error!r}") from error
    return dict(sorted({each.step: each for each in timelines}.items()))


def recorded_step(run_dir: str | os.PathLike[str], step: int | None) -> StepTimeline:
    """The timeline of a step of a run, by default of the last one that was recorded.

    Raises:
        OffloadError: that step was not recorded; says which were.
    """
    timelines = read_timelines(run_dir)
    if not timelines:
        raise OffloadError(
            f"{Path(run_dir) / TIMELINE_NAME} does not exist: no step of the run was recorded",
            expected="a run with run.trace_steps, which names the steps to record",
        )
    if step is None:
        return timelines[max(timelines)]
    if step not in timelines:
        raise OffloadError(
            f"step {step} of the run was not recorded",
            expected=f"one of {', '.join(map(str, timelines))}, or run.trace_steps = [{step}]",
        )
    return timelines[step]
