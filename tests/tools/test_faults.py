"""tools/faults.py itself: what counts as good, and what the exit code says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PART = '''"""Breaks a thing.

More about it.
"""

from fault.result import Row


def add_arguments(parser):
    parser.add_argument("--lose", type=int, default=0)


def run(options):
    broken = "the thing" if options.teeth else ""
    yield Row("a thing", options.trials or 2, lost=options.lost_by_seed, broken=broken)
'''


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/faults.py, imported as it is when it is run as a script."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("faults")


@pytest.fixture
def part(faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part `things` which loses as many trials as `--lose` says."""
    (tmp_path / "things.py").write_text(PART.replace("options.lost_by_seed", "options.lose"))
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(faults, "FOLDER", tmp_path)
    package = importlib.import_module("fault")
    monkeypatch.setattr(package, "__path__", [str(tmp_path), *package.__path__])
    monkeypatch.delitem(sys.modules, "fault.things", raising=False)


@pytest.mark.usefixtures("part")
def test_the_exit_code_and_the_file_say_whether_all_is_good(
    faults: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    assert faults.main(["things", "--trials", "3", "--json", str(result)]) == 0
    assert "| a thing | 3 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
    assert json.loads(result.read_text())["rows"][0]["trials"] == 3
    assert faults.main(["things", "--lose", "1", "--json", str(result)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert json.loads(result.read_text())["good"] is False


@pytest.mark.usefixtures("part")
def test_a_broken_build_must_be_seen(
    faults: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert faults.main(["things", "--teeth"]) == 1
    assert "NOT CAUGHT" in capsys.readouterr().out
    assert faults.main(["things", "--teeth", "--lose", "2"]) == 0
    assert "| a thing, broken: the thing | 2 | 2 | 0 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.usefixtures("part")
def test_parts_are_listed_with_their_first_line(
    faults: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert faults.main([]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ["things", "Breaks a thing.\n"]
    with pytest.raises(SystemExit, match="2"):
        faults.main(["absent"])
    assert "choose from" in capsys.readouterr().err


def test_what_makes_a_row_good(faults: ModuleType) -> None:
    row = importlib.import_module("fault.result").Row
    assert row("x", 1).good
    assert not row("x", 0).good, "no trial is no proof"
    assert not row("x", 0, broken="y").good
    for damage in ({"lost": 1}, {"mixed": 1}, {"undetected": 1}, {"problems": ["z"]}):
        assert not row("x", 1, **damage).good
        assert row("x", 1, broken="y", **damage).good
    assert row("x", 1, lost=1, peer=True).good, "what another system does is a result"
    assert not row("x", 0, peer=True).good
