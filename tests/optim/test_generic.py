from __future__ import annotations

import pickle

import pytest
import torch

from offload.errors import OffloadError
from offload.optim.generic import GenericRule, GenericUpdate

SHAPES = [(7, 5), (4,), (5, 3), (2, 3, 4), ()]
CASES = {
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {"t0": 3}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "adamw amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "sgd maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "sgd plain": (torch.optim.SGD, {"maximize": True}),
    "adagrad": (torch.optim.Adagrad, {"maximize": True, "initial_accumulator_value": 0.2}),
    "muon": (torch.optim.Muon, {}),
}


def groups_of(parameters: list, settings: dict) -> list[dict]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}]


class Run:
    """The same steps of one optimizer on the whole model, and of its rule, two buckets a step."""

    def __init__(self, optimizer_class, settings: dict, shapes: list) -> None:
        torch.manual_seed(6)
        self.expected = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.optimizer = optimizer_class(groups_of(self.expected, settings), **settings)
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in self.expected]
        meta = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        self.prototype = optimizer_class(groups_of(meta, settings), **settings)
        self.rule = GenericRule(self.prototype)
        self.updates = []
        for i, parameter in enumerate(parameters):
            group = self.prototype.param_groups[0 if i < 2 else 1]
            layout = self.rule.state_layout(parameter.shape, group)
            memory = {t.key: torch.full(t.shape, torch.nan, dtype=t.dtype) for t in layout.tensors}
            self.updates.append(GenericUpdate(parameter, group, memory))
        self.memory = [dict(update.tensors) for update in self.updates]

    def steps(self, steps: range) -> None:
        for step in steps:
            for i, (expected, update) in enumerate(zip(self.expected, self.updates, strict=True)):
                absent = (step + i) % 4 == 0
                expected.grad = None if absent else torch.randn(expected.shape)
                update.parameter.grad = None if absent else expected.grad.clone()
            self.optimizer.step()
            self.rule.step_bucket(self.updates[:3])
            self.rule.step_bucket(self.updates[3:])

    def check(self) -> None:
        for expected, update, memory in zip(self.expected, self.updates, self.memory, strict=True):
            assert torch.equal(update.parameter, expected)
            state = self.optimizer.state[expected]
            assert {**update.tensors, **update.scalars}.keys() == state.keys()
            for key, tensor in update.tensors.items():
                assert tensor is memory[key]
                assert torch.equal(tensor, state[key])
            for key, value in update.scalars.items():
                assert value == state[key]


def run_of(case: str) -> Run:
    optimizer_class, settings = CASES[case]
    shapes = [(7, 5), (4, 4), (5, 3), (3, 9)] if case == "muon" else SHAPES
    return Run(optimizer_class, settings, shapes)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_optimizer_on_the_whole_model(case: str) -> None:
    run = run_of(case)
    run.steps(range(20))
    run.check()
    assert not any(
        p.grad is not None for group in run.prototype.param_groups for p in group["params"]
    )


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    run = run_of(case)
    run.steps(range(5))
    for i, update in enumerate(run.updates):
        kept = pickle.loads(pickle.dumps((update.tensors, update.scalars, update.started)))
        run.updates[i] = GenericUpdate(update.parameter, update.group, *kept)
    run.memory = [dict(update.tensors) for update in run.updates]
    run.rule = GenericRule(run.prototype)
    run.steps(range(5, 10))
    run.check()


def test_a_parameter_without_gradient_is_untouched() -> None:
    run = run_of("nadam")
    run.steps(range(3))
    update = run.updates[0]
    update.parameter.grad = None
    before = pickle.dumps((update.parameter, update.tensors, update.scalars))
    run.updates[1].parameter.grad = torch.ones(4)
    run.rule.step_bucket(run.updates[:2])
    assert pickle.dumps((update.parameter, update.tensors, update.scalars)) == before


def test_settings_follow_the_group() -> None:
    run = run_of("adamax")
    run.steps(range(2))
    for optimizer in (run.optimizer, run.prototype):
        optimizer.param_groups[1]["lr"] = 0.5
    run.steps(range(2, 4))
    run.check()


def test_a_scheduler_and_hooks_on_the_prototype_do_not_matter() -> None:
    run = run_of("adamax")
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for optimizer in (run.optimizer, run.prototype)
    ]
    calls = []
    run.prototype.register_step_pre_hook(lambda *_: calls.append(1))
    for step in range(3):
        run.steps(range(step, step + 1))
        run.prototype.step()  # without gradients: for the scheduler's bookkeeping
        for scheduler in schedulers:
            scheduler.step()
    run.check()
    assert len(calls) == 3


def prototype_of(optimizer_class, **settings) -> torch.optim.Optimizer:
    return optimizer_class([torch.nn.Parameter(torch.empty(3, device="meta"))], **settings)


def test_an_optimizer_that_needs_a_closure() -> None:
    with pytest.raises(OffloadError, match="LBFGS"):
        GenericRule(prototype_of(torch.optim.LBFGS))


class Stubborn(torch.optim.SGD):
    def step(self, closure):
        raise NotImplementedError


def test_an_optimizer_whose_closure_is_required() -> None:
    with pytest.raises(OffloadError, match="Stubborn"):
        GenericRule(prototype_of(Stubborn))


class Counting(torch.optim.SGD):
    count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        super().step()


class Drifting(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.9


class Late(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "old" in state:
                    state["older"] = torch.zeros_like(p)
                state["old"] = torch.zeros_like(p)


class Listing(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [torch.zeros_like(p)]


@pytest.mark.parametrize(
    ("optimizer_class", "message"),
    [
        (torch.optim.SparseAdam, "dense gradients"),
        (Counting, "changes its own count"),
        (Drifting, "changes its own lr"),
        (Late, "adds to its state"),
        (Listing, "keeps a list as 'history'"),
    ],
)
def test_what_cannot_be_stepped_by_parts_is_refused(optimizer_class, message: str) -> None:
    prototype = prototype_of(optimizer_class)
    rule = GenericRule(prototype)
    with pytest.raises(OffloadError, match=message):
        rule.state_layout((3,), prototype.param_groups[0])


def test_layout_counts_bytes() -> None:
    prototype = prototype_of(torch.optim.Adafactor)
    layout = GenericRule(prototype).state_layout((8, 4), prototype.param_groups[0])
    assert [(t.key, t.shape, t.nbytes) for t in layout.tensors] == [
        ("col_var", (1, 4), 16),
        ("row_var", (8, 1), 32),
    ]
    assert layout.scalars == ("step",)
