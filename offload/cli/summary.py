"""What a run did, in tables, and whether what it stated about itself holds.

[Note: expectations]
weights   bytes of the weights on all tiers, in the compute dtype
state     weights and optimizer state on all tiers: what a checkpoint holds
nvme      of every step but the first (whose weights were placed beforehand): bytes read from nvme;
          at least weights, gradients and optimizer state minus the host budget must come from there
fall      1 - (held-out loss after the last step) / (held-out loss before the first)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.cli.progress import format_rate
from offload.config import ExpectSection
from offload.errors import format_bytes
from offload.telemetry import LaneReport, StepReport

# From this step on the trace is known, so prefetches are planned and nothing should fault.
STEADY_STEP = 3


@dataclass(slots=True)
class Outcome:
    """What a run has collected: `placed_bytes[tier][state_class]`, a report a step, losses."""

    placed_bytes: Mapping[str, Mapping[str, int]]
    reports: list[StepReport] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    held_out_before: float | None = None
    held_out_after: float | None = None

    def class_bytes(self, *state_classes: str) -> int:
        """Bytes of these state classes on all tiers."""
        return sum(
            nbytes
            for classes in self.placed_bytes.values()
            for name, nbytes in classes.items()
            if name in state_classes
        )

    @property
    def steady(self) -> list[StepReport]:
        """Reports of the steps that ran with a known trace; of all steps in a shorter run."""
        return self.reports[STEADY_STEP - 1 :] or self.reports

    @property
    def held_out_loss_fall(self) -> float | None:
        """Share by which the held-out loss fell; None before the second evaluation."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return 1 - self.held_out_after / self.held_out_before

    def to_dict(self) -> dict[str, Any]:
        """The run in plain values, for the metrics file."""
        steady = self.steady
        return {
            "kind": "summary",
            "steps": len(self.reports),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "placed_bytes": {tier: dict(held) for tier, held in self.placed_bytes.items()},
            "lane_bytes_per_step": {n: lane.bytes for n, lane in lanes_per_step(steady).items()},
            "efficiency": median_efficiency(steady),
            "faults": sum(report.faults for report in self.reports),
            "steady_faults": sum(report.faults for report in self.reports[STEADY_STEP - 1 :]),
            "held_out_before": self.held_out_before,
            "held_out_after": self.held_out_after,
            "held_out_loss_fall": self.held_out_loss_fall,
        }


def lanes_per_step(reports: Sequence[StepReport]) -> dict[str, LaneReport]:
    """Mean of each lane over the steps."""
    totals: dict[str, LaneReport] = {}
    for report in reports:
        for name, lane in report.lanes.items():
            totals[name] = totals.get(name, LaneReport()) + lane
    count = max(len(reports), 1)
    return {
        name: LaneReport(total.bytes // count, total.busy_seconds / count)
        for name, total in totals.items()
    }


def median_efficiency(reports: Sequence[StepReport]) -> float:
    """Median of bound / measured; 0.0 without steps."""
    return statistics.median(report.efficiency for report in reports) if reports else 0.0


def median_bound(reports: Sequence[StepReport]) -> float:
    """Median of the bounds in seconds; 0.0 without steps."""
    return statistics.median(report.bound_seconds for report in reports) if reports else 0.0


def print_summary(console: Console, outcome: Outcome) -> None:
    """Where the state was, what moved, how near to the bound, and what was learnt."""
    if not outcome.reports:
        console.print("no step was taken")
        return
    print_tables(console, outcome)
    faults = [report.faults for report in outcome.reports]
    lines = [
        f"{len(faults)} steps in {outcome.seconds:.1f} s, "
        f"{outcome.tokens / max(outcome.seconds, 1e-9):,.0f} tokens/s",
        describe_bound(outcome.steady),
        f"faults: {sum(faults)}, of them {sum(faults[STEADY_STEP - 1 :])} "
        f"from step {STEADY_STEP} on",
    ]
    update = outcome.reports[-1].update
    if update.on_device:
        num_buckets = len(update.on_device) + update.num_cpu
        lines.append(
            f"updated on the device: {len(update.on_device)} of {num_buckets} buckets "
            f"({update.reason})"
        )
    retried = [report.retries for report in outcome.reports if report.retries.count]
    if retried:
        lines.append(
            "I/O errors after which something was made again: "
            f"{sum(each.count for each in retried)}, the last one: {retried[-1].last}"
        )
    shrunk = [report.shrinks for report in outcome.reports if report.shrinks.count]
    lines += [each.last for each in shrunk]
    fall = outcome.held_out_loss_fall
    if fall is not None:
        lines.append(
            f"held-out loss: {outcome.held_out_before:.3f} -> {outcome.held_out_after:.3f}, "
            f"a fall of {fall:.1%}"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def print_tables(console: Console, outcome: Outcome) -> None:
    """Where the state was after the last step, and what lanes did in a steady one."""
    console.print(_state_table(outcome))
    console.print(_lane_table(outcome))


def describe_bound(steady: Sequence[StepReport]) -> str:
    """How long a step took, how near to its bound that is, and which lanes it was for."""
    measured = statistics.median(report.measured_seconds for report in steady)
    return (
        f"a step: {measured:.3f} s, physical bound {median_bound(steady):.3f} s, "
        f"efficiency {median_efficiency(steady):.0%}, critical lane {steady[-1].critical}, "
        f"bottleneck {steady[-1].bottleneck}"
    )


def mean_idle_share(reports: Sequence[StepReport], lane: str) -> float:
    """Mean over the steps of the share in which nothing was in flight on a lane."""
    return statistics.mean(report.idle_shares.get(lane, 1.0) for report in reports)


def _state_table(outcome: Outcome) -> Table:
    tiers = outcome.reports[-1].tiers
    classes = sorted({name for held in outcome.placed_bytes.values() for name in held})
    classes = [name for name in classes if outcome.class_bytes(name)]
    table = Table(title="where the state was", title_justify="left")
    for name in ("tier", *classes, "peak", "budget"):
        table.add_column(name, justify="left" if name == "tier" else "right", no_wrap=True)
    for tier, held in outcome.placed_bytes.items():
        report = tiers.get(tier)
        peak = format_bytes(report.peak_bytes) if report else "-"
        budget = format_bytes(report.budget_bytes) if report and report.budget_bytes else "-"
        amounts = [format_bytes(held.get(name, 0)) for name in classes]
        table.add_row(tier, *amounts, peak, budget)
    totals = [format_bytes(outcome.class_bytes(name)) for name in classes]
    table.add_row("all", *totals, "", "", style="bold")
    return table


def _lane_table(outcome: Outcome) -> Table:
    table = Table(title="moved in a step", title_justify="left")
    for name in ("lane", "bytes", "busy", "idle", "bandwidth"):
        table.add_column(name, justify="left" if name == "lane" else "right", no_wrap=True)
    steady = outcome.steady
    for name, lane in lanes_per_step(steady).items():
        if lane == LaneReport():
            continue
        busy = f"{lane.busy_seconds * 1e3:.1f} ms"
        idle = mean_idle_share(steady, name)
        table.add_row(name, format_bytes(lane.bytes), busy, f"{idle:.0%}", format_rate(lane))
    return table


def failed_expectations(outcome: Outcome, expect: ExpectSection) -> list[str]:
    """One line for each expectation that does not hold, see [Note: expectations]."""
    if not outcome.reports:
        return []
    tiers = outcome.reports[-1].tiers
    weights = outcome.class_bytes("weights")
    state = weights + outcome.class_bytes("optimizer")
    ratios = [
        ("weights_over_device", expect.weights_over_device, weights, tiers["device"].budget_bytes),
        ("state_over_host", expect.state_over_host, state, tiers["host"].budget_bytes),
    ]
    failed = [
        f"{name} = {wanted}: {have} bytes over a budget of {budget} are {have / budget:.2f}"
        for name, wanted, have, budget in ratios
        if wanted is not None and have < wanted * budget
    ]
    if expect.nvme_reads_cover_state:
        due = state + outcome.class_bytes("gradients") - tiers["host"].budget_bytes
        reads = [report.lanes["nvme_read"].bytes for report in outcome.reports[1:]]
        # With the step overlapped, state may be read before or after the step that it belongs to.
        if not reads or sum(reads) < due * len(reads):
            failed.append(
                f"nvme_reads_cover_state: {len(reads)} steps read {sum(reads)} bytes, "
                f"due were {due} in each"
            )
    fall = outcome.held_out_loss_fall
    wanted_fall = expect.held_out_loss_fall
    if wanted_fall is not None and not (fall is not None and fall >= wanted_fall):
        failed.append(f"held_out_loss_fall = {wanted_fall}: the loss fell by {fall}")
    return failed
