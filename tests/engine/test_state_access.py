"""Gradients, hooks, copies and compilation: what the user sees is what plain PyTorch shows.

`tests/faults` has conversions, deep copies, state dicts, files and averaged copies; the round trips
of `named_state` and `state_dict` are in test_semantics.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine.gradients import GradientHome
from offload.errors import EngineStateError, GuardError, OffloadError, StorageError
from tests.faults.lab import Run, make_engine, run_everywhere
from tests.faults.modules import WIDTH, Blocks, inputs, loss_of

PLACES = ("device", "host", "nvme")


def _micro(run: Run, number: int) -> None:
    """One backward, plain or not, without a step."""
    run.backward(loss_of(run(inputs(number))))


def _forget(run: Run) -> None:
    run.module.zero_grad()


# -- what p.grad says -----------------------------------------------------------------------------


@pytest.mark.parametrize("home", PLACES)
@pytest.mark.parametrize(
    "act",
    [
        lambda ps: nn.utils.clip_grad_norm_(ps, 1.0),
        lambda ps: nn.utils.clip_grad_norm_(ps, 1.0, foreach=False),
        lambda ps: nn.utils.clip_grad_value_(ps, 1.0),
        lambda ps: nn.utils.get_total_norm([p.grad for p in ps]),
        lambda ps: [p.grad.norm() for p in ps],
        lambda ps: [p.grad.mul_(2) for p in ps],
        lambda ps: [p.grad.numpy() for p in ps],
        lambda ps: [torch.isfinite(p.grad).all() for p in ps],
        lambda ps: torch.save(ps[0].grad, io.BytesIO()),
        lambda ps: torch.optim.SGD(ps, lr=0.1).step(),
    ],
)
def test_values_of_a_gradient_that_has_gone_home_are_refused_with_the_remedy(
    act: Callable[[list[nn.Parameter]], Any], home: str, tmp_path: Path
) -> None:
    engine = make_engine(Blocks(), home, tmp_path)
    parameters = list(engine.module.parameters())
    for backward in (engine.backward, torch.Tensor.backward):
        backward(loss_of(engine(inputs())))
        before = dict(engine.named_state())
        with pytest.raises(GuardError, match=r"(?s)of parameter .*training\.max_grad_norm"):
            act(parameters)
        for name, state in engine.named_state():
            assert torch.equal(state["gradient"], before[name]["gradient"])
            assert torch.equal(state["weight"], before[name]["weight"])
    taken = engine.step()
    assert taken
    assert all(p.grad is None for p in parameters)
    engine.close()


@pytest.mark.parametrize("home", PLACES)
def test_a_departed_gradient_has_a_shape_and_a_text(home: str, tmp_path: Path) -> None:
    engine = make_engine(Blocks(), home, tmp_path)
    weight = engine.module.blocks[0].up.weight
    assert weight.grad is None
    engine.backward(loss_of(engine(inputs())))
    gradient = weight.grad
    assert gradient is not None
    assert (gradient.shape, gradient.dtype) == (weight.shape, weight.dtype)
    assert (gradient.device, gradient.numel()) == (weight.device, WIDTH * WIDTH)
    assert gradient.requires_grad is False
    assert repr(gradient) == "<gradient of blocks.0.up.weight, at home: see engine.named_state()>"
    engine.close()
    assert weight.grad is None


def test_a_parameter_without_a_gradient_has_none(tmp_path: Path) -> None:
    engine = make_engine(Blocks(), "host", tmp_path)
    first, *others = engine.module.blocks
    engine.backward(loss_of(first(inputs())))
    assert all(p.grad is not None for p in first.parameters())
    assert all(p.grad is None for block in others for p in block.parameters())
    engine.close()


def _assignments(run: Run) -> None:
    weight, other = run.module.blocks[0].up.weight, run.module.blocks[1].up.weight
    _micro(run, 0)
    run.record("one", run.gradients())
    _micro(run, 1)
    run.record("two", run.gradients())
    weight.grad = torch.full((WIDTH, WIDTH), 0.25)
    other.grad = None
    run.record("assigned", run.gradients())
    weight.grad = torch.full((WIDTH, WIDTH), 0.5)
    _micro(run, 2)
    run.record("added to what was assigned", run.gradients())
    _forget(run)
    run.record("forgotten", len(run.gradients()))
    _micro(run, 3)
    _micro(run, 4)
    weight.grad = None
    run.step()
    _micro(run, 5)
    other.grad = torch.ones(WIDTH, WIDTH)
    run.step()


def test_what_is_put_into_grad_counts_as_in_plain_pytorch(tmp_path: Path) -> None:
    run_everywhere(_assignments, tmp_path, Blocks)


def _double(run: Run) -> None:
    _micro(run, 0)
    run.backward(loss_of(run(inputs(1))), create_graph=True)
    run.record("gradients", run.gradients())
    run.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_of_the_backward_is_no_part_of_the_gradient(tmp_path: Path) -> None:
    run_everywhere(_double, tmp_path, Blocks)


def test_a_gradient_lost_on_its_way_home_stops_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(Blocks(), "nvme", tmp_path)
    real = GradientHome.arrive
    left = [3]

    def arrive(self: GradientHome, state: Any, gradient: torch.Tensor) -> None:
        left[0] -= 1
        if not left[0]:
            raise StorageError(operation="write", path=str(tmp_path))
        real(self, state, gradient)

    monkeypatch.setattr(GradientHome, "arrive", arrive)
    with pytest.raises(StorageError):
        loss_of(engine(inputs())).backward()
    with pytest.raises(EngineStateError, match="was lost on its way home"):
        engine.optimizer.step()
    engine.optimizer.zero_grad()
    loss_of(engine(inputs())).backward()
    engine.optimizer.step()
    assert engine.global_steps == 1
    engine.close()


# -- hooks ----------------------------------------------------------------------------------------


def _watch(module: nn.Module, seen: list[torch.Tensor], number: int) -> None:
    """Hooks of every kind, some of which change the gradient; `number` tells them apart."""
    first, second, third, fourth = module.blocks

    def note(values: torch.Tensor) -> None:
        seen.append(torch.cat([torch.tensor([float(number)]), values.detach().flatten()]))

    def after(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        note(parameter.grad)
        parameter.grad.mul_(0.5)

    def takes(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        note(parameter.grad)
        parameter.grad = None

    first.up.weight.register_hook(lambda gradient: note(gradient) or gradient * 2)
    first.up.weight.register_post_accumulate_grad_hook(after)
    second.down.bias.register_post_accumulate_grad_hook(after)
    second.up.bias.register_hook(lambda gradient: gradient.clamp(-0.001, 0.001))
    third.register_full_backward_hook(lambda m, gi, go: note(go[0]) or (gi[0] * 1.5,))
    third.register_full_backward_pre_hook(lambda m, go: note(go[0]))
    if number == 1:
        fourth.up.weight.register_post_accumulate_grad_hook(takes)
    fourth.register_forward_hook(lambda m, args, out: out * 0.5)


def _before_and_after(run: Run) -> None:
    seen: list[torch.Tensor] = run.module.seen
    _watch(run.module, seen, 2)
    for step in range(3):
        for part in range(2):
            _micro(run, 2 * step + part)
        run.record("seen", seen)
        seen.clear()
        run.step()
        if step == 0:
            _watch(run.module, seen, 3)


class BlocksWithHooks(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        _watch(self, self.seen, 1)


def test_gradient_hooks_see_and_do_what_they_do_in_plain_pytorch(tmp_path: Path) -> None:
    """Registered before `initialize`, after it and in mid-run; two backwards a step."""
    run_everywhere(_before_and_after, tmp_path, BlocksWithHooks)


# -- reading and writing --------------------------------------------------------------------------


def _moving_average(run: Run) -> None:
    average = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
        for name, parameter in run.module.named_parameters():
            with torch.no_grad(), _present(run, name):
                average[name].lerp_(parameter, 0.25)
        run.record("average", average)
    with torch.no_grad():
        for name, parameter in run.module.named_parameters():
            with _present(run, name, writable=True):
                parameter.copy_(average[name])
    run.train(loss_of(run(inputs(9))))


def _present(run: Run, name: str, **options: bool) -> Any:
    if run.engine is None:
        return torch.no_grad()
    return run.engine.gathered([name], **options)


def test_a_moving_average_of_gathered_weights(tmp_path: Path) -> None:
    run_everywhere(_moving_average, tmp_path, Blocks)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("home", PLACES)
def test_full_gradients_are_read_and_written(home: str, compute: str, tmp_path: Path) -> None:
    """What is written is what the step applies: the update of SGD is exactly lr times it."""
    engine = make_engine(
        Blocks(),
        home,
        tmp_path,
        precision={"compute": compute, "initial_loss_scale": 1024.0}
        if compute == "fp16"
        else {"compute": compute},
    )
    x = inputs().to(engine.module.blocks[0].up.weight.dtype)
    engine.backward(loss_of(engine(x)).float())
    before = dict(engine.named_state())
    for name, state in before.items():
        gradient = state["gradient"].float()
        assert gradient.any(), name
        engine.set_state(name, {"gradient": (gradient * 0 + 0.5)})
    assert all((state["gradient"] == 0.5).all() for _, state in engine.named_state())
    taken = engine.step()
    assert taken
    for name, state in engine.named_state():
        assert torch.equal(state["master"], before[name]["master"] - 0.5 * 2.0**-4), name
    engine.close()


@pytest.mark.parametrize("home", PLACES)
def test_printing_shows_what_pytorch_shows(home: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Blocks()
    torch.manual_seed(0)
    engine = make_engine(Blocks(), home, tmp_path)
    faults = engine._parts.pager.faults
    assert repr(engine.module) == repr(plain)
    assert engine._parts.pager.faults == faults, "the structure alone needs no weight"
    for (name, expected), found in zip(
        plain.named_parameters(), engine.module.parameters(), strict=True
    ):
        assert repr(found) == repr(expected), name
        assert f"{found.shape} {found.dtype}" == f"{expected.shape} {expected.dtype}"
    engine.close()


@pytest.mark.parametrize("home", PLACES)
def test_a_conversion_between_backward_and_step_is_an_error(home: str, tmp_path: Path) -> None:
    """At once, or, where weights are at home on the device, by the step; nothing is trained."""
    engine = make_engine(Blocks(), home, tmp_path)
    engine.backward(loss_of(engine(inputs())))
    with pytest.raises(OffloadError, match=r"blocks\.0\.up\.weight"):
        engine.module.half()
        engine.step()
    assert engine.global_steps == 0
    engine.close()


# -- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from other tests, and none left for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("backend", "whole", "runs"),
    [
        ("eager", True, ("plain", "host")),
        *(
            pytest.param(backend, whole, ("plain", *PLACES), marks=pytest.mark.slow)
            for backend in ("eager", "aot_eager")
            for whole in (False, True)
        ),
    ],
)
def test_compiling_after_initialize_runs(
    backend: str, whole: bool, runs: tuple[str, ...], tmp_path: Path
) -> None:
    """Its graphs are cut where weights are touched; the numbers are those of plain PyTorch."""

    def body(run: Run) -> None:
        torch._dynamo.reset()
        if run.engine is None:
            call: Any = run.module
        elif whole:
            call = torch.compile(run.module, backend=backend)
        else:
            run.module.blocks[2].compile(backend=backend)
            call = run
        for step in range(3):
            run.train(loss_of(call(inputs(step))))
        with torch.no_grad():
            run.record("evaluated", call(inputs(9)))

    run_everywhere(body, tmp_path, lambda: Blocks(3), pages=8, runs=runs)
