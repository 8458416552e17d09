"""The rules as torch ops give the bits of the kernels: on the CPU, whose ops are IEEE, too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.optim.device_rules import DeviceRule, Rows, device_rule, merge, rows_bytes, split
from offload.optim.generic import GenericRule
from offload.optim.rules import UpdateRule, make_rule
from offload.optim.split import FIRST_UNHOLDABLE

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", False), ("fp16", True)]
GROUPS = {
    "adamw": ("adamw", {"lr": 3e-3, "weight_decay": 0.1}),
    "adam": ("adam", {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.8, 0.95)}),
    "sgd": ("sgd", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adagrad": ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "lion": ("lion", {"lr": 1e-3, "weight_decay": 0.1}),
}
EDGES = np.array(
    [0x0, 0x1, 0x7F_FFFF, 0x80_0000, 0x33D6_BF95, 0x3F80_0000, 0x3F80_8000, 0x3F7F_8000,
     0x477F_EFFF, 0x477F_F000, 0x3880_0000, 0x3300_0000, 0x7F7F_7FFF, 0x7F7F_8000, 0x7F7F_FFFF,
     0x5F80_0000, 0x1F80_0000],
    np.uint32,
)  # fmt: skip
EDGES = np.concatenate([EDGES, EDGES | np.uint32(0x8000_0000)])
NOT_FINITE = np.array([0x7F80_0000, 0xFF80_0000, 0x7FC0_0000], np.uint32)

State = dict[str, torch.Tensor]


def random_patterns(drawn: np.random.Generator, numel: int, *, finite: bool) -> torch.Tensor:
    """fp32 of every exponent: edges, uniform bit patterns, and numbers as training has them."""
    patterns = drawn.integers(0, 1 << 32, numel, dtype=np.uint32)
    usual = drawn.standard_normal(numel).astype(np.float32).view(np.uint32)
    patterns = np.where(drawn.random(numel) < 0.6, usual, patterns)
    at_edge = drawn.random(numel) < 0.2
    edges = EDGES if finite else np.concatenate([EDGES, NOT_FINITE])
    patterns = np.where(at_edge, drawn.choice(edges, numel), patterns)
    values = patterns.view(np.float32)
    if finite:
        values = np.where(np.isfinite(values), values, np.float32(1.5))
    return torch.from_numpy(values.copy())


def make_state(
    rule: UpdateRule, precision: str, gradient_fp32: bool, numel: int, seed: int, *, finite: bool
) -> State:
    drawn = np.random.default_rng(seed)
    value = random_patterns(drawn, numel, finite=finite)
    gradient = random_patterns(drawn, numel, finite=finite)
    tensors: State = {}
    if precision == "bf16":
        bits = value.view(torch.int32)
        tensors["weight"] = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        tensors["remainder"] = bits.to(torch.int16)
    elif precision == "fp16":
        tensors["weight"], tensors["master"] = value.to(torch.float16), value
    else:
        tensors["weight"] = value
    tensors["gradient"] = gradient if gradient_fp32 else gradient.to(PRECISIONS[precision])
    for name in rule.state_fields:
        tensors[name] = random_patterns(drawn, numel, finite=finite)
    if "exp_avg_sq" in tensors:
        tensors["exp_avg_sq"].abs_()
    if "sum" in tensors:
        tensors["sum"].abs_()
    return tensors


def by_kernel(
    rule: UpdateRule, precision: str, tensors: State, hyper: Mapping[str, object], step: int
) -> tuple[State, bool]:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    arrays = {
        name: (t.view(torch.uint16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()
        for name, t in tensors.items()
    }
    finite = rule.update(
        precision=precision,  # type: ignore[arg-type]
        weight=arrays["weight"],
        master=arrays.get("remainder", arrays.get("master")),
        gradient=arrays["gradient"],
        state={name: arrays[name] for name in rule.state_fields},
        hyper=hyper,
        step=step,
        gradient_scale=0.37,
    )
    return tensors, finite


def by_ops(
    rule: DeviceRule,
    precision: str,
    tensors: State,
    hyper: Mapping[str, object],
    step: int,
    device: str = "cpu",
) -> tuple[State, bool]:
    tensors = {name: tensor.clone().to(device) for name, tensor in tensors.items()}
    numel = tensors["weight"].numel()
    largest = torch.zeros((), dtype=torch.int32, device=device)
    # The rows hold NaNs at first: none may be read before it is written.
    memory = torch.full((rows_bytes(numel),), 0xFF, dtype=torch.uint8, device=device)
    scalars = rule.scalars(hyper, step, 0.37)
    rule.update(precision, tensors, scalars, Rows.over(memory, numel), largest)  # type: ignore[arg-type]
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    return tensors, int(largest) < FIRST_UNHOLDABLE[precision]  # type: ignore[index]


def canonical_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, with every NaN the same one; see [Note: one rounding an op]."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def assert_same(one: State, other: State, *, but: frozenset[str] = frozenset()) -> None:
    for name in one.keys() - but:
        assert torch.equal(canonical_bits(one[name]), canonical_bits(other[name])), name


@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
@pytest.mark.parametrize("case", GROUPS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), step=st.sampled_from([1, 2, 3, 1000, 10**6]))
def test_ops_have_the_bits_of_the_kernel(
    case: str, precision: str, gradient_fp32: bool, seed: int, step: int
) -> None:
    name, hyper = GROUPS[case]
    rule = make_rule(name, [hyper])
    ops = device_rule(rule)
    assert ops is not None
    tensors = make_state(rule, precision, gradient_fp32, 4099, seed, finite=True)
    expected, finite = by_kernel(rule, precision, tensors, hyper, step)
    found, found_finite = by_ops(ops, precision, tensors, hyper, step)
    assert_same(found, expected)
    assert found_finite == finite


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
@pytest.mark.parametrize("case", GROUPS)
def test_a_gpu_has_the_bits_of_the_kernel(case: str, precision: str, gradient_fp32: bool) -> None:
    name, hyper = GROUPS[case]
    rule = make_rule(name, [hyper])
    ops = device_rule(rule)
    assert ops is not None
    for seed, step in enumerate((1, 2, 3, 1000, 10**6)):
        tensors = make_state(rule, precision, gradient_fp32, 1 << 20, seed, finite=True)
        expected, finite = by_kernel(rule, precision, tensors, hyper, step)
        found, found_finite = by_ops(ops, precision, tensors, hyper, step, "cuda")
        assert_same(found, expected)
        assert found_finite == finite


@pytest.mark.parametrize(("precision", "gradient_fp32"), FORMATS)
@pytest.mark.parametrize("case", GROUPS)
def test_what_is_not_finite_is_so_in_both(case: str, precision: str, gradient_fp32: bool) -> None:
    name, hyper = GROUPS[case]
    rule = make_rule(name, [hyper])
    ops = device_rule(rule)
    assert ops is not None
    for seed in range(5):
        tensors = make_state(rule, precision, gradient_fp32, 4099, seed, finite=False)
        expected, finite = by_kernel(rule, precision, tensors, hyper, 3)
        found, found_finite = by_ops(ops, precision, tensors, hyper, 3)
        assert not finite
        assert not found_finite
        # The halves of a NaN may differ in what it carries; of all else they may not.
        split_nan = frozenset({"weight", "remainder"} if precision == "bf16" else ())
        assert_same(found, expected, but=split_nan)
        if precision == "bf16":
            assert_same({"value": merged(found)}, {"value": merged(expected)})


def merged(tensors: State) -> torch.Tensor:
    value = torch.empty(tensors["weight"].numel())
    merge(tensors["weight"], tensors["remainder"], value)
    return value


def test_every_step_count_of_a_long_run_has_the_kernels_scalars() -> None:
    rule = make_rule("adamw")
    ops = device_rule(rule)
    assert ops is not None
    tensors = make_state(rule, "bf16", True, 257, 5, finite=True)
    found = expected = tensors
    for step in range(1, 200):
        expected, _ = by_kernel(rule, "bf16", expected, {"lr": 1e-2}, step)
        found, _ = by_ops(ops, "bf16", found, {"lr": 1e-2}, step)
        assert_same(found, expected)


def test_a_split_value_merges_to_itself() -> None:
    highs = torch.arange(0, 1 << 16, dtype=torch.int32)
    for low in (0x0, 0x1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        value = ((highs << 16) | low).view(torch.float32)
        numel = value.numel()
        rows = Rows.over(torch.zeros(rows_bytes(numel), dtype=torch.uint8), numel)
        weight, remainder = (
            torch.empty(numel, dtype=torch.bfloat16),
            torch.empty(numel, dtype=torch.int16),
        )
        split(value, weight, remainder, rows)
        half_up = ((value.view(torch.int32).long() & 0xFFFF_FFFF) + 0x8000) >> 16
        assert torch.equal(weight.view(torch.int16), half_up.to(torch.int16))
        back = torch.empty(numel)
        merge(weight, remainder, back)
        assert torch.equal(back.view(torch.int32), value.view(torch.int32))


def test_a_generic_optimizer_has_no_ops() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert device_rule(GenericRule(torch.optim.RMSprop([parameter]))) is None
