"""The GPU check finds what it is for: each part is run on the CPU, and a fault is reported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.engine.activations.copies import ActivationCopy
from tools import gpu_features

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.py"


def run_check(out: Path, *arguments: str, script: Path = SCRIPT) -> tuple[int, dict[str, Any]]:
    """The exit status, and the results."""
    done = subprocess.run(
        [sys.executable, str(script), "--device=cpu", "--small", f"--out={out}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    return done.returncode, json.loads(out.read_text())


@pytest.mark.slow
def test_every_part_passes_on_the_cpu(tmp_path: Path) -> None:
    status, results = run_check(tmp_path / "results.json", f"--path={tmp_path}")
    assert status == 0, results
    assert [name for name, part in results.items() if isinstance(part, dict) and part["ok"]] == [
        *("library", "parity", "trace", "speed", "versus", "size", "features")
    ]


def test_a_part_that_kills_its_process_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "offload").symlink_to(ROOT / "offload")
    script = tmp_path / "tools" / SCRIPT.name
    script.parent.mkdir()
    script.write_bytes(SCRIPT.read_bytes())
    (script.parent / "gpu_features.py").write_text(
        "import os\n\ndef run_checks(device, path):\n    os.abort()\n"
    )
    status, results = run_check(
        tmp_path / "results.json", "--parts", "features", "library", script=script
    )
    assert status == 1
    assert results["features"]["error"] == "its process ended with status -6"
    assert "ok" in results["library"]


@pytest.mark.parametrize("field", ["loss", "master"])
def test_values_that_are_no_numbers_are_not_close(field: str) -> None:
    def outcome(loss: float, master: float) -> gpu_features.Outcome:
        state = {"first": torch.tensor([master]), "last": torch.tensor([1.0])}
        masters = {name: {"master": value} for name, value in state.items()}
        return gpu_features.Outcome([1.0, loss, 1.0], masters, None, {})

    expected = outcome(1.0, 1.0)
    assert gpu_features.require_close(expected, expected) == {"largest_relative_difference": 0.0}
    wrong = outcome(**{"loss": 1.0, "master": 1.0, field: math.nan})
    with pytest.raises(AssertionError, match=r"loss 1 is nan|first is nan"):
        gpu_features.require_close(wrong, expected)


def test_a_fault_of_a_feature_is_found_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived = ActivationCopy.make_arrived

    def damaged(copy: ActivationCopy) -> torch.Tensor:
        return torch.zeros_like(arrived(copy))

    wanted = ("activations on host", "deferred_init", "side stream")
    checks = {name: gpu_features.CHECKS[name] for name in wanted}
    monkeypatch.setattr(gpu_features, "CHECKS", checks)
    monkeypatch.setattr(ActivationCopy, "make_arrived", damaged)
    results: dict[str, dict[str, Any]] = gpu_features.run_checks("cpu", str(tmp_path))
    assert [results[name]["ok"] for name in wanted] == [False, True, None]
    assert "AssertionError" in results["activations on host"]["error"]
    assert "side stream" in capsys.readouterr().out
