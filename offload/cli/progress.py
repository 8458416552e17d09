"""The progress of a run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console, RichCast
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.errors import format_bytes
from offload.telemetry import LaneReport, StepReport, TierReport

LEAST_SECONDS = 0.25  # between two drawings


def format_rate(lane: LaneReport) -> str:
    """Achieved bandwidth, e.g. ``"1.20 GB/s"``; ``"-"`` for an idle lane."""
    if lane.busy_seconds <= 0 or lane.bytes <= 0:
        return "-"
    return f"{lane.bytes / lane.busy_seconds / 1e9:.2f} GB/s"


def _occupancy(name: str, tier: TierReport) -> str:
    if tier.budget_bytes <= 0:
        return ""
    share = tier.used_bytes / tier.budget_bytes
    return f"{name} {format_bytes(tier.used_bytes)}" + (f" ({share:.0%})" if share >= 0.01 else "")


def describe_step(report: StepReport, *, loss: float, tokens_per_second: float) -> list[str]:
    """The parts of a progress line: loss, tokens/s, tier occupancy, lane bandwidths, faults."""
    tiers = [_occupancy(name, tier) for name, tier in report.tiers.items()]
    lanes = [
        f"{name} {format_rate(lane)}"
        for name, lane in report.lanes.items()
        if format_rate(lane) != "-"
    ]
    parts = [f"loss {loss:.3f}", f"{tokens_per_second:,.0f} tok/s", *filter(None, tiers), *lanes]
    return [*parts, f"{report.faults} faults"] if report.faults else parts


class Progress:
    """Shows steps; on a terminal a view that is redrawn, elsewhere a line at times.

    Args:
        console: where to.
        steps: how many there will be.
        log_every: steps between two lines.
        view: what is redrawn; None: a bar and a line.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        log_every: int,
        view: RichCast | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._view = view
        self._clock = clock
        self._drawn_at = -math.inf
        self._steps = steps
        self._log_every = log_every
        # Drawn from here and not by a thread of rich's, so never in the middle of anything.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of its own, e.g. an evaluation."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, number: int, parts: list[str]) -> None:
        """Step `number` of all is done; `parts` are those of `describe_step`."""
        if self._live is not None:
            now = self._clock()
            is_due = now - self._drawn_at >= LEAST_SECONDS or number >= self._steps
            if is_due:
                self._drawn_at = now
            self._live.update(self._view or self._line(number, parts), refresh=is_due)
        elif number % self._log_every == 0 or number in {1, self._steps}:
            self.note(f"step {number}/{self._steps}  " + "  ".join(parts))

    def _line(self, number: int, parts: list[str]) -> Table:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            f"step {number}/{self._steps}", ProgressBar(total=self._steps, completed=number)
        )
        body = Table.grid()
        body.add_row(head)
        body.add_row(Text("  ".join(parts), no_wrap=True, overflow="ellipsis"))
        return body
