"""`offload plan`: configurations and models, what fits and what would, tables and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from offload.cli import plan as command
from offload.cli.main import main
from offload.config import load_config
from offload.engine.profile import MachineProfile, keep_profile

TIERS = """
[tiers.device]
kind = "cpu"
memory = "{device}"
[tiers.host]
memory = "{host}"
"""
RUN = """
[run]
architecture = "LlamaForCausalLM"
steps = 1
batch = 2
sequence_length = 16
[run.hf_config]
vocab_size = 512
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def write(folder: Path, text: str, *, device: str = "8MiB", host: str = "8MiB") -> Path:
    path = folder / "config.toml"
    path.write_text(TIERS.format(device=device, host=host) + text)
    return path


def as_json(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = invoke(*arguments, "--json", "--no-measure")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_configuration_that_fits(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    result = invoke(path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[0] == "tier"
    assert any(line.startswith("compute") for line in lines)
    assert "an estimate from a short measurement: this machine has not been measured" in (
        result.stdout
    )
    assert "32 tokens a step" in result.stdout
    assert "compute as its operations were measured" in result.stdout
    assert "activations of one micro-batch: " in result.stdout
    found = as_json(path)
    assert found["fits"]
    assert found["tokens"] == 32
    assert found["bottleneck"] in found["lanes"]
    assert found["lanes"][found["bottleneck"]]["seconds"] == max(
        lane["seconds"] for lane in found["lanes"].values()
    )
    for tier in found["tiers"].values():
        homes = tier["weights"] + tier["gradients"] + tier["optimizer"] + tier["activations"]
        assert tier["peak"] == homes + tier["moving"] <= tier["budget"] or tier["peak"] == 0


def test_one_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    text = f'[tiers.nvme]\npaths = ["{tmp_path}"]\n[placement]\noptimizer = "host"\n{RUN}'
    path = write(tmp_path, text, device="2MiB", host="512KiB")
    result = invoke(path, "--no-measure")
    assert result.exit_code == 1
    assert "does not fit:" in result.stdout
    assert 'or with placement.optimizer = "auto": fits, about' in result.stdout
    found = as_json(path, code=1)
    assert not found["fits"]
    (short,) = found["shortfalls"]
    assert short["tier"] == "host"
    # What it says makes it fit.
    budgets = {tier: entry["least"] for tier, entry in found["tiers"].items()}
    assert short["need_bytes"] == budgets["host"]
    write(tmp_path, text, device="2MiB", host=f"{short['need_bytes']}B")
    assert as_json(path)["fits"]
    (alternative,) = found["alternatives"]
    assert alternative["placement"] == 'placement.optimizer = "auto"'
    write(tmp_path, text.replace('"host"', '"auto"'), device="2MiB", host="512KiB")
    assert as_json(path)["fits"]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_model_of_transformers(tmp_path: Path, form: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    target = tmp_path if form == "folder" else tmp_path / "config.json"
    config = tmp_path / "offload.toml"
    config.write_text(TIERS.format(device="8MiB", host="8MiB"))
    found = as_json(target, "--config", config)
    assert found["fits"]
    assert found["tokens"] is None
    given = as_json(target, "--config", config, "--batch", "3", "--sequence-length", "5")
    assert given["tokens"] == 15
    assert given["tiers"] == found["tiers"]
    assert found["activation_bytes"] is None
    assert given["activation_bytes"] > 0
    assert given["lanes"]["compute"]["seconds"] > 0
    assert as_json(write(tmp_path, RUN))["tiers"] == found["tiers"]
    result = invoke(target, "--config", config, "--no-measure")
    assert "compute is not counted: give --batch and --sequence-length" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent", None, "does not exist: give a configuration or a model"),
        ("config.json", '{"model_type": "no such model"}', "is no configuration of a model"),
        ("config.json", '{"model_type": "llama"}', "names no architecture"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"training": {"seed": 1}}', "run.model and run.hf_config are missing"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    result = invoke(path)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_configuration_takes_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    assert invoke(path, "--config", path).exit_code == 2


def test_what_bench_has_kept_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, RUN)
    before = as_json(path)
    assert before["speeds"].startswith("an estimate at low speeds")
    keep_profile(load_config(path), MachineProfile({"cpu": 1.0}, (), 1.8e9))
    monkeypatch.setattr("time.time", lambda: 1.8e9 + 60)

    def sample(*_: Any, **__: Any) -> None:
        raise AssertionError("measured, although it is known")

    monkeypatch.setattr(command, "sample", sample)
    monkeypatch.setattr(command, "measure_operations", lambda *_, **__: 0.25)
    result = invoke(path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["lanes"]["cpu"]["seconds"] == before["lanes"]["cpu"]["bytes"]
    assert found["speeds"].startswith("speeds as measured in")
    assert found["lanes"]["compute"]["seconds"] == 0.25


def test_the_endurance_of_the_disk(tmp_path: Path) -> None:
    text = f'[tiers.nvme]\npaths = ["{tmp_path}"]\n{{0}}\n[placement]\noptimizer = "nvme"\n{RUN}'
    found = as_json(write(tmp_path, text.format("endurance_tbw = 600.0")))
    written = found["lanes"]["nvme_write"]["bytes"]
    assert written > 0
    daily = written / found["step_seconds"] * 86_400 / 1e12
    assert found["nvme_terabytes_a_day"] == pytest.approx(daily)
    assert found["disk_days"] == pytest.approx(600 / daily)
    assert "endurance lasts" in invoke(tmp_path / "config.toml", "--no-measure").stdout
    without = write(tmp_path, text.format(""))
    assert as_json(without)["disk_days"] is None
    assert "set tiers.nvme.endurance_tbw" in invoke(without, "--no-measure").stdout


def test_a_path_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    text = f'[tiers.nvme]\npaths = ["{tmp_path}/absent"]\n{RUN}'
    result = invoke(write(tmp_path, text))
    assert result.exit_code == 0, result.output
    assert "an estimate at low speeds of any machine" in result.stdout
    assert not (tmp_path / "absent").exists()
