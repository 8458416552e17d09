"""Deltas: only what differs is written, and base and delta give the export back, bit for bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import offload
from offload.cli.main import main
from offload.errors import CheckpointError
from offload.state.delta import export_delta
from offload.state.export import export_checkpoint, save_pretrained
from offload.state.safetensors_stream import SafetensorsReader
from offload.state.stored import StoredCheckpoint
from tests.state.saving import save_checkpoint

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2,
}  # fmt: skip
SHARD_BYTES = 20_000


def llama(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fine_tuned(tmp_path, in_memory_engine):
    """A base, and a checkpoint in which the second layer's MLP differs from it; and the export."""
    engine = in_memory_engine(llama())
    save_pretrained(engine, tmp_path / "base", max_shard_bytes=SHARD_BYTES)
    save_checkpoint(engine, tmp_path / "base-ckpt")
    changed = [n for n, _ in engine.module.named_parameters() if "layers.1.mlp" in n]
    with torch.no_grad():
        for name in changed:
            engine.module.get_parameter(name)[-1, -1] += 1
    save_checkpoint(engine, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "export", max_shard_bytes=SHARD_BYTES)
    return tmp_path, changed


@pytest.mark.parametrize("base", ["base", "base-ckpt"])
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 4_000], ids=["one", "sharded"])
def test_a_delta_and_its_base_give_the_export(fine_tuned, base, shard_bytes):
    folder, changed = fine_tuned
    export_checkpoint(folder / "ckpt", folder / "expected", max_shard_bytes=shard_bytes)
    made = export_delta(
        folder / "ckpt", folder / base, folder / "delta", max_shard_bytes=shard_bytes
    )
    tensors = {}
    for path in (folder / "delta").glob("*.safetensors"):
        tensors |= load_file(path)
    assert sorted(tensors) == sorted(changed)
    assert len(list((folder / "delta").glob("*.safetensors"))) == (1 if shard_bytes > 4_000 else 3)
    assert (made.num_changed, made.num_unchanged) == (3, 17)
    assert made.changed_bytes == 3 * 32 * 48 * 2
    description = json.loads((folder / "delta" / "delta.json").read_text())
    assert len(description["unchanged"]) == made.num_unchanged
    assert not set(description["unchanged"]) & set(changed)
    with safe_open(next((folder / "delta").glob("*.safetensors")), "pt") as file:
        assert file.metadata()["base_index_sha256"] == description["base"]["index_sha256"]
    offload.apply_delta(folder / base, folder / "delta", folder / "again")
    assert contents(folder / "again") == contents(folder / "expected")
    transformers.LlamaForCausalLM.from_pretrained(folder / "again")


def test_the_digest_is_of_the_index_whatever_the_shards(fine_tuned):
    folder, _ = fine_tuned
    digests = set()
    for base in ("base", "base-ckpt", "export"):
        export_delta(folder / "ckpt", folder / base, folder / "delta")
        description = json.loads((folder / "delta" / "delta.json").read_text())
        digests.add(description["base"]["index_sha256"])
    assert len(digests) == 1


def test_the_same_bits_are_an_empty_delta(fine_tuned):
    folder, _ = fine_tuned
    made = export_delta(folder / "ckpt", folder / "export", folder / "delta")
    assert (made.num_changed, made.changed_bytes) == (0, 0)
    offload.apply_delta(folder / "export", folder / "delta", folder / "again")
    expected = load_file(export_checkpoint(folder / "ckpt", folder / "one") / "model.safetensors")
    found = load_file(folder / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bits_count_and_not_values(tmp_path, small_engine):
    engine = small_engine()
    with torch.no_grad():
        engine.module.frozen.weight.fill_(float("nan"))
        engine.module.norm.bias.fill_(0.0)
    save_checkpoint(engine, tmp_path / "base")
    with torch.no_grad():
        engine.module.norm.bias.fill_(-0.0)
    save_checkpoint(engine, tmp_path / "ckpt")
    export_delta(tmp_path / "ckpt", tmp_path / "base", tmp_path / "delta")
    found = load_file(tmp_path / "delta" / "delta.safetensors")
    assert list(found) == ["norm.bias"], "NaN is its own bits; zeros of two signs are not one"


def test_an_older_delta_goes_before_a_newer_is_whole(fine_tuned, monkeypatch):
    folder, _ = fine_tuned
    export_delta(folder / "ckpt", folder / "base", folder / "delta", max_shard_bytes=4_000)
    export_delta(folder / "ckpt", folder / "base", folder / "delta")
    assert len(list((folder / "delta").glob("*.safetensors"))) == 1
    monkeypatch.setattr(offload.state.delta, "write_shards", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_delta(folder / "ckpt", folder / "base", folder / "delta")
    with pytest.raises(CheckpointError, match="is no delta"):
        offload.apply_delta(folder / "base", folder / "delta", folder / "again")


def test_another_base_is_named(fine_tuned, in_memory_engine):
    folder, _ = fine_tuned
    export_delta(folder / "ckpt", folder / "base", folder / "delta")
    save_pretrained(in_memory_engine(llama(seed=1)), folder / "other")
    with pytest.raises(CheckpointError, match=r"model\.\S+' does not have the bits.*the base that"):
        offload.apply_delta(folder / "other", folder / "delta", folder / "again")
    tensors = load_file(folder / "other" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing.*index digest"):
        offload.apply_delta(folder / "other", folder / "delta", folder / "again")
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, folder / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is torch\.float32 \(31,\); expected"):
        offload.apply_delta(folder / "other", folder / "delta", folder / "again")
    with pytest.raises(CheckpointError, match="is a delta itself"):
        offload.apply_delta(folder / "delta", folder / "delta", folder / "again")
    with pytest.raises(CheckpointError, match="no tensor of the export"):
        save_file({"a": torch.zeros(1)}, folder / "other" / "model.safetensors")
        export_delta(folder / "ckpt", folder / "other", folder / "delta2")
    assert not (folder / "again" / "model.safetensors").exists()
    assert not (folder / "delta2").exists()


def test_what_is_read_is_not_overwritten(fine_tuned):
    folder, _ = fine_tuned
    before = contents(folder / "base")
    with pytest.raises(CheckpointError, match="is also what is read"):
        export_delta(folder / "ckpt", folder / "base", folder / "base")
    export_delta(folder / "ckpt", folder / "base", folder / "delta")
    for out in ("base", "delta"):
        with pytest.raises(CheckpointError, match="is also what is read"):
            offload.apply_delta(folder / "base", folder / "delta", folder / out)
    assert contents(folder / "base") == before


def test_a_damaged_delta_is_refused(fine_tuned):
    folder, changed = fine_tuned
    export_delta(folder / "ckpt", folder / "base", folder / "delta")
    path = folder / "delta" / "delta.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\S+' does not have.*make it again"):
        offload.apply_delta(folder / "base", folder / "delta", folder / "again")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks delta\.safetensors"):
        offload.apply_delta(folder / "base", folder / "delta", folder / "again")
    save_file({changed[0]: torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="do not hold"):
        offload.apply_delta(folder / "base", folder / "delta", folder / "again")
    path.write_bytes(whole)
    description = folder / "delta" / "delta.json"
    text = json.loads(description.read_text())
    for forged in (
        text | {"num_files": 10**9}, text | {"num_files": "2"}, text | {"tensors": [{}]},
        text | {"version": 2}, text | {"unchanged": ["absent"]}, text | {"max_shard_bytes": 0},
        text | {"tensors": text["tensors"] * 2}, text | {"dtype": "bf16"}, [], "x",
        text | {"tensors": [text["tensors"][0] | {"dtype": "load"}]},
        text | {"tensors": [text["tensors"][0] | {"shape": [-1]}]},
    ):  # fmt: skip
        description.write_text(json.dumps(forged))
        with pytest.raises(CheckpointError, match="is malformed"):
            offload.apply_delta(folder / "base", folder / "delta", folder / "again")


def test_one_tensor_of_each_side_is_in_memory(fine_tuned, monkeypatch):
    folder, _ = fine_tuned
    alive: list = []
    most = []

    def counted(real):
        def read(self, key):
            tensor = real(self, key)
            alive.append(weakref.ref(tensor))
            most.append(sum(ref() is not None for ref in alive))
            return tensor

        return read

    monkeypatch.setattr(StoredCheckpoint, "read", counted(StoredCheckpoint.read))
    monkeypatch.setattr(SafetensorsReader, "read", counted(SafetensorsReader.read))
    export_delta(folder / "ckpt", folder / "base", folder / "delta")
    offload.apply_delta(folder / "base", folder / "delta", folder / "again")
    assert len(most) > 60
    assert max(most) <= 3


def test_on_the_command_line(fine_tuned):
    folder, _ = fine_tuned
    arguments = ["export", str(folder / "ckpt"), str(folder / "delta")]
    result = CliRunner().invoke(main, [*arguments, "--delta", str(folder / "base")])
    assert result.exit_code == 0, result.output
    assert f"3 of 20 tensors differ from {folder / 'base'}: 9.00 KiB of" in result.output
    assert str(folder / "delta" / "delta.json") in result.output
    arguments = [str(folder / name) for name in ("base", "delta", "again")]
    result = CliRunner().invoke(main, ["apply-delta", *arguments])
    assert result.exit_code == 0, result.output
    assert str(folder / "again" / "model.safetensors") in result.output
    one = export_checkpoint(folder / "ckpt", folder / "one")
    assert contents(folder / "again") == contents(one)
