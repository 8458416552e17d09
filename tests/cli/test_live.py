"""The live view: what it says, how often it is drawn, and how it leaves the terminal."""

from __future__ import annotations

import io
import itertools
import threading
from pathlib import Path

import pytest
from rich.console import Console

from offload.cli.live import RunView, bar, sparkline
from offload.cli.progress import LEAST_SECONDS, Progress
from offload.telemetry import LaneReport, RetryReport, StepReport, TierReport

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


def report(number: int = 1, *, faults: int = 2, retries: int = 0) -> StepReport:
    return StepReport(
        step=number,
        tiers={
            "device": TierReport(1 << 20, 1 << 19, 3 << 18),
            "nvme": TierReport(0, 0, 0),
        },
        lanes={"nvme_read": LaneReport(10**9, 0.5), "d2h": LaneReport()},
        bound_seconds=1.5,
        measured_seconds=2.0,
        faults=faults,
        retries=RetryReport(retries, "read failed"),
    )


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=40)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(view: RunView) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(view)
    return written(console)


def test_it_says_what_a_step_was() -> None:
    view = RunView(10)
    assert "the first step is under way" in shown(view)
    for number in range(1, 5):
        view.add(number, report(number), loss=5.0 - number, tokens_per_second=1234.5)
    text = shown(view)
    for part in ("step 4/10", "1,234 tokens/s", "0:00:12 left", "loss 1.000", "█▆▃▁",
                 "512.00 KiB", "768.00 KiB", "1.00 MiB", "2.00 GB/s", "75%", "faults 2, in all 8",
                 "efficiency 75%", "checkpoint none yet"):  # fmt: skip
        assert part in text, part
    assert "d2h" not in text, "it did nothing"
    assert "nvme " not in text, "it is not used"
    assert "made again" not in text
    view.held_out, view.checkpoint = 0.75, Path("a/step-00000003")
    view.add(5, report(5, retries=3), loss=float("nan"), tokens_per_second=1.0)
    for part in ("held out 0.750", "checkpoint step-00000003", "I/O made again 3", "loss nan"):
        assert part in shown(view), part


def test_bars_and_lines_stay_in_their_width() -> None:
    for share, mark in ((0.0, 0.0), (0.5, 0.75), (1.0, 0.0), (7.0, 9.0), (-1.0, 0.3)):
        assert len(bar(share, mark).plain) == 24
    assert bar(0.5, 0.75).plain == "█" * 12 + "▒" * 6 + "░" * 6
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert sparkline([float("inf")]) == " "


def test_it_is_drawn_at_most_four_times_a_second_and_at_the_end() -> None:
    console, now = terminal(), [0.0]
    view = RunView(1000)
    drawn = []
    with Progress(console, steps=1000, log_every=1, view=view, clock=lambda: now[0]) as progress:
        for number in range(1, 1001):
            before = len(written(console))
            view.add(number, report(), loss=1.0, tokens_per_second=1.0)
            progress.step(number, [])
            if len(written(console)) > before:
                drawn.append(now[0])
            now[0] += 0.01
    gaps = [later - earlier for earlier, later in itertools.pairwise(drawn)]
    assert min(gaps[:-1]) >= LEAST_SECONDS
    assert 35 <= len(drawn) <= 42
    assert "step 1000/1000" in written(console)


def test_nothing_of_it_runs_beside_the_training() -> None:
    before = threading.active_count()
    with Progress(terminal(), steps=2, log_every=1, view=RunView(2)) as progress:
        progress.step(1, [])
        assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_terminal_as_it_was(error: type[BaseException]) -> None:
    console = terminal()

    def interrupted() -> None:
        with Progress(console, steps=9, log_every=1, view=RunView(9)) as progress:
            progress.step(1, [])
            progress.note("a line of its own")
            raise error

    with pytest.raises(error):
        interrupted()
    text = written(console)
    assert "a line of its own" in text
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)


def test_without_a_terminal_there_are_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Progress(console, steps=5, log_every=2, view=RunView(5)) as progress:
        for number in range(1, 6):
            progress.step(number, [f"loss {number}"])
    lines = written(console).splitlines()
    assert lines == [f"step {n}/5  loss {n}" for n in (1, 2, 4, 5)]
    assert "\x1b" not in written(console)


def test_without_a_view_it_is_a_bar_and_a_line() -> None:
    console = terminal()
    with Progress(console, steps=2, log_every=1) as progress:
        progress.step(2, ["loss 1.0"])
    assert "step 2/2" in written(console)
    assert "loss 1.0" in written(console)
