"""The JSON Schema that editors complete configurations with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.config import config_json_schema

jsonschema = pytest.importorskip("jsonschema")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def fields() -> Iterator[tuple[str, dict[str, Any]]]:
    schema = config_json_schema()
    for name, section in [("", schema), *schema["$defs"].items()]:
        for key, field in section["properties"].items():
            inner = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            yield f"{name}.{key}", {**inner, **field}


def test_it_is_a_schema_of_its_draft() -> None:
    schema = config_json_schema()
    assert schema["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_follow_it(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(config_json_schema())
    validator.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tiers": {"hosst": {}}},
        {"tiers": {"host": {"memory": "20G"}}},
        {"tiers": {"device": {"kind": "gpu"}}},
        {"placement": {"weights": "disk"}},
        {"optimizer": {"lr": -1}},
        {"run": {"steps": 1, "train_on": "prompt"}},
        {"lora": {"r": 0}},
    ],
    ids=str,
)
def test_what_is_wrong_is_marked(wrong: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(config_json_schema()).is_valid(wrong)


def test_every_setting_says_what_it_is() -> None:
    schema = config_json_schema()
    for name, field in fields():
        assert field.get("description"), name
        if "default" in field:
            whole = {**field, "$defs": schema["$defs"]}
            jsonschema.Draft202012Validator(whole).validate(field["default"])
