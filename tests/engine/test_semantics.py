"""What a step means: the same as in PyTorch, wherever the state is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.errors import EngineStateError, NonFiniteError, OffloadError
from tests.oracle import (
    ADAMW,
    Run,
    assert_close,
    assert_identical,
    assert_same_state,
    continue_engine,
    make_engine,
    relative_difference,
    settings,
    small_loss,
    small_model,
    train_engine,
    train_plain,
)

TIERS = ("device", "host", "nvme")


def config(tier: str, path: Path, **options: Any) -> dict[str, Any]:
    return settings(tier, path, **{"bucket_elements": 1024, "host": 8 << 20, **options})


def everywhere(
    make: Callable[[], nn.Module],
    loss: Any,
    path: Path,
    *,
    steps: int = 4,
    factories: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train in every tier; the runs are identical."""
    runs = [
        train_engine(make(), config(tier, path, **options), loss, steps=steps, **(factories or {}))
        for tier in TIERS
    ]
    for run in runs[1:]:
        assert_identical(run, runs[0])
    return runs[0]


class Experts(nn.Module):
    """A router that sends every token of a batch to the experts the batch names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 64)

    def forward(self, tokens: torch.Tensor, chosen: int) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.head(hidden + self.experts[chosen](hidden))


def expert_loss(model: Any, index: int) -> torch.Tensor:
    tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(index))
    logits = model(tokens, index % 2)  # expert 2 never gets a token
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def make_experts() -> nn.Module:
    torch.manual_seed(0)
    return Experts()


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_parameters_without_a_gradient_stand_still(compute: str, tmp_path: Path) -> None:
    run = everywhere(make_experts, expert_loss, tmp_path, steps=3, compute=compute)
    steps = dict(zip(run.state, run.steps, strict=True))
    assert steps["embed.weight"] == 3
    assert [steps[f"experts.{i}.weight"] for i in range(3)] == [2, 1, 0]
    unused = run.state["experts.2.weight"]
    assert torch.equal(unused["master"], make_experts().experts[2].weight)
    assert not unused["exp_avg"].any()
    if compute == "fp32":
        assert_close(run, train_plain(make_experts(), expert_loss, steps=3), tolerance=1e-6)


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_clipping_and_norm_equal_torch(max_norm: float, tmp_path: Path) -> None:
    training = {"max_grad_norm": max_norm}
    run = everywhere(small_model, small_loss, tmp_path, training=training)
    plain = train_plain(small_model(), small_loss, steps=4, max_norm=max_norm)
    assert_close(run, plain, tolerance=1e-6)
    assert run.norms == pytest.approx(plain.norms, rel=1e-6)
    assert (min(run.norms) > max_norm) == (max_norm < 1), "the clip must matter, or must not"


def test_clipped_gradient_is_exactly_scaled(tmp_path: Path) -> None:
    """SGD without momentum shows the clip coefficient: fp64 norm, torch's formula, one rounding."""
    model = small_model()
    with make_engine(
        model,
        config(
            "host",
            tmp_path,
            training={"max_grad_norm": 0.1},
            optimizer={"name": "sgd", "lr": 1.0, "weight_decay": 0.0},
        ),
    ) as engine:
        engine.backward(small_loss(engine, 0))
        before = dict(engine.named_state())
        engine.step()
        norm = math.sqrt(
            math.fsum(float(s["gradient"].double().square().sum()) for s in before.values())
        )
        assert engine.grad_norm == pytest.approx(norm, rel=1e-14)
        coefficient = torch.tensor(0.1 / (engine.grad_norm + 1e-6), dtype=torch.float32)
        for name, state in engine.named_state():
            expected = before[name]["weight"] - before[name]["gradient"] * coefficient
            assert torch.equal(state["weight"], expected), name


def test_accumulation_equals_plain_accumulation(tmp_path: Path) -> None:
    run = everywhere(small_model, small_loss, tmp_path, training={"gradient_accumulation_steps": 4})
    assert_close(
        run, train_plain(small_model(), small_loss, steps=4, accumulation=4), tolerance=1e-6
    )


def test_the_boundary_is_announced(tmp_path: Path) -> None:
    with make_engine(
        small_model(), config("host", tmp_path, training={"gradient_accumulation_steps": 2})
    ) as engine:
        taken, announced = [], []
        for index in range(4):
            announced.append(engine.is_accumulation_boundary())
            engine.backward(small_loss(engine, index))
            taken.append(engine.step())
        assert announced == taken == [False, True, False, True]
        assert engine.global_steps == 2


# -- non-finite values ----------------------------------------------------------------------------


def every_byte(engine: Any) -> dict[tuple[int, str], bytes]:
    """The homes of weights and optimizer state, padding included."""
    store = engine._parts.store
    found = {}
    for block in store.blocks():
        if block.state_class != "gradients":
            chunks = []
            for chunk in range(len(block.layout.chunk_nbytes)):
                staged = store.load(block, chunk)
                chunks.append(staged.tensor.numpy().tobytes())
                staged.release()
            found[block.bucket.index, block.state_class] = b"".join(chunks)
    return found


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_non_finite_step_changes_nothing(
    compute: str, poison: float, tier: str, tmp_path: Path
) -> None:
    with make_engine(small_model(), config(tier, tmp_path, compute=compute)) as engine:
        continue_engine(engine, small_loss, steps=2)
        before, steps = every_byte(engine), engine.parameter_steps()
        engine.backward(small_loss(engine, 2) * poison)
        taken = engine.step()
        assert taken is False
        assert not math.isfinite(engine.grad_norm)
        assert (engine.global_steps, engine.skipped_steps) == (2, 1)
        assert every_byte(engine) == before
        assert engine.parameter_steps() == steps
        calm = continue_engine(engine, small_loss, steps=1)
        assert engine.skipped_steps == 1
        assert all(math.isfinite(loss) for loss in calm.losses)


@pytest.mark.parametrize("tier", TIERS)
def test_a_weight_that_overflows_is_an_error_after_the_step(tier: str, tmp_path: Path) -> None:
    """Every placement ends up with the same bits, and the engine can load what was saved."""
    sgd = {"name": "sgd", "lr": 1e38, "weight_decay": 0.0, "momentum": 0.0}
    with make_engine(small_model(), config(tier, tmp_path, optimizer=sgd)) as engine:
        saved = dict(engine.named_state())
        engine.backward(small_loss(engine, 0) * 1e4)
        with pytest.raises(NonFiniteError, match="step 1 made a weight of parameter"):
            engine.step()
            engine.parameter_steps()  # of a step that is overlapped, the next call says it
        assert engine.global_steps == 1
        assert set(engine.parameter_steps()) == {1}
        overflown = [n for n, s in engine.named_state() if not torch.isfinite(s["weight"]).all()]
        assert overflown
        for name, state in saved.items():
            engine.set_state(name, {"master": state["master"]})
        assert_same_state(dict(engine.named_state()), saved)
        engine.optimizer.param_groups[0]["lr"] = 1e-3
        engine.backward(small_loss(engine, 1))
        taken = engine.step()
        assert taken


# -- fp16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_fp16_follows_grad_scaler(tier: str, tmp_path: Path) -> None:
    """Scale, growth, backoff and skips are those of torch; a skip touches no byte of state."""
    first, interval = 2.0**24, 3
    precision = {"initial_loss_scale": first, "growth_interval": interval}
    scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=interval)
    model = small_model()
    masters = [p.detach().clone() for p in model.parameters()]
    rule = torch.optim.AdamW(masters, foreach=False, **ADAMW)
    model.half()
    taken = []
    with make_engine(
        small_model(), config(tier, tmp_path, compute="fp16", precision=precision)
    ) as engine:
        for index in range(14):
            assert engine.loss_scale.scale == scaler.get_scale()
            loss = small_loss(model, index)
            scaler.scale(loss).backward()
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad, p.grad = p.grad.float(), None
            scaler.unscale_(rule)
            scaler.step(rule)
            before = engine.loss_scale.scale
            scaler.update()
            rule.zero_grad()
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
            found = small_loss(engine, index)
            assert found.item() == pytest.approx(loss.item(), rel=2e-3)
            bytes_before = every_byte(engine)
            engine.backward(found)
            taken.append(engine.step())
            if not taken[-1]:
                assert every_byte(engine) == bytes_before
                assert engine.loss_scale.scale == before / 2
        assert engine.loss_scale.state_dict() == scaler.state_dict()
        for (name, state), master in zip(engine.named_state(), masters, strict=True):
            assert relative_difference(state["master"], master) < 1e-3, name
            assert torch.equal(state["weight"], state["master"].half()), name
    assert taken[0] is False
    assert True in taken
    assert engine.skipped_steps == taken.count(False)


def test_fp16_refuses_an_unscaled_backward(tmp_path: Path) -> None:
    with (
        make_engine(small_model(), config("host", tmp_path, compute="fp16")) as engine,
        pytest.raises(EngineStateError, match=r"engine\.backward"),
    ):
        small_loss(engine, 0).backward()


# -- groups, schedules, optimizers ----------------------------------------------------------------


def test_groups_by_pattern(tmp_path: Path) -> None:
    groups = [{"match": ["*bias"], "weight_decay": 0.0, "lr": 1e-2}]
    run = everywhere(small_model, small_loss, tmp_path, optimizer={"groups": groups})
    model = small_model()
    named = dict(model.named_parameters())

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        biases = [p for name, p in named.items() if name.endswith("bias")]
        others = [p for name, p in named.items() if not name.endswith("bias")]
        return torch.optim.AdamW(
            [{"params": others}, {"params": biases, "weight_decay": 0.0, "lr": 1e-2}],
            foreach=False,
            **ADAMW,
        )

    assert_close(run, train_plain(model, small_loss, steps=4, optimizer=optimizer), tolerance=1e-6)


def test_a_configured_schedule(tmp_path: Path) -> None:
    section = {"name": "cosine", "warmup_steps": 2, "total_steps": 6, "min_lr_ratio": 0.1}
    shares = [0.0, 0.5] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]

    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: [*shares, 0.1][i])

    runs = [
        train_engine(
            small_model(), {**config(tier, tmp_path), "lr_scheduler": section}, small_loss, steps=6
        )
        for tier in TIERS
    ]
    for run in runs[1:]:
        assert_identical(run, runs[0])
    plain = train_plain(small_model(), small_loss, steps=6, scheduler=schedule)
    assert_close(runs[0], plain, tolerance=1e-6)


def _schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def test_a_schedule_from_a_factory(tmp_path: Path) -> None:
    run = everywhere(small_model, small_loss, tmp_path, factories={"lr_scheduler": _schedule})
    plain = train_plain(small_model(), small_loss, steps=4, scheduler=_schedule)
    assert_close(run, plain, tolerance=1e-6)


def _unlike(factory: Any) -> Any:
    """Another class, so that the engine takes it for an optimizer that it has no kernel for."""
    return type("Unlike", (factory,), {})


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, eps=1e-6, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-6, momentum=0.5, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, eps=1e-6, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=False),
    "generic adamw": lambda p: _unlike(torch.optim.AdamW)(p, lr=1e-3, eps=1e-6, foreach=False),
}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_from_factories(name: str, compute: str, tmp_path: Path) -> None:
    run = everywhere(
        small_model,
        small_loss,
        tmp_path,
        factories={"optimizer": OPTIMIZERS[name]},
        compute=compute,
    )
    if compute == "fp32":
        plain = train_plain(small_model(), small_loss, steps=4, optimizer=OPTIMIZERS[name])
        assert_close(run, plain, tolerance=1e-6)
        for parameter, tensors in plain.state.items():
            assert set(tensors) - {"step"} <= set(run.state[parameter]), parameter
            for key in set(tensors) - {"weight"}:
                found = run.state[parameter][key]
                assert relative_difference(found, tensors[key]) <= 1e-5, (parameter, key)


def test_an_optimizer_of_some_parameters_leaves_the_others_alone(tmp_path: Path) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters[:3], foreach=False, **ADAMW)

    for tier in TIERS:
        run = train_engine(
            small_model(), config(tier, tmp_path), small_loss, steps=2, optimizer=optimizer
        )
        plain = train_plain(small_model(), small_loss, steps=2, optimizer=optimizer)
        assert_close(run, plain, tolerance=1e-6)
        assert run.steps == [2, 2, 2] + [0] * (len(run.steps) - 3)


# -- the plain idiom ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_the_plain_idiom_works(tier: str, tmp_path: Path) -> None:
    with make_engine(small_model(), config(tier, tmp_path)) as engine:
        for index in range(4):
            small_loss(engine.module, index).backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        found = Run(state=dict(engine.named_state()))
    assert_close(
        found, Run(state=train_plain(small_model(), small_loss, steps=4).state), tolerance=1e-6
    )


def test_gradients_stay_until_zero_grad(tmp_path: Path) -> None:
    """As in PyTorch: a second step applies them again, a second backward adds to them."""
    model = small_model()
    rule = torch.optim.AdamW(model.parameters(), foreach=False, **ADAMW)
    with make_engine(small_model(), config("nvme", tmp_path)) as engine:
        for module, optimizer in ((engine.module, engine.optimizer), (model, rule)):
            small_loss(module, 0).backward()
            optimizer.step()
            optimizer.step()
            offloaded = module is not model
            with pytest.warns(UserWarning, match="zero_grad") if offloaded else nullcontext():
                small_loss(module, 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.step()  # nothing to apply
        for name, state in engine.named_state():
            expected = model.get_parameter(name)
            assert relative_difference(state["weight"], expected.detach()) <= 1e-6, name
            assert "gradient" not in state


def test_an_assigned_gradient_replaces_what_has_arrived(tmp_path: Path) -> None:
    model = small_model()
    rule = torch.optim.AdamW(model.parameters(), foreach=False, **ADAMW)
    with make_engine(small_model(), config("nvme", tmp_path)) as engine:
        for module, optimizer in ((engine.module, engine.optimizer), (model, rule)):
            small_loss(module, 0).backward()
            weight = module.get_parameter("1.weight")
            weight.grad = torch.full((32, 32), 0.25)
            optimizer.step()
            optimizer.zero_grad()
        for name, state in engine.named_state():
            expected = model.get_parameter(name).detach()
            assert relative_difference(state["weight"], expected) <= 1e-6, name


def test_a_failed_backward_leaves_no_gradients(tmp_path: Path) -> None:
    sections = {"training": {"gradient_accumulation_steps": 2}}
    calm = train_engine(small_model(), config("nvme", tmp_path, **sections), small_loss, steps=2)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("cut off")

    with make_engine(small_model(), config("nvme", tmp_path, **sections)) as engine:
        first = continue_engine(engine, small_loss, steps=1)
        engine.backward(small_loss(engine, 2))
        engine.step()
        handle = engine.module[4].register_forward_hook(lambda m, args, out: Fails.apply(out))
        with pytest.raises(RuntimeError, match="cut off"):
            engine.backward(small_loss(engine, 3))
        handle.remove()
        assert engine.micro_steps == 2
        assert not any("gradient" in state for _, state in engine.named_state())
        second = continue_engine(engine, small_loss, steps=1)
    second.losses = first.losses + second.losses
    second.norms = first.norms + second.norms
    assert_identical(second, calm)


# -- unusual parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_frozen_parameters_cost_nothing_and_are_never_written(tier: str, tmp_path: Path) -> None:
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("1."))
    frozen = model[1].weight.detach().clone()
    with make_engine(model, config(tier, tmp_path)) as engine:
        for bucket in engine.plan.buckets:
            classes = engine._parts.store.classes(bucket.index)
            assert ("gradients" in classes) == ("optimizer" in classes) == bucket.trainable
        pages = [
            engine._parts.store.block(b.index, "weights")
            for b in engine.plan.buckets
            if not b.trainable
        ]
        assert pages
        generations = [r.generation for block in pages for r in block.records]
        continue_engine(engine, small_loss, steps=2)
        assert [r.generation for block in pages for r in block.records] == generations
        state = dict(engine.named_state())["1.weight"]
        assert list(state) == ["weight"]
        assert torch.equal(state["weight"], frozen)


class Unusual(nn.Module):
    """Ties, channels-last, complex and empty parameters, and an embedding with sparse gradients."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.extra = nn.Embedding(64, 16, sparse=sparse)
        self.conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
        self.phase = nn.Parameter(torch.randn(16, dtype=torch.complex64))
        self.none = nn.Parameter(torch.zeros(0, 16))
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) + self.extra(tokens)
        image = hidden.transpose(1, 2)[..., None].contiguous(memory_format=torch.channels_last)
        hidden = hidden + self.conv(image)[..., 0].transpose(1, 2)
        hidden = hidden + (hidden * self.phase).imag + self.none.sum()
        return self.head(hidden)


def make_unusual(*, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Unusual(sparse=sparse)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_unusual_parameters(optimizer: str, tmp_path: Path) -> None:
    rule = OPTIMIZERS[optimizer]
    run = everywhere(make_unusual, small_loss, tmp_path, factories={"optimizer": rule})
    plain = train_plain(make_unusual(), small_loss, steps=4, optimizer=rule)
    assert "head.weight" not in run.state
    assert_close(run, plain, tolerance=1e-6)
    assert run.state["phase"]["weight"].is_complex()
    assert run.steps == [4] * len(run.steps)


def test_sparse_gradients(tmp_path: Path) -> None:
    rule = OPTIMIZERS["adagrad"]
    run = everywhere(
        lambda: make_unusual(sparse=True), small_loss, tmp_path, factories={"optimizer": rule}
    )
    plain = train_plain(make_unusual(), small_loss, steps=4, optimizer=rule)
    assert_close(run, plain, tolerance=1e-6)


# -- access to state ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_state_round_trips(compute: str, tier: str, tmp_path: Path) -> None:
    """What `named_state` gives, `set_state` brings to another engine; it goes on as the first."""
    training = {"gradient_accumulation_steps": 2}
    precision = {"initial_loss_scale": 1024.0}
    options = {"compute": compute, "training": training, "precision": precision}
    with (
        make_engine(small_model(), config(tier, tmp_path, **options)) as engine,
        make_engine(small_model(), config("host", tmp_path, **options)) as other,
    ):
        continue_engine(engine, small_loss, steps=2)
        engine.backward(small_loss(engine, 4))
        engine.step()
        state = dict(engine.named_state())
        for name, tensors in state.items():
            other.set_state(name, tensors)
        other.set_parameter_steps(engine.parameter_steps())
        other.global_steps, other.micro_steps = engine.global_steps, engine.micro_steps
        if compute == "fp16":
            other.loss_scale.load_state_dict(engine.loss_scale.state_dict())
        assert_same_state(dict(other.named_state()), state)
        assert_identical(
            continue_engine(other, small_loss, steps=2),
            continue_engine(engine, small_loss, steps=2),
        )


def test_complex_state_round_trips(tmp_path: Path) -> None:
    with make_engine(make_unusual(), config("nvme", tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=1)
        state = dict(engine.named_state())
        with make_engine(make_unusual(), config("host", tmp_path)) as other:
            for name, tensors in state.items():
                other.set_state(name, tensors)
            assert_same_state(dict(other.named_state()), state)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_state_dict_round_trips(compute: str, tier: str, tmp_path: Path) -> None:
    """Also into a plain module, and from a plain one; masters follow a loaded weight."""
    with make_engine(make_unusual_real(), config(tier, tmp_path, compute=compute)) as engine:
        continue_engine(engine, small_loss, steps=2)
        saved = engine.state_dict()
        plain = make_unusual_real().to(torch.bfloat16 if compute == "bf16" else torch.float32)
        plain.load_state_dict(saved)
        continue_engine(engine, small_loss, steps=1)
        engine.load_state_dict(plain.state_dict())
        for name, tensor in engine.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        for name, state in engine.named_state():
            assert torch.equal(state["master"], saved[name].float()), name
        engine.backward(small_loss(engine, 3))
        taken = engine.step()
        assert taken


def make_unusual_real() -> nn.Module:
    """Without the complex parameter, which has no bf16 form."""
    model = make_unusual()
    model.phase = nn.Parameter(torch.ones(16))
    model.forward = lambda tokens: model.head(  # type: ignore[method-assign]
        (model.embed(tokens) + model.extra(tokens)) * model.phase
    )
    return model


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_gathered_edits_reach_weight_and_master(compute: str, tier: str, tmp_path: Path) -> None:
    with make_engine(small_model(), config(tier, tmp_path, compute=compute)) as engine:
        continue_engine(engine, small_loss, steps=1)
        weight = engine.module[1].weight
        with engine.gathered("1.weight", writable=True), torch.no_grad():
            weight.copy_(torch.arange(1024).view(32, 32) / 1024)
        state = dict(engine.named_state())["1.weight"]
        expected = (torch.arange(1024).view(32, 32) / 1024).to(weight.dtype)
        assert torch.equal(state["weight"], expected)
        assert torch.equal(state["master"], expected.float())
        with (
            pytest.raises(OffloadError, match=r"1\.weight was edited"),
            engine.gathered("1.weight"),
            torch.no_grad(),
        ):
            weight.zero_()
        with pytest.raises(OffloadError, match="no parameter nonsense"):
            engine.gathered("nonsense").__enter__()
        with pytest.raises(OffloadError, match="shape"):
            engine.set_state("1.weight", {"exp_avg": torch.zeros(3)})


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_edits_of_data_after_an_evaluation_reach_the_master(
    compute: str, tier: str, tmp_path: Path
) -> None:
    with make_engine(small_model(), config(tier, tmp_path, compute=compute)) as engine:
        continue_engine(engine, small_loss, steps=1)
        with torch.no_grad():
            small_loss(engine, 1)
        weight = engine.module[1].weight
        weight.data.fill_(0.25)
        state = dict(engine.named_state())["1.weight"]
        assert torch.equal(state["master"], torch.full((32, 32), 0.25))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("raw", [False, True])
def test_a_master_that_is_set_keeps_its_low_bits(raw: bool, tier: str, tmp_path: Path) -> None:
    with make_engine(small_model(), config(tier, tmp_path, compute="bf16")) as engine:
        if raw:
            assert engine.module[1].weight.data_ptr()
        master = torch.full((32, 32), 1 / 3)
        engine.set_state("1.weight", {"master": master})
        assert engine.module[1].weight.sum()
        assert torch.equal(dict(engine.named_state())["1.weight"]["master"], master)


def test_a_frozen_parameter_takes_no_gradient(tmp_path: Path) -> None:
    model = small_model()
    model[1].weight.requires_grad_(False)
    with (
        make_engine(model, config("host", tmp_path)) as engine,
        pytest.raises(OffloadError, match=r"gradient of parameter 1\.weight"),
    ):
        engine.set_state("1.weight", {"gradient": torch.ones(32, 32)})


# -- the engine as an object ----------------------------------------------------------------------


def test_several_engines_in_one_process(tmp_path: Path) -> None:
    alone = train_engine(small_model(), config("nvme", tmp_path), small_loss, steps=3)
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(make_engine(small_model(), config("nvme", tmp_path)))
            for _ in range(3)
        ]
        runs = [Run() for _ in engines]
        for _ in range(3):
            for engine, run in zip(engines, runs, strict=True):
                part = continue_engine(engine, small_loss, steps=1)
                run.losses += part.losses
                run.norms += part.norms
                run.state, run.steps = part.state, part.steps
    for run in runs:
        assert_identical(run, alone)


@pytest.mark.parametrize("tier", TIERS)
def test_close_is_final_and_idempotent(tier: str, tmp_path: Path) -> None:
    engine = make_engine(small_model(), config(tier, tmp_path))
    continue_engine(engine, small_loss, steps=1)
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == []
    for action in (
        lambda: engine(torch.zeros(1, 1, dtype=torch.long)),
        lambda: engine.backward(torch.zeros(())),
        engine.step,
        engine.state_dict,
        lambda: dict(engine.named_state()),
        lambda: engine.set_state("1.weight", {}),
        engine.optimizer.step,
    ):
        with pytest.raises(EngineStateError):
            action()
    with pytest.raises(EngineStateError):
        engine.module(torch.zeros(1, 1, dtype=torch.long))
