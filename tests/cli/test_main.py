"""The command group: lazy, errors as one message, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from offload import __version__
from offload.cli.interrupt import Interrupted
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


def test_export_of_a_checkpoint(tmp_path: Path) -> None:
    import torch

    import offload

    config = {"tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "1MiB"}}}
    with offload.initialize(torch.nn.Linear(3, 2), config) as engine:
        engine.save_checkpoint(tmp_path / "ckpt")
        weight = dict(engine.named_state())["weight"]["master"]
    arguments = ("export", str(tmp_path / "ckpt"), str(tmp_path / "out"))
    result = invoke(*arguments, "--dtype", "fp32")
    assert (result.exit_code, result.output) == (0, f"{tmp_path}/out/model.safetensors\n")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], weight)
    result = invoke(*arguments, "--tag", "absent")
    assert result.exit_code == 2
    assert "no undamaged checkpoint 'absent'" in result.stderr
    assert "export" in invoke("--help").output


def test_import_makes_a_checkpoint_that_training_goes_on_from(tmp_path: Path) -> None:
    import torch

    import offload
    from offload.cli.models import build_model
    from offload.config import load_config

    config = {
        "tiers": {"device": {"kind": "cpu", "memory": "4MiB"}, "host": {"memory": "4MiB"}},
        "precision": {"compute": "fp32"},
        "run": {
            "steps": 2,
            "architecture": "LlamaForCausalLM",
            "hf_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 2, "vocab_size": 32, "model_type": "llama",
            },
        },
    }  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(config))
    section = load_config(config).run
    assert section is not None
    with offload.initialize(build_model(section), config) as engine:
        tokens = torch.arange(8).view(1, 8)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        assert engine.step()
        engine.save_checkpoint(tmp_path / "ckpt")
        expected = dict(engine.named_state())
    out = str(tmp_path / "dcp")
    command = ("export", str(tmp_path / "ckpt"), out, "--format", "dcp", "--optimizer")
    assert invoke(*command).exit_code == 0
    result = invoke("import", str(path), out, str(tmp_path / "imported"))
    assert result.exit_code == 0, result.output
    assert "optimizer state at step 1" in result.output
    assert f"saved as {tmp_path}/imported/step-00000001" in result.output
    assert "not resumed: the learning rate scheduler" in result.output
    with offload.initialize(build_model(section), config) as engine:
        engine.load_checkpoint(tmp_path / "imported")
        for name, tensors in engine.named_state():
            for key, tensor in tensors.items():
                if key != "gradient":
                    assert torch.equal(tensor, expected[name][key]), (name, key)
    result = invoke("import", str(path), str(tmp_path), str(tmp_path / "again"))
    assert (result.exit_code, "lacks model.safetensors" in result.stderr) == (2, True)
    path.write_text("{}")
    result = invoke("import", str(path), out, str(tmp_path / "again"))
    assert (result.exit_code, "[run] is missing" in result.stderr) == (2, True)


def test_config_schema_is_the_schema() -> None:
    result = invoke("config-schema")
    assert result.exit_code == 0
    assert json.loads(result.output) == json.loads(json.dumps(config_json_schema()))


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)]
)
def test_what_interrupts_a_command_at_once_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def run(config: str, stop: object) -> int:
        raise raised

    monkeypatch.setattr("offload.cli.train.run", run)
    assert invoke("train", "any.toml").exit_code == code


@pytest.mark.parametrize("place", ["make_context", "invoke"])
def test_ctrl_c_outside_of_a_command_is_the_exit_code_too(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(main), place, interrupted)
    assert invoke("config-schema").exit_code == 130
