"""Each benchmark runs once with its smallest sizes, so that none rots; no speed is judged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import dev

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tools" / "bench"
ARGUMENTS = {
    "accumulation": [
        *("--rounds=1", "--hidden=64", "--layers=2", "--vocabulary=64", "--tokens=8"),
        *("--count=2", "--device=1", "--host=64"),
    ],
    "activations": [
        *("--layers=1", "--hidden=64", "--batch=1", "--tokens=16", "--steps=2"),
        *("--minimum=1", "--room=1"),
    ],
    "checkpoint": [
        *("--rounds=1", "--steps=1", "--hidden=64", "--layers=1", "--vocabulary=64"),
        *("--tokens=8", "--device=4", "--host=32"),
    ],
    "guard": ["--rounds=1", "--tokens=8", "--hidden=64", "--layers=1"],
    "io": ["--rounds=1", "--mib=16", "--request-mib=4", "--only=threads|pool, 4 MiB"],
    "kernels": ["--rounds=1", "--numel=200000", "--json"],
    "larger_than_memory": ["--sizes=small", "--sequence=8", "--steps=1", "--threads=1"],
    "loading": ["--rounds=1", "--hidden=64", "--layers=1"],
    "memory": ["--hidden=64", "--layers=1", "--factor=2", "--tokens=16"],
    "nvme_step": ["--rounds=1", "--parameters", "1", "9"],
    "planning": ["--rounds=1", "--steps=1", "--only=llama tiny"],
    "tiling": ["--rounds=1", "--vocabulary=512", "--width=128", "--tokens=64"],
    "train_step": [
        *("--rounds=1", "--steps=1", "--hidden=64", "--layers=1", "--vocabulary=64"),
        *("--tokens=8", "--no-match", "--device=4", "--host=16"),
    ],
    "urgent": ["--rounds=1", "--bulk-mib=16", "--urgent-mib=1", "--request-mib=4"],
    "update_site": ["--device=cpu", "--parameters=1", "--threads=1", "--rounds=1"],
    "versus_deepspeed": [
        *("--small", "--sequence=8", "--rounds=1", "--steps=4", "--warm-up=1", "--threads=1"),
    ],
}


def start(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own, ended."""
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *ARGUMENTS[name], *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(name: str, *arguments: str) -> str:
    """The output of a benchmark that ends well."""
    done = start(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(output: str) -> dict[str, Any]:
    """The numbers that a benchmark prints last, as JSON."""
    found = json.loads(output.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def assert_positive(*values: float) -> None:
    assert all(math.isfinite(value) and value > 0 for value in values), values


def test_every_benchmark_is_tried_here() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == set(ARGUMENTS)


def test_they_are_listed_with_what_they_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["bench"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == set(ARGUMENTS)
    assert all(line.endswith((".", "?")) for line in listed.values()), listed


def test_accumulation(tmp_path: Path) -> None:
    found = last_line(run("accumulation", f"--path={tmp_path}"))
    assert_positive(*found["ratios"].values())
    assert list(tmp_path.iterdir()) == []


def test_kernels() -> None:
    found = json.loads(run("kernels"))
    assert {"bound", "offload", "offload, 8-bit moments", "torch fused + casts"} <= set(
        found["seconds"]
    )
    assert_positive(*found["seconds"].values(), *found["time_over_ours"].values())


def test_nvme_step(tmp_path: Path) -> None:
    output = run("nvme_step", f"--path={tmp_path}")
    found = last_line(output)
    small, large = found["sizes"]
    assert_positive(found["share"], found["growth"], large["step_seconds"], large["bound_seconds"])
    assert small["growth"] == 1.0
    assert large["parameters"] >= 1.5 * small["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_planning(tmp_path: Path) -> None:
    found = last_line(run("planning", f"--path={tmp_path}"))
    (case,) = found["cases"]
    assert_positive(case["predicted_seconds"], case["measured_seconds"])
    assert found["good_bytes"] == found["bounded"] == found["count"] == 1
    assert list(tmp_path.iterdir()) == []


def test_train_step(tmp_path: Path) -> None:
    output = run("train_step", f"--path={tmp_path}")
    found = last_line(output)
    assert_positive(found["compute_seconds"], found["update_seconds"], found["apart"])
    for side in ("on", "off"):
        assert_positive(*found[side]["shares"], found[side]["io_seconds"])
    # With overlap a step's state may move before or after the steps that are counted.
    assert output.count("\n| off | 1") == 1, "all state is on NVMe: more than 10 bytes a parameter"
    assert list(tmp_path.iterdir()) == []


def test_update_site() -> None:
    found = last_line(run("update_site"))
    assert set(found["seconds"]) == {"cpu", "device", "auto"}
    assert_positive(*found["seconds"].values(), *found["speeds"].values())
    assert 0 <= found["share"] <= 1


def test_versus_deepspeed_without_it(tmp_path: Path) -> None:
    found = last_line(run("versus_deepspeed", f"--path={tmp_path}"))
    assert set(found["sides"]) == {"ours", "ours, weights in memory", "plain"}, (
        "DeepSpeed is not installed by a test"
    )
    assert_positive(*(side["step_seconds"] for side in found["sides"].values()))
    assert found["checks"]["losses apart"]["met"]
    # So small a model may have read much of a step before or after the steps that are counted.
    assert found["checks"]["lanes read, of 12 B a parameter"]["measured"] > 0
    assert list(tmp_path.iterdir()) == []


def test_versus_deepspeed_says_what_it_needs(tmp_path: Path) -> None:
    done = start("versus_deepspeed", f"--venv={tmp_path / 'none'}")
    assert done.returncode == 1
    assert "has no DeepSpeed: make it with --install" in done.stderr


@pytest.mark.slow
def test_larger_than_memory(tmp_path: Path) -> None:
    found = last_line(run("larger_than_memory", f"--path={tmp_path}", "--unlimited"))
    under, over = found["rows"]
    assert found["losses_equal"]
    assert under["losses"] == over["losses"]
    assert_positive(under["step_seconds"], under["efficiency"], under["peak_rss_bytes"])
    assert under["nvme_bytes"] > over["nvme_bytes"], "the second has its state in memory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_larger_than_memory_is_limited(tmp_path: Path) -> None:
    done = start("larger_than_memory", f"--path={tmp_path}")
    if "no memory cgroup can be made here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    for row in last_line(done.stdout)["rows"]:
        assert 0 < row["cgroup_peak_bytes"] <= row["limit_bytes"]


@pytest.mark.parametrize(
    ("name", "nonsense"),
    [
        ("nvme_step", "--path=/nowhere/at/all"),
        ("train_step", "--hidden=100"),
        ("versus_deepspeed", "--rounds=0"),
        ("larger_than_memory", "--sizes=huge"),
    ],
)
def test_nonsense_is_refused(name: str, nonsense: str) -> None:
    done = start(name, nonsense)
    assert done.returncode == 2
    assert f"{name}.py: error: " in done.stderr


def test_io(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here, which the plain pools need: {error}")
    result = tmp_path / "io.json"
    run("io", f"--folder={tmp_path}", f"--output={result}")
    rows = json.loads(result.read_text())["rows"]
    assert {"threads", "plain Python pool, 4 MiB"} <= {row["contender"] for row in rows}
    for row in rows:
        assert_positive(*(row[mode]["gb_per_second"] for mode in ("read", "write", "mixed")))


def test_urgent(tmp_path: Path) -> None:
    result = tmp_path / "urgent.json"
    run("urgent", f"--folder={tmp_path}", f"--output={result}")
    rows = json.loads(result.read_text())["rows"]
    assert {row["order"] for row in rows} == {"idle", "order", "order, full", "fifo"}
    for row in rows:
        assert_positive(row["median_seconds"], row["times_idle"], row["gb_per_second"])
    assert list(tmp_path.iterdir()) == [result]


@pytest.mark.slow
def test_guard() -> None:
    found = last_line(run("guard"))
    assert set(found) == {"passes", "update", "step"}
    assert_positive(*found.values())
    assert set(last_line(run("guard", "--against=unguarded"))) == {"device", "host"}


@pytest.mark.slow
def test_activations(tmp_path: Path) -> None:
    found = last_line(run("activations", f"--path={tmp_path}"))
    assert_positive(found["growth_ratio"], found["seconds_ratio"], found["moved_bytes"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    output = run("memory", f"--path={tmp_path}")
    assert output.count("parameters") == 2
    assert_positive(*last_line(output)["overhead_bytes"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_checkpoint(tmp_path: Path) -> None:
    found = last_line(run("checkpoint", f"--path={tmp_path}"))
    assert found["pause"]["step_seconds"] > 0
    assert found["speed"]["save"].keys() == found["speed"]["load"].keys()
    assert len(found["speed"]["save"]) == 6
    assert all(value > 0 for value in found["speed"]["load"].values())
    assert list(tmp_path.iterdir()) == []


def test_loading(tmp_path: Path) -> None:
    found = last_line(run("loading", f"--path={tmp_path}"))
    assert_positive(found["model_bytes"], found["ratios"]["seconds"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tiling(tmp_path: Path) -> None:
    found = last_line(run("tiling", f"--folder={tmp_path}"))
    shares = [row["share"] for row in found["tiles"]]
    assert shares == sorted(shares, reverse=True)
    assert_positive(*(row["time"] for row in (*found["tiles"], *found["chunks"])))
    assert list(tmp_path.iterdir()) == []
