"""`offload bench` measures lanes and steps, holds what it prints together, and cleans up."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from offload.cli import built_in, lanes, trial
from offload.cli.main import main
from offload.engine import build
from tests.engine.accelerator import use_accelerator

LANES = {"h2d", "d2h", "nvme_read", "nvme_write", "cpu", "compute"}
TINY = '[tiers.device]\nkind = "cpu"\nmemory = "1MiB"\n[tiers.host]\nmemory = "4MiB"\n'
LLAMA = """
[run]
architecture = "LlamaForCausalLM"
steps = 1
batch = 2
sequence_length = 16
[run.hf_config]
vocab_size = 32
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def bench(tmp_path: Path, config: str, *arguments: str) -> Result:
    path = tmp_path / "config.toml"
    path.write_text(config)
    return CliRunner().invoke(main, ["bench", str(path), "--size", "1MiB", *arguments])


def measured(tmp_path: Path, config: str, *arguments: str) -> dict[str, Any]:
    result = bench(tmp_path, config, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def on_nvme(disk: Path) -> str:
    return f'{TINY}[tiers.nvme]\npaths = ["{disk}"]\n'


def bound(report: dict[str, Any], best: dict[str, float], cores: str = "shared") -> float:
    """The least seconds of a step, from what its lanes moved and what each can do alone."""
    moved = {name: lane["bytes"] for name, lane in report["lanes"].items()}
    disk_bytes = moved["nvme_read"] + moved["nvme_write"]
    update_seconds = moved["cpu"] / best["cpu"]
    compute_seconds = report["lanes"]["compute"]["busy_seconds"]
    return max(
        *(moved[name] / best[name] for name in ("h2d", "d2h", "nvme_read", "nvme_write")),
        disk_bytes / best["nvme_mixed"],
        update_seconds + compute_seconds if cores == "shared" else compute_seconds,
        update_seconds,
    )


def test_lanes_of_two_disks_and_no_training(tmp_path: Path, disk: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = f'[tiers.nvme]\npaths = ["{disk}"]\n[io]\nbackend = "python"\nblock_bytes = 65536\n'
    arguments = ("--path", str(other), "--path", str(disk), "--steps", "0")
    found = measured(tmp_path, config, *arguments)
    assert found["training"] is None
    by_name = {lane["lane"]: lane for lane in found["lanes"]}
    disk_lanes = ["nvme_write", "nvme_read", "nvme_mixed"]
    assert list(by_name) == ["memory", "cpu", "h2d", "d2h", *disk_lanes]
    assert by_name["memory"]["nbytes"] == 2 << 20
    assert {by_name[name]["nbytes"] for name in ("h2d", "d2h", *disk_lanes)} == {1 << 20}
    for lane in by_name.values():
        assert 0 < lane["median_bytes_per_second"] <= lane["best_bytes_per_second"]
    assert by_name["nvme_read"]["where"] == f"{disk}, {other} (python)"
    assert list(disk.iterdir()) == list(other.iterdir()) == []


def test_steps_of_the_built_in_model_against_the_lanes(tmp_path: Path, disk: Path) -> None:
    found = measured(tmp_path, on_nvme(disk), "--steps", "3")
    best = {lane["lane"]: lane["best_bytes_per_second"] for lane in found["lanes"]}
    training = found["training"]
    placed = training["placed_bytes"]["nvme"]
    assert placed["weights"] >= 2 * training["parameters"]
    assert placed["optimizer"] >= 10 * training["parameters"]
    assert len(training["steps"]) == 3
    for step in training["steps"]:
        assert step["bound_seconds"] == pytest.approx(bound(step, best), rel=1e-9)
        assert step["efficiency"] == step["bound_seconds"] / step["measured_seconds"]
        assert step["critical"] in LANES
    middle = {
        name: sorted(step[name] for step in training["steps"])[1]
        for name in ("bound_seconds", "measured_seconds", "efficiency")
    }
    assert {name: training[name] for name in middle} == middle
    assert training["critical"] == training["steps"][-1]["critical"]
    assert training["shown_bound_seconds"] > 0
    assert set(training["lanes"]) >= LANES
    for name, lane in training["lanes"].items():
        assert set(lane) == {"bytes", "busy_seconds", "idle_share"}, name
        assert 0 <= lane["idle_share"] <= 1
    # Weights are read for forward, and for the update beside the optimizer state; both are written.
    state = placed["weights"] + placed["optimizer"]
    assert training["lanes"]["nvme_read"]["bytes"] >= placed["weights"] + state
    assert training["lanes"]["nvme_write"]["bytes"] >= state
    assert training["lanes"]["cpu"]["bytes"] >= state + placed["gradients"]
    assert list(disk.iterdir()) == []


def test_the_model_of_run_and_what_is_printed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = TINY + '[placement]\noptimizer = "host"\n[training]\ngradient_accumulation_steps = 2\n'
    result = bench(tmp_path, config + LLAMA, "--steps", "2")
    assert result.exit_code == 0, result.output
    for part in (
        "lanes, each alone",
        "update by adamw in bf16",
        "where the state was",
        "moved in a step",
        "LlamaForCausalLM, ",
        "2 steps after 2 that warmed up",
        "efficiency",
        "critical lane",
        "at the best speeds of the steps themselves",
    ):
        assert part in result.stdout, part
    assert "step 4/4" in result.stderr


def test_without_a_kernel_the_lane_counts_as_it_shows_itself(tmp_path: Path, disk: Path) -> None:
    found = measured(tmp_path, on_nvme(disk) + '[optimizer]\nname = "mezo"\n', "--steps", "1")
    best = {lane["lane"]: lane["best_bytes_per_second"] for lane in found["lanes"]}
    assert "cpu" not in best
    assert set(found["training"]["placed_bytes"]["nvme"]) >= {"weights"}
    (step,) = found["training"]["steps"]
    cpu = step["lanes"]["cpu"]
    best["cpu"] = cpu["bytes"] / cpu["busy_seconds"]
    assert 0 < step["bound_seconds"] <= bound(step, best) * (1 + 1e-9)


def test_an_accelerator_copies_both_ways(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = use_accelerator(monkeypatch)
    open_tier = functools.partial(build.open_device_tier, deadline_seconds=60.0)
    monkeypatch.setattr(lanes, "open_device_tier", open_tier)
    for module in (trial, built_in):
        monkeypatch.setattr(module, "device_is_host_memory", lambda _config: False)
    found = measured(tmp_path, on_nvme(disk) + "[io]\nchecksum = false\n", "--steps", "2")
    alone, engine = opened
    assert {name: moved for name, (moved, _) in alone.lanes().items()} == {
        "h2d": 4 << 20,
        "d2h": 4 << 20,
    }
    training = found["training"]
    gradients = 2 * training["parameters"]
    best = {lane["lane"]: lane["best_bytes_per_second"] for lane in found["lanes"]}
    for step in training["steps"]:
        assert step["lanes"]["d2h"]["bytes"] >= gradients
        assert step["lanes"]["h2d"]["bytes"] >= gradients  # as many weights
        assert step["bound_seconds"] == pytest.approx(bound(step, best, cores="apart"), rel=1e-9)
    assert engine.peak_bytes <= 1 << 20


def test_long_steps_are_fewer(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_LONG_SECONDS", 0.0)
    assert len(measured(tmp_path, on_nvme(disk), "--steps", "3")["training"]["steps"]) == 1


def test_ctrl_c_ends_the_training_after_a_step(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = trial.take_step

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return take_step(*arguments)

    monkeypatch.setattr(trial, "take_step", interrupted)
    result = bench(tmp_path, on_nvme(disk), "--json", "--steps", "4")
    assert result.exit_code == 128 + signal.SIGINT, result.output
    assert len(json.loads(result.stdout)["training"]["steps"]) == 1
    assert list(disk.iterdir()) == []


def test_ctrl_c_in_a_lane(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_tickets: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "_finish", interrupted)  # requests are under way
    result = bench(tmp_path, on_nvme(disk))
    assert (result.exit_code, "interrupted by SIGINT" in result.stderr) == (130, True)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "20G"), "did you mean 20GiB"),
        (("--size", "4KiB"), "--size is too small for a measurement"),
        (("--size", "12KiB", "--path", "/tmp", "--path", "/var/tmp"), "too small for 2 paths"),
        (("--size", "1000TiB"), "available: lower it"),
        (("--path", "/absent/folder"), "/absent/folder"),
        (("--steps", "-1"), "--steps"),
    ],
)
def test_what_cannot_be_measured(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = bench(tmp_path, TINY, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_model_that_does_not_fit_comes_after_the_lanes(tmp_path: Path) -> None:
    result = bench(tmp_path, TINY.replace("1MiB", "64KiB"))
    assert (result.exit_code, "does not fit" in result.stderr) == (2, True), result.stderr
    assert "lanes, each alone" in result.stdout


def test_the_model_of_run_needs_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    result = bench(tmp_path, TINY + LLAMA)
    assert (result.exit_code, "pip install 'offload[hf]'" in result.stderr) == (2, True)
