"""Programs in DeepSpeed's idiom: the numbers of plain PyTorch, and the same four results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DistributedSampler

from offload import CheckpointError, ConfigError, EngineStateError, OffloadError
from offload.integrations import deepspeed
from offload.integrations.deepspeed.schedules import Course, CourseLR
from tests.integrations.deepspeed_configs import (
    HF_ZERO2_VALUES,
    hf_zero2,
    hf_zero3,
    megatron_infinity,
)
from tests.oracle import relative_difference

MEMORY = {"tiers": {"device": {"kind": "cpu", "memory": 32 << 20}, "host": {"memory": 32 << 20}}}
WARMUP = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-2, "warmup_num_steps": 4}


@pytest.fixture
def engines() -> Iterator[list[deepspeed.DeepSpeedEngine]]:
    made: list[deepspeed.DeepSpeedEngine] = []
    yield made
    for engine in made:
        engine.destroy()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 16, generator=drawn) for _ in range(count)]


def config(tmp_path: Path, device: str = "cpu", **keys: Any) -> dict[str, Any]:
    home = {"device": device, **({"nvme_path": str(tmp_path / "disk")} if device == "nvme" else {})}
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "gradient_clipping": 0.05,
        "zero_optimization": {"stage": 3, "offload_param": home, "offload_optimizer": home},
        "offload": MEMORY,
        **keys,
    }


def train(engine: Any, data: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in data:
        loss = (engine(batch) - batch).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def plain(data: list[torch.Tensor], *, accumulate: int = 2) -> tuple[list[float], nn.Module]:
    model = small()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.1, foreach=False
    )
    params = {**WARMUP, "warmup_type": "log"}
    schedule = CourseLR(optimizer, Course("WarmupLR", params))
    losses = []
    for number, batch in enumerate(data, start=1):
        loss = (model(batch) - batch).square().mean()
        (loss / accumulate).backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return losses, model


def test_the_numbers_are_those_of_plain_pytorch_in_every_placement(
    tmp_path: Path, engines: list[Any]
) -> None:
    data = batches(12)
    expected, model = plain(data)
    runs = []
    for device in ("none", "cpu", "nvme"):
        engine, *_ = deepspeed.initialize(model=small(), config=config(tmp_path, device))
        engines.append(engine)
        losses = train(engine, data)
        assert losses == pytest.approx(expected, rel=1e-6, abs=0)
        weights = engine.engine.state_dict()
        for name, weight in model.state_dict().items():
            assert relative_difference(weights[name], weight) <= 1e-6
        runs.append((losses, weights))
    for losses, weights in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(weights[name], w) for name, w in runs[0][1].items())


def test_what_the_engine_says_of_itself(tmp_path: Path, engines: list[Any]) -> None:
    model = small()
    made = deepspeed.initialize(model=model, config=config(tmp_path))
    engine, optimizer, loader, schedule = made
    engines.append(engine)
    assert loader is None
    assert engine.module is model
    assert optimizer is engine.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert schedule is engine.lr_scheduler
    assert engine.train_batch_size() == 8
    assert engine.train_micro_batch_size_per_gpu() == 4
    assert engine.gradient_accumulation_steps() == 2
    assert engine.zero_optimization_stage() == 3
    assert engine.gradient_clipping() == 0.05
    assert not engine.fp16_enabled()
    assert not engine.bfloat16_enabled()
    assert engine.device == torch.device("cpu")
    assert (engine.local_rank, engine.global_rank) == (0, 0)
    assert engine.get_global_grad_norm() is None
    assert next(name for name, _ in engine.named_parameters()) == "0.weight"  # the module's
    assert engine.train() is engine
    assert not engine.eval().training
    engine.train()
    assert not engine.is_gradient_accumulation_boundary()
    train(engine, batches(1))
    assert engine.is_gradient_accumulation_boundary()
    assert not engine.was_step_applied()
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (0, 1, 0)
    train(engine, batches(1))
    assert engine.was_step_applied()
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 2, 8)
    norm = engine.get_global_grad_norm()
    assert norm is not None
    assert norm > 0.05
    assert engine.get_lr() == [1e-4]
    with pytest.raises(EngineStateError, match="no_sync"):
        engine.no_sync()
    with pytest.raises(OffloadError, match="lr_kwargs"):
        engine.step(lr_kwargs={"epoch": 1})
    with pytest.raises(AttributeError):
        engine.nothing_of_that_name  # noqa: B018


def test_skipped_steps_count_as_in_deepspeed(tmp_path: Path, engines: list[Any]) -> None:
    asked = config(tmp_path, train_batch_size=4, train_micro_batch_size_per_gpu=4)
    engine, *_ = deepspeed.initialize(model=small(), config=asked)
    engines.append(engine)
    train(engine, [torch.full((4, 16), float("nan")), *batches(1)])
    assert (engine.global_steps, engine.skipped_steps) == (2, 1)
    assert engine.engine.lr_scheduler.last_epoch == 1  # the schedule waits


def test_a_loss_that_is_not_scaled(tmp_path: Path, engines: list[Any]) -> None:
    norms = []
    for scale, factor in ((True, 1.0), (False, 0.5)):
        engine, *_ = deepspeed.initialize(model=small(), config=config(tmp_path))
        engines.append(engine)
        for batch in batches(2):
            loss = (engine(batch) - batch).square().mean() * factor
            returned = engine.backward(loss, scale_wrt_gas=scale)
            assert returned.item() == pytest.approx(loss.item() * (0.5 if scale else 1))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    assert norms[0] == norms[1]


@pytest.mark.parametrize("form", ["instance", "function", "groups"])
def test_optimizers_of_the_program(form: str, tmp_path: Path, engines: list[Any]) -> None:
    data = batches(6)
    asked = config(tmp_path)
    settings = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.0}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, last = list(model.children())[::2]
        return [
            {"params": list(first.parameters()), "weight_decay": 0.5},
            {"params": list(last.parameters())},
        ]

    model, twin = small(), small()
    given: dict[str, Any] = {}
    if form == "instance":
        given["optimizer"] = torch.optim.AdamW(groups(model), **settings)
        given["lr_scheduler"] = torch.optim.lr_scheduler.ExponentialLR(given["optimizer"], 0.5)
    elif form == "function":
        given["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, **settings)
        given["model_parameters"] = groups(model)
        given["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(
            optimizer, 0.5
        )
    else:
        given["model_parameters"] = groups(model)
        asked["optimizer"] = {"type": "AdamW", "params": settings}
        del asked["scheduler"]
    engine, optimizer, _, schedule = deepspeed.initialize(model=model, config=asked, **given)
    engines.append(engine)
    found = train(engine, data)
    assert len(optimizer.param_groups) == 2
    assert (schedule is None) == (form == "groups")

    rule = torch.optim.AdamW(groups(twin), foreach=False, **settings)
    falling = torch.optim.lr_scheduler.ExponentialLR(rule, 1.0 if form == "groups" else 0.5)
    expected = []
    for number, batch in enumerate(data, start=1):
        loss = (twin(batch) - batch).square().mean()
        (loss / 2).backward()
        expected.append(loss.item())
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.05, foreach=False)
            rule.step()
            rule.zero_grad()
            falling.step()
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    assert engine.get_lr() == [group["lr"] for group in rule.param_groups]


def test_parameters_that_are_left_out_stay(tmp_path: Path, engines: list[Any]) -> None:
    model = small()
    first = model[0].weight.detach().clone()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model[2].parameters(), config=config(tmp_path)
    )
    engines.append(engine)
    train(engine, batches(4))
    assert torch.equal(engine.engine.state_dict()["0.weight"], first)


def test_a_sequence_of_schedulers_moves_as_a_whole(tmp_path: Path, engines: list[Any]) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr = torch.optim.lr_scheduler
    parts = [lr.LinearLR(optimizer, 0.1, total_iters=2), lr.ExponentialLR(optimizer, 0.5)]
    schedule = lr.SequentialLR(optimizer, parts, milestones=[2])
    asked = config(tmp_path, train_batch_size=4)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=asked
    )
    engines.append(engine)
    rates = []
    for batch in batches(4):
        rates.append(engine.get_lr()[0])
        train(engine, [batch])
    assert rates == pytest.approx([1e-3, 5.5e-3, 1e-2, 5e-3])


def test_training_data_comes_in_the_order_of_deepspeed(tmp_path: Path, engines: list[Any]) -> None:
    rows = list(torch.cat(batches(3)))
    asked = config(tmp_path, dataloader_drop_last=True)
    engine, _, loader, _ = deepspeed.initialize(
        model=small(), training_data=rows[:-1], config=asked, collate_fn=torch.stack
    )
    engines.append(engine)
    assert loader is not None
    order = list(DistributedSampler(rows[:-1], num_replicas=1, rank=0))
    found = list(loader)
    assert [tuple(batch.shape) for batch in found] == [(4, 16), (4, 16)]
    assert torch.equal(torch.cat(found), torch.stack([rows[i] for i in order[:8]]))


def test_checkpoints_go_on_bit_for_bit(tmp_path: Path, engines: list[Any]) -> None:
    data = batches(8)
    folder = tmp_path / "checkpoints"
    engine, *_ = deepspeed.initialize(model=small(), config=config(tmp_path))
    engines.append(engine)
    assert engine.load_checkpoint(folder) == (None, None)
    train(engine, data[:4])
    assert engine.save_checkpoint(folder, client_state={"epoch": 3})
    assert engine.save_checkpoint(folder, tag="named")
    rest = train(engine, data[4:])
    other, *_ = deepspeed.initialize(model=small(), config=config(tmp_path, "nvme"))
    engines.append(other)
    assert other.load_checkpoint(folder, tag="global_step2") == (
        str(folder / "global_step2"),
        {"epoch": 3},
    )
    assert train(other, data[4:]) == rest
    assert other.get_lr() == engine.get_lr()
    assert other.load_checkpoint(folder) == (str(folder / "named"), {})
    assert other.global_steps == 2
    with pytest.raises(CheckpointError):
        other.load_checkpoint(folder, tag="nothing")
    with pytest.raises(OffloadError, match="of a part"):
        other.load_checkpoint(folder, load_optimizer_states=False)
    with pytest.raises(OffloadError, match="save_latest"):
        other.save_checkpoint(folder, save_latest=False)


def test_a_model_is_saved_without_pickle(tmp_path: Path, engines: list[Any]) -> None:
    engine, *_ = deepspeed.initialize(model=small(), config=config(tmp_path))
    engines.append(engine)
    assert engine.save_16bit_model(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[n], w) for n, w in small().state_dict().items())
    with pytest.raises(OffloadError, match="safetensors"):
        engine.save_16bit_model(tmp_path / "out", "pytorch_model.bin")


def test_arguments_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = small(), config(tmp_path)
    with pytest.raises(OffloadError, match="without a model"):
        deepspeed.initialize(config=asked)
    with pytest.raises(ConfigError, match="no configuration"):
        deepspeed.initialize(model=model)
    with pytest.raises(ConfigError, match="given twice"):
        deepspeed.initialize(model=model, config=asked, config_params=asked)
    with pytest.raises(ConfigError, match="no optimizer"):
        deepspeed.initialize(model=model, config={"train_batch_size": 1})
    with pytest.raises(OffloadError, match="mpu"):
        deepspeed.initialize(model=model, config=asked, mpu=object())
    used = torch.optim.AdamW(model.parameters())
    model(batches(1)[0]).sum().backward()
    used.step()
    with pytest.raises(OffloadError, match="has taken steps"):
        deepspeed.initialize(model=model, config=asked, optimizer=used)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OffloadError, match="one of 2 processes"):
        deepspeed.initialize(model=model, config=asked)


def test_arguments_of_the_command_line_name_the_file(tmp_path: Path, engines: list[Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(tmp_path)))
    arguments = argparse.Namespace(deepspeed_config=str(path), local_rank=0)
    engine, *_ = deepspeed.initialize(arguments, small())
    engines.append(engine)
    assert engine.train_batch_size() == 8


@pytest.mark.parametrize("name", ["zero3", "zero2", "infinity"])
def test_public_configurations_train(name: str, tmp_path: Path, engines: list[Any]) -> None:
    given: dict[str, Any] = {}
    if name == "zero3":
        asked = hf_zero3() | {"train_batch_size": 4}
        asked["scheduler"]["params"] |= {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}
    elif name == "zero2":
        asked, given["values"] = hf_zero2(), HF_ZERO2_VALUES
    else:
        asked = megatron_infinity(str(tmp_path / "nvme_data"))
        given["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=small(), config=asked | {"offload": MEMORY}, **given)
    engines.append(engine)
    dtype = torch.bfloat16 if name == "zero2" else torch.float16
    (batch,) = batches(1)
    losses = []
    for _ in range(24):
        loss = (engine(batch.to(dtype)).float() - batch).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert engine.global_steps == (12 if name == "zero2" else 24)
    assert engine.skipped_steps < 5
    bytes_on = engine.engine.plan.bytes
    home = {"zero3": "host", "zero2": "host", "infinity": "nvme"}[name]
    assert bytes_on[home]["optimizer"] > 0
    assert sum(bytes_on[tier]["optimizer"] for tier in bytes_on) == bytes_on[home]["optimizer"]


def test_the_numbers_are_those_of_deepspeed(tmp_path: Path, engines: list[Any]) -> None:
    """Losses, rates, counts and weights that DeepSpeed 0.19.8 gave; fp32, OneCycle, clipping."""
    recorded = json.loads((Path(__file__).parent / "foreign" / "deepspeed_run.json").read_text())
    engine, *_ = deepspeed.initialize(
        model=small(), config=recorded["config"] | {"offload": MEMORY}
    )
    engines.append(engine)
    losses, rates, steps = [], [], []
    for batch in batches(len(recorded["losses"])):
        rates.append(engine.get_lr()[0])
        losses += train(engine, [batch])
        steps.append(engine.global_steps)
    assert losses == pytest.approx(recorded["losses"], rel=2e-6, abs=0)
    assert rates == pytest.approx(recorded["rates"], rel=1e-14, abs=0)
    assert steps == recorded["steps"]
    weights = engine.engine.state_dict().values()
    norms = [weight.double().norm().item() for weight in weights]
    assert norms == pytest.approx(recorded["weight_norms"], rel=1e-6, abs=0)
