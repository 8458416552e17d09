"""Loading: formats, sizes, defaults, and all problems at once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from offload import OffloadConfig, load_config
from offload.config import config_json_schema
from offload.config.problems import valid_keys
from offload.errors import ConfigError

DESIGN_EXAMPLE = """
[tiers.device]
kind = "auto"
memory = "auto"
[tiers.host]
memory = "20GiB"
[tiers.nvme]
paths = ["offload-a", "offload-b"]
capacity = "auto"
[placement]
weights = "auto"
gradients = "host"
optimizer = "nvme"
activations = "device"
[precision]
compute = "bf16"
[training]
gradient_accumulation_steps = 4
max_grad_norm = 1
seed = 0
[optimizer]
name = "adamw"
lr = 1e-4
betas = [0.9, 0.95]
eps = 1e-8
weight_decay = 0.1
[[optimizer.groups]]
match = ["*bias", "*norm*"]
weight_decay = 0.0
[lr_scheduler]
name = "cosine"
warmup_steps = 10
[overlap]
prefetch = true
optimizer = true
[io]
backend = "auto"
[run]
model = "some/folder"
steps = 100
"""


def problems_of(config: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config)  # type: ignore[arg-type]
    return caught.value.problems


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DESIGN_EXAMPLE)
    config = load_config(path)
    assert config.tiers.host.memory == 20 << 30
    assert config.tiers.device.memory == "auto"
    assert config.tiers.nvme.paths == (Path("offload-a"), Path("offload-b"))
    assert config.training.max_grad_norm == 1.0
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.groups[0].match == ("*bias", "*norm*")
    assert config.optimizer.groups[0].weight_decay == 0.0
    assert config.optimizer.groups[0].lr is None


def test_json_and_mapping_give_the_same(tmp_path: Path) -> None:
    mapping = {"tiers": {"host": {"memory": "1 GB"}}, "run": {"steps": 3}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(mapping))
    assert load_config(str(path)) == load_config(mapping)
    assert load_config(mapping).tiers.host.memory == 10**9


def test_none_is_all_defaults_and_a_config_is_itself() -> None:
    config = load_config(None)
    assert config == OffloadConfig()
    assert load_config(config) is config


def test_sections_can_be_objects() -> None:
    config = load_config({"placement": {"weights": "host"}})
    assert OffloadConfig(placement=config.placement) == config
    assert OffloadConfig(**dict(config)) == config


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OffloadConfig().training.seed = 1  # type: ignore[misc]


def test_all_problems_at_once() -> None:
    problems = problems_of(
        {
            "trainig": {},
            "lr": 1,
            "tiers": {"device": {"kind": "gpu"}, "host": {"memory": "20G"}, "nvme": {"path": "x"}},
            "placement": {"weights": "nvm", "optimizer": "nvme"},
            "optimizer": {"groups": [{"match": ["a"], "weight_decy": 0}]},
            "training": {"gradient_accumulation_steps": 0, "seed": "1"},
            "overlap": 3,
        }
    )
    expected = [
        "tiers.device.kind must be auto, cpu, cuda or cuda:N, not 'gpu'",
        "tiers.host.memory has the unknown unit 'G': did you mean 20GiB or 20GB?",
        "unknown key tiers.nvme.path: did you mean tiers.nvme.paths?",
        "did you mean 'nvme'?",
        "unknown key optimizer.groups.0.weight_decy: did you mean optimizer.groups.0.weight_decay?",
        "training.gradient_accumulation_steps = 0: should be greater than or equal to 1",
        "training.seed = '1': should be a valid integer",
        "overlap must be a table (section), not 3",
        "unknown key trainig: did you mean training?",
        "unknown key lr: did you mean optimizer.lr?",
        "placement.optimizer = 'nvme' needs tiers.nvme.paths",
    ]
    assert len(problems) == len(expected)
    for part in expected:
        assert any(part in problem for problem in problems), part


@pytest.mark.parametrize("key", ["zzz", "", "Prefetch", "q" * 40])
def test_any_unknown_key_names_a_valid_one(key: str) -> None:
    (problem,) = problems_of({key: 1})
    assert any(name in problem for name in valid_keys(OffloadConfig)), problem


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.yaml", "", "a .toml or .json file"),
        ("a.toml", "x = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "table of sections"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, part: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=part) as caught:
        load_config(path)
    assert name in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml.*\n.*No such file"):
        load_config(tmp_path / "absent.toml")


def test_nvme_path_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    (problem,) = problems_of({"tiers": {"nvme": {"paths": [str(path)]}}})
    assert "is not a directory" in problem
    assert "tiers.nvme.paths.0" in problem


def test_nvme_path_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(_: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "exists", exists)
    (problem,) = problems_of({"tiers": {"nvme": {"paths": [str(tmp_path)]}}})
    assert "cannot be looked at: Input/output error" in problem


def test_a_decay_ends_with_the_run() -> None:
    config = load_config({"lr_scheduler": {"name": "linear"}, "run": {"steps": 7}})
    assert config.lr_scheduler.total_steps == 7
    explicit = {"lr_scheduler": {"name": "linear", "total_steps": 9}, "run": {"steps": 7}}
    assert load_config(explicit).lr_scheduler.total_steps == 9


def test_schema_describes_every_field() -> None:
    schema = config_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["additionalProperties"] is False
        assert definition["description"]
        for name, field in definition["properties"].items():
            # pydantic leaves out a field's description that only repeats the section's own
            assert field.get("description") or "$ref" in field, name
