"""Checkpoints of other programs: real ones, made by what is beside them in foreign/."""

from __future__ import annotations

import importlib.util
import json
import shutil
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict

import offload
from offload.errors import CheckpointError, ConfigError, EngineStateError
from offload.state.dcp_export import export_dcp
from offload.state.torch_archive import TorchArchive

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FOREIGN = Path(__file__).with_name("foreign")
TIERS = {"tiers": {"device": {"kind": "cpu", "memory": "4MiB"}, "host": {"memory": "4MiB"}}}
ADAMW = {"lr": 1e-2, "weight_decay": 0.01}
UNIVERSAL = {"zero1_two_ranks": "fp32", "zero2_bf16": "bf16", "zero3_two_ranks": "fp32"}

spec = importlib.util.spec_from_file_location("make_universal", FOREIGN / "make_universal.py")
make_universal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_universal)


def unpacked(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(FOREIGN / f"{name}.zip") as packed:
        packed.extractall(folder)
    return folder


def build(compute: str = "fp32", seed: int = 9, **sections):
    torch.manual_seed(seed)
    config = TIERS | {"precision": {"compute": compute}, "optimizer": ADAMW} | sections
    return offload.initialize(make_universal.Net(), config)


def step(engine, number: int) -> None:
    """A step that is taken: in fp16 the first ones are skipped until the loss scale fits."""
    for _ in range(20):
        engine.backward(make_universal.loss_of(engine, number))
        if engine.step():
            return
    raise AssertionError("no step is taken")


def everything(engine) -> dict[str, torch.Tensor]:
    found = {f"{n}|{k}": t for n, state in engine.named_state() for k, t in state.items()}
    return found | {name: b.clone() for name, b in engine.module.named_buffers()}


def assert_goes_on(engine, expected: Path, bound: float) -> None:
    """The fourth step is that of the program that wrote the checkpoint."""
    step(engine, 3)
    masters = {name: state["master"] for name, state in engine.named_state() if "master" in state}
    for name, tensor in load_file(expected).items():
        if name in masters:
            error = (masters[name] - tensor).norm() / tensor.norm()
            assert error <= bound, (name, error)


@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_checkpoint_goes_on(tmp_path, name):
    folder = unpacked(name, tmp_path)
    with build(UNIVERSAL[name]) as engine:
        done = engine.import_checkpoint(folder)
        assert (done.num_parameters, done.num_buffers, done.optimizer) == (7, 1, True)
        assert done.global_steps == engine.global_steps == 3
        assert engine.parameter_steps() == [3, 0, 0, 3, 3, 3, 3]
        assert engine.module.offsets.tolist() == [300, 301, 302, 303, 304]
        assert "DeepSpeed universal checkpoint: 7 parameters, 1 buffers" in str(done)
        assert any("scheduler" in line for line in done.not_resumed)
        zero = folder / "universal" / "zero"
        for parameter, state in engine.named_state():
            for key, field in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq",) * 2):
                if key in state:
                    value = torch.load(zero / parameter / f"{field}.pt")
                    value = value["param"] if isinstance(value, dict) else value
                    assert torch.equal(state[key].flatten(), value.flatten()), (parameter, key)
        fresh = make_universal.Net()  # frozen weights are those of the seed
        torch.manual_seed(0)
        fresh = make_universal.Net()
        frozen = engine.module.get_parameter("frozen.weight")
        with engine.gathered():
            expected = fresh.frozen.weight.to(frozen.dtype)
            assert torch.equal(frozen.detach(), expected)
        bound = 1e-6 if UNIVERSAL[name] == "fp32" else 2e-3
        assert_goes_on(engine, folder / "expected.safetensors", bound)


@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_a_directory_of_two_ranks_goes_on(tmp_path, placement):
    folder = unpacked("dcp_two_ranks", tmp_path)
    places = dict.fromkeys(("weights", "gradients", "optimizer"), placement)
    tiers = TIERS["tiers"] | {"nvme": {"paths": [str(tmp_path)], "capacity": "16MiB"}}
    with build(placement=places, tiers=tiers) as engine:
        done = engine.import_checkpoint(folder / "dcp")
        assert (done.num_parameters, done.num_buffers, done.optimizer) == (7, 1, True)
        assert done.not_resumed[:2] == (
            "the optimizer's groups (learning rates and so on: those of the config count)",
            "train_state",
        )
        assert engine.parameter_steps() == [3, 0, 0, 3, 3, 3, 3]
        assert_goes_on(engine, folder / "expected.safetensors", 1e-6)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_an_export_comes_back_bit_for_bit(tmp_path, compute):
    with build(compute) as engine:
        for number in range(2):
            step(engine, number)
        engine.save_checkpoint(tmp_path / "ckpt")
        expected, steps = everything(engine), engine.parameter_steps()
    export_dcp(
        tmp_path / "ckpt", tmp_path / "out", dtype="fp32", optimizer=True, max_file_bytes=999
    )
    with build(compute, seed=3) as engine:
        step(engine, 0)
        engine.import_checkpoint(tmp_path / "out")
        found = everything(engine)
        assert engine.parameter_steps() == steps
        assert engine.global_steps == 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "app.model.", "state_dict."])
def test_prefixes_are_found(tmp_path, prefix):
    model = make_universal.Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    weights, state = get_state_dict(model, optimizer)
    flat = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    flat |= {
        f"optimizer.state.{name}.{field}": value
        for name, fields in state["state"].items()
        for field, value in fields.items()
    }
    flat |= {"optimizer.param_groups.embed.weight.lr": 0.1, "train_state.step": torch.tensor(7)}
    flat["lr_scheduler.last_epoch"] = 3
    dcp.save(flat, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with build() as engine:
        done = engine.import_checkpoint(tmp_path / "dcp")
        assert done.not_resumed[1:3] == ("lr_scheduler", "train_state")
        for name, tensors in engine.named_state():
            assert torch.equal(tensors["weight"], weights[name]), name


def test_weights_only_and_state_that_has_to_be_there(tmp_path):
    folder = unpacked("zero3_two_ranks", tmp_path)
    with build() as engine:
        step(engine, 0)
        done = engine.import_checkpoint(folder, optimizer=False)
        assert not done.optimizer
        assert "moments and step counts begin at zero" in str(done)
        assert engine.parameter_steps() == [0] * 7
        assert engine.global_steps == 0
        for _, state in engine.named_state():
            assert not state.get("exp_avg", torch.zeros(1)).any()
        engine.save_pretrained(tmp_path / "hf")
        before = everything(engine)
        with pytest.raises(CheckpointError, match="has no optimizer state for Net"):
            engine.import_checkpoint(tmp_path / "hf", optimizer=True)
        assert everything(engine).keys() == before.keys()
        step(engine, 0)


def test_all_that_does_not_fit_is_listed_and_the_engine_unchanged(tmp_path):
    folder = unpacked("zero2_bf16", tmp_path) / "universal"
    zero = folder / "zero"
    shutil.rmtree(zero / "embed.weight")
    shutil.rmtree(zero / "head.weight")
    (zero / "body.weight" / "exp_avg.pt").unlink()
    (zero / "norm.bias" / "step.pt").unlink()
    torch.save({"param": torch.zeros(3)}, zero / "norm.weight" / "fp32.pt")
    torch.save({"param": torch.zeros(2, 3)}, zero / "body.bias" / "exp_avg_sq.pt")
    (zero / "stray").mkdir()
    torch.save(torch.zeros(1), zero / "stray" / "fp32.pt")
    torch.save(torch.zeros(7, 5), zero / "body.weight" / "max_exp_avg_sq.pt")
    with build("bf16") as engine:
        step(engine, 0)
        before = everything(engine)
        with pytest.raises(CheckpointError) as caught:
            engine.import_checkpoint(folder)
        message, _, remedy = str(caught.value).partition("; remedy: ")
        assert remedy.startswith("strict=False begins moments that are missing at zero")
        lines = message.split("\n  - ")
        assert lines[0].endswith("does not fit Net, 10 problems:")
        assert sorted(line.split(" (nearest")[0] for line in lines[1:]) == [
            "in excess: max_exp_avg_sq of body.weight",
            "in excess: stray",
            "is float32 [2, 3], expected [7]: exp_avg_sq of body.bias",
            "is float32 [3], expected bfloat16 [7]: norm.weight",
            "missing: embed.weight",
            "missing: exp_avg of body.weight",
            "missing: exp_avg of embed.weight",
            "missing: exp_avg_sq of embed.weight",
            "missing: step of embed.weight",
            "missing: step of norm.bias",
        ]
        after = everything(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)
        step(engine, 1)


def test_not_strict_passes_over_and_begins_at_zero(tmp_path):
    folder = unpacked("zero2_bf16", tmp_path) / "universal"
    zero = folder / "zero"
    for name in ("exp_avg", "exp_avg_sq", "step"):
        (zero / "norm.bias" / f"{name}.pt").unlink()
    (zero / "body.weight" / "exp_avg.pt").unlink()
    (zero / "stray").mkdir()
    torch.save(torch.zeros(1), zero / "stray" / "fp32.pt")
    with build("bf16") as engine:
        with pytest.raises(CheckpointError, match="in excess: stray"):
            engine.import_checkpoint(folder)
        done = engine.import_checkpoint(folder, strict=False)
        assert done.new == ("exp_avg of body.weight", "optimizer state of norm.bias")
        assert done.passed_over == ("stray",)
        assert "begins at zero: optimizer state of norm.bias" in str(done)
        assert engine.parameter_steps() == [3, 0, 0, 3, 3, 3, 0]
        step(engine, 3)


def test_frozen_here_and_trained_there(tmp_path):
    folder = unpacked("zero1_two_ranks", tmp_path)
    torch.manual_seed(1)
    model = make_universal.Net()
    model.body.requires_grad_(False)
    with offload.initialize(model, TIERS | {"precision": {"compute": "fp32"}}) as engine:
        with pytest.raises(CheckpointError, match=r"exp_avg of body\.weight, which is frozen here"):
            engine.import_checkpoint(folder)
        engine.import_checkpoint(folder, strict=False)
        value = torch.load(folder / "universal" / "zero" / "body.weight" / "fp32.pt")["param"]
        assert torch.equal(dict(engine.named_state())["body.weight"]["weight"], value)


def test_tied_weights_that_differ_are_refused(tmp_path):
    folder = unpacked("zero2_bf16", tmp_path) / "universal"
    torch.save({"param": torch.ones(13, 7)}, folder / "zero" / "head.weight" / "fp32.pt")
    with build("bf16") as engine, pytest.raises(CheckpointError, match="one tied parameter"):
        engine.import_checkpoint(folder)


def test_the_name_of_a_tie_that_has_the_moments_has_the_master(tmp_path):
    """Under the other name there is the weight rounded to bf16."""
    folder = unpacked("zero2_bf16", tmp_path) / "universal"
    exact = torch.load(folder / "zero" / "embed.weight" / "fp32.pt")["param"]
    (folder / "zero" / "embed.weight").rename(folder / "zero" / "aside")
    (folder / "zero" / "head.weight").rename(folder / "zero" / "embed.weight")
    (folder / "zero" / "aside").rename(folder / "zero" / "head.weight")
    with build("bf16") as engine:
        engine.import_checkpoint(folder)
        assert torch.equal(dict(engine.named_state())["embed.weight"]["master"], exact)
        assert engine.parameter_steps()[0] == 3


def test_model_states_with_something_of_the_users_are_passed_over(tmp_path):
    """Of ZeRO 1 and 2 all weights are in zero/, too; of ZeRO 3 frozen ones are then missing."""
    for name in ("zero1_two_ranks", "zero3_two_ranks"):
        folder = unpacked(name, tmp_path / name) / "universal"
        for path in folder.glob("*_model_states.pt"):
            states = torch.load(path)
            states["mine"] = torch.optim.SGD
            torch.save(states, path)
        with build() as engine:
            if name == "zero3_two_ranks":
                with pytest.raises(CheckpointError, match=r"missing: frozen\.weight"):
                    engine.import_checkpoint(folder)
                continue
            done = engine.import_checkpoint(folder)
            assert any("torch.optim.sgd.SGD" in line for line in done.not_resumed)
            assert engine.module.offsets.tolist() == [300, 301, 302, 303, 304]
            assert engine.global_steps == 3


@pytest.mark.parametrize("target", ["fp32.pt", "exp_avg.pt"])
def test_damage_is_found_before_the_engine_changes(tmp_path, target):
    folder = unpacked("zero2_bf16", tmp_path) / "universal"
    path = folder / "zero" / "norm.weight" / target
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
    header = member.header_offset
    lengths = int.from_bytes(data[header + 26 : header + 28], "little")
    lengths += int.from_bytes(data[header + 28 : header + 30], "little")
    data[header + 30 + lengths + 5] ^= 1
    path.write_bytes(data)
    with build("bf16") as engine:
        before = everything(engine)
        with pytest.raises(CheckpointError, match=r"damaged: data/0 does not have the CRC32"):
            engine.import_checkpoint(folder)
        after = everything(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_values_that_are_not_finite_are_refused(tmp_path):
    folder = unpacked("zero1_two_ranks", tmp_path) / "universal"
    path = folder / "zero" / "norm.weight" / "fp32.pt"
    torch.save({"param": torch.tensor([1e6] * 7)}, path)
    with build("fp16") as engine, pytest.raises(CheckpointError, match="not finite in the compute"):
        engine.import_checkpoint(folder)
    with build("fp32") as engine:
        engine.import_checkpoint(folder)


def test_eight_bit_moments_take_fp32_ones(tmp_path):
    folder = unpacked("zero1_two_ranks", tmp_path) / "universal"
    with build("bf16", optimizer=ADAMW | {"moments": "8bit"}) as engine:
        engine.import_checkpoint(folder)
        exact = torch.load(folder / "zero" / "embed.weight" / "exp_avg.pt")["param"]
        found = dict(engine.named_state())["embed.weight"]["exp_avg"]
        assert (found - exact).norm() <= 0.01 * exact.norm()
        negative = torch.load(folder / "zero" / "embed.weight" / "exp_avg_sq.pt")["param"]
        negative[0, 0] = -1
        torch.save({"param": negative}, folder / "zero" / "embed.weight" / "exp_avg_sq.pt")
        with pytest.raises(CheckpointError, match="is negative"):
            engine.import_checkpoint(folder)
        step(engine, 3)


def test_any_torch_optimizer_gets_its_tensors_and_scalars(tmp_path):
    model = make_universal.Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.NAdam(trained, lr=1e-2, foreach=False)
    for number in range(3):
        make_universal.loss_of(model, number).backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    weights, state = get_state_dict(model, torch_optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    make_universal.loss_of(model, 3).backward()
    torch_optimizer.step()
    torch.manual_seed(4)
    config = TIERS | {"precision": {"compute": "fp32"}}
    make = lambda p: torch.optim.NAdam(p, lr=1e-2, foreach=False)  # noqa: E731
    with offload.initialize(make_universal.Net(), config, optimizer=make) as engine:
        done = engine.import_checkpoint(tmp_path / "dcp")
        assert done.passed_over == ()
        step(engine, 3)
        expected = model.state_dict()
        for name, tensors in engine.named_state():
            difference = (tensors["weight"] - expected[name]).norm()
            assert difference <= 1e-6 * expected[name].norm(), name
    with build() as engine:
        with pytest.raises(CheckpointError, match=r"in excess: mu_product of embed\.weight"):
            engine.import_checkpoint(tmp_path / "dcp")
        done = engine.import_checkpoint(tmp_path / "dcp", strict=False)
        assert "mu_product of embed.weight" in done.passed_over


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral"])
def test_a_hugging_face_folder(tmp_path, kind):
    """Also one whose names and experts the library converts as it loads."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
        "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2,
        "tie_word_embeddings": kind == "llama_tied",
    }  # fmt: skip
    mixtral = kind == "mixtral"
    config = (transformers.MixtralConfig if mixtral else transformers.LlamaConfig)(
        **sizes, **({"num_local_experts": 3} if mixtral else {})
    )
    make = transformers.MixtralForCausalLM if mixtral else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    source = make(config)
    source.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    torch.manual_seed(1)
    with offload.initialize(make(config), TIERS | {"precision": {"compute": "bf16"}}) as engine:
        done = engine.import_checkpoint(tmp_path / "hf")
        assert not done.optimizer
        expected = dict(source.named_parameters())
        for name, state in engine.named_state():
            assert torch.equal(state["master"], expected[name].detach()), name
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        name = "model.norm.weight"
        path = tmp_path / "hf" / index["weight_map"][name]
        tensors = load_file(path)
        tensors[name] = torch.zeros(31)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"is float32 \[31\], expected bfloat16 \[32\]"):
            engine.import_checkpoint(tmp_path / "hf")


def test_gradients_and_edits_of_the_old_state_go(tmp_path):
    folder = unpacked("zero1_two_ranks", tmp_path)
    with build() as engine:
        engine.backward(make_universal.loss_of(engine, 0))
        with torch.no_grad(), engine.gathered("norm.weight", writable=True):
            engine.module.norm.weight.fill_(5.0)
        engine.import_checkpoint(folder)
        assert all("gradient" not in state for _, state in engine.named_state())
        assert_goes_on(engine, folder / "expected.safetensors", 1e-6)


@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_a_checkpoint_that_is_being_written_keeps_the_old_state(tmp_path, placement):
    folder = unpacked("zero1_two_ranks", tmp_path)
    places = dict.fromkeys(("weights", "gradients", "optimizer"), placement)
    tiers = TIERS["tiers"] | {"nvme": {"paths": [str(tmp_path)], "capacity": "16MiB"}}
    with build(placement=places, tiers=tiers) as engine:
        step(engine, 0)
        expected = everything(engine)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine.import_checkpoint(folder)
        engine.load_checkpoint(tmp_path / "ckpt")
        found = everything(engine)
        for name in found:
            assert torch.equal(found[name], expected[name]), name


def test_what_else_a_folder_may_be(tmp_path, small_engine):
    with build() as engine:
        engine.save_checkpoint(tmp_path / "own", "first")
    with build() as engine:
        for path in (tmp_path / "own", tmp_path / "own" / "first"):
            with pytest.raises(CheckpointError, match=r"load it: engine\.load_checkpoint"):
                engine.import_checkpoint(path)
        (tmp_path / "bin").mkdir()
        torch.save({}, tmp_path / "bin" / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which is pickled"):
            engine.import_checkpoint(tmp_path / "bin")
        with pytest.raises(ConfigError, match="is no local folder"):
            engine.import_checkpoint(tmp_path / "absent")
        (tmp_path / "bin" / "delta.json").write_text("{}")
        with pytest.raises(CheckpointError, match="is a delta"):
            engine.import_checkpoint(tmp_path / "bin")
        (tmp_path / "own" / "latest_universal").write_text("../elsewhere")
        with pytest.raises(CheckpointError, match="no universal checkpoint is beside it"):
            engine.import_checkpoint(tmp_path / "own")
    with pytest.raises(EngineStateError):
        engine.import_checkpoint(tmp_path / "bin")


def test_a_write_that_fails_leaves_no_half_imported_state(tmp_path, monkeypatch):
    folder = unpacked("zero1_two_ranks", tmp_path)
    with build() as engine:
        real = engine.set_state
        calls = []

        def fail(name, tensors):
            calls.append(name)
            if len(calls) == 5:
                raise OSError("disk")
            real(name, tensors)

        monkeypatch.setattr(engine, "set_state", fail)
        with pytest.raises(OSError, match="disk"):
            engine.import_checkpoint(folder)
        with pytest.raises(EngineStateError):
            step(engine, 0)
        monkeypatch.undo()
        engine.import_checkpoint(folder)
        assert_goes_on(engine, folder / "expected.safetensors", 1e-6)


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = unpacked("dcp_two_ranks", tmp_path)
    alive: list = []
    most = []
    real = TorchArchive.read

    def read(self, tensor):
        found = real(self, tensor)
        alive.append(weakref.ref(found))
        most.append(sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(TorchArchive, "read", read)
    with build() as engine:
        engine.import_checkpoint(folder / "dcp")
    assert len(most) > 60
    assert max(most) <= 3, "a chunk, and the two tensors of a tie that are compared"
