"""Forward-only training: the bits of an in-memory implementation, in every placement."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.config import OffloadConfig
from offload.engine import build
from offload.errors import (
    ConfigError,
    EngineStateError,
    GuardError,
    NonFiniteError,
    OffloadError,
    StorageError,
)
from offload.optim import zeroth_order
from offload.partition.blocks import Block, BlockStore
from offload.partition.staging import Staged
from offload.schedule.executor import ComputePool
from tests.engine.test_faults import CountingIo
from tests.engine.test_simulated_device import accelerator  # noqa: F401 - a fixture
from tests.oracle import (
    assert_same_state,
    language_loss,
    make_engine,
    settings,
    small_loss,
    small_model,
    transformers_model,
)
from tests.zeroth_oracle import PlainMezo

STEPS = 6
MEZO = {"name": "mezo", "lr": 1e-4, "perturbation": 1e-2, "weight_decay": 0.1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_unused() -> nn.Module:
    """The small model, with parameters that its forward never touches."""
    model = small_model()
    model[3].register_module("unused", nn.Linear(32, 40))  # type: ignore[index, union-attr, operator]
    return model


class Zoo(nn.Module):
    """Tied, unused, frozen, transposed and large parameters, buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.unused = nn.Linear(32, 8)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.wide = nn.Linear(32, 4500)  # 144,000 elements: three chunks
        self.norm = nn.BatchNorm1d(4500)
        self.narrow = nn.Parameter(torch.randn(4500, 32).div_(64).t())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(tokens)).flatten(0, 1)
        x = self.dropout(torch.relu(self.norm(self.wide(x))))
        return self.head(x @ self.narrow.t()).unflatten(0, tokens.shape)


def mezo(
    tier: str, directory: Path | None = None, *, bucket_elements: int = 1024, **sections: Any
) -> dict[str, Any]:
    """A configuration with the weights in one tier."""
    config = settings(
        tier,
        directory,
        bucket_elements=bucket_elements,
        **{"optimizer": MEZO, **sections},
    )
    return {**config, "placement": {"weights": tier}}


def train(engine: Any, *, steps: int = STEPS, loss: Any = small_loss) -> list[tuple[float, float]]:
    """The loss and the projected gradient of each step; batches are numbered from the start."""
    found = []
    for _ in range(steps):
        index = engine.micro_steps
        taken = engine.step(lambda index=index: loss(engine, index))
        assert taken
        found.append((engine.step_loss, engine.projected_gradient))
    return found


def run(
    config: Any, *, make: Callable[[], nn.Module] = small_model, steps: int = STEPS
) -> tuple[list[tuple[float, float]], dict[str, dict[str, torch.Tensor]], Any]:
    with make_engine(make(), config) as engine:
        records = train(engine, steps=steps)
        return records, dict(engine.named_state()), engine.state_dict()


def plain_mezo(model: nn.Module) -> PlainMezo:
    """The yardstick, with the settings of `MEZO`."""
    return PlainMezo(model, **{key: value for key, value in MEZO.items() if key != "name"})


def in_memory(make: Callable[[], nn.Module], compute: str = "fp32") -> PlainMezo:
    model = make().to(DTYPES[compute])
    plain = plain_mezo(model)
    for index in range(STEPS):
        plain.step(lambda index=index: small_loss(plain.module, index))
    return plain


@pytest.mark.parametrize("make", [small_model, Zoo])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_the_bits_of_an_in_memory_implementation(
    compute: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    plain = in_memory(make, compute)
    records, state, weights = run(mezo("nvme", tmp_path, precision={"compute": compute}), make=make)
    assert records == list(zip(plain.losses, plain.projected, strict=True))
    for name, weight in plain.state().items():
        assert torch.equal(state[name]["weight"], weight), name
    for name, tensor in plain.module.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_every_placement_gives_the_same_bits(tmp_path: Path) -> None:
    expected, state, weights = run(mezo("host"), make=Zoo)
    page = 72 * 4096  # the chunked parameters are the largest pages: 576 KiB
    tight = {"device": {"kind": "cpu", "memory": 4 * page}, "host": {"memory": "2MiB"}}
    nvme = {"nvme": {"paths": [str(tmp_path)]}}
    variants: dict[str, dict[str, Any]] = {
        "nvme": mezo("nvme", tmp_path),
        "tight": mezo("nvme", tmp_path, tiers={**tight, **nvme}),
        "tight, faults only": mezo(
            "nvme", tmp_path, tiers={**tight, **nvme}, overlap={"prefetch": False}
        ),
        "gathered": mezo("nvme", tmp_path, guard={"gather": ["wide"]}),
        "large buckets": mezo("host", bucket_elements=1 << 17),
        "auto": {**mezo("host"), "placement": {}},
    }
    for name, config in variants.items():
        found, found_state, found_weights = run(config, make=Zoo)
        assert found == expected, name
        assert_same_state(found_state, state)
        assert all(torch.equal(found_weights[key], weights[key]) for key in weights), name


def test_the_threads_of_the_pool_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, state, _ = run(mezo("nvme", tmp_path), make=Zoo)
    monkeypatch.setattr(build, "ComputePool", lambda _: ComputePool(3))
    found, found_state, _ = run(mezo("nvme", tmp_path), make=Zoo)
    assert found == expected
    assert_same_state(found_state, state)


def test_a_step_reads_weights_twice_and_writes_them_once(tmp_path: Path) -> None:
    with make_engine(small_model(), mezo("nvme", tmp_path, device=40 << 10)) as engine:
        train(engine, steps=2)
        nbytes = sum(classes["weights"].nbytes for classes in engine.plan.layouts)
        for _ in range(3):
            train(engine, steps=1)
            lanes = engine.report().lanes
            assert lanes["nvme_read"].bytes == 2 * nbytes
            assert lanes["nvme_write"].bytes == nbytes
        plan = engine.plan
    assert len(plan.buckets) > 3
    assert plan.bytes["nvme"]["weights"] == nbytes
    for tier, classes in plan.bytes.items():
        assert classes["gradients"] == classes["optimizer"] == 0, tier
    assert plan.gradient_bytes == 0
    assert all(list(classes) == ["weights"] for classes in plan.layouts)


def test_frozen_weights_are_read_and_never_written(tmp_path: Path) -> None:
    model = small_model()
    for layer in (0, 4, 7):
        model[layer].requires_grad_(False)  # type: ignore[index]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with make_engine(model, mezo("nvme", tmp_path, device=24 << 10)) as engine:
        train(engine, steps=3)
        lanes, plan = engine.report().lanes, engine.plan
        nbytes = [plan.layouts[b.index]["weights"].nbytes for b in plan.buckets if b.trainable]
        assert lanes["nvme_write"].bytes == sum(nbytes)
        assert lanes["nvme_read"].bytes == 2 * plan.bytes["nvme"]["weights"]
        for name, weight in before.items():
            same = torch.equal(engine.read_state(name, "weight"), weight)
            assert same == (name.partition(".")[0] in "047"), name


def test_freezing_between_steps(tmp_path: Path) -> None:
    """What is frozen is neither perturbed nor moved; an update that is pending still arrives."""
    plain = plain_mezo(small_model())
    with make_engine(small_model(), mezo("nvme", tmp_path, bucket_elements=4096)) as engine:
        for index, (frozen, thawed) in enumerate([((0, 1, 2), ()), ((7,), (1,)), ((), (0, 7))]):
            plain.step(lambda index=index: small_loss(plain.module, index))
            train(engine, steps=1)
            for model in (plain.module, engine.module):
                for layer in frozen:
                    model[layer].requires_grad_(False)
                for layer in thawed:
                    model[layer].requires_grad_(True)
        plain.step(lambda: small_loss(plain.module, 3))
        train(engine, steps=1)
        assert engine.projected_gradient == plain.projected[-1]
        for name, weight in plain.state().items():
            assert torch.equal(engine.read_state(name, "weight"), weight), name
        steps = dict(zip(engine.parameter_names(), engine.parameter_steps(), strict=True))
        assert steps["2.weight"] == 1
        assert steps["0.weight"] == 2
        assert steps["4.weight"] == 4


def test_unfreezing_what_was_frozen_is_refused() -> None:
    model = small_model()
    model[1].requires_grad_(False)  # type: ignore[index]
    with make_engine(model, mezo("host")) as engine:
        train(engine, steps=1)
        model[1].requires_grad_(True)  # type: ignore[index]
        with pytest.raises(OffloadError, match="forward-only"):
            train(engine, steps=1)


def test_a_model_that_streams_in_trains_the_same(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    def loss(model: Any, index: int) -> torch.Tensor:
        return language_loss(model, index)

    model = transformers_model("llama")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with make_engine(model, mezo("host")) as engine:
        expected = train(engine, steps=3, loss=loss)
    with offload.from_pretrained(
        tmp_path / "model", mezo("nvme", tmp_path), model_class=LlamaForCausalLM
    ) as engine:
        engine.train()
        assert train(engine, steps=3, loss=loss) == expected


def test_the_second_pass_is_prefetched(tmp_path: Path) -> None:
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        train(engine, steps=3)
        assert engine.report().faults == 0


def test_it_learns() -> None:
    torch.manual_seed(1)
    centres = torch.randn(4, 16)

    def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 4, (64,), generator=drawn)
        return centres[labels] + 0.5 * torch.randn(64, 16, generator=drawn), labels

    def loss(engine: Any, index: int) -> torch.Tensor:
        x, labels = batch(index)
        return nn.functional.cross_entropy(engine(x), labels)

    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    config = mezo("host", optimizer={"name": "mezo", "lr": 3e-2, "perturbation": 1e-3})
    with make_engine(model, config) as engine:
        with torch.no_grad():
            before = loss(engine, 10_000).item()
        train(engine, steps=300, loss=loss)
        with torch.no_grad():
            after = loss(engine, 10_000).item()
    assert before > 1.2
    assert after < 0.5 * before


# --- between steps --------------------------------------------------------------------------------


def reference(steps: int) -> dict[str, torch.Tensor]:
    """The weights after some undisturbed steps."""
    _, state, _ = run(mezo("host"), steps=steps)
    return {name: tensors["weight"] for name, tensors in state.items()}


def test_whatever_looks_finds_true_weights(tmp_path: Path) -> None:
    """After each step another kind of access is the first to meet the pending update."""

    def forward(engine: Any) -> torch.Tensor:
        with torch.no_grad():
            small_loss(engine, 0)
        return engine.module[1].weight.detach().clone()

    def gathered(engine: Any) -> torch.Tensor:
        with engine.gathered(["1.weight"]):
            return torch.from_numpy(engine.module[1].weight.detach().numpy().copy())

    def saved(engine: Any) -> torch.Tensor:
        engine.save_checkpoint(tmp_path / "saved")
        with make_engine(small_model(), mezo("host")) as other:
            other.load_checkpoint(tmp_path / "saved")
            return other.read_state("1.weight", "weight")

    def inference(engine: Any) -> torch.Tensor:
        with torch.inference_mode():
            small_loss(engine, 0)
        return engine.module[1].weight.detach().clone()

    looks: list[Callable[[Any], torch.Tensor]] = [
        forward,
        inference,
        lambda engine: engine.module[1].weight.detach().clone(),
        lambda engine: engine.module[1].weight.t().contiguous().t(),
        gathered,
        lambda engine: engine.state_dict()["1.weight"],
        lambda engine: dict(engine.named_state())["1.weight"]["weight"],
        lambda engine: engine.module.state_dict()["1.weight"].clone(),
        saved,
    ]
    for look in looks:
        with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
            for steps in (1, 2, 3):
                train(engine, steps=1)
                assert torch.equal(look(engine), reference(steps)["1.weight"])
            assert engine.parameter_steps() == [3] * len(engine.parameter_names())


def test_edits_between_steps_are_kept(tmp_path: Path) -> None:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            model[1].weight.mul_(0.5)  # type: ignore[index, union-attr, operator]

    plain = plain_mezo(small_model())
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        for index in range(4):
            plain.step(lambda index=index: small_loss(plain.module, index))
            train(engine, steps=1)
            edit(plain.module)
            edit(engine.module)
            plain.module[4].bias.detach().numpy()[index] = 7
            engine.module[4].bias.detach().numpy()[index] = 7
        engine.set_state("1.bias", {"weight": torch.ones(32)})
        with torch.no_grad():
            plain.module[1].bias.fill_(1)
        train(engine, steps=1)
        plain.step(lambda: small_loss(plain.module, 4))
        for name, weight in plain.state().items():
            assert torch.equal(engine.read_state(name, "weight"), weight), name


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    records, state, _ = run(mezo("host"))
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        first = train(engine, steps=3)
        engine.save_checkpoint(tmp_path / "saved")
        train(engine, steps=2)
        engine.load_checkpoint(tmp_path / "saved")  # the update that is pending is given up
        assert [*first, *train(engine, steps=3)] == records
        assert_same_state(dict(engine.named_state()), state)
    with make_engine(small_model(), mezo("host", bucket_elements=4096)) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert engine.global_steps == 3
        assert [*first, *train(engine, steps=3)] == records
        assert_same_state(dict(engine.named_state()), state)


def test_the_learning_rate_is_that_of_the_step(tmp_path: Path) -> None:
    schedule = {"name": "linear", "total_steps": 4}
    with make_engine(small_model(), mezo("nvme", tmp_path, lr_scheduler=schedule)) as engine:
        plain = plain_mezo(small_model())
        for index in range(4):
            plain.lr = engine.optimizer.param_groups[0]["lr"]
            plain.step(lambda index=index: small_loss(plain.module, index))
            train(engine, steps=1)
        assert engine.optimizer.param_groups[0]["lr"] == 0
        for name, weight in plain.state().items():
            assert torch.equal(engine.read_state(name, "weight"), weight), name


def test_groups_have_their_own_settings(tmp_path: Path) -> None:
    groups = [{"match": ["*bias"], "lr": 0.0}]
    config = mezo("nvme", tmp_path, optimizer={**MEZO, "groups": groups})
    before = dict(small_model().named_parameters())
    _, state, _ = run(config)
    for name, tensors in state.items():
        assert torch.equal(tensors["weight"], before[name]) == name.endswith("bias"), name


def test_both_passes_draw_the_same_numbers() -> None:
    drawn = []

    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(1).item())
            return super().forward(x)

    with make_engine(Noisy(4, 4), mezo("host")) as engine:
        torch.manual_seed(5)
        expected = [torch.rand(1).item() for _ in range(3)]
        torch.manual_seed(5)
        for _ in range(3):
            engine.step(lambda: engine(torch.ones(1, 4)).sum())
    assert drawn == [number for number in expected for _ in range(2)]


def test_casts_of_perturbed_weights_are_not_kept() -> None:
    """Autocast keeps casts of weights; those of the first pass would be used in the second."""
    with make_engine(small_model(), mezo("host")) as engine:
        model = engine.module

        def closure() -> torch.Tensor:
            return nn.functional.linear(torch.ones(1, 32), model[1].weight).float().sum()

        with torch.autocast("cpu", torch.bfloat16):
            engine.step(closure)
        assert engine.projected_gradient != 0


def test_a_graph_kept_across_a_step_is_void() -> None:
    with make_engine(small_model(), mezo("host")) as engine:
        x = torch.randn(1, 32, requires_grad=True)
        kept = engine.module[1](x).sum()
        train(engine, steps=1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(kept, x)


def test_the_optimizers_own_step(tmp_path: Path) -> None:
    expected, state, _ = run(mezo("host"))
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        for index in range(STEPS):
            loss = engine.optimizer.step(lambda index=index: small_loss(engine, index).item())
            assert loss == expected[index][0]
        assert_same_state(dict(engine.named_state()), state)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("failing_pass", [0, 1])
def test_a_closure_that_raises_changes_nothing(failing_pass: int, tmp_path: Path) -> None:
    records, state, _ = run(mezo("host"))
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        found = train(engine, steps=2)
        for depth in ("before", "inside", "after"):
            calls = []

            def closure(depth: str = depth, calls: list[int] = calls) -> torch.Tensor:
                calls.append(0)
                torch.rand(3)
                if len(calls) <= failing_pass:
                    return small_loss(engine, engine.micro_steps)
                if depth == "inside":
                    return engine(torch.full((1, 1), 64))  # no such token
                if depth == "after":
                    small_loss(engine, engine.micro_steps)
                raise KeyboardInterrupt

            state_before = torch.get_rng_state()
            with pytest.raises((KeyboardInterrupt, IndexError)):
                engine.step(closure)
            assert torch.equal(torch.get_rng_state(), state_before)
            assert (engine.global_steps, engine.skipped_steps) == (2 + len(found) - 2, 0)
            with torch.no_grad():
                assert math.isfinite(small_loss(engine, 0).item())
            weight = engine.module[1].weight.detach().clone()
            assert torch.equal(weight, reference(engine.global_steps)["1.weight"])
            found += train(engine, steps=1)
        found += train(engine, steps=STEPS - len(found))
        assert found == records
        assert_same_state(dict(engine.named_state()), state)


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_an_interrupt_in_the_middle_of_an_update(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when some elements of a home have been updated: none is updated twice."""
    records, state, _ = run(mezo("host"), make=Zoo)
    update_weights, calls = zeroth_order.update_weights, []

    def interrupted(*arguments: Any, **options: Any) -> bool:
        finite = update_weights(*arguments, **options)
        calls.append(0)
        if len(calls) % 10 == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return finite

    monkeypatch.setattr(zeroth_order, "update_weights", interrupted)
    interrupts = 0
    buffers: dict[str, torch.Tensor] = {}
    with make_engine(Zoo(), mezo(tier, tmp_path)) as engine:
        found: list[tuple[float, float]] = []
        while len(found) < STEPS:
            random_state = torch.get_rng_state()
            try:
                found += train(engine, steps=1)
            except KeyboardInterrupt:
                interrupts += 1
                assert torch.equal(torch.get_rng_state(), random_state)
                engine.module.load_state_dict(buffers, strict=False)
            else:
                buffers = {name: b.clone() for name, b in engine.module.named_buffers()}
        assert found == records
        while True:
            try:
                assert_same_state(dict(engine.named_state()), state)
                break
            except KeyboardInterrupt:
                interrupts += 1
        held = engine.report().tiers["host"].used_bytes
        assert held == engine.plan.bytes["host"]["weights"], "staging has been given back"
    assert interrupts > 3


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_step_whose_loss_is_not_finite_is_skipped(number: float, tmp_path: Path) -> None:
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        train(engine, steps=2)
        losses = iter([1.0, number])
        reduced: list[float] = []
        taken = engine.step(lambda: next(losses), reduce=lambda g: reduced.append(g) or g)
        assert not taken
        assert len(reduced) == 1  # the other workers wait for this one
        assert (engine.global_steps, engine.skipped_steps) == (2, 1)
        for name, weight in reference(2).items():
            assert torch.equal(engine.read_state(name, "weight"), weight), name
        train(engine, steps=1)


def test_a_weight_that_becomes_infinite_is_an_error(tmp_path: Path) -> None:
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        train(engine, steps=1)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e38
        losses = iter([1e3, -1e3])
        taken = engine.step(lambda: next(losses))
        assert taken
        with pytest.raises(NonFiniteError, match="step 2 made a weight"):
            engine.state_dict()
        assert not torch.isfinite(engine.state_dict()["1.weight"]).all()


@pytest.mark.parametrize("device", [1 << 20, 24 << 10])
def test_an_edit_inside_the_closure_is_refused(device: int, tmp_path: Path) -> None:
    """With a tight device the edited page is evicted in the pass: it must not go home."""

    with make_engine(small_model(), mezo("nvme", tmp_path, device=device)) as engine:
        train(engine, steps=1)

        def edit(how: Callable[[torch.Tensor], Any]) -> torch.Tensor:
            how(engine.module[1].weight)
            return small_loss(engine, 0)

        def through_numpy(weight: torch.Tensor) -> None:
            weight.detach().numpy()[:] = 0

        for how in (torch.Tensor.zero_, through_numpy):
            with pytest.raises(GuardError, match=r"1\.weight.*edited inside the closure"):
                engine.step(lambda how=how: edit(how))
        for name, weight in reference(1).items():
            assert torch.equal(engine.read_state(name, "weight"), weight), name
        train(engine, steps=1)
        assert torch.equal(engine.read_state("1.weight", "weight"), reference(2)["1.weight"])


def test_reading_state_inside_the_closure_gives_true_weights(tmp_path: Path) -> None:
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        train(engine, steps=1)
        seen = []

        def closure() -> torch.Tensor:
            loss = small_loss(engine, engine.micro_steps)
            seen.append(engine.read_state("1.weight", "weight"))
            return loss

        engine.step(closure)
        assert all(torch.equal(weight, reference(1)["1.weight"]) for weight in seen)
        assert torch.equal(engine.read_state("1.weight", "weight"), reference(2)["1.weight"])


def test_gradients_are_refused() -> None:
    with make_engine(small_model(), mezo("host")) as engine:
        loss = small_loss(engine, 0)
        for use in (
            lambda: engine.backward(loss),
            lambda: loss.backward(),
            lambda: engine.set_state("1.bias", {"gradient": torch.zeros(32)}),
            engine.step,
            engine.optimizer.step,
        ):
            with pytest.raises(EngineStateError, match=r"engine\.step\(closure\)"):
                use()
        with pytest.raises(EngineStateError, match="gathered"), engine.gathered():
            train(engine, steps=1)
        for returned in (None, torch.ones(2), "loss"):
            with pytest.raises(OffloadError, match="a tensor with one element"):
                engine.step(lambda returned=returned: returned)
        train(engine, steps=1)


def test_a_closure_without_mezo_is_refused() -> None:
    with make_engine(small_model(), settings("host")) as engine:
        for step in (engine.step, engine.optimizer.step):
            with pytest.raises(EngineStateError, match="mezo"):
                step(lambda: small_loss(engine, 0), reduce=lambda projected: projected)
        with pytest.raises(EngineStateError, match="mezo"):
            engine.step(lambda: small_loss(engine, 0))
        loss = engine.optimizer.step(lambda: _with_backward(engine))
        assert loss.item() > 0


def _with_backward(engine: Any) -> torch.Tensor:
    loss = small_loss(engine, 0)
    engine.backward(loss)
    return loss


def test_contradictions_are_found_before_anything_moves() -> None:
    config = settings("device", optimizer=MEZO)
    config["training"] = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    with pytest.raises(ConfigError) as caught:
        offload.initialize(small_model(), config)
    assert len(caught.value.problems) == 5


# --- faults of the disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
def test_training_goes_on_after_an_error_anywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or several operations fail, each time others; an update is never lost nor repeated."""
    config = mezo("nvme", tmp_path, device=24 << 10, host=1 << 20)
    records, state, _ = run(config, make=with_unused, steps=4)
    engine: Any = None

    def start(fault: str | None) -> Any:
        io = lambda _: CountingIo(backend="threads", threads=2, fault=fault)  # noqa: E731
        monkeypatch.setattr(build, "open_io", io)
        return make_engine(with_unused(), config)

    engine = start(None)
    first = engine._parts.io.counts[kind]
    train(engine, steps=4)
    list(engine.named_state())
    last = engine._parts.io.counts[kind]
    engine.close()
    code = "EIO" if kind == "read" else "ENOSPC"
    failures = 0
    for nth in range(first + 1, last + 1, 3):
        engine = start(
            f"op={kind},nth={nth},count={1 + nth % 3},errno={5 if code == 'EIO' else 28}"
        )
        found: list[tuple[float, float]] = []
        while len(found) < 4:
            try:
                found += train(engine, steps=1)
            except StorageError:
                failures += 1
            if len(found) == 2 and nth % 2:
                try:
                    with torch.no_grad():
                        small_loss(engine, 99)
                except StorageError:
                    failures += 1
        assert found == records, nth
        while True:
            try:
                found_state = dict(engine.named_state())
                break
            except StorageError:
                failures += 1
        assert_same_state(found_state, state)
        engine.close()
    assert failures > 5


# --- a device that the CPU does not reach ---------------------------------------------------------


@pytest.mark.parametrize("tier", ["host", "nvme"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_accelerator_gives_the_same_bits(
    compute: str, tier: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("accelerator")
    plain = in_memory(Zoo, compute)
    config = mezo(tier, tmp_path, precision={"compute": compute})
    with make_engine(Zoo(), config) as engine:
        records = train(engine)
        report, plan = engine.report(), engine.plan
        faulted = engine.module.wide.weight.detach().clone()  # with the update that is pending
        state = dict(engine.named_state())
    assert torch.equal(faulted, state["wide.weight"]["weight"])
    assert records == list(zip(plain.losses, plain.projected, strict=True))
    for name, weight in plain.state().items():
        assert torch.equal(state[name]["weight"], weight), name
    assert report.lanes["h2d"].bytes > 0
    assert report.tiers["host"].peak_bytes <= plan.peak_bytes["host"]


@pytest.mark.usefixtures("accelerator")
def test_a_buffer_that_the_store_has_taken_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update goes home from the buffer from which the device copy is made."""
    start_store = BlockStore.start_store

    def hostile(store: BlockStore, block: Block, chunk: int, staged: Staged) -> None:
        start_store(store, block, chunk, staged)
        store.drain()
        staged.tensor.fill_(255)

    plain = plain_mezo(small_model())
    monkeypatch.setattr(BlockStore, "start_store", hostile)
    with make_engine(small_model(), mezo("nvme", tmp_path)) as engine:
        for index in range(3):
            plain.step(lambda index=index: small_loss(plain.module, index))
            train(engine, steps=1)
            for name, weight in plain.state().items():
                found = engine.module.get_parameter(name).detach().clone()
                assert torch.equal(found, weight), name


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    plan = offload.plan(model, mezo("host"))
    assert plan.fits
    assert plan.bytes["host"]["weights"] == plan.peak_bytes["host"]
    assert sum(sum(classes.values()) for classes in plan.bytes.values()) < 4.1e6
    assert isinstance(OffloadConfig(**mezo("host")).optimizer.perturbation, float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "gradients" in str(plan)
