"""The files in configs/ are complete: they load, name a real model, and fit their budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.cli import train
from offload.cli.models import build_model, build_tokenizer
from offload.cli.trainable import trainable
from offload.config import load_config
from offload.engine.planning import plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_complete(path):
    config = load_config(path)
    if config.run is None:
        pytest.skip("not for `offload train`")
    with torch.device("meta"):
        model = trainable(build_model(config.run), config)
    build_tokenizer(config.run, model.config.vocab_size)
    assert config.run.data == "stdlib" or (ROOT / config.run.data).is_file()
    if config.tiers.device.kind == "cpu" or torch.cuda.is_available():
        assert plan(model, config).fits


def test_the_quickstart_is_larger_than_its_memory():
    config = load_config(next(path for path in CONFIGS if path.stem == "quickstart"))
    with torch.device("meta"):
        made = plan(build_model(config.run), config)
    weights = sum(tier["weights"] for tier in made.bytes.values())
    state = weights + sum(tier["optimizer"] for tier in made.bytes.values())
    assert weights >= 4 * config.tiers.device.memory
    assert state >= 4 * config.tiers.host.memory
    assert config.run.expect.held_out_loss_fall == 0.4
    assert config.run.expect.weights_over_device == config.run.expect.state_over_host == 4
    assert config.run.expect.nvme_reads_cover_state


def test_the_example_of_adapters_trains(tmp_path, monkeypatch, capsys):
    """Three steps of it, with everything that it says."""
    monkeypatch.chdir(ROOT)
    config = load_config("configs/lora-chat_cpu_host.toml").model_dump(exclude_unset=True)
    config["run"] |= {"steps": 3, "eval_every": 1, "output": str(tmp_path), "generate_tokens": 2}
    config["lr_scheduler"] |= {"warmup_steps": 1, "total_steps": 3}
    config["checkpoint"] |= {"every_steps": 2}
    assert train.run(config) == 0
    printed = capsys.readouterr().out
    assert "transformers loads it" in printed
    assert "cut to" not in printed
    assert (tmp_path / "checkpoints" / "best" / "manifest.json").is_file()
