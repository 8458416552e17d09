"""Each contradiction is found, alone, with a remedy; its neighbours are legal."""

from __future__ import annotations

from typing import Any

import pytest

from offload.config import load_config
from offload.errors import ConfigError

CONTRADICTORY: list[tuple[dict[str, Any], str]] = [
    ({"placement": {"weights": "nvme"}}, "placement.weights = 'nvme' needs tiers.nvme.paths"),
    ({"tiers": {"nvme": {"capacity": "1GiB"}}}, "tiers.nvme.capacity is set but"),
    ({"checkpoint": {"every_steps": 5}}, "checkpoint.every_steps = 5 needs checkpoint.directory"),
    ({"tiers": {"nvme": {"paths": ["a", "a/"]}}}, "names 'a' more than once"),
    ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum is not a setting of adamw, but of sgd"),
    ({"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}, "optimizer.betas is not a setting"),
    (
        {"optimizer": {"groups": [{"match": ["*"], "momentum": 0.9}]}},
        "optimizer.groups.0.momentum is not a setting of adamw",
    ),
    ({"optimizer": {"name": "sgd", "nesterov": True}}, "needs optimizer.momentum above 0"),
    ({"optimizer": {"perturbation": 1e-3}}, "optimizer.perturbation is not a setting of adamw"),
    ({"optimizer": {"name": "mezo", "eps": 1e-3}}, "optimizer.eps is not a setting of mezo"),
    (
        {"optimizer": {"name": "mezo"}, "training": {"gradient_accumulation_steps": 2}},
        "loop over the micro-batches in the closure",
    ),
    (
        {"optimizer": {"name": "mezo"}, "training": {"accumulation": "layer_major"}},
        "training.accumulation is of no use to mezo",
    ),
    ({"optimizer": {"name": "mezo"}, "training": {"max_grad_norm": 1.0}}, "max_grad_norm is of no"),
    ({"optimizer": {"name": "mezo"}, "tiling": {"modules": ["head"]}}, "tiling.modules is of no"),
    ({"optimizer": {"name": "mezo"}, "placement": {"gradients": "host"}}, "placement.gradients is"),
    ({"optimizer": {"name": "mezo"}, "placement": {"optimizer": "host"}}, "placement.optimizer is"),
    ({"optimizer": {"name": "mezo"}, "placement": {"weights": "device"}}, "no true weights"),
    ({"optimizer": {"name": "mezo"}, "placement": {"update": 0.5}}, "placement.update is of no"),
    (
        {"optimizer": {"name": "mezo", "moments": "8bit"}},
        "optimizer.moments = '8bit' is not for mezo",
    ),
    (
        {"optimizer": {"name": "adagrad", "moments": "8bit"}},
        "is not for adagrad, but for adamw, adam, lion, and sgd with momentum",
    ),
    ({"optimizer": {"name": "sgd", "moments": "8bit"}}, "needs optimizer.momentum above 0: sgd"),
    ({"lr_scheduler": {"name": "cosine"}}, "needs the step at which the decay ends"),
    (
        {"lr_scheduler": {"name": "cosine", "warmup_steps": 8}, "run": {"steps": 7}},
        "lr_scheduler.warmup_steps = 8 is more than the 7 steps",
    ),
    ({"io": {"block_bytes": 5000}}, "io.block_bytes = 5000 is no multiple of 4096"),
    ({"run": {"model": "m"}}, "run.steps is missing"),
]

LEGAL: list[dict[str, Any]] = [
    {"checkpoint": {"every_steps": 5, "directory": "a"}},
    {"checkpoint": {"every_steps": 5}, "run": {"steps": 7}},
    {"placement": {"weights": "nvme"}, "tiers": {"nvme": {"paths": ["a"]}}},
    {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}},
    {
        "optimizer": {"name": "mezo", "perturbation": 1e-2, "weight_decay": 0.1},
        "placement": {"weights": "host", "gradients": "auto"},
        "training": {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    },
    {"optimizer": {"moments": "8bit"}},
    {"optimizer": {"name": "lion", "moments": "8bit"}},
    {"optimizer": {"name": "sgd", "momentum": 0.9, "moments": "8bit"}},
    {
        "optimizer": {
            "name": "sgd",
            "moments": "8bit",
            "groups": [{"match": ["*"], "momentum": 0.9}],
        }
    },
    {"optimizer": {"name": "mezo", "moments": "fp32"}},
    {"lr_scheduler": {"name": "constant", "warmup_steps": 8}},
    {"lr_scheduler": {"name": "linear", "warmup_steps": 8, "total_steps": 8}},
    {"io": {"block_bytes": 8192}},
]


@pytest.mark.parametrize(("config", "part"), CONTRADICTORY)
def test_contradiction(config: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    (problem,) = caught.value.problems
    assert part in problem


@pytest.mark.parametrize("config", LEGAL)
def test_legal(config: dict[str, Any]) -> None:
    load_config(config)
