"""The page of `offload report`: it stands alone, is inert, and a browser renders it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from offload.cli.charts import NUM_COLOURS, line_chart, timeline_chart
from offload.cli.main import main
from offload.cli.page import _COLOURS, render_page
from offload.cli.report import RunRecord, read_run
from offload.cli.summary import Outcome
from tests.cli.test_report import evaluation, step, write_run
from tests.cli.test_trace import timeline
from tests.cli.test_trace import write_run as write_timelines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "</pre><script>console.error('ran')</script><img src=x onerror=console.error(1)>"


class Reader(HTMLParser):
    """The elements of a page; fails where they are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def a_run(folder: Path) -> Path:
    steps = [step(number, loss=4.0 / number, faults=number % 3) for number in range(1, 9)]
    for number, entry in enumerate(steps):
        entry |= {"grad_norm": 1.0 + number, "lr": 1e-3}
    write_run(folder, evaluation(0, 4.0), *steps, evaluation(8, 0.6))
    return write_timelines(folder, 5)


def test_the_command_writes_a_page_that_stands_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run / "config.json").write_text('{"run": {"prompt": "def "}}')
    result = CliRunner().invoke(main, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert "critical lane nvme_read" in result.output
    page = (run / "report.html").read_text(encoding="utf-8")
    reader = read(page)
    assert "script" not in reader.seen
    assert reader.seen.count("svg") >= 9
    assert not re.search(r"https?:|//", page), "it refers to nothing outside"
    assert [value for name, value in reader.attributes if name in {"src", "href"}] == ["data:,"]
    for part in ("Loss", "Tokens a second", "Gradient norm", "bytes in use", "bound", '"prompt"',
                 "A step, lane by lane", "made again: 33", "read of a chunk failed",
                 "memory ran short", "nvme_write", "held-out loss: 4.000"):  # fmt: skip
        assert part in reader.text, part
    assert "weights of bucket 2: 2.00 ms, 4.00 KiB" in page
    assert "prefers-color-scheme:dark" in page


def test_what_a_run_says_is_inert(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    run.machine = {"processor": EVIL}
    recorded = timeline()
    recorded = type(recorded)(5, 0.01, recorded.spans, ((0.0, EVIL),), (), 0)
    page = render_page(EVIL, run, {"run": {"prompt": EVIL}}, {5: recorded})
    reader = read(page)
    assert "script" not in reader.seen
    assert "img" not in reader.seen
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_another_file_or_none(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    out = tmp_path / "own.html"
    assert CliRunner().invoke(main, ["report", str(run), "-o", str(out)]).exit_code == 0
    assert out.exists()
    assert not (run / "report.html").exists()
    nowhere = str(tmp_path / "no" / "page.html")
    result = CliRunner().invoke(main, ["report", str(run), "-o", nowhere])
    assert (result.exit_code, nowhere in result.output) == (2, True)


def test_a_run_without_a_step_and_one_without_a_timeline(tmp_path: Path) -> None:
    read(render_page("run", RunRecord(Outcome(placed_bytes={})), {}, {}))
    run = read_run(write_run(tmp_path, step(1, loss=float("nan"))))
    assert "Tokens a second" in render_page("run", run, {}, {})


def test_lines_are_scaled_to_what_is_finite() -> None:
    chart = line_chart("x", {"a": [(1, 0.0), (2, float("inf")), (3, 4.0)], "none": []})
    (points,) = re.findall(r'polyline points="([^"]*)"', chart)
    assert points == "70.0,144.0 408.0,12.0"
    assert "none" not in chart
    assert line_chart("x", {"a": [(1, float("nan"))]}) == ""
    assert "<circle" in line_chart("x", {"a": [(1, 1.0)]})


def test_many_points_and_spans_make_a_small_chart() -> None:
    many = [(float(step), float(step % 7)) for step in range(100_000)]
    assert len(line_chart("x", {"a": many})) < 20_000
    assert f"{many[-1][0]:.0f}" in line_chart("x", {"a": many})
    one = timeline()
    crowded = type(one)(5, 0.01, one.spans * 5000, one.faults * 9000, (), 0)
    assert len(timeline_chart(crowded)) < 2_000_000
    assert len(_COLOURS) == NUM_COLOURS


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_renders_it_without_a_complaint(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render_page(EVIL, run, {"prompt": EVIL}, {5: timeline()}), encoding="utf-8")
    shown = browse(page, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ":CONSOLE" not in shown
    assert ":CONSOLE" in browse(with_error(tmp_path), picture), "errors would be seen"


def with_error(folder: Path) -> Path:
    page = folder / "error.html"
    page.write_text("<script>console.error('ran')</script>")
    return page


def browse(page: Path, picture: Path) -> str:
    """What Chromium has to say of a page while it makes a picture of it."""
    profile = page.parent / "profile"
    command: list[Any] = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--enable-logging=stderr", f"--user-data-dir={profile}", "--hide-scrollbars"]
    command += [f"--screenshot={picture}", "--window-size=1200,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stderr
