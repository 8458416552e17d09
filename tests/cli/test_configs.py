"""The files in configs/ are complete: they load, name a real model, and fit their budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.cli.models import build_model, build_tokenizer
from offload.config import load_config
from offload.engine.planning import plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_complete(path):
    config = load_config(path)
    if config.run is None:
        pytest.skip("not for `offload train`")
    with torch.device("meta"):
        model = build_model(config.run)
    build_tokenizer(config.run, model.config.vocab_size)
    assert config.run.data == "stdlib"
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
