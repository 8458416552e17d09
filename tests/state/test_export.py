from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from offload.errors import CheckpointError, DiskFullError
from offload.state import durable, manifest
from offload.state.export import export_checkpoint, save_pretrained
from offload.state.stored import StoredCheckpoint
from tests.state.saving import save_checkpoint

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
FEED = {"intermediate_size": 48, "max_position_embeddings": 64}
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL | FEED | {"num_key_value_heads": 2}),
    "llama_tied": ("LlamaForCausalLM", SMALL | FEED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}),
    "bert": ("BertForMaskedLM", SMALL | FEED),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 61},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        SMALL | FEED | {"num_key_value_heads": 2, "num_local_experts": 3},
    ),
}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    name, fields = MODELS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**fields)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000], ids=["one", "sharded"])
@pytest.mark.parametrize("kind", MODELS)
def test_from_pretrained_reads_the_same_bits(tmp_path, in_memory_engine, kind, shard_bytes):
    model = build(kind, torch.bfloat16)
    engine = in_memory_engine(model)
    before = model.config.to_dict()
    assert save_pretrained(engine, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert model.config.to_dict() == before, "the user's config object is untouched"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    loaded, report = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    ties = dict(model.named_parameters(remove_duplicate=False))
    loaded_ties = dict(loaded.named_parameters(remove_duplicate=False))
    for name, canonical in engine.aliases().items():
        assert ties[name] is ties[canonical]
        assert loaded_ties[name] is loaded_ties[canonical], "tied again"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["dtype"] == "bfloat16"


def test_files_are_what_the_format_asks(tmp_path, in_memory_engine):
    save_pretrained(in_memory_engine(build("llama_tied")), tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    total_bytes = 0
    for name in names:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
            total_bytes += sum(
                t.numel() * t.element_size() for t in map(file.get_tensor, file.keys())
            )
    assert index["metadata"]["total_size"] == total_bytes
    assert "lm_head.weight" not in index["weight_map"], "tied weights are stored once"


def test_any_module_becomes_its_state_dict(tmp_path, small_engine):
    engine = small_engine()
    save_pretrained(engine, tmp_path)
    assert names_in(tmp_path) == ["model.safetensors"]
    found, expected = load_file(tmp_path / "model.safetensors"), engine.module.state_dict()
    assert found.keys() == expected.keys() - {"head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_exporting_again_replaces_the_weights_and_nothing_else(tmp_path, in_memory_engine):
    (tmp_path / "tokenizer.json").write_text("{}")
    engine = in_memory_engine(build("llama"))
    save_pretrained(engine, tmp_path, max_shard_bytes=20_000)
    save_pretrained(engine, tmp_path)
    assert names_in(tmp_path) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    save_pretrained(engine, tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    type(engine.module).from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_earlier_export_whole(tmp_path, in_memory_engine, monkeypatch):
    engine = in_memory_engine(build("llama"))
    save_pretrained(engine, tmp_path, max_shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    writes = []

    def full(descriptor, data, offset, real=durable.write_all):
        writes.append(offset)
        if len(writes) == 12:
            raise OSError(28, "No space left on device")
        real(descriptor, data, offset)

    monkeypatch.setattr(durable, "write_all", full)
    with pytest.raises(DiskFullError):
        save_pretrained(engine, tmp_path, max_shard_bytes=20_000)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == before
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


def test_one_tensor_is_in_memory_at_a_time(tmp_path, in_memory_engine, monkeypatch):
    """The engine's copies: the next is asked for only when the last one is gone."""
    engine = in_memory_engine(build("llama"))
    copies = []
    real_read = engine.read_state

    def read(name, field):
        assert all(ref() is None for ref in copies), "an earlier copy is still alive"
        tensor = real_read(name, field)
        copies.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(engine, "read_state", read)
    save_pretrained(engine, tmp_path)
    assert len(copies) == len(engine.parameter_names())


def test_the_checkpoint_of_any_module_becomes_its_state_dict(tmp_path, small_engine):
    engine = small_engine()
    save_checkpoint(engine, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["model.safetensors"]
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), engine.module.state_dict()
    assert found.keys() == expected.keys() - {"head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_one_tensor_of_a_checkpoint_is_in_memory_at_a_time(tmp_path, in_memory_engine, monkeypatch):
    save_checkpoint(in_memory_engine(build("llama")), tmp_path / "ckpt")
    alive = []
    real_read = StoredCheckpoint.read

    def read(self, record):
        assert all(ref() is None for ref in alive), "an earlier tensor is still alive"
        tensor = real_read(self, record)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredCheckpoint, "read", read)
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert len(alive) > 20


def test_a_damaged_checkpoint_is_not_exported(tmp_path, small_engine):
    path = save_checkpoint(small_engine(), tmp_path / "ckpt")
    data = bytearray((path / "data-00000.bin").read_bytes())
    data[-1] ^= 1
    (path / "data-00000.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: CRC32C"):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_forged_description_writes_no_other_file(tmp_path, small_engine):
    path = save_checkpoint(small_engine(), tmp_path / "ckpt")
    content = manifest.read(path)
    for forged in ({"names": {}, "configs": {"../evil": "x"}}, {"names": {"a": 1}}, None, []):
        content.values["export"] = forged
        (path / manifest.MANIFEST_NAME).write_bytes(manifest.encode(content))
        with pytest.raises(CheckpointError, match="export"):
            export_checkpoint(path, tmp_path / "out")
    assert names_in(tmp_path) == ["ckpt"]
