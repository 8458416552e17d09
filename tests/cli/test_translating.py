"""`offload translate`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload.cli.main import main
from offload.config import load_config
from offload.integrations.deepspeed import translate
from tests.integrations.deepspeed_configs import HF_ZERO2_VALUES, hf_zero2, megatron_infinity


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    groups = [{"match": ["*bias"], "weight_decay": 0.0}]
    own = {"optimizer": {"groups": groups}, "tiers": {"host": {"memory": "1GiB"}}}
    path.write_text(json.dumps(hf_zero2() | {"offload": own}))
    return path


AUTOS = [f"--set={key}={json.dumps(value)}" for key, value in HF_ZERO2_VALUES.items()]


def test_the_toml_is_the_translation_and_the_notes_are_shown(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.toml"
    done = CliRunner().invoke(main, ["translate", str(source), "-o", str(out), *AUTOS])
    assert done.exit_code == 0, done.output
    made = translate(source, values=HF_ZERO2_VALUES)
    assert done.output == f"{made}\n"
    assert load_config(out) == made.config
    again = CliRunner().invoke(main, ["translate", str(source), "-o", str(out), *AUTOS])
    assert again.exit_code == 2
    assert "cannot be written: File exists" in again.output


def test_without_a_file_all_is_printed_as_one_toml(source: Path) -> None:
    done = CliRunner().invoke(main, ["translate", str(source), *AUTOS])
    made = translate(source, values=HF_ZERO2_VALUES)
    assert load_config(tomllib.loads(done.output)) == made.config
    assert all(f"# {note}\n" in done.output for note in made.notes)


def test_paths_and_words_pass(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(megatron_infinity('a "quoted" path') | {"bf16": {"enabled": "auto"}})
    )
    command = ["translate", str(path), "--set", "bf16.enabled=false"]
    done = CliRunner().invoke(main, command)
    assert tomllib.loads(done.output)["tiers"]["nvme"]["paths"] == ['a "quoted" path']
    wrong = CliRunner().invoke(main, [*command[:-1], "bf16.enabled=perhaps"])
    assert wrong.exit_code == 2
    assert "bf16.enabled = 'perhaps' must be true or false" in wrong.output


def test_what_is_missing_is_an_error(source: Path) -> None:
    done = CliRunner().invoke(main, ["translate", str(source)])
    assert done.exit_code == 2
    assert "--set optimizer.params.lr=..." in done.output
