"""Parameters are frozen and unfrozen between steps: plain PyTorch's numbers, in every placement."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.errors import (
    CheckpointError,
    DoesNotFitError,
    EngineStateError,
    OffloadError,
)
from offload.partition.blocks import BlockStore
from tests.oracle import (
    ADAMW,
    Run,
    assert_close,
    assert_identical,
    assert_same_state,
    continue_engine,
    make_engine,
    settings,
    small_loss,
    small_model,
)

TOLERANCE = 1e-6
BUCKET_ELEMENTS = 2048  # the embedding is alone; each other bucket holds two layers
STATE = ("weights", "gradients", "optimizer")
PLACEMENTS: dict[str, dict[str, str]] = {
    "device": dict.fromkeys(STATE, "device"),
    "host": dict.fromkeys(STATE, "host"),
    "nvme": dict.fromkeys(STATE, "nvme"),
    "mixed": {"weights": "nvme", "gradients": "host", "optimizer": "nvme"},
    "auto": dict.fromkeys(STATE, "auto"),
}
# Names of `small_model`: 0 embedding; 1, 4, 7 linear; 2, 5, 8 norms; 10 head.
Schedule = Mapping[int, Callable[[nn.Module], Any]]


def freeze(*prefixes: str, frozen: bool = True) -> Callable[[nn.Module], None]:
    """An action on the parameters whose names start so."""

    def act(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.requires_grad_(not frozen)

    return act


unfreeze = functools.partial(freeze, frozen=False)


def representable(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with weights that the compute dtype holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def placed(placement: str, path: Path, **sections: Any) -> dict[str, Any]:
    small = {"device": 40 << 10} if placement in ("nvme", "mixed") else {}
    if placement == "auto":
        small = {"device": 60 << 10, "host": 200 << 10}
    return settings(
        "auto",
        path,
        **{**small, "bucket_elements": BUCKET_ELEMENTS, **sections},
        placement=PLACEMENTS[placement],
    )


def run_engine(
    model: nn.Module,
    config: Mapping[str, Any],
    schedule: Schedule,
    *,
    steps: int,
    **factories: Any,
) -> Run:
    """Train; before step number i, `schedule[i]` acts on the model."""
    with make_engine(model, config, **factories) as engine:
        run = follow(engine, schedule, steps=steps)
        run.report, run.plan = engine.report(), engine.plan
    return run


def follow(engine: Any, schedule: Schedule, *, steps: int) -> Run:
    run = Run()
    for _ in range(steps):
        if engine.global_steps in schedule:
            schedule[engine.global_steps](engine.module)
        one = continue_engine(engine, small_loss, steps=1)
        run.losses += one.losses
        run.norms += one.norms
        run.state, run.steps = one.state, one.steps
    return run


def run_plain(
    model: nn.Module,
    schedule: Schedule,
    *,
    steps: int,
    accumulation: int = 1,
    max_norm: float = 0.0,
    groups: Callable[[nn.Module], Any] | None = None,
    share: Callable[[int], float] | None = None,
) -> Run:
    """PyTorch alone: an optimizer over all parameters passes over those without a gradient."""
    run = Run()
    rule = torch.optim.AdamW(
        groups(model) if groups else list(model.parameters()), foreach=False, **ADAMW
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, share) if share else None
    for step in range(steps):
        if step in schedule:
            schedule[step](model)
        for micro in range(accumulation):
            loss = small_loss(model, step * accumulation + micro)
            (loss / accumulation).backward()
            run.losses.append(loss.item())
        present = [p for p in model.parameters() if p.grad is not None]
        run.norms.append(torch.nn.utils.clip_grad_norm_(present, max_norm or torch.inf).item())
        rule.step()
        rule.zero_grad()
        if scheduler is not None:
            scheduler.step()
    for name, parameter in model.named_parameters():
        known = rule.state.get(parameter, {})
        run.state[name] = {"weight": parameter.detach().clone()}
        run.state[name] |= {k: v.clone() for k, v in known.items() if torch.is_tensor(v) and v.ndim}
        run.steps.append(int(known["step"]) if known else 0)
    return run


def assert_as_plain(run: Run, plain: Run) -> None:
    assert_close(run, plain, tolerance=TOLERANCE)
    assert run.steps == plain.steps
    for one, other in zip(run.norms, plain.norms, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    trained = {name: state for name, state in plain.state.items() if "exp_avg" in state}
    assert_close(Run(state=run.state), Run(state=trained), tolerance=TOLERANCE, key="exp_avg")


# -- freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_what_is_frozen_between_steps_stands_still(placement: str, tmp_path: Path) -> None:
    schedule = {1: freeze("0", "4", "5"), 3: unfreeze("4"), 4: unfreeze("0", "5")}
    run = run_engine(small_model(), placed(placement, tmp_path), schedule, steps=5)
    assert_as_plain(run, run_plain(small_model(), schedule, steps=5))


@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_a_gradient_that_has_arrived_counts_though_its_parameter_is_frozen(
    placement: str, tmp_path: Path
) -> None:
    plain, model = small_model(), small_model()
    rule = torch.optim.AdamW(plain.parameters(), foreach=False, **ADAMW)
    training = {"gradient_accumulation_steps": 2}
    with make_engine(model, placed(placement, tmp_path, training=training)) as engine:
        for micro in range(4):
            if micro in (1, 2):
                for each in (plain, model):
                    freeze("4", "0", frozen=micro == 1)(each)
            (small_loss(plain, micro) / 2).backward()
            engine.backward(small_loss(engine, micro))
            if engine.step():
                rule.step()
                rule.zero_grad()
        found = dict(engine.named_state())
    expected = {
        name: {"weight": p.detach(), "exp_avg": rule.state[p]["exp_avg"]}
        for name, p in plain.named_parameters()
    }
    for key in ("weight", "exp_avg"):
        assert_close(Run(state=found), Run(state=expected), tolerance=TOLERANCE, key=key)


def test_freezing_everything_is_a_step_without_gradients(tmp_path: Path) -> None:
    with make_engine(small_model(), placed("host", tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=1)
        before = dict(engine.named_state())
        freeze("")(engine.module)
        with pytest.raises(RuntimeError, match="does not require grad"):
            engine.backward(small_loss(engine, 0))
        taken = engine.step()
        assert taken
        assert_same_state(dict(engine.named_state()), before)


# -- unfreezing ------------------------------------------------------------------------------------

UNFREEZING: Schedule = {1: unfreeze("4", "10"), 2: freeze("10"), 3: unfreeze("0", "10", "2")}


def partly_frozen() -> nn.Module:
    """Only one layer and its norm train."""
    model = small_model()
    freeze("")(model)
    unfreeze("7", "8")(model)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_what_was_frozen_at_initialize_trains_once_unfrozen(
    placement: str, accumulation: int, tmp_path: Path
) -> None:
    training = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    config = placed(placement, tmp_path, training=training)
    run = run_engine(partly_frozen(), config, UNFREEZING, steps=5)
    plain = run_plain(partly_frozen(), UNFREEZING, steps=5, accumulation=accumulation, max_norm=0.5)
    assert_as_plain(run, plain)
    base = run_engine(
        partly_frozen(), placed("device", tmp_path, training=training), UNFREEZING, steps=5
    )
    assert_identical(run, base)
    assert run.plan.fits
    for tier, figures in run.report.tiers.items():
        assert figures.peak_bytes <= run.plan.peak_bytes[tier] <= figures.budget_bytes


RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
    "sgd without state": {"optimizer": {"name": "sgd", "lr": 0.1}},
    "lion": {"optimizer": {"name": "lion", "lr": 1e-3}},
    "adagrad": {"optimizer": {"name": "adagrad", "lr": 1e-2}},
}


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", list(RULES))
def test_promotion_gives_what_a_trainable_parameter_has(
    rule: str, compute: str, tmp_path: Path
) -> None:
    """To the bit: an engine that had room from the start, over weights that are no rounded ones."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    sections = {"compute": compute, **RULES[rule]}
    if compute == "fp16":
        sections["precision"] = {"compute": "fp16", "initial_loss_scale": 1024.0}

    def first(model: nn.Module) -> None:
        freeze("")(model)
        unfreeze("7", "8")(model)

    run = run_engine(
        representable(partly_frozen(), dtype),
        placed("nvme", tmp_path, **sections),
        UNFREEZING,
        steps=4,
    )
    start = run_engine(
        representable(small_model(), dtype),
        placed("host", tmp_path, **sections),
        {0: first, **UNFREEZING},
        steps=4,
    )
    for name, tensors in run.state.items():
        assert_same_state({name: tensors}, {name: {k: start.state[name][k] for k in tensors}})
    assert run.losses == start.losses
    assert run.norms == start.norms
    assert run.steps == start.steps
    never = {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert {name for name, tensors in run.state.items() if len(tensors) == 1} == never


def test_a_parameter_of_many_chunks_is_promoted(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 2500), nn.Linear(2500, 64)).requires_grad_(False)

    schedule = {0: unfreeze("1"), 1: unfreeze("0")}
    config = placed("nvme", tmp_path, device=8 << 20)
    with make_engine(make(), config) as engine:
        assert max(len(bucket.chunks) for bucket in engine.plan.buckets) > 1
        run = follow(engine, schedule, steps=3)
    assert_as_plain(run, run_plain(make(), schedule, steps=3))


def test_tied_weights_are_promoted_once(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64))
        model[2].weight = model[0].weight
        freeze("0")(model)
        return model

    schedule = {1: unfreeze("0")}
    run = run_engine(make(), placed("nvme", tmp_path), schedule, steps=3)
    assert_as_plain(run, run_plain(make(), schedule, steps=3))


def test_everything_may_be_frozen_at_first(tmp_path: Path) -> None:
    schedule = {0: unfreeze("10"), 2: unfreeze("")}
    run = run_engine(
        small_model().requires_grad_(False), placed("nvme", tmp_path), schedule, steps=4
    )
    plain = run_plain(small_model().requires_grad_(False), schedule, steps=4)
    assert_as_plain(run, plain)


def test_edits_of_a_frozen_weight_are_what_training_starts_from(tmp_path: Path) -> None:
    def act(model: nn.Module) -> None:
        with torch.no_grad():
            model[4].weight.mul_(1.5)
        unfreeze("4")(model)

    dtype = torch.float16
    sections = {"precision": {"compute": "fp16", "initial_loss_scale": 1024.0}}
    runs = [
        run_engine(
            representable(model, dtype), placed("nvme", tmp_path, **sections), schedule, steps=3
        )
        for model, schedule in (
            (partly_frozen(), {1: act}),
            (small_model(), {0: lambda m: (freeze("")(m), unfreeze("7", "8")(m)), 1: act}),
        )
    ]
    for name in ("4.weight", "7.weight"):
        assert_same_state({name: runs[0].state[name]}, {name: runs[1].state[name]})


def test_a_gradient_that_came_before_the_place_counts(tmp_path: Path) -> None:
    """The module itself runs, so that nobody has noticed yet when the step comes."""
    plain, model = partly_frozen(), partly_frozen()
    rule = torch.optim.AdamW(plain.parameters(), foreach=False, **ADAMW)
    with make_engine(model, placed("host", tmp_path)) as engine:
        for each in (plain, model):
            unfreeze("4")(each)
            small_loss(each, 0).backward()
        rule.step()
        engine.optimizer.step()
        found = dict(engine.named_state())
        engine.optimizer.zero_grad()
        assert model[4].weight.grad is None
    assert_close(
        Run(state=found),
        Run(state={"4.weight": {"exp_avg": rule.state[plain[4].weight]["exp_avg"]}}),
        tolerance=TOLERANCE,
        key="exp_avg",
    )


@pytest.mark.parametrize("placement", ["host", "nvme"])
def test_any_schedule_gives_the_bits_of_an_engine_with_room(placement: str, tmp_path: Path) -> None:
    names = [name for name, _ in small_model().named_parameters()]
    for seed in range(3):
        drawn = random.Random(seed)

        def toggle(model: nn.Module, wanted: tuple[str, ...]) -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in wanted)

        choices = [tuple(drawn.sample(names, drawn.randint(1, len(names)))) for _ in range(5)]
        schedule = {i: functools.partial(toggle, wanted=w) for i, w in enumerate(choices)}
        start = small_model()
        toggle(start, tuple(drawn.sample(names, 2)))
        run = run_engine(start, placed(placement, tmp_path), schedule, steps=5)
        roomy = run_engine(small_model(), placed("device", tmp_path), schedule, steps=5)
        assert run.losses == roomy.losses
        assert run.steps == roomy.steps
        for name, tensors in run.state.items():
            known = {key: roomy.state[name][key] for key in tensors}
            assert_same_state({name: tensors}, {name: known})


# -- what it costs ---------------------------------------------------------------------------------


def test_only_the_bucket_of_the_parameter_becomes_trainable(tmp_path: Path) -> None:
    with make_engine(partly_frozen(), placed("nvme", tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=1)
        before, store = engine.plan, engine._parts.store
        unfreeze("4.weight")(engine.module)
        continue_engine(engine, small_loss, steps=2)
        after = engine.plan
        fresh = [
            bucket
            for old, bucket in zip(before.buckets, after.buckets, strict=True)
            if bucket.trainable and not old.trainable
        ]
        assert len(fresh) == 1
        (bucket,) = fresh
        members = [engine.parameter_names()[slot.param] for slot in bucket.slots]
        assert "4.weight" in members
        assert len(members) > 1
        for name in members:
            fields = engine.state_fields(name)
            assert ("exp_avg" in fields) == (name == "4.weight")
        for state_class in STATE:
            grown = after.bytes["nvme"][state_class] - before.bytes["nvme"][state_class]
            added = (
                0 if state_class == "weights" else after.layouts[bucket.index][state_class].nbytes
            )
            assert grown == added
        assert engine._parts.nvme.used_bytes == after.peak_bytes["nvme"]
        assert {n for i in range(len(after.buckets)) for n in store.classes(i)} == set(STATE)


def test_nothing_is_done_where_no_gradient_is_recorded(tmp_path: Path) -> None:
    with make_engine(partly_frozen(), placed("host", tmp_path)) as engine:
        plan = engine.plan
        unfreeze("4")(engine.module)
        with torch.no_grad():
            small_loss(engine, 0)
        assert engine.plan is plan
        freeze("4")(engine.module)
        continue_engine(engine, small_loss, steps=1)
        assert engine.plan is plan


@pytest.mark.parametrize("placement", ["device", "host", "nvme"])
def test_moments_start_at_zero_whatever_the_memory_held(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = BlockStore.add

    def add_dirty(store: BlockStore, bucket: Any, name: str, layout: Any, home: str) -> None:
        add(store, bucket, name, layout, home)
        block = store.block(bucket.index, name)
        for lease in (block.host_lease, block.device_lease):
            if lease is not None:
                lease.tensor.fill_(0x5A)

    monkeypatch.setattr(BlockStore, "add", add_dirty)
    schedule = {1: unfreeze("4")}
    run = run_engine(partly_frozen(), placed(placement, tmp_path), schedule, steps=3)
    assert_as_plain(run, run_plain(partly_frozen(), schedule, steps=3))


def test_homes_that_come_to_a_full_device_send_pages_away(tmp_path: Path) -> None:
    """The budget is what the plan needs in the end; until then pages fill it."""
    sections: dict[str, Any] = {"bucket_elements": 1024}
    sections["placement"] = {"weights": "nvme", "gradients": "device", "optimizer": "host"}
    with make_engine(partly_frozen(), settings("auto", tmp_path, **sections)) as roomy:
        follow(roomy, {0: unfreeze("")}, steps=1)
        need = roomy.plan.need_bytes["device"]
    config = settings("auto", tmp_path, device=need, **sections)
    schedule = {2: unfreeze("")}
    with make_engine(partly_frozen(), config) as engine:
        follow(engine, {}, steps=2)
        device = engine._parts.device
        with torch.no_grad():
            small_loss(engine, 0)
        before, room = engine.plan.bytes["device"], device.budget_bytes - device.used_bytes
        run = follow(engine, schedule, steps=2)
        assert engine.plan.bytes["device"]["gradients"] - before["gradients"] > room
        assert engine.plan.need_bytes["device"] == need
        assert device.peak_bytes <= need
        engine._parts.pager.make_way(engine.plan.working_bytes)
        held = sum(engine.plan.bytes["device"].values()) + engine.plan.gradient_bytes
        assert device.used_bytes == held
    plain = run_plain(partly_frozen(), schedule, steps=4)
    assert_as_plain(run, rest_of(plain, 2))


@pytest.mark.usefixtures("by_itself")
def test_old_staging_stays_within_the_budget_of_the_host(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 512), nn.Linear(512, 64))
        freeze("0", "1.weight")(model)
        return model

    schedule = {1: unfreeze("0")}
    options: dict[str, Any] = {"bucket_elements": 512}
    with make_engine(make(), settings("nvme", tmp_path, **options)) as engine:
        before = engine.plan.staging_bytes
        follow(engine, schedule, steps=2)
        after = engine.plan.staging_bytes
        assert 0 < before < after
    with make_engine(make(), settings("nvme", tmp_path, host=after, **options)) as engine:
        follow(engine, {}, steps=1)
        unfreeze("0")(engine.module)
        with pytest.raises(DoesNotFitError, match=r"parameter 0\.weight: unfrozen"):
            small_loss(engine, 1)
    enough = settings("nvme", tmp_path, host=before + after, **options)
    with make_engine(make(), enough) as engine:
        run = follow(engine, schedule, steps=3)
        assert engine._parts.host.budget_bytes <= before + after
        assert engine.plan.fits
    assert_as_plain(run, run_plain(make(), schedule, steps=3))


# -- groups ----------------------------------------------------------------------------------------

GROUPED = {
    "name": "adamw",
    **ADAMW,
    "groups": [{"match": ["*.bias"], "weight_decay": 0.0}, {"match": ["0.*"], "lr": 1e-2}],
}


def plain_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    biases = [name for name in named if name.endswith("bias")]
    rest = [name for name in named if name not in (*biases, "0.weight")]
    return [
        {"params": [named[name] for name in rest]},
        {"params": [named[name] for name in biases], "weight_decay": 0.0},
        {"params": [named["0.weight"]], "lr": 1e-2},
    ]


def test_an_unfrozen_parameter_joins_the_group_of_its_name(tmp_path: Path) -> None:
    schedule = {1: unfreeze("4"), 2: unfreeze("0")}
    config = placed(
        "nvme",
        tmp_path,
        optimizer=GROUPED,
        lr_scheduler={"name": "linear", "total_steps": 8, "warmup_steps": 2},
    )

    def share(step: int) -> float:
        return step / 2 if step < 2 else 1 - (step - 2) / 6

    with make_engine(partly_frozen(), config) as engine:
        assert [len(g["params"]) for g in engine.optimizer.param_groups] == [2, 2, 0]
        run = follow(engine, schedule, steps=5)
        assert [len(g["params"]) for g in engine.optimizer.param_groups] == [3, 3, 1]
    plain = run_plain(partly_frozen(), schedule, steps=5, groups=plain_groups, share=share)
    assert_as_plain(run, plain)


def factory(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False, **ADAMW),
        "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3, foreach=False),
        "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, foreach=False),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, foreach=False),
    }
    return kinds[kind]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("order", ["unfrozen first", "added first"])
@pytest.mark.parametrize("kind", ["adamw", "nadam", "adafactor"])
@pytest.mark.parametrize("placement", ["host", "nvme"])
def test_an_optimizer_of_the_users_takes_new_groups(
    placement: str, kind: str, order: str, tmp_path: Path
) -> None:
    plain, model = partly_frozen(), partly_frozen()
    rule = factory(kind)(trainable(plain))
    with make_engine(model, placed(placement, tmp_path), optimizer=factory(kind)) as engine:
        for step in range(4):
            for each, optimizer in ((plain, rule), (model, engine.optimizer)):
                if step == 1:
                    acts = [
                        lambda m=each: unfreeze("0", "4")(m),
                        lambda m=each, o=optimizer: o.add_param_group(
                            {"params": [m[0].weight, *m[4].parameters()], "lr": 5e-3}
                        ),
                    ]
                    for act in acts if order == "unfrozen first" else reversed(acts):
                        act()
            loss = small_loss(plain, step)
            loss.backward()
            rule.step()
            rule.zero_grad()
            found = small_loss(engine, step)
            assert found.item() == pytest.approx(loss.item(), rel=TOLERANCE)
            engine.backward(found)
            taken = engine.step()
            assert taken
        assert engine.optimizer.param_groups[1]["lr"] == 5e-3
        known = rule.param_groups[1].keys() - {"params"}
        assert known <= engine.optimizer.param_groups[1].keys()
        state = dict(engine.named_state())
    expected = {name: {"weight": p.detach()} for name, p in plain.named_parameters()}
    assert_close(Run(state=state), Run(state=expected), tolerance=TOLERANCE)


def test_unfreezing_alone_trains_nothing_of_a_users_optimizer(tmp_path: Path) -> None:
    model = partly_frozen()
    with make_engine(model, placed("host", tmp_path), optimizer=factory("adamw")) as engine:
        unfreeze("4")(model)
        with pytest.warns(
            UserWarning, match=r"parameters 4\.weight, 4\.bias: unfrozen, but no gro"
        ):
            loss = small_loss(engine, 0)
        engine.backward(loss)
        assert model[4].weight.grad is not None, "as in PyTorch it is the user's"
        before = engine.read_state("4.weight", "weight")
        engine.step()
        continue_engine(engine, small_loss, steps=1)  # says it no more
        assert torch.equal(engine.read_state("4.weight", "weight"), before)
        unfreeze("5")(model)
        with pytest.warns(UserWarning, match=r"parameters 5\.weight, 5\.bias: unfrozen"):
            small_loss(engine, 0)


def test_what_a_users_optimizer_left_out_can_be_added(tmp_path: Path) -> None:
    model = small_model()
    config = placed("nvme", tmp_path)

    def heads_only(parameters: Any) -> torch.optim.Optimizer:
        return factory("adamw")(list(parameters)[-2:])

    with make_engine(model, config, optimizer=heads_only) as engine:
        assert "exp_avg" not in engine.state_fields("4.weight")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            continue_engine(engine, small_loss, steps=1)
        engine.optimizer.add_param_group({"params": [model[4].weight]})
        assert "exp_avg" in engine.state_fields("4.weight")
        before = engine.read_state("4.weight", "weight")
        continue_engine(engine, small_loss, steps=1)
        assert not torch.equal(engine.read_state("4.weight", "weight"), before)


def test_a_group_of_ones_own_beside_the_configured_ones(tmp_path: Path) -> None:
    """It is taken before the name decides, follows the config's schedule, and its own rate."""
    model, plain = partly_frozen(), partly_frozen()
    scheduled = {"name": "linear", "total_steps": 10}
    with make_engine(model, placed("host", tmp_path, lr_scheduler=scheduled)) as engine:
        follow(engine, {}, steps=2)
        unfreeze("4")(model)
        engine.optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 1e-2})
        group = engine.optimizer.param_groups[1]
        assert group["lr"] == pytest.approx(1e-2 * 0.8)
        assert group["weight_decay"] == ADAMW["weight_decay"]
        follow(engine, {}, steps=1)
        assert group["lr"] == pytest.approx(1e-2 * 0.7)
        assert engine.lr_scheduler.get_last_lr() == [g["lr"] for g in engine.optimizer.param_groups]
    assert len(list(plain.parameters())) == len(list(model.parameters()))


def test_groups_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    model = partly_frozen()
    with make_engine(model, placed("host", tmp_path), optimizer=factory("sgd")) as engine:
        groups = [{**g, "params": list(g["params"])} for g in engine.optimizer.param_groups]
        add = engine.optimizer.add_param_group
        with pytest.raises(OffloadError, match=r"shape \(3,\) that is none of those"):
            add({"params": [nn.Parameter(torch.zeros(3))]})
        with pytest.raises(OffloadError, match=r"momentum = 0\.9"):
            add({"params": [model[4].weight], "momentum": 0.9})
        with pytest.raises(OffloadError, match="maximize = True"):
            add({"params": [model[4].weight], "maximize": True})
        with pytest.raises(ValueError, match="more than one parameter group"):
            add({"params": [model[7].weight]})
        found = [{**g, "params": list(g["params"])} for g in engine.optimizer.param_groups]
        assert [g.keys() for g in found] == [g.keys() for g in groups]
        assert [len(g["params"]) for g in found] == [len(g["params"]) for g in groups]
        continue_engine(engine, small_loss, steps=1)


def test_a_second_group_must_keep_the_state_that_the_bucket_has(tmp_path: Path) -> None:
    model = partly_frozen()

    def asgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, amsgrad=True, foreach=False)

    with make_engine(model, placed("host", tmp_path), optimizer=asgd) as engine:
        unfreeze("4.weight")(model)
        engine.optimizer.add_param_group({"params": [model[4].weight]})
        unfreeze("4.bias")(model)
        with pytest.raises(OffloadError, match=r"parameter 4\.bias has no place in its bucket"):
            engine.optimizer.add_param_group({"params": [model[4].bias], "amsgrad": False})
        engine.optimizer.add_param_group({"params": [model[4].bias]})
        continue_engine(engine, small_loss, steps=1)


# -- no room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
def test_without_room_nothing_changes(tier: str, tmp_path: Path) -> None:
    model = partly_frozen()
    with make_engine(model, placed(tier, tmp_path)) as roomy:
        need = {name: roomy.plan.peak_bytes[name] for name in ("device", "host", "nvme")}
    sections: dict[str, Any] = {}
    if tier == "nvme":
        sections["tiers"] = {"nvme": {"paths": [str(tmp_path)], "capacity": need["nvme"]}}
    else:
        sections[tier] = need[tier]
    model = partly_frozen()
    with make_engine(model, placed(tier, tmp_path, **sections)) as engine:
        first = follow(engine, {}, steps=1)
        plan, groups = engine.plan, [len(g["params"]) for g in engine.optimizer.param_groups]
        used = {name: figures.used_bytes for name, figures in engine.report().tiers.items()}
        unfreeze("0", "4")(model)
        for _ in range(2):
            with pytest.raises(DoesNotFitError, match=r"parameters 0\.weight, 4\.weight, 4") as e:
                small_loss(engine, 1)
            assert "freeze with requires_grad_(False)" in str(e.value)
            assert f"tiers.{tier}." in str(e.value)
        with pytest.raises(DoesNotFitError):
            engine.optimizer.step()
        assert engine.plan is plan
        assert [len(g["params"]) for g in engine.optimizer.param_groups] == groups
        now = {name: figures.used_bytes for name, figures in engine.report().tiers.items()}
        assert now["host"] == used["host"]
        assert now.get("nvme") == used.get("nvme")
        freeze("0", "4")(model)
        rest = follow(engine, {}, steps=2)
    plain = run_plain(partly_frozen(), {}, steps=3)
    rest.losses, rest.norms = first.losses + rest.losses, first.norms + rest.norms
    assert_as_plain(rest, plain)


def test_a_disk_that_is_full_after_all_leaves_the_engine_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = partly_frozen()
    config = placed("mixed", tmp_path)
    with make_engine(model, config) as engine:
        follow(engine, {}, steps=1)
        store = engine._parts.store
        before = [block.name for block in store.blocks()]
        held = engine.report().tiers["host"].used_bytes, engine.report().tiers["device"].used_bytes
        unfreeze("4")(model)

        def refuse(*_: Any, **__: Any) -> None:
            raise OffloadError("no room on this disk")

        with monkeypatch.context() as broken:
            broken.setattr(engine._parts.nvme, "reserve", refuse)
            with pytest.raises(OffloadError, match="no room on this disk"):
                small_loss(engine, 1)
        assert [block.name for block in store.blocks()] == before
        engine._parts.pager.make_way(engine.plan.working_bytes)
        now = engine.report().tiers["host"].used_bytes, engine.report().tiers["device"].used_bytes
        assert now[0] == held[0]
        assert now[1] <= held[1]
        rest = follow(engine, {}, steps=2)  # there is room now
    assert_as_plain(
        rest_of(rest, 2), rest_of(run_plain(partly_frozen(), {1: unfreeze("4")}, steps=3), 2)
    )


def rest_of(run: Run, steps: int) -> Run:
    """The run with its last losses and norms only."""
    run.losses, run.norms = run.losses[-steps:], run.norms[-steps:]
    return run


def test_forward_only_training_refuses_by_name(tmp_path: Path) -> None:
    config = settings(
        "host", tmp_path, placement=dict.fromkeys(STATE, "auto"), optimizer={"name": "mezo"}
    )
    model = partly_frozen()
    with make_engine(model, config) as engine:
        taken = engine.step(lambda: small_loss(engine, 0))
        assert taken
        unfreeze("4.weight")(model)
        with pytest.raises(OffloadError, match=r"parameter 4\.weight: unfrozen in forward-only"):
            engine.step(lambda: small_loss(engine, 1))
        freeze("4")(model)
        taken = engine.step(lambda: small_loss(engine, 1))
        assert taken


@pytest.mark.parametrize("placement", ["host", "nvme"])
def test_a_tiled_weight_is_promoted(placement: str, tmp_path: Path) -> None:
    schedule = {1: unfreeze("0", "4.weight")}
    config = placed(placement, tmp_path, tiling={"modules": ["0", "4"], "tiles": 3})
    run = run_engine(partly_frozen(), config, schedule, steps=4)
    assert {each.name for each in run.plan.tiled} == {"0.weight", "4.weight"}
    assert_as_plain(run, run_plain(partly_frozen(), schedule, steps=4))
    start = {0: lambda model: (freeze("")(model), unfreeze("7", "8")(model)), **schedule}
    roomy = run_engine(small_model(), config, start, steps=4)
    for name, tensors in run.state.items():
        known = {key: roomy.state[name][key] for key in tensors}
        assert_same_state({name: tensors}, {name: known})


@pytest.mark.parametrize("activations", ["host", "nvme"])
def test_activations_keep_their_room(activations: str, tmp_path: Path) -> None:
    config = placed("nvme", tmp_path, activations={"host_memory": "256KiB", "min_bytes": 1})
    config["placement"] = {**config["placement"], "activations": activations}
    with make_engine(partly_frozen(), config) as engine:
        run = follow(engine, UNFREEZING, steps=5)
        assert engine.plan.bytes["host"]["activations"] == 256 << 10
        assert engine._parts.host.budget_bytes <= engine.plan.peak_bytes["host"]
    assert_as_plain(run, run_plain(partly_frozen(), UNFREEZING, steps=5))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("target", ["trainable", "unfrozen before", "unfrozen and run"])
def test_a_checkpoint_after_promotion_loads(target: str, compute: str, tmp_path: Path) -> None:
    sections = {"compute": compute, "optimizer": GROUPED}
    with make_engine(partly_frozen(), placed("nvme", tmp_path, **sections)) as engine:
        follow(engine, {1: unfreeze("0", "4")}, steps=3)
        engine.save_checkpoint(tmp_path / "checkpoints")
        expected = follow(engine, {}, steps=2)
    model = small_model() if target == "trainable" else partly_frozen()
    if target == "trainable":
        freeze("1", "2", "5", "10")(model)
    with make_engine(model, placed("host", tmp_path, **sections)) as engine:
        if target != "trainable":
            unfreeze("0", "4")(model)
        if target == "unfrozen and run":
            continue_engine(engine, small_loss, steps=1)
        engine.load_checkpoint(tmp_path / "checkpoints")
        assert_identical(follow(engine, {}, steps=2), expected)


def test_a_checkpoint_of_other_frozen_parameters_is_refused(tmp_path: Path) -> None:
    with make_engine(partly_frozen(), placed("host", tmp_path)) as engine:
        follow(engine, {1: unfreeze("4")}, steps=2)
        engine.save_checkpoint(tmp_path / "after")
    with make_engine(partly_frozen(), placed("host", tmp_path)) as engine:
        engine.save_checkpoint(tmp_path / "before")
        with pytest.raises(
            CheckpointError, match=r"exp_avg of '4\.weight' is not of this engine"
        ) as e:
            engine.load_checkpoint(tmp_path / "after")
        assert "requires_grad_(True)" in str(e.value)
        continue_engine(engine, small_loss, steps=1)
        unfreeze("4")(engine.module)
        engine.load_checkpoint(tmp_path / "after")
        with pytest.raises(CheckpointError, match=r"exp_avg of '4\.weight' is missing"):
            engine.load_checkpoint(tmp_path / "before")
        continue_engine(engine, small_loss, steps=1)


def test_a_checkpoint_with_another_number_of_groups_is_refused(tmp_path: Path) -> None:
    with make_engine(
        partly_frozen(), placed("host", tmp_path), optimizer=factory("nadam")
    ) as engine:
        unfreeze("4")(engine.module)
        engine.optimizer.add_param_group({"params": list(engine.module[4].parameters())})
        saved = follow(engine, {}, steps=2)
        engine.save_checkpoint(tmp_path / "checkpoints")
    model = small_model()
    freeze("0", "1", "2", "5", "10")(model)
    with make_engine(model, placed("nvme", tmp_path), optimizer=factory("nadam")) as engine:
        before = dict(engine.named_state())
        with pytest.raises(CheckpointError, match="2 parameter groups instead of 1"):
            engine.load_checkpoint(tmp_path / "checkpoints")
        assert_same_state(dict(engine.named_state()), before)
    model = partly_frozen()
    with make_engine(model, placed("nvme", tmp_path), optimizer=factory("nadam")) as engine:
        unfreeze("4")(model)
        engine.optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 9.0})
        engine.load_checkpoint(tmp_path / "checkpoints")
        assert_same_state(dict(engine.named_state()), saved.state)
        assert engine.optimizer.param_groups[1]["lr"] == 1e-3


def test_a_new_group_is_refused_while_a_step_is_pending(tmp_path: Path) -> None:
    with make_engine(partly_frozen(), placed("host", tmp_path)) as engine:
        engine.close()
        with pytest.raises(EngineStateError, match="closed"):
            engine.optimizer.add_param_group({"params": [engine.module[4].weight]})
