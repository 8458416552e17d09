"""Saving and loading with the real engine, across placements."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from torch import nn

from offload.errors import CheckpointError, ChecksumError, EngineStateError, StorageError
from offload.state.export import export_checkpoint
from offload.state.safetensors_stream import SafetensorsReader
from offload.state.session import OffloadEngine, initialize

VOCABULARY, LENGTH = 61, 16
PLACEMENTS = {
    "device": {"tiers": {"device": {"memory": "64MiB"}, "host": {"memory": "64MiB"}}},
    "host": {
        "tiers": {"device": {"memory": "400KiB"}, "host": {"memory": "8MiB"}},
        "placement": {"weights": "host", "gradients": "host", "optimizer": "host"},
    },
    "nvme": {
        "tiers": {"device": {"memory": "400KiB"}, "host": {"memory": "2MiB"}},
        "placement": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
        "partition": {"bucket_elements": 8192},
    },
}


def make_model() -> nn.Module:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH
    )
    return transformers.GPT2LMHeadModel(config)  # tied weights, dropout 0.1


def make_engine(
    tmp_path,
    placement: str,
    precision: str,
    model: nn.Module | None = None,
    more: dict | None = None,
    **options,
) -> OffloadEngine:
    config = {name: dict(section) for name, section in PLACEMENTS[placement].items()}
    config["tiers"]["device"] = {"kind": "cpu"} | config["tiers"]["device"]
    if placement == "nvme":
        (tmp_path / "nvme").mkdir(exist_ok=True)
        config["tiers"] = config["tiers"] | {"nvme": {"paths": [str(tmp_path / "nvme")]}}
    config |= {
        "precision": {"compute": precision},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "lr_scheduler": {"name": "linear", "total_steps": 20},
        "training": {"max_grad_norm": 1.0},
        "io": {"backend": "threads"},
    } | (more or {})
    return initialize(model or make_model(), config, **options)


def steps(engine: OffloadEngine, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full_state(engine: OffloadEngine) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, field): engine.read_state(name, field)
        for name in engine.parameter_names()
        for field in engine.state_fields(name)
    }


def assert_equal_state(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("saved", "loaded"), [("nvme", "device"), ("host", "nvme")])
def test_resume_is_bit_exact_under_another_placement(tmp_path, precision, saved, loaded):
    with make_engine(tmp_path, saved, precision) as engine:
        torch.manual_seed(1)
        steps(engine, 3)
        path = engine.save_checkpoint(tmp_path / "ckpt", client_state={"epoch": 1})
        at_save = full_state(engine)
        expected = steps(engine, 3)
        at_end, rate = full_state(engine), engine.optimizer.param_groups[0]["lr"]
        scale = engine.loss_scale.state_dict() if engine.loss_scale else None
    assert path == tmp_path / "ckpt" / "step-00000003"
    with make_engine(tmp_path, loaded, precision) as engine:
        steps(engine, 1)
        assert engine.load_checkpoint(tmp_path / "ckpt") == {"epoch": 1}
        assert_equal_state(full_state(engine), at_save)
        assert engine.global_steps == 3
        assert steps(engine, 3) == expected
        assert_equal_state(full_state(engine), at_end)
        assert engine.optimizer.param_groups[0]["lr"] == rate
        assert (engine.loss_scale.state_dict() if engine.loss_scale else None) == scale


@pytest.mark.parametrize(
    "factory", [torch.optim.RMSprop, torch.optim.NAdam], ids=lambda f: f.__name__
)
def test_an_arbitrary_optimizer_resumes_bit_exactly(tmp_path, factory):
    def make(placement: str) -> OffloadEngine:
        return make_engine(
            tmp_path, placement, "bf16", optimizer=lambda params: factory(params, lr=1e-3)
        )

    with make("nvme") as engine:
        torch.manual_seed(1)
        steps(engine, 2)
        engine.save_checkpoint(tmp_path / "ckpt")
        expected, at_end = steps(engine, 2), full_state(engine)
    with make("host") as engine:
        engine.load_checkpoint(tmp_path / "ckpt")
        assert steps(engine, 2) == expected
        assert_equal_state(full_state(engine), at_end)


def test_frozen_parameters_and_unused_ones_resume(tmp_path):
    def make() -> OffloadEngine:
        model = make_model()
        model.unused = nn.Linear(3, 3)
        model.transformer.h[0].requires_grad_(False)
        return make_engine(tmp_path, "nvme", "bf16", model)

    with make() as engine:
        torch.manual_seed(1)
        steps(engine, 2)
        engine.save_checkpoint(tmp_path / "ckpt")
        counts, at_save = engine.parameter_steps(), full_state(engine)
    assert set(counts) == {0, 2}
    with make() as engine:
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(1)
        engine.load_checkpoint(tmp_path / "ckpt")
        assert engine.parameter_steps() == counts
        assert_equal_state(full_state(engine), at_save)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_from_nvme_is_bit_equal_in_transformers(tmp_path, precision):
    with make_engine(tmp_path, "nvme", precision) as engine:
        steps(engine, 2)
        engine.save_pretrained(tmp_path / "out")
        expected = engine.state_dict()
        peak = engine.report().tiers["host"].peak_bytes
        assert peak <= engine.report().tiers["host"].budget_bytes
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype="auto")
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with SafetensorsReader(tmp_path / "out" / "model.safetensors") as reader:
        assert "lm_head.weight" not in reader.entries


@pytest.mark.parametrize("dtype", ["compute", "fp32"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_checkpoint_becomes_an_export_without_the_model(tmp_path, precision, dtype):
    model = make_model()
    model.transformer.h[0].requires_grad_(False)
    with make_engine(tmp_path, "nvme", precision, model) as engine:
        steps(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt", "first")
        steps(engine, 2)
        path = engine.save_checkpoint(tmp_path / "ckpt")
        field = "weight" if dtype == "compute" else "master"
        expected = {n: s.get(field, s["weight"].float()) for n, s in engine.named_state()}
        engine.save_pretrained(tmp_path / "direct")
    for source in (tmp_path / "ckpt", path):
        out = export_checkpoint(source, tmp_path / "out", dtype=dtype, max_shard_bytes=30_000)
        assert (out / "model.safetensors.index.json").exists()
        loaded = transformers.GPT2LMHeadModel.from_pretrained(out, dtype="auto")
        found = dict(loaded.named_parameters())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    if dtype == "compute":
        export_checkpoint(path, tmp_path / "out")
        files = sorted(p.name for p in (tmp_path / "direct").iterdir())
        assert sorted(p.name for p in out.iterdir()) == files
        for name in files:
            assert (out / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    first = export_checkpoint(tmp_path / "ckpt", tmp_path / "first", tag="first")
    with SafetensorsReader(first / "model.safetensors") as reader:
        assert not torch.equal(
            reader.read("transformer.wte.weight"), expected["transformer.wte.weight"]
        )


def test_another_precision_is_refused(tmp_path):
    with make_engine(tmp_path, "host", "bf16") as engine:
        engine.save_checkpoint(tmp_path / "ckpt")
    with make_engine(tmp_path, "host", "fp32") as engine:
        before = full_state(engine)
        with pytest.raises(CheckpointError, match="another kind of engine"):
            engine.load_checkpoint(tmp_path / "ckpt")
        assert_equal_state(full_state(engine), before)


@pytest.mark.parametrize(("saved", "loaded"), [("nvme", "host"), ("device", "nvme")])
@pytest.mark.parametrize("point", ["between micro-steps", "before the step"])
def test_resume_in_the_middle_of_an_accumulation(tmp_path, saved, loaded, point):
    """Gradients that no step has used come back to the bit."""

    def micro_step(engine: OffloadEngine, *, then_step: bool = True) -> None:
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        if then_step:
            engine.step()

    def make(placement: str) -> OffloadEngine:
        return make_engine(
            tmp_path,
            placement,
            "bf16",
            more={"training": {"gradient_accumulation_steps": 3, "max_grad_norm": 1.0}},
        )

    is_last = point == "before the step"
    with make(saved) as engine:
        torch.manual_seed(1)
        for _ in range(3):
            micro_step(engine)
        for _ in range(1 + is_last):
            micro_step(engine)
        if is_last:
            micro_step(engine, then_step=False)
        engine.save_checkpoint(tmp_path / "ckpt")
        if is_last:
            engine.step()
        while engine.global_steps < 3:
            micro_step(engine)
        expected, norm = full_state(engine), engine.grad_norm
    with make(loaded) as engine:
        micro_step(engine)
        engine.load_checkpoint(tmp_path / "ckpt")
        if is_last:
            engine.step()
        while engine.global_steps < 3:
            micro_step(engine)
        assert engine.grad_norm == norm
        assert_equal_state(full_state(engine), expected)


def damage(engine: OffloadEngine, state_class: str, bucket: int = 0) -> None:
    """Flip a byte of a chunk on the disk, past the engine."""
    nvme = engine._parts.nvme
    record = engine._parts.store.block(bucket, state_class).records[0]
    extent = record.current
    path = f"/proc/self/fd/{nvme._files[extent.file].io.fd}"
    descriptor = os.open(path, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, extent.offset)
    os.pwrite(descriptor, bytes([byte ^ 1]), extent.offset)
    os.close(descriptor)


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_loading_goes_on_after_a_step_that_cannot_be_completed(tmp_path, precision, place):
    with make_engine(tmp_path, "nvme", precision) as engine:
        torch.manual_seed(1)
        steps(engine, 2)
        engine.save_checkpoint(tmp_path / "ckpt")
        expected, at_end = steps(engine, 3), full_state(engine)
    with make_engine(tmp_path, "nvme", precision) as engine:
        steps(engine, 3)
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        last = max(b.bucket.index for b in engine._parts.store.blocks())
        damage(engine, "optimizer", 0 if place == "first" else last)
        for _ in range(2):
            with pytest.raises(ChecksumError, match="optimizer of bucket"):
                engine.step()
        with pytest.raises(EngineStateError, match="load a checkpoint"):
            engine(input_ids=tokens)
        with pytest.raises(EngineStateError):
            engine.save_checkpoint(tmp_path / "ckpt")
        with pytest.raises(CheckpointError):
            engine.load_checkpoint(tmp_path / "ckpt", "absent")
        with pytest.raises(ChecksumError):  # a load that fails early leaves the step pending
            engine.step()
        engine.load_checkpoint(tmp_path / "ckpt")
        assert engine.global_steps == 2
        assert steps(engine, 3) == expected
        assert_equal_state(full_state(engine), at_end)


@pytest.mark.parametrize("placement", ["host", "nvme"])
def test_loading_drops_edits_gradients_and_prefetches(tmp_path, placement):
    with make_engine(tmp_path, placement, "bf16") as engine:
        torch.manual_seed(1)
        steps(engine, 2)
        engine.save_checkpoint(tmp_path / "ckpt")
        at_save = full_state(engine)
        expected, at_end = steps(engine, 2), full_state(engine)
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        loss = engine(input_ids=tokens, labels=tokens).loss
        parameters = list(engine.module.parameters())
        with torch.no_grad():
            for parameter in parameters[2:]:
                parameter.mul_(2)
        parameters[-1].data_ptr()
        if placement == "nvme":
            pager = engine._parts.pager
            pager._evict(pager.pages[0])
            damage(engine, "weights", 0)
            assert pager._start(pager.pages[0], wait=True)  # a prefetch that will fail
        engine.load_checkpoint(tmp_path / "ckpt")
        assert_equal_state(full_state(engine), at_save)
        assert steps(engine, 2) == expected
        assert_equal_state(full_state(engine), at_end)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            engine.backward(loss)


def test_a_graph_of_the_state_before_loading_is_void(tmp_path):
    with make_engine(tmp_path, "host", "fp32") as engine:
        engine.save_checkpoint(tmp_path / "ckpt")
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.load_checkpoint(tmp_path / "ckpt")
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            engine.backward(loss)
        steps(engine, 1)


def test_a_load_that_is_interrupted_leaves_the_state_void(tmp_path, monkeypatch):
    with make_engine(tmp_path, "nvme", "bf16") as engine:
        torch.manual_seed(1)
        steps(engine, 2)
        engine.save_checkpoint(tmp_path / "ckpt")
        at_save = full_state(engine)
        replaced = []

        def start_replacing(key, *, wait):
            if len(replaced) == 3:
                raise StorageError(operation="write", path="disk")
            replaced.append(key)
            return OffloadEngine.start_replacing(engine, key, wait=wait)

        monkeypatch.setattr(engine, "start_replacing", start_replacing)
        with pytest.raises(StorageError, match="disk"):
            engine.load_checkpoint(tmp_path / "ckpt")
        monkeypatch.undo()
        for use in (engine.step, engine.state_dict, lambda: engine.save_pretrained(tmp_path / "o")):
            with pytest.raises(EngineStateError, match="void"):
                use()
        engine.load_checkpoint(tmp_path / "ckpt")
        assert_equal_state(full_state(engine), at_save)
        steps(engine, 1)
