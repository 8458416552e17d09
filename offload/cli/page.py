"""One HTML page of a run, which needs nothing beside itself: no network, no script.

Everything that comes from the run is escaped. The theme is that of the reader's system.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from offload.cli.charts import Points, line_chart, timeline_chart
from offload.cli.progress import format_rate
from offload.cli.report import RunRecord
from offload.cli.summary import describe_bound, lanes_per_step, mean_idle_share
from offload.errors import format_bytes
from offload.telemetry import LaneReport, StepReport
from offload.timeline import StepTimeline

_STYLE = """
:root{color-scheme:light dark;--b:#fff;--t:#1c2024;--m:#667;--g:#dde1e6;--p:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--b:#14171a;--t:#e6e8ea;--m:#99a;--g:#333a41;--p:#1d2125}}
body{background:var(--b);color:var(--t);font:14px/1.45 system-ui,sans-serif;max-width:1180px;
margin:24px auto;padding:0 16px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:28px 0 8px}p{margin:4px 0;color:var(--m)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:12px}
figure{background:var(--p);border-radius:8px;margin:0;padding:10px 12px}.wide{overflow-x:auto}
figcaption{font-weight:600;margin-bottom:4px}figcaption span{font-weight:400;margin-left:14px;
white-space:nowrap;display:inline-block}
figcaption i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
svg{width:100%;height:auto;display:block}text{fill:var(--t);font-size:12px}
.tick{fill:var(--m);font-size:11px}.grid{stroke:var(--g)}.line{fill:none;stroke-width:1.8}
.fault{fill:#d33}table{margin-top:10px;border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:3px 14px 3px 0;text-align:right}td:first-child,th:first-child{text-align:left}
th{color:var(--m);font-weight:500;border-bottom:1px solid var(--g)}
pre{background:var(--p);border-radius:8px;padding:12px;overflow-x:auto}
.use{width:220px}.use i{display:block;height:10px;border-radius:2px;min-width:1px}
.facts td{text-align:left}
"""
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#84cc16")


def render_page(
    name: str,
    run: RunRecord,
    config: Mapping[str, Any],
    timelines: Mapping[int, StepTimeline],
) -> str:
    """Return the page of a run.

    Args:
        name: of the run.
        run: what it has written of itself.
        config: what it was told.
        timelines: the steps that were recorded.
    """
    body = [f"<h1>{escape(name)}</h1>", *_summary(run)]
    if run.steps:
        body += ["<h2>Learning</h2>", _grid(_learning(run))]
        body += ["<h2>Time</h2>", _grid(_time(run)), _lanes(run.outcome.steady)]
    if timelines:
        body += ["<h2>A step, lane by lane</h2>", timeline_chart(timelines[max(timelines)])]
    if run.steps:
        body += ["<h2>Memory</h2>", _grid(_memory(run)), _placement(run)]
    if run.machine:
        body += ["<h2>Machine</h2>", _table((), run.machine.items(), kind="facts")]
    if config:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        body += ["<h2>Configuration</h2>", f"<pre>{escape(text)}</pre>"]
    colours = "".join(
        f".c{number}{{stroke:{colour}}}.bar.c{number}{{fill:{colour};stroke:none}}"
        f"i.c{number}{{background:{colour}}}circle,.c{number} circle{{fill:{colour}}}"
        for number, colour in enumerate(_COLOURS)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(name)}</title><style>{_STYLE}{colours}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def read_config(run_dir: Path) -> dict[str, Any]:
    """The config that `offload train` has kept beside the metrics; {} where there is none."""
    try:
        kept = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _summary(run: RunRecord) -> list[str]:
    outcome = run.outcome
    if not outcome.reports:
        return ["<p>no step was taken</p>"]
    reports = outcome.reports
    rate = outcome.tokens / max(outcome.seconds, 1e-9)
    lines = [
        f"{len(run.steps)} steps in {outcome.seconds:.1f} s, {rate:,.0f} tokens/s",
        describe_bound(outcome.steady),
    ]
    if outcome.held_out_before is not None and outcome.held_out_after is not None:
        lines.append(f"held-out loss: {outcome.held_out_before:.3f} → {outcome.held_out_after:.3f}")
    counts = {
        "faults": sum(report.faults for report in reports),
        "I/O errors after which something was made again": sum(r.retries.count for r in reports),
        "shrinks of the host's budget": sum(report.shrinks.count for report in reports),
    }
    lines.append(", ".join(f"{what}: {count}" for what, count in counts.items()))
    lines += [report.retries.last for report in reports if report.retries.count][-1:]
    lines += [report.shrinks.last for report in reports if report.shrinks.count]
    return [f"<p>{escape(line)}</p>" for line in lines]


def _learning(run: RunRecord) -> list[str]:
    losses = {"training": _of_steps(run, "loss")}
    if run.held_out:
        losses["held out"] = list(run.held_out.items())
    return [
        line_chart("Loss", losses, from_zero=False),
        line_chart("Gradient norm", {"before clipping": _of_steps(run, "grad_norm")}),
        line_chart("Learning rate", {"first group": _of_steps(run, "lr")}),
    ]


def _time(run: RunRecord) -> list[str]:
    def use(lane: str) -> Callable[[StepReport], float]:
        return lambda report: 1 - report.idle_shares.get(lane, 1.0)

    lanes = [n for n, lane in lanes_per_step(run.outcome.steady).items() if lane != LaneReport()]
    return [
        line_chart(
            "Tokens a second",
            {"tokens/s": _of_steps(run, "tokens_per_second")},
            lambda value: f"{value:,.0f}",
        ),
        line_chart(
            "A step: measured against its bound",
            {
                "measured": _of_reports(run, lambda report: report.measured_seconds),
                "bound": _of_reports(run, lambda report: report.bound_seconds),
            },
            lambda value: f"{value:.3g} s",
        ),
        line_chart(
            "Share of the step in which a lane is busy",
            {lane: _of_reports(run, use(lane)) for lane in lanes},
            lambda value: f"{value:.0%}",
        ),
        line_chart(
            "Faults, and I/O made again",
            {
                "faults": _of_reports(run, lambda report: report.faults),
                "retries": _of_reports(run, lambda report: report.retries.count),
            },
        ),
    ]


def _memory(run: RunRecord) -> list[str]:
    charts = []
    for name, tier in run.outcome.reports[-1].tiers.items():
        if not tier.budget_bytes:
            continue
        series = {
            "at the end of the step": _of_tier(run, name, "used_bytes"),
            "most in the step": _of_tier(run, name, "step_peak_bytes"),
        }
        # A disk that is nearly empty would flatten everything else.
        if tier.budget_bytes < 4 * max(tier.peak_bytes, 1):
            series["budget"] = _of_tier(run, name, "budget_bytes")
        title = f"{name}: bytes in use, of {format_bytes(tier.budget_bytes)}"
        charts.append(line_chart(title, series, lambda value: format_bytes(round(value))))
    return charts


def _lanes(steady: Sequence[StepReport]) -> str:
    rows = []
    measured = statistics.median(report.measured_seconds for report in steady)
    for number, (name, lane) in enumerate(lanes_per_step(steady).items()):
        if lane == LaneReport():
            continue
        share = 1 - mean_idle_share(steady, name)
        bar = f'<i class="c{number % len(_COLOURS)}" style="width:{share:.1%}"></i>'
        numbers = (format_bytes(lane.bytes), f"{lane.busy_seconds * 1e3:.1f} ms", f"{share:.0%}")
        rows.append((name, *numbers, format_rate(lane), _Markup(bar)))
    head = ("lane", "bytes a step", "busy", "share", "bandwidth", f"of {measured:.3f} s")
    return _table(head, rows)


def _placement(run: RunRecord) -> str:
    placed = run.outcome.placed_bytes
    classes = sorted({name for held in placed.values() for name in held})
    rows = [
        (tier, *(format_bytes(held.get(c, 0)) for c in classes)) for tier, held in placed.items()
    ]
    return _table(("tier", *classes), rows)


class _Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    def cell(text: str, tag: str = "td") -> str:
        if isinstance(text, _Markup):
            return f'<{tag} class="use">{text}</{tag}>'
        return f"<{tag}>{escape(text)}</{tag}>"

    titles = "".join(cell(text, "th") for text in head)
    body = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{titles}</tr>{body}</table>'


def _grid(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _of_steps(run: RunRecord, key: str) -> Points:
    values = ((number, step.get(key)) for number, step in run.steps.items())
    return [(number, float(value)) for number, value in values if value is not None]


def _of_reports(run: RunRecord, value: Callable[[StepReport], float]) -> Points:
    return [
        (number, float(value(report)))
        for number, report in zip(run.steps, run.outcome.reports, strict=True)
    ]


def _of_tier(run: RunRecord, tier: str, key: str) -> Points:
    return [
        (number, float(getattr(report.tiers[tier], key)))
        for number, report in zip(run.steps, run.outcome.reports, strict=True)
        if tier in report.tiers
    ]
