"""The command group: lazy, errors as one message, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from offload import __version__
from offload.cli.main import main
from offload.config import config_json_schema


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from offload.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, __version__ in result.output) == (0, True)


@pytest.mark.parametrize("command", ["train", "plan", "doctor", "bench"])
def test_an_offload_error_is_one_message_without_traceback(command: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[tiers.hosst]\nmemory = 1\n[placement]\nweights = 'nvm'\n")
    result = invoke(command, str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: 2 problems in {path}:")
    assert "did you mean tiers.host?" in result.stderr
    assert "Traceback" not in result.output


def test_plan_needs_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("")
    result = invoke("plan", str(path))
    assert result.exit_code == 2
    assert "run.model and run.hf_config are missing" in result.stderr


def test_config_schema_is_the_schema() -> None:
    result = invoke("config-schema")
    assert result.exit_code == 0
    assert json.loads(result.output) == json.loads(json.dumps(config_json_schema()))
