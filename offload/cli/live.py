"""The live view of a run: tiers, lanes, loss and what is left, in one panel that is redrawn."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.cli.progress import format_rate
from offload.errors import format_bytes
from offload.telemetry import LaneReport, StepReport

_BAR_WIDTH = 24
_MOST_LOSSES = 48
_RECENT_STEPS = 20  # whose median says how long the others will take
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class RunView:
    """What the panel shows; printing it draws it.

    Attributes:
        num_steps: of the whole run.
        number: steps taken.
        held_out: the last held-out loss.
        checkpoint: the newest that is durable.
    """

    num_steps: int
    number: int = 0
    held_out: float | None = None
    checkpoint: Path | None = None
    _report: StepReport | None = None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_LOSSES))
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _tokens_per_second: float = 0.0
    _faults: int = 0
    _retries: int = 0

    def add(
        self, number: int, report: StepReport, *, loss: float, tokens_per_second: float
    ) -> None:
        """Step `number` has been taken."""
        self.number = number
        self._report = report
        self._losses.append(loss)
        self._seconds.append(report.measured_seconds)
        self._tokens_per_second = tokens_per_second
        self._faults += report.faults
        self._retries += report.retries.count

    @property
    def left_seconds(self) -> float:
        """How long the steps that are left will take, if they are like the last ones."""
        each = statistics.median(self._seconds) if self._seconds else 0.0
        return each * max(0, self.num_steps - self.number)

    def __rich__(self) -> RenderableType:
        if self._report is None:
            return Text("the first step is under way")
        parts = (self._head(), self._tiers(self._report), self._lanes(self._report), self._foot())
        return Panel(Group(*parts), title="offload train", title_align="left", width=88)

    def _head(self) -> Table:
        head = Table.grid(padding=(0, 2))
        left = timedelta(seconds=round(self.left_seconds))
        head.add_row(
            Text(f"step {self.number}/{self.num_steps}", style="bold"),
            ProgressBar(total=self.num_steps, completed=self.number, width=_BAR_WIDTH),
            f"{self._tokens_per_second:,.0f} tokens/s",
            f"{left} left",
        )
        held_out = "" if self.held_out is None else f"held out {self.held_out:.3f}"
        loss = Text(f"loss {self._losses[-1]:.3f}", style="bold")
        head.add_row(loss, Text(sparkline(list(self._losses)[-_BAR_WIDTH:]), "cyan"), held_out, "")
        return head

    def _tiers(self, report: StepReport) -> Table:
        table = _titled("tier", "in use", "", "peak", "budget")
        for name, tier in report.tiers.items():
            if not tier.budget_bytes:
                continue
            table.add_row(
                name,
                format_bytes(tier.used_bytes),
                bar(tier.used_bytes / tier.budget_bytes, tier.peak_bytes / tier.budget_bytes),
                format_bytes(tier.peak_bytes),
                format_bytes(tier.budget_bytes),
            )
        return table

    def _lanes(self, report: StepReport) -> Table:
        table = _titled("lane", "bandwidth", "", "idle", "a step")
        idle = report.idle_shares
        for name, lane in report.lanes.items():
            if lane != LaneReport():
                share = idle.get(name, 1.0)
                moved = format_bytes(lane.bytes) if lane.bytes else "-"
                table.add_row(name, format_rate(lane), bar(1 - share), f"{share:.0%}", moved)
        return table

    def _foot(self) -> Text:
        assert self._report is not None
        saved = "none yet" if self.checkpoint is None else self.checkpoint.name
        parts = [
            f"faults {self._report.faults}, in all {self._faults}",
            f"efficiency {self._report.efficiency:.0%}",
            f"checkpoint {saved}",
        ]
        if self._retries:
            parts.insert(1, f"I/O made again {self._retries}")
        return Text(" · ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def bar(share: float, mark: float = 0.0) -> Text:
    """A bar that is full to `share`, and marked from there to `mark`; both from 0 to 1."""
    full = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH)
    marked = max(full, round(min(max(mark, 0.0), 1.0) * _BAR_WIDTH))
    text = Text("█" * full, style="green")
    text.append("▒" * (marked - full), style="yellow")
    text.append("░" * (_BAR_WIDTH - marked), style="bright_black")
    return text


def sparkline(values: Sequence[float]) -> str:
    """A character a value, the higher, the fuller; what is not finite is a blank."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )


def _titled(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(names):
        is_left = number == 0 or not name
        table.add_column(name, justify="left" if is_left else "right", no_wrap=True, min_width=10)
    return table
