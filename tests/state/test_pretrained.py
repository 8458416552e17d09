"""Streaming a folder of safetensors into an engine: what transformers loads, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import offload
from offload.errors import CheckpointError, ConfigError, DiskFullError, OffloadError
from offload.optim.split import split_tensor
from offload.state import pretrained, recording
from offload.state.deferred import DeferredWeights
from offload.state.ranges import is_readable
from offload.state.recording import deferred_view, version_of

FP32 = {"precision": {"compute": "fp32"}}
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SMALL,
    "LlamaModel": SMALL,
    "GPT2LMHeadModel": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
    | {"bos_token_id": 0, "eos_token_id": 1},
    "BertForMaskedLM": SMALL,
    "T5ForConditionalGeneration": {"vocab_size": 300, "d_model": 64, "d_ff": 96}
    | {"num_layers": 2, "d_kv": 16, "num_heads": 4},
    "ViTForImageClassification": {k: v for k, v in SMALL.items() if k != "vocab_size"},
    "MixtralForCausalLM": SMALL | {"num_key_value_heads": 2, "num_local_experts": 12},
}


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def transformers_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    model_class = transformers_class(name)
    return model_class(model_class.config_class(**{**MODELS[name], **changes}))


def assert_loads_as_transformers_does(
    folder: Path, model_class: Any, *, is_named: bool = False
) -> None:
    """Every tensor, buffer, tie and the mode are what transformers makes of the folder.

    `is_named`: the class is given, and not the one that the folder names.
    """
    expected = model_class.from_pretrained(folder, dtype=torch.float32)
    generator = torch.get_rng_state()
    given = model_class if is_named else None
    with offload.from_pretrained(folder, FP32, model_class=given) as engine:
        assert torch.equal(generator, torch.get_rng_state())
        assert type(engine.module) is model_class
        assert engine.module.training is expected.training
        assert engine.module.config.to_dict() == expected.config.to_dict()
        if expected.can_generate():
            found_config: Any = engine.module.generation_config
            assert found_config.to_dict() == expected.generation_config.to_dict()
        with engine.gathered():
            found = engine.module.state_dict(keep_vars=True)
            wanted = expected.state_dict(keep_vars=True)
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(tensor, found[name]), name
                assert found[name].requires_grad == tensor.requires_grad
            for alias, tensor in wanted.items():
                for name, other in wanted.items():
                    assert (found[alias] is found[name]) == (tensor is other)
        buffers = dict(engine.module.named_buffers())
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
            assert buffer.dtype is buffers[name].dtype


@pytest.mark.parametrize("threshold", [1, recording.THRESHOLD_ELEMENTS])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_loads_as_with_transformers(
    name: str, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "THRESHOLD_ELEMENTS", threshold)
    model = model_of(name)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if threshold == 1 else "150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or threshold > 1
    assert_loads_as_transformers_does(tmp_path, type(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("MixtralForCausalLM").to(dtype)
    model.save_pretrained(tmp_path)
    assert_loads_as_transformers_does(tmp_path, type(model))


def test_tied_embeddings(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert_loads_as_transformers_does(tmp_path, type(model))
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    assert_loads_as_transformers_does(tmp_path, type(model))
    stored["lm_head.weight"] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one tied parameter of the module, and differ"):
        offload.from_pretrained(tmp_path, FP32)


def test_tied_tensors_are_compared_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_COMPARED_ELEMENTS", 1000)
    model_of("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    assert head.numel() > 3 * pretrained._COMPARED_ELEMENTS
    save_file(stored, tmp_path / "model.safetensors")
    assert_loads_as_transformers_does(tmp_path, transformers_class("LlamaForCausalLM"))
    head[-1, -1] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one tied parameter of the module, and differ"):
        offload.from_pretrained(tmp_path, FP32)


def test_tied_tensors_of_different_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    model_of("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    rounded = stored["model.embed_tokens.weight"].to(torch.bfloat16)
    stored |= {"model.embed_tokens.weight": rounded.float(), "lm_head.weight": rounded}
    save_file(stored, tmp_path / "model.safetensors")
    assert_loads_as_transformers_does(tmp_path, transformers_class("LlamaForCausalLM"))
    stored["model.embed_tokens.weight"][0, 0] *= 1.0001
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one tied parameter of the module, and differ"):
        offload.from_pretrained(tmp_path, FP32)


def test_a_real_tensor_is_compared_with_a_deferred_one() -> None:
    """A conversion of the model's library may have to compute what it makes."""
    real = torch.full((200, 200), 0.5)
    with offload.deferred_init():
        deferred = nn.Parameter(torch.full((200, 200), 0.5))
    assert version_of(deferred) is not None
    assert pretrained._equal(deferred, real)
    assert pretrained._equal(real, deferred)
    assert not pretrained._equal(deferred, real + 1)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("LlamaModel", "LlamaForCausalLM"), ("LlamaForCausalLM", "LlamaModel")],
    ids=["a prefix is added", "a prefix is taken away"],
)
def test_a_body_and_a_model_with_a_head(saved: str, loaded: str, tmp_path: Path) -> None:
    """The head is tied, so that neither file lacks a tensor; the names differ by a prefix."""
    model_of(saved, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert_loads_as_transformers_does(tmp_path, transformers_class(loaded), is_named=True)


def test_generation_settings_in_the_models_configuration(folder: Path) -> None:
    """As models had them before there was a file for them."""
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_beams": 3}))
    assert_loads_as_transformers_does(folder, transformers_class("LlamaForCausalLM"))


def test_experts_are_read_in_ranges_and_not_put_together(tmp_path: Path) -> None:
    """The file has a tensor for each expert, the module one for all of a layer."""
    model = model_of("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum("experts" in name for name in stored) > 12
    with pretrained.opened(tmp_path) as module:
        views = {
            name: deferred_view(parameter)
            for name, parameter in module.named_parameters()
            if version_of(parameter) is not None
        }
        assert any("experts" in name for name in views)
        assert all(view is not None and is_readable(view) for view in views.values())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_an_engines_own_export_loads(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    with offload.initialize(model, FP32) as engine:
        engine.save_pretrained(tmp_path)
    assert_loads_as_transformers_does(tmp_path, type(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masters_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM").to(dtype)
    model.save_pretrained(tmp_path / "model")
    config = {
        "precision": {"compute": "bf16"},
        "tiers": {"nvme": {"paths": [str(tmp_path)]}, "device": {"memory": "4MiB"}},
        "placement": {"weights": "nvme", "optimizer": "nvme"},
    }
    with offload.from_pretrained(tmp_path / "model", config) as engine:
        for name, state in engine.named_state():
            expected = model.get_parameter(name).detach().float()
            assert torch.equal(state["master"], expected)
            assert torch.equal(state["weight"], split_tensor(expected)[0])


@pytest.mark.parametrize("placement", ["device", "host", "nvme"])
def test_training_is_that_of_the_loaded_model(placement: str, tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    config = {
        **FP32,
        "tiers": {"nvme": {"paths": [str(tmp_path)]}, "device": {"memory": "16MiB"}},
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), placement),
    }
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(64).view(2, 32)
    found = []
    for engine in (
        offload.initialize(loaded, config),
        offload.from_pretrained(tmp_path / "model", config),
    ):
        with engine.train():
            losses = []
            for _ in range(3):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            found.append((losses, {n: s["weight"] for n, s in engine.named_state()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


class Plain(nn.Module):
    """A module of nobody's library: ties, both kinds of buffers, an empty and a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.phase = nn.Parameter(torch.randn(130, 130, dtype=torch.complex64))
        self.codes = nn.Parameter(torch.arange(20_000), requires_grad=False)
        self.conv = nn.Conv2d(32, 32, 5).to(memory_format=torch.channels_last)
        self.register_buffer("table", torch.randn(150, 150))
        self.register_buffer("mask", torch.ones(150, 150).tril(), persistent=False)


def test_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Plain()
    tensors = {name: t.contiguous() for name, t in module.state_dict().items()}
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with offload.from_pretrained(tmp_path, FP32, model_class=Plain) as engine:
        with engine.gathered():
            found = engine.module.state_dict(keep_vars=True)
            for name, tensor in module.state_dict().items():
                assert torch.equal(found[name], tensor), name
        assert engine.module.head.weight is engine.module.embed.weight
        assert torch.equal(engine.module.mask, module.mask)
        engine.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    for name in ("norm.running_var", "table"):
        change(tmp_path, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match=f"missing: {name}"):
            offload.from_pretrained(tmp_path, FP32, model_class=Plain)


def test_a_module_in_half_precision_gets_the_masters_of_the_file(tmp_path: Path) -> None:
    weight = torch.randn(200, 200)
    save_file({"weight": weight}, tmp_path / "model.safetensors")

    def build() -> nn.Module:
        return nn.Linear(200, 200, bias=False).to(torch.bfloat16)

    with offload.from_pretrained(tmp_path, {}, model_class=build) as engine:
        ((_, state),) = engine.named_state()
        assert torch.equal(state["master"], weight)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama of one file."""
    model_of("LlamaForCausalLM").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_every_wrong_tensor_is_listed_at_once(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_project.weight"] = tensors.pop(
            "model.layers.0.mlp.up_proj.weight"
        )
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
        turned = tensors["model.layers.1.mlp.down_proj.weight"].t().contiguous()
        tensors["model.layers.1.mlp.down_proj.weight"] = turned
        del tensors["model.layers.1.self_attn.q_proj.weight"]

    change(folder, edit)
    with pytest.raises(CheckpointError) as error:
        offload.from_pretrained(folder, FP32)
    text = str(error.value)
    assert "6 problems" in text
    assert (
        "missing: model.layers.0.mlp.up_proj.weight "
        "(nearest: model.layers.0.mlp.up_project.weight)" in text
    )
    assert (
        "unexpected: model.layers.0.mlp.up_project.weight "
        "(nearest: model.layers.0.mlp.up_proj.weight)" in text
    )
    assert "missing: model.layers.1.self_attn.q_proj.weight" in text
    assert "float32 [65] in the files, expected float32 [64]: model.norm.weight" in text
    assert "[96, 64] in the files, expected float32 [64, 96]: model.layers.1.mlp.down" in text
    assert "int32 [300, 64] in the files, expected float32 [300, 64]: lm_head.weight" in text


def test_what_a_conversion_makes_in_excess_is_unexpected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = pretrained.match

    def match_more(*given: Any) -> Any:
        found, unexpected = match(*given)
        return {**found, "model.ghost": found["model.norm.weight"]}, unexpected

    monkeypatch.setattr(pretrained, "match", match_more)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.ghost"):
        offload.from_pretrained(folder, FP32)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    model_of("MixtralForCausalLM").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    victim = next(name for name in stored if ".experts.3." in name)
    change(tmp_path, lambda tensors: tensors.pop(victim))
    with pytest.raises(CheckpointError, match="experts"):
        offload.from_pretrained(tmp_path, FP32)


def test_what_the_class_declares_ignorable_is_ignored(folder: Path) -> None:
    import transformers

    class Lenient(transformers.LlamaForCausalLM):
        _keys_to_ignore_on_load_missing = (r"q_proj",)
        _keys_to_ignore_on_load_unexpected = (r"legacy",)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.1.legacy"] = torch.ones(3)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    change(folder, edit)
    with offload.from_pretrained(folder, FP32, model_class=Lenient) as engine:
        state = dict(engine.named_state())["model.layers.1.self_attn.q_proj.weight"]
        assert 0.001 < state["weight"].std() < 0.1  # as the class initializes it


def test_damaged_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        whole[:-100],  # truncated
        whole[:4],
        whole[:9] + b"\xff" + whole[10:],  # no JSON
        (1 << 40).to_bytes(8, "little") + whole[8:],  # a header longer than the file
        whole + b"more",
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no valid safetensors file"):
            offload.from_pretrained(folder, FP32)


def test_shards_and_their_index(tmp_path: Path) -> None:
    model_of("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="150KB")
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    content = (tmp_path / shard).read_bytes()
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard}, which .* names"):
        offload.from_pretrained(tmp_path, FP32)
    (tmp_path / shard).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=shard):
        offload.from_pretrained(tmp_path, FP32)
    (tmp_path / shard).write_bytes(content)
    name = next(iter(index["weight_map"]))
    for wrong in ("../elsewhere.safetensors", "/etc/passwd", 3):
        changed = {"weight_map": {**index["weight_map"], name: wrong}}
        index_path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="no file beside it"):
            offload.from_pretrained(tmp_path, FP32)
    changed = {"weight_map": {**index["weight_map"], "ghost": shard}}
    index_path.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="'ghost', and it does not"):
        offload.from_pretrained(tmp_path, FP32)
    index_path.write_text("{")
    with pytest.raises(CheckpointError, match="no index of shards"):
        offload.from_pretrained(tmp_path, FP32)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which is pickled"):
        offload.from_pretrained(folder, FP32)


def test_folders_that_are_none_and_unknown_architectures(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no local folder"):
        offload.from_pretrained(folder / "model.safetensors", FP32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForAll"]}))
    with pytest.raises(ConfigError, match="LlamaForAll"):
        offload.from_pretrained(folder, FP32)
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | quantized))
    with pytest.raises(ConfigError, match="quantized"):
        offload.from_pretrained(folder, FP32)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="model_class"):
        offload.from_pretrained(folder, FP32)
    with pytest.raises(ConfigError, match="returned a int"):
        offload.from_pretrained(folder, FP32, model_class=lambda: 3)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("in_ranges", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    value: float, in_ranges: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_ranges:  # as after a conversion that has to be computed
        monkeypatch.setattr("offload.state.ranges.is_readable", lambda view: False)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    change(folder, edit)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: element 293 "):
        offload.from_pretrained(folder, FP32)


def test_what_is_finite_or_frozen_loads(tmp_path: Path) -> None:
    """Large weights whose sum overflows are finite; a frozen one may hold anything (a mask)."""
    tensors = {"0.weight": torch.full((200, 200), 3e38), "1.weight": torch.eye(200).log()}
    save_file(tensors, tmp_path / "model.safetensors")

    def build() -> nn.Module:
        module = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(2)))
        module[1].requires_grad_(False)
        return module

    with offload.from_pretrained(tmp_path, FP32, model_class=build) as engine:
        for name, state in engine.named_state():
            assert torch.equal(state["weight"], tensors[name])


def test_a_full_disk_while_weights_move(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes through, files are closed, and nothing is left that was reserved."""
    readers = []
    seen = DeferredWeights.read

    def read(self: DeferredWeights, state: Any, start: int, numel: int) -> torch.Tensor:
        if state.index == 5:
            readers.extend(r for r in [*_open_readers()] if r not in readers)
            raise DiskFullError(path=str(tmp_path), needed_bytes=1, free_bytes=0)
        return seen(self, state, start, numel)

    monkeypatch.setattr(DeferredWeights, "read", read)
    config = {
        **FP32,
        "tiers": {"nvme": {"paths": [str(tmp_path)]}},
        "placement": {"weights": "nvme"},
    }
    with pytest.raises(DiskFullError):
        offload.from_pretrained(folder, config)
    assert readers
    assert all(reader._descriptor == -1 for reader in readers)
    monkeypatch.undo()
    with offload.from_pretrained(folder, config) as engine:
        assert engine.plan.bytes["nvme"]["weights"]


def _open_readers() -> list[Any]:
    import gc

    from offload.state.safetensors_stream import SafetensorsReader

    return [r for r in gc.get_objects() if type(r) is SafetensorsReader and r._descriptor >= 0]


def test_the_model_is_guarded_while_its_files_are_open(folder: Path) -> None:
    with pretrained.opened(folder) as module:
        with pytest.raises(OffloadError, match=r"offload\.initialize"):
            module(input_ids=torch.arange(8)[None])
        assert all(
            type(p) is not nn.Parameter for p in module.parameters() if version_of(p) is not None
        )
