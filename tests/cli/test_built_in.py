"""The built-in model is as large as the budgets let it be, and does not stay on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload.cli.built_in import build_built_in, built_in_config
from offload.config import OffloadConfig


def config(device: str, path: Path | None = None, **sections: Any) -> OffloadConfig:
    tiers: dict[str, Any] = {
        "device": {"kind": "cpu", "memory": device},
        "host": {"memory": "1GiB"},
    }
    if path is not None:
        tiers["nvme"] = {"paths": [str(path)]}
    return built_in_config(OffloadConfig(tiers=tiers, **sections))


def test_the_largest_that_fits(tmp_path: Path) -> None:
    widths = [build_built_in(config(each)).width for each in ("1MiB", "4MiB", "64MiB")]
    assert widths == sorted(set(widths))
    assert widths[-1] == 512


def test_what_is_auto_is_on_the_furthest_tier(tmp_path: Path) -> None:
    placed = config("64MiB", tmp_path, placement={"weights": "host", "gradients": "auto"}).placement
    assert (placed.weights, placed.gradients, placed.optimizer) == ("host", "nvme", "nvme")
    assert config("64MiB").placement.optimizer == "host"


def test_mezo_has_weights_only(tmp_path: Path) -> None:
    placed = config("64MiB", tmp_path, optimizer={"name": "mezo"}).placement
    assert (placed.weights, placed.gradients, placed.optimizer) == ("nvme", "auto", "auto")


@pytest.mark.parametrize(
    "sections",
    [
        {"guard": {"gather": ["layers.0"], "poison": False}},
        {"tiling": {"modules": ["lm_head"], "tiles": 4}},
        {"training": {"loss_chunk_tokens": 8, "lm_head": "head", "max_grad_norm": 1.0}},
        {"optimizer": {"groups": [{"match": ["*layers*"], "lr": 0.0}], "lr": 0.5}},
        {"precision": {"keep_fp32": ["head*"], "compute": "fp32"}},
    ],
)
def test_what_names_parts_of_another_model_is_left_out(sections: dict[str, Any]) -> None:
    ((name, settings),) = sections.items()
    kept = getattr(config("64MiB", **sections), name)
    *named, last = settings
    default = getattr(OffloadConfig(), name)
    assert getattr(kept, last) == settings[last]
    for each in named:
        assert getattr(kept, each) == getattr(default, each)
