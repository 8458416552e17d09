"""Charts as SVG for a page: lines over steps, and the timeline of one step.

Colours are CSS classes of the page (`c0`, `c1`, ...), so that they follow its theme. All text is
escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from offload.cli.chrome_trace import rows
from offload.errors import format_bytes
from offload.timeline import TRACKS, StepTimeline

Points = Sequence[tuple[float, float]]  # (step, value)
NUM_COLOURS = 7
_WIDTH, _HEIGHT = 420, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 12, 26
_ROW_HEIGHT, _MOST_ROWS, _MOST_SPANS = 11, 4, 4000
_TIMELINE_WIDTH, _LABEL_WIDTH = 1150, 90
_MOST_POINTS = 600


def line_chart(
    title: str,
    series: Mapping[str, Points],
    form: Callable[[float], str] = lambda value: f"{value:.4g}",
    *,
    from_zero: bool = True,
) -> str:
    """Lines over steps, with a legend; "" where there is nothing to draw.

    Values that are not finite are left out; `form` makes a value a label of the axis.
    """
    drawn = {name: _thinned(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    high = high if high > low else low + 1.0
    first, last = min(steps), max(steps)
    span = last - first or 1.0

    def place(step: float, value: float) -> str:
        x = _LEFT + (step - first) / span * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [_axes(low, high, first, last, form)]
    for number, (name, points) in enumerate(drawn.items()):
        path = " ".join(place(*point) for point in points)
        shape = (
            f'<polyline points="{path}"/>'
            if len(points) > 1
            else '<circle cx="{}" cy="{}" r="3"/>'.format(*path.split(","))
        )
        parts.append(
            f'<g class="line c{number % NUM_COLOURS}">{shape}<title>{escape(name)}</title></g>'
        )
    return _figure(title, _svg(_WIDTH, _HEIGHT, title, parts), list(drawn))


def timeline_chart(timeline: StepTimeline) -> str:
    """A step as one band of bars for each lane; faults are marks above `compute`."""
    spans = sorted(timeline.spans, key=lambda span: span.began - span.ended)[:_MOST_SPANS]
    end = max(timeline.seconds, 1e-9)
    scale = (_TIMELINE_WIDTH - _LABEL_WIDTH) / end
    found = {span.lane for span in spans}
    parts, y = [], 16.0
    for number, lane in enumerate([*TRACKS, *sorted(found.difference(TRACKS))]):
        dealt = rows(span for span in spans if span.lane == lane)
        height = _ROW_HEIGHT * max(1, min(len(dealt), _MOST_ROWS))
        parts.append(f'<text x="0" y="{y + 10:.0f}">{escape(lane)}</text>')
        parts.append(f'<g class="bar c{number % NUM_COLOURS}">')
        for row, each in enumerate(dealt):
            for span in each:
                x = _LABEL_WIDTH + max(span.began, 0.0) * scale
                width = (min(span.ended, end) - max(span.began, 0.0)) * scale
                if width < 0:
                    continue
                moved = f", {format_bytes(span.nbytes)}" if span.nbytes else ""
                text = f"{span.name or lane}: {(span.ended - span.began) * 1e3:.2f} ms{moved}"
                top = y + _ROW_HEIGHT * min(row, _MOST_ROWS - 1)
                parts.append(
                    f'<rect x="{x:.1f}" y="{top:.0f}" width="{max(width, 0.5):.1f}" '
                    f'height="{_ROW_HEIGHT - 2}"><title>{escape(text)}</title></rect>'
                )
        parts.append("</g>")
        y += height + 8
    for at, name in timeline.faults[:_MOST_SPANS]:
        x = _LABEL_WIDTH + at * scale
        parts.append(
            f'<path class="fault" d="M{x:.1f} 14l-3 -8h6z">'
            f"<title>fault: {escape(name)}</title></path>"
        )
    for tenth in range(0, 11, 2):
        x = _LABEL_WIDTH + tenth / 10 * end * scale
        anchor = "end" if tenth == 10 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.0f}" y="{y + 10:.0f}" text-anchor="{anchor}">'
            f"{tenth / 10 * end * 1e3:.0f} ms</text>"
        )
    title = f"step {timeline.step}, {timeline.seconds:.3f} s"
    return _figure(title, _svg(_TIMELINE_WIDTH, y + 16, title, parts), [], wide=True)


def _thinned(points: Points) -> list[tuple[float, float]]:
    """The finite points; of very many every nth, and the last."""
    finite = [point for point in points if math.isfinite(point[1])]
    every = max(1, -(-len(finite) // _MOST_POINTS))
    return [*finite[:-1:every], *finite[-1:]]


def _axes(low: float, high: float, first: float, last: float, form: Callable[[float], str]) -> str:
    parts = []
    for quarter in range(5):
        value = low + (high - low) * quarter / 4
        y = _TOP + (4 - quarter) / 4 * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(form(value))}</text>"
        )
    for step, anchor, x in ((first, "start", _LEFT), (last, "end", _WIDTH - _RIGHT)):
        parts.append(
            f'<text class="tick" x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">'
            f"step {step:.0f}</text>"
        )
    return "".join(parts)


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _figure(title: str, svg: str, names: Sequence[str], *, wide: bool = False) -> str:
    legend = "".join(
        f'<span><i class="c{number % NUM_COLOURS}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><figcaption>{escape(title)}{legend}</figcaption>{svg}</figure>"
