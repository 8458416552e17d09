from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.optim.rules import RULES, MomentumSGDRule, UpdateRule, from_torch, make_rule
from offload.optim.split import merge_master, split_master
from tests.optim.bits import array_of, same_bits

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", False), ("fp16", True)]
"""(precision, gradient_fp32)."""

TORCH_CASES = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adam_l2": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.2},
    ),
}
RULE_GROUPS = {
    "adamw": {"weight_decay": 0.1},
    "adam": {"weight_decay": 0.1},
    "sgd": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "adagrad": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
}


def rule_of(name: str) -> UpdateRule:
    return make_rule("sgd" if name == "momentum" else name, [RULE_GROUPS[name]])


def stored(values: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight, master) of fp32 values."""
    if precision == "fp32":
        return values.copy(), None
    if precision == "bf16":
        weight, remainder = np.empty(len(values), np.uint16), np.empty(len(values), np.int16)
        split_master(values, weight, remainder)
        return weight, remainder
    return array_of(torch.from_numpy(values).to(torch.float16)), values.copy()


def true_values(weight: np.ndarray, master: np.ndarray | None) -> np.ndarray:
    if master is None or master.dtype == np.float32:
        return weight if master is None else master
    values = np.empty(len(weight), np.float32)
    merge_master(weight, master, values)
    return values


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
@pytest.mark.parametrize("case", TORCH_CASES)
def test_twenty_steps_equal_torch(case: str, precision: str, gradient_fp32: bool) -> None:
    torch.manual_seed(3)
    parameter = torch.nn.Parameter(torch.randn(10_007))
    optimizer_class, settings = TORCH_CASES[case]
    optimizer = optimizer_class([parameter], **settings, foreach=False)
    rule = from_torch(optimizer)
    assert rule is not None
    weight, master = stored(array_of(parameter).copy(), precision)
    state = {name: np.zeros(10_007, np.float32) for name in rule.state_fields}
    for step in range(1, 21):
        gradient = torch.randn(10_007).to(torch.float32 if gradient_fp32 else PRECISIONS[precision])
        parameter.grad = gradient.to(torch.float32) * 0.5
        optimizer.step()
        updated = rule.update(
            precision=precision,
            weight=weight,
            master=master,
            gradient=array_of(gradient),
            state=state,
            hyper=optimizer.param_groups[0],
            step=step,
            gradient_scale=0.5,
        )
        assert updated
    values = true_values(weight, master)
    assert relative_difference(values, array_of(parameter)) <= 1e-6
    for name in rule.state_fields:
        assert relative_difference(state[name], array_of(optimizer.state[parameter][name])) <= 1e-6
    expected_weight, _ = stored(values, precision)
    assert same_bits(weight, expected_weight)


@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
def test_lion_equals_its_definition(precision: str, gradient_fp32: bool) -> None:
    torch.manual_seed(4)
    value, average = torch.randn(5_003), torch.zeros(5_003)
    weight, master = stored(array_of(value).copy(), precision)
    state = {"exp_avg": np.zeros(5_003, np.float32)}
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    for step in range(1, 21):
        gradient = torch.randn(5_003).to(torch.float32 if gradient_fp32 else PRECISIONS[precision])
        g = gradient.to(torch.float32)
        value.mul_(1 - 1e-2 * 0.1).sub_((average * 0.9 + g * (1 - 0.9)).sign_(), alpha=1e-2)
        average.mul_(0.99).add_(g, alpha=1 - 0.99)
        updated = rule_of("lion").update(
            precision=precision,
            weight=weight,
            master=master,
            gradient=array_of(gradient),
            state=state,
            hyper=group,
            step=step,
        )
        assert updated
    assert relative_difference(true_values(weight, master), array_of(value)) <= 1e-6
    assert relative_difference(state["exp_avg"], array_of(average)) <= 1e-6


def problem(name: str, precision: str, gradient_fp32: bool, numel: int) -> SimpleNamespace:
    """Arrays of wide-ranging values, subnormal ones too, for one update."""
    rng = np.random.default_rng(numel)

    def wide() -> np.ndarray:
        return (rng.standard_normal(numel) * 2.0 ** rng.integers(-30, 10, numel)).astype(np.float32)

    rule = rule_of(name)
    weight, master = stored(wide(), precision)
    gradient = torch.from_numpy(wide()).to(
        torch.float32 if gradient_fp32 else PRECISIONS[precision]
    )
    state = {field: np.abs(wide()) for field in rule.state_fields}
    return SimpleNamespace(
        rule=rule, weight=weight, master=master, gradient=array_of(gradient), state=state
    )


def update_in_pieces(p: SimpleNamespace, precision: str, group: dict, edges: list[int]) -> None:
    for a, b in itertools.pairwise(edges):
        p.rule.update(
            precision=precision,
            weight=p.weight[a:b],
            master=None if p.master is None else p.master[a:b],
            gradient=p.gradient[a:b],
            state={name: array[a:b] for name, array in p.state.items()},
            hyper=group,
            step=7,
            gradient_scale=0.37,
        )


def assert_same_arrays(one: SimpleNamespace, other: SimpleNamespace) -> None:
    assert same_bits(one.weight, other.weight)
    assert one.master is None or same_bits(one.master, other.master)
    for name, array in one.state.items():
        assert same_bits(array, other.state[name]), name


@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
@pytest.mark.parametrize("name", RULE_GROUPS)
def test_vector_body_equals_single_elements(name: str, precision: str, gradient_fp32: bool) -> None:
    numel = 1_171  # more than any unrolled vector body, and a tail
    whole = problem(name, precision, gradient_fp32, numel)
    single = problem(name, precision, gradient_fp32, numel)
    update_in_pieces(whole, precision, RULE_GROUPS[name], [0, numel])
    update_in_pieces(single, precision, RULE_GROUPS[name], list(range(numel + 1)))
    assert_same_arrays(whole, single)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(RULE_GROUPS)),
    st.sampled_from(FORMATS),
    st.integers(1, 3_000),
    st.lists(st.floats(0, 1), max_size=6),
)
def test_bits_do_not_depend_on_the_cut(
    name: str, number_format: tuple[str, bool], numel: int, cuts: list[float]
) -> None:
    precision, gradient_fp32 = number_format
    whole = problem(name, precision, gradient_fp32, numel)
    pieces = problem(name, precision, gradient_fp32, numel)
    update_in_pieces(whole, precision, RULE_GROUPS[name], [0, numel])
    edges = sorted({0, numel, *(int(cut * numel) for cut in cuts)})
    update_in_pieces(pieces, precision, RULE_GROUPS[name], edges)
    assert_same_arrays(whole, pieces)


@pytest.mark.parametrize("position", [0, 63, 64, 100])
@pytest.mark.parametrize(
    ("precision", "value", "finite"),
    [
        ("fp32", 3.4028235e38, True),
        ("fp32", np.inf, False),
        ("bf16", 3.3961e38, True),
        ("bf16", 3.3962e38, False),
        ("bf16", -3.3962e38, False),
        ("fp16", 65519.0, True),
        ("fp16", 65520.0, False),
        ("fp16", -65520.0, False),
    ],
)
def test_a_weight_that_is_not_finite_is_told(
    precision: str, value: float, finite: bool, position: int
) -> None:
    values = np.ones(101, np.float32)
    values[position] = 0
    weight, master = stored(values, precision)
    gradient = np.zeros(101, np.float32)
    gradient[position] = -value
    rule = rule_of("sgd")
    told = rule.update(
        precision=precision,
        weight=weight,
        master=master,
        gradient=gradient,
        state={},
        hyper={"lr": 1.0},
        step=1,
    )
    assert told is finite


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_gradient_is_told(precision: str) -> None:
    for name in ("adamw", "adam", "sgd", "momentum", "adagrad"):
        p = problem(name, precision, True, 50)
        p.gradient[33] = np.nan
        updated = p.rule.update(
            precision=precision,
            weight=p.weight,
            master=p.master,
            gradient=p.gradient,
            state=p.state,
            hyper=RULE_GROUPS[name],
            step=1,
        )
        assert not updated, name


def test_a_group_without_momentum_beside_one_with() -> None:
    rule = make_rule("sgd", [{"momentum": 0.0}, {"momentum": 0.9}])
    assert isinstance(rule, MomentumSGDRule)
    weight = np.ones(20, np.float32)
    buffer = np.zeros(20, np.float32)
    for step in (1, 2):
        rule.update(
            precision="fp32",
            weight=weight,
            master=None,
            gradient=np.full(20, 0.25, np.float32),
            state={"momentum_buffer": buffer},
            hyper={"lr": 1.0, "momentum": 0.0},
            step=step,
        )
    assert weight.tolist() == [0.5] * 20
    assert not buffer.any()


@pytest.mark.parametrize(
    ("optimizer_class", "settings", "name"),
    [
        (torch.optim.AdamW, {"fused": True}, "adamw"),
        (torch.optim.AdamW, {"lr": torch.tensor(1e-3), "betas": (0.9, 0.99)}, "adamw"),
        (torch.optim.Adam, {"foreach": True}, "adam"),
        (torch.optim.SGD, {}, "sgd"),
        (torch.optim.Adagrad, {}, "adagrad"),
        (torch.optim.AdamW, {"amsgrad": True}, None),
        (torch.optim.SGD, {"maximize": True}, None),
        (torch.optim.Adagrad, {"differentiable": True}, None),
        (torch.optim.RMSprop, {}, None),
    ],
)
def test_which_optimizers_have_a_rule(optimizer_class, settings: dict, name: str | None) -> None:
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(3))], **settings)
    rule = from_torch(optimizer)
    assert (rule.name if rule else None) == name


def test_a_subclass_has_no_rule() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert from_torch(Mine([torch.nn.Parameter(torch.ones(3))])) is None


def test_tensor_settings_are_taken_as_numbers() -> None:
    numbers = problem("adamw", "bf16", False, 99)
    tensors = problem("adamw", "bf16", False, 99)
    update_in_pieces(numbers, "bf16", {"lr": 0.5, "betas": (0.5, 0.75)}, [0, 99])
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    update_in_pieces(tensors, "bf16", {"lr": torch.tensor(0.5), "betas": betas}, [0, 99])
    assert_same_arrays(numbers, tensors)


def test_defaults_are_torchs() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for name in ("adamw", "adam", "sgd", "adagrad"):
        optimizer = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "sgd": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
        }[name]([parameter])
        for key, value in RULES[name].hyper_defaults.items():
            assert optimizer.defaults[key] == value, (name, key)


def test_unknown_rule() -> None:
    with pytest.raises(ConfigError, match=r"adamx.*adagrad, adam, adamw, lion, sgd"):
        make_rule("adamx")
