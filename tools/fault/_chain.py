"""Lives one after the other, and the judgement of what each one finds; see `_job.py`."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault._job import LAST_STEP, PLACEMENTS, PRECISIONS, Job, Life, Scenario, Uninterrupted
from fault.result import Row
from offload.state import durable

Cut = Callable[[Life, random.Random], None]
_MOMENTS = ("fork", "begun", "saving", "saving", "saving", "saved", "saved")
_COUNTS = (1, 1, 2, 3, 8)  # of such moments; after many saves extents are written again
_MOST_DELAY_PERIODS = 2.5  # a life is killed within so many steps and saves


@dataclass
class Chain:
    """One run of a scenario in `folder`, from life to life.

    Attributes:
        newest: the newest step that was acknowledged or loaded; nothing older may come back.
    """

    scenario: Scenario
    precision: str
    digests: list[str]  # of the uninterrupted run, by step
    folder: Path
    newest: int | None = None

    @property
    def nvme(self) -> Path:
        return self.folder / "nvme"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def is_over(self) -> bool:
        return self.newest is not None and self.newest >= LAST_STEP - 2

    def job(self, draw: random.Random, **options: Any) -> Job:
        """What the next life does; its placement is drawn, unless it is given."""
        self.nvme.mkdir(parents=True, exist_ok=True)
        placement = options.pop("placement", None) or draw.choice(PLACEMENTS)
        return Job(
            self.scenario,
            self.precision,
            placement,
            self.nvme,
            self.checkpoints,
            self.newest is not None,
            **options,
        )

    def judge(self, life: Life, row: Row, *, error_is_expected: bool = False) -> None:
        """Count in `row` what a life that has ended found, and remember what it acknowledged.

        With `error_is_expected` it may have ended by an error, for which something else is to
        blame than what it found.
        """
        has_begun = False
        for report in life.reports:
            kind = report["kind"]
            if kind == "loaded":
                self._judge_loaded(report, row)
            elif kind == "older" and report["damaged"] and not error_is_expected:
                row.lost += 1
                row.details.append(f"{self}: of older ones are damaged: {report['damaged']}")
                self.restart()  # else it is found again and again
                return
            elif kind == "fresh" and self.newest is not None:
                row.lost += 1
                row.details.append(f"{self}: step {self.newest} was there, now there is nothing")
            elif kind == "saved":
                self.newest = report["step"]
            elif kind == "swept" and report["left"]:
                row.problems.append(f"{self}: a save leaves {report['left']}")
            elif kind == "error" and error_is_expected:
                pass
            elif kind == "error" and not has_begun and self.newest is not None:
                row.lost += 1
                row.details.append(f"{self}: step {self.newest} is gone: {report['text']}")
                self.restart()
                return
            elif kind == "error":
                row.problems.append(f"{self}: {report['text']}")
            has_begun = has_begun or kind in {"loaded", "fresh"}

    def _judge_loaded(self, report: dict[str, Any], row: Row) -> None:
        step = report["step"]
        if self.newest is not None and step < self.newest:
            row.lost += 1
            row.details.append(f"{self}: step {self.newest} was there, loaded is {step}")
        elif report["digest"] != self.digests[step]:
            row.mixed += 1
            row.details.append(f"{self}: step {step} has not the bits of that step")
        elif report["position"] != step:
            row.mixed += 1
            row.details.append(f"{self}: step {step} has the position {report['position']}")
        elif report["warnings"]:
            row.problems.append(f"{self}: loading warns: {report['warnings'][0]}")
        self.newest = step

    def restart(self) -> None:
        """Forget and remove everything, durably."""
        self.newest = None
        shutil.rmtree(self.folder, ignore_errors=True)
        durable.sync_folder(self.folder.parent)  # a power cut would bring it back

    def __str__(self) -> str:
        return f"{self.scenario.name}, {self.precision}"


@dataclass
class Chains:
    """One scenario's chains, a precision after the other."""

    scenario: Scenario
    runs: Uninterrupted
    folder: Path
    draw: random.Random
    row: Row = field(init=False)
    chain: Chain = field(init=False)
    period_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.row = Row(self.scenario.name)
        self._count = 0
        self._moments: Counter[str] = Counter()
        self._start_chain()
        self.period_seconds = self._measured_period()

    def _start_chain(self) -> None:
        precision = PRECISIONS[self._count % len(PRECISIONS)]
        self._count += 1
        self.chain = Chain(self.scenario, precision, self.runs[precision], self.folder)
        self.chain.restart()

    def _measured_period(self) -> float:
        """Seconds of a step and its save, in a life that nobody kills."""
        began = time.perf_counter()
        self.undisturbed(num_steps=8)
        return (time.perf_counter() - began) / 16  # opening and loading are half of it

    def undisturbed(self, **options: Any) -> None:
        """A life that ends by itself; judges what the lives before it have left."""
        if self.chain.is_over:
            self._start_chain()
        life = Life(self.chain.job(self.draw, **options))
        life.end()
        self.chain.judge(life, self.row)

    def disturbed(
        self, cut: Cut, *, recover: Callable[[], None] | None = None, **options: Any
    ) -> Life:
        """One trial: a life that `cut` ends; `recover` is called when it is dead.

        With `recover` it may also end by an error of its own.
        """
        if self.chain.is_over:
            self._start_chain()
        self.row.trials += 1
        life = Life(self.chain.job(self.draw, **options))
        try:
            cut(life, self.draw)
        finally:
            life.kill()
            life.end()
            if recover is not None:
                recover()
        self._tally(life)
        lost, mixed = self.row.lost, self.row.mixed
        self.chain.judge(life, self.row, error_is_expected=recover is not None)
        kinds = {report["kind"] for report in life.reports}
        is_damaged = any(report.get("damaged") for report in life.reports)
        if recover is not None and (is_damaged or not kinds & {"loaded", "fresh"}):
            self.undisturbed(num_steps=0)  # whether it cannot be read, or there just was no disk
        self.row.lost = min(self.row.lost, lost + 1)
        self.row.mixed = min(self.row.mixed, mixed + 1 - (self.row.lost - lost))  # counted once
        return life

    def _tally(self, life: Life) -> None:
        """Count in the row's remark at which moment a life ended."""
        kinds = [report["kind"] for report in life.reports if report["kind"] != "error"]
        last = kinds[-1] if kinds else "none"
        moment = {"none": "loading", "older": "loading", "saving": "a save", "end": "nothing"}.get(
            last, "a step"
        )
        self._moments[moment] += 1
        self._moments["acknowledged"] += sum(r["kind"] == "saved" for r in life.reports)
        counts = ", ".join(f"{self._moments[m]} in {m}" for m in ("loading", "a step", "a save"))
        self.row.remark = f"{counts}; {self._moments['acknowledged']} saves were acknowledged"

    def wait_a_while(self, life: Life, *, after_saves: int = 0) -> None:
        """Until a random moment of loading, steps and saves, or of what follows so many saves."""
        if after_saves:
            life.wait_for("saved", count=after_saves)
            return
        kind = self.draw.choice(_MOMENTS)
        periods = self.draw.uniform(0, _MOST_DELAY_PERIODS)
        if kind == "begun":
            life.wait_for("loaded", "fresh")
        elif kind in {"saving", "saved"}:
            life.wait_for(kind, count=self.draw.choice(_COUNTS))
            periods /= _MOST_DELAY_PERIODS
        time.sleep(periods * self.period_seconds)
