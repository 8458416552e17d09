"""The progress of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.errors import format_bytes
from offload.telemetry import LaneReport, StepReport, TierReport


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
    """Shows steps; on a terminal a bar and a line that are redrawn, elsewhere a line at times."""

    def __init__(self, console: Console, *, steps: int, log_every: int) -> None:
        self._console = console
        self._steps = steps
        self._log_every = log_every
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None

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
            head = Table.grid(padding=(0, 1))
            head.add_row(
                f"step {number}/{self._steps}", ProgressBar(total=self._steps, completed=number)
            )
            body = Table.grid()
            body.add_row(head)
            body.add_row(Text("  ".join(parts), no_wrap=True, overflow="ellipsis"))
            self._live.update(body)
        elif number % self._log_every == 0 or number in {1, self._steps}:
            self.note(f"step {number}/{self._steps}  " + "  ".join(parts))
