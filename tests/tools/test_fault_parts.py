"""A small dose of each crash and fault suite; `tools/faults.py PART` is the whole one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(part: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "faults.py"), part, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rows(part: str, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run it; it must be good. Skips where this machine or user cannot."""
    result = tmp_path / "result.json"
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    done = start(part, f"--path={work}", f"--json={result}", *arguments)
    if done.stderr.startswith("error: cut"):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(work.iterdir()) == [], "nothing stays behind"
    found: list[dict[str, Any]] = json.loads(result.read_text())["rows"]
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    found = rows("kill", tmp_path, "--trials=20", "--only=moments")
    assert sum(row["trials"] for row in found) >= 20


def test_power_cuts(tmp_path: Path) -> None:
    found = rows("power", tmp_path, "--trials=4")
    assert sum(row["trials"] for row in found) >= 4


@pytest.mark.slow
def test_signals(tmp_path: Path) -> None:
    assert [row["trials"] for row in rows("signals", tmp_path, "--trials=10")] == [6, 4, 1]


def test_interrupts(tmp_path: Path) -> None:
    found = rows("interrupts", tmp_path, "--trials=2", "--only=goes on")
    assert [row["trials"] for row in found] == [2, 2]


@pytest.mark.slow
def test_peers_without_deepspeed(tmp_path: Path) -> None:
    found = rows("peers", tmp_path, "--trials=3")
    assert [row["trials"] for row in found] == [3, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["errors", "flips", "hostile", "interrupts", "kill", "power", "pressure", "signals", "slopes"],
)
def test_broken_saves_are_seen(tmp_path: Path, part: str) -> None:
    assert len(rows(part, tmp_path, "--teeth")) > 1


def test_power_says_that_it_needs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    loop = importlib.import_module("fault._loop")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="needs root"):
        loop.LoopDisk(tmp_path / "image", tmp_path / "disk", 1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_io_attempts_that_fail(tmp_path: Path) -> None:
    found = rows("errors", tmp_path, "--trials=3", "--only", "engine", "--backends", "threads")
    assert sum(row["trials"] for row in found) >= 6 * 6


def test_nothing_grows(tmp_path: Path) -> None:
    found = rows("slopes", tmp_path, "--trials=80", "--homes", "nvme")
    assert len(found) == 6


def test_a_machine_that_refuses(tmp_path: Path) -> None:
    found = rows("hostile", tmp_path, "--only", "no asynchronous I/O", "small files only")
    assert sum(row["trials"] for row in found) == 3


@pytest.mark.slow
def test_limits_that_are_lowered(tmp_path: Path) -> None:
    found = rows("pressure", tmp_path, "--trials=5")
    if all(row["skipped"] for row in found):
        pytest.skip(found[0]["skipped"])
    assert [row["trials"] for row in found] == [1] * 5


def test_damage_to_files(tmp_path: Path) -> None:
    only = ("--only", "checkpoint", "extents", "training")
    found = rows("flips", tmp_path, "--trials=30", *only)
    assert sum(row["trials"] for row in found) >= 4 * 39
