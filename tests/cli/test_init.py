"""`offload init`, and the whole way from there to an export, as a user goes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from offload.cli import init
from offload.cli.init import Request, write_config
from offload.cli.main import main
from offload.config import config_json_schema, load_config
from offload.errors import DoesNotFitError, OffloadError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def hf_model(tmp_path: Path) -> Path:
    """A tiny Llama with weights, a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "</s>": 257}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(path: Path, count: int = 60) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("named", "lora"), [("folder", True), ("config", False), ("built-in", True)]
)
def test_what_is_written_is_complete_and_fits(tmp_path, hf_model, named, lora) -> None:
    model = {"folder": hf_model, "config": hf_model / "config.json"}.get(named, named)
    out = tmp_path / "new.toml"
    command = ["init", str(model), "-o", str(out), "--data", 'a "b".jsonl']
    result = CliRunner().invoke(main, [*command, *(["--lora"] if lora else [])])
    assert result.exit_code == 0, result.output
    config = load_config(out)
    assert config.run.data == 'a "b".jsonl'
    assert (config.lora is not None) == lora
    text = out.read_text()
    assert text.startswith("#:schema ./offload.schema.json\n")
    schema = json.loads((tmp_path / "offload.schema.json").read_text())
    assert schema == json.loads(json.dumps(config_json_schema()))
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(schema).validate(tomllib.loads(text))
    again = CliRunner().invoke(main, command)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert out.read_text() == text
    assert CliRunner().invoke(main, ["plan", str(out), "--no-measure"]).exit_code == 0


def test_what_does_not_fit_gets_the_disk_or_is_refused(tmp_path, monkeypatch) -> None:
    """A machine with little memory, with a disk and without."""
    monkeypatch.setattr("offload.engine.planning.available_host_bytes", lambda: 64 << 20)
    monkeypatch.setattr("offload.config.available_host_bytes", lambda: 64 << 20)
    monkeypatch.setattr(init, "roomiest_disk", lambda _: tmp_path)
    request = Request(init.BUILT_IN, tmp_path / "a.toml", "stdlib", lora=False)
    made = write_config(request)
    assert made.fits
    assert load_config(request.out).tiers.nvme.paths == (tmp_path,)
    monkeypatch.setattr(init, "roomiest_disk", lambda _: None)
    request = Request(init.BUILT_IN, tmp_path / "b.toml", "stdlib", lora=False)
    with pytest.raises(DoesNotFitError, match="built-in does not fit this machine"):
        write_config(request)
    assert not request.out.exists()
    with pytest.raises(OffloadError, match=r"is no \.toml file"):
        write_config(Request(init.BUILT_IN, tmp_path / "b.json", "stdlib", lora=False))


def test_the_roomiest_disk_is_a_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(init, "file_system", lambda path: "tmpfs" if path == tmp_path else "ext4")
    monkeypatch.setattr(init, "_mounts", list)
    assert init.roomiest_disk(tmp_path) != tmp_path
    monkeypatch.setattr(init, "file_system", lambda path: "tmpfs")
    assert init.roomiest_disk(tmp_path) is None


def offload(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "offload.cli.main", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


def test_from_init_to_an_export_that_transformers_loads(tmp_path, hf_model) -> None:
    chat(tmp_path / "chat.jsonl")
    offload(tmp_path, "init", "model", "--data", "chat.jsonl", "-o", "tune.toml")
    path = tmp_path / "tune.toml"
    text = path.read_text()
    for old, new in (
        ("steps = 100\n", "steps = 4\n"), ("every_steps = 50 ", "every_steps = 2 "),
        ("eval_every = 50\n", "eval_every = 2\n"), ("warmup_steps = 10", "warmup_steps = 1"),
        ("# packing = true", "packing = true"), ("= 512", "= 64"), ("= 0.05 ", "= 0.2 "),
        ('memory = "auto"               # or', 'memory = "16MiB"  # or'),
    ):  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    assert "host" in offload(tmp_path, "plan", "tune.toml", "--no-measure")
    printed = offload(tmp_path, "train", "tune.toml")
    assert "train: 48 examples in" in printed
    assert "transformers loads it" in printed
    assert "4 steps" in offload(tmp_path, "report", "runs/tune")
    offload(tmp_path, "export", "runs/tune/checkpoints", "best", "--tag", "best")
    exported = tmp_path / "runs" / "tune" / "export"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "best" / name).read_bytes() == (exported / name).read_bytes()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(exported)("1?", return_tensors="pt")["input_ids"]
    tuned = AutoModelForCausalLM.from_pretrained(exported)
    plain = AutoModelForCausalLM.from_pretrained(hf_model, dtype=tuned.dtype)
    assert not torch.equal(tuned(ids).logits, plain(ids).logits)
