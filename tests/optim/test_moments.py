"""8-bit moments: what one rounding costs, and that it costs nothing the second time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.optim.kernels import MOMENT_BLOCK
from offload.optim.moments import EncodedMoment, decode, encode
from offload.optim.rules import RULES, UpdateRule, eight_bit_rule, make_rule, scale_field
from tests.optim.bits import same_bits
from tests.optim.test_rules import FORMATS, PRECISIONS, array_of, stored, true_values

LARGEST = float(np.finfo(np.float32).max)
ROUNDING = 8 * 2.0**-24  # what the codec's own arithmetic rounds, of the value
# Magnitudes over all of fp32, subnormal ones too, and zeros; a block of one magnitude is the rule.
EXPONENTS = st.integers(-149, 127)


@st.composite
def moments(draw: Any, signed: bool) -> torch.Tensor:
    """Blocks of their own magnitudes, with a spread within each, and zeros among them."""
    numel = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blocks = -(-numel // MOMENT_BLOCK)
    magnitudes = np.repeat([draw(EXPONENTS) for _ in range(blocks)], MOMENT_BLOCK)[:numel]
    spread = draw(st.sampled_from([0, 3, 20]))
    exponents = np.minimum(magnitudes - rng.integers(0, spread + 1, numel), 126)
    values = rng.uniform(0.5, 2, numel) * 2.0**exponents
    values *= rng.uniform(0, 1, numel) >= draw(st.sampled_from([0.0, 0.3, 1.0]))
    if signed:
        values *= rng.choice([-1, 1], numel)
    return torch.from_numpy(values.astype(np.float32))


def scales_of(values: torch.Tensor, encoded: EncodedMoment) -> torch.Tensor:
    """The scale of each element, in fp64."""
    return encoded.scales.double().repeat_interleave(MOMENT_BLOCK)[: values.numel()]


@settings(max_examples=100, deadline=None)
@given(moments(signed=True))
def test_a_signed_moment_is_within_its_bound(values: torch.Tensor) -> None:
    encoded = encode(values, signed=True)
    found, exact = decode(encoded).double(), values.double()
    scale = scales_of(values, encoded)
    cut = exact.clamp(-(2.0**126), 2.0**126)
    reach = torch.maximum(found.abs(), cut.abs()) / scale.clamp_min(1e-300)
    bound = torch.where(scale > 0, scale / 508 * (1 + reach) ** 2, 2.0**-108)
    assert ((found - cut).abs() <= bound + ROUNDING * cut.abs()).all()
    assert (found * exact >= 0).all(), "no sign is turned"
    assert not found[exact == 0].any()


@settings(max_examples=100, deadline=None)
@given(moments(signed=False))
def test_an_unsigned_moment_is_within_its_bound(values: torch.Tensor) -> None:
    encoded = encode(values, signed=False)
    root, exact = decode(encoded).double().sqrt(), values.double().sqrt()
    scale = scales_of(values, encoded)
    raised = (exact > 0) & (exact < scale / 510)
    bound = torch.where(raised, scale / 255, scale / 510)
    assert ((root - exact).abs() <= bound + ROUNDING * exact).all()
    assert (root >= exact * (2 / 3 - 1e-6)).all(), "no step of Adam becomes much larger"
    assert ((root > 0) == (exact > 0)).all(), "and none is divided by a zero that is none"


@settings(max_examples=100, deadline=None)
@given(st.booleans().flatmap(lambda signed: st.tuples(st.just(signed), moments(signed))))
def test_encoding_what_was_decoded_changes_nothing(drawn: tuple[bool, torch.Tensor]) -> None:
    signed, values = drawn
    encoded = encode(values, signed=signed)
    again = encode(decode(encoded), signed=signed)
    assert torch.equal(again.codes, encoded.codes)
    assert torch.equal(again.scales, encoded.scales)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back(signed: bool) -> None:
    """Of scales over their whole range."""
    largest = 127 if signed else 255
    lowest, highest = (-100, 126) if signed else (-55, 63)
    codes = torch.arange(-127 if signed else 0, largest + 1).to(
        torch.int8 if signed else torch.uint8
    )
    drawn = torch.Generator().manual_seed(0)
    for exponent in range(lowest, highest + 1):
        scale = (1 + torch.rand(1, generator=drawn)) * 2.0**exponent
        scale = scale.clamp(max=2.0**126) if signed else scale.clamp(max=1.8446743e19)
        # Each block has one code to try, and one that says what the scale is.
        blocks = torch.zeros(len(codes), MOMENT_BLOCK, dtype=codes.dtype)
        blocks[:, 7], blocks[:, 40] = codes, largest
        encoded = EncodedMoment(blocks.flatten(), scale.expand(len(codes)).contiguous())
        values = decode(encoded)
        assert torch.isfinite(values).all()
        assert torch.equal(
            values.view(-1, MOMENT_BLOCK)[:, 40], (scale if signed else scale**2).expand(len(codes))
        )
        again = encode(values, signed=signed)
        assert torch.equal(again.codes, encoded.codes), exponent
        assert torch.equal(again.scales, encoded.scales), exponent


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_do_not_depend_on_each_other(signed: bool) -> None:
    drawn = torch.Generator().manual_seed(1)
    values = torch.rand(5 * MOMENT_BLOCK + 9, generator=drawn) * 1e-3
    whole = encode(values, signed=signed)
    for block, start in enumerate(range(0, len(values), MOMENT_BLOCK)):
        alone = encode(values[start : start + MOMENT_BLOCK].clone(), signed=signed)
        assert torch.equal(alone.codes, whole.codes[start : start + MOMENT_BLOCK])
        assert torch.equal(alone.scales, whole.scales[block : block + 1])


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_are_exact(signed: bool) -> None:
    encoded = encode(torch.zeros(200), signed=signed)
    assert not encoded.codes.any()
    assert not encoded.scales.any()
    assert not decode(encoded).any()
    never_written = EncodedMoment(torch.zeros_like(encoded.codes), torch.zeros(4))
    assert torch.equal(decode(never_written), torch.zeros(200))
    assert encode(torch.empty(0), signed=signed).scales.shape == (0,)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [math.inf, math.nan, LARGEST])
def test_nothing_that_is_not_finite_gets_in(value: float, signed: bool) -> None:
    values = torch.full((MOMENT_BLOCK,), 1.0)
    values[9] = value
    encoded = encode(values, signed=signed)
    assert torch.isfinite(encoded.scales).all()
    found = decode(encoded)
    assert torch.isfinite(found).all()
    assert found[9] == (2.0**126 if signed else pytest.approx(LARGEST, rel=1e-6))


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 1e-30])
def test_the_least_values(value: float) -> None:
    tiny = torch.full((MOMENT_BLOCK,), value)
    squares = decode(encode(tiny, signed=False))
    assert (squares >= tiny * (4 / 9)).all()
    assert (squares.sqrt() <= 2.0**-55).all() or torch.allclose(squares, tiny)
    averages = decode(encode(-tiny, signed=True))
    assert ((averages + tiny).abs() <= 2.0**-100 / 508).all() or torch.allclose(averages, -tiny)


# --- rules ----------------------------------------------------------------------------------------

GROUPS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1},
    "adam": {"lr": 1e-2, "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "lion": {"lr": 1e-3, "weight_decay": 0.1},
}
NUMEL = 5_003  # several tiles of the kernels and a part of a block


def rules_of(name: str) -> tuple[UpdateRule, UpdateRule]:
    rule = make_rule(name, [GROUPS[name]])
    return rule, eight_bit_rule(rule)


def blank_state(rule: UpdateRule, numel: int) -> dict[str, np.ndarray]:
    kinds = {"fp32": np.float32, "int8": np.int8, "uint8": np.uint8}
    return {
        spec.name: np.zeros(-(-numel // spec.elements_per_value), kinds[spec.dtype])
        for spec in rule.state_specs
    }


def as_moment(state: dict[str, np.ndarray], name: str) -> EncodedMoment:
    return EncodedMoment(torch.from_numpy(state[name]), torch.from_numpy(state[scale_field(name)]))


@pytest.mark.parametrize(
    ("name", "precision", "gradient_fp32"),
    [("adamw", *each) for each in FORMATS]
    + [(name, "bf16", False) for name in GROUPS if name != "adamw"],
)
def test_a_step_is_the_fp32_rule_between_decoding_and_encoding(
    name: str, precision: str, gradient_fp32: bool
) -> None:
    """Bit for bit, weights and codes."""
    plain, rule = rules_of(name)
    assert rule.scalars({**rule.hyper_defaults, **GROUPS[name]}, 3) == plain.scalars(
        {**plain.hyper_defaults, **GROUPS[name]}, 3
    )
    torch.manual_seed(5)
    values = torch.randn(NUMEL).numpy()
    ours, expected = stored(values.copy(), precision), stored(values.copy(), precision)
    state, exact = blank_state(rule, NUMEL), blank_state(plain, NUMEL)
    for step in range(1, 6):
        size = torch.rand(NUMEL // 100 + 1).repeat_interleave(100)[:NUMEL] ** 8
        gradient = (torch.randn(NUMEL) * size).to(
            torch.float32 if gradient_fp32 else PRECISIONS[precision]
        )
        shared: dict[str, Any] = {
            "precision": precision,
            "gradient": array_of(gradient),
            "hyper": GROUPS[name],
            "step": step,
            "gradient_scale": 0.5,
        }
        assert rule.update(weight=ours[0], master=ours[1], state=state, **shared)
        assert plain.update(weight=expected[0], master=expected[1], state=exact, **shared)
        for field in plain.state_fields:
            signed = field != "exp_avg_sq"
            encoded = encode(torch.from_numpy(exact[field]), signed=signed)
            found = as_moment(state, field)
            assert torch.equal(found.codes, encoded.codes)
            assert torch.equal(found.scales, encoded.scales)
            assert found.codes.any()
            exact[field][:] = decode(encoded).numpy()
        assert same_bits(ours[0], expected[0])
        assert same_bits(true_values(*ours), true_values(*expected))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(GROUPS)), st.integers(1, 6_000), st.lists(st.floats(0, 1), max_size=4)
)
def test_bits_do_not_depend_on_the_cut(name: str, numel: int, cuts: list[float]) -> None:
    """Where the cut is between blocks, as every cut between chunks and pieces is."""
    _, rule = rules_of(name)
    rng = np.random.default_rng(numel)
    values = rng.standard_normal(numel).astype(np.float32)
    gradients = rng.standard_normal((2, numel)).astype(np.float32)
    results = []
    between = {int(cut * numel) // MOMENT_BLOCK * MOMENT_BLOCK for cut in cuts}
    for edges in ([0, numel], sorted({0, numel, *between})):
        weight, master = stored(values.copy(), "bf16")
        assert master is not None
        state = blank_state(rule, numel)
        for step, gradient in enumerate(gradients, start=1):
            for start, stop in itertools.pairwise(edges):
                part = slice(start, stop)
                blocks = slice(start // MOMENT_BLOCK, -(-stop // MOMENT_BLOCK))
                rule.update(
                    precision="bf16",
                    weight=weight[part],
                    master=master[part],
                    gradient=gradient[part],
                    state={
                        spec.name: state[spec.name][
                            part if spec.elements_per_value == 1 else blocks
                        ]
                        for spec in rule.state_specs
                    },
                    hyper=GROUPS[name],
                    step=step,
                )
        results.append([weight, master, *state.values()])
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


def test_no_step_is_huge_where_a_block_has_both_large_and_small_gradients() -> None:
    """Rounding a small second moment to 0 would divide its first moment by epsilon."""
    _, rule = rules_of("adamw")
    rng = np.random.default_rng(0)
    numel, lr = 64 * MOMENT_BLOCK, 1e-3
    # Steady small gradients beside large ones of changing sign, whose average is small.
    small = rng.integers(0, 2, numel) == 0
    weight, state = np.zeros(numel, np.float32), blank_state(rule, numel)
    for step in range(1, 60):
        before = weight.copy()
        gradient = rng.standard_normal(numel).astype(np.float32)
        gradient[small] = 10.0 ** rng.uniform(-4, -2.2, numel)[small]
        rule.update(
            precision="fp32",
            weight=weight,
            master=None,
            gradient=gradient,
            state=state,
            hyper={"lr": lr, "weight_decay": 0.0, "eps": 1e-12},
            step=step,
        )
        assert np.abs(weight - before).max() <= 12 * lr


def test_a_gradient_whose_square_overflows() -> None:
    """fp32 moments stay infinite from then on; these recover."""
    _, rule = rules_of("adamw")
    weight, state = np.ones(100, np.float32), blank_state(rule, 100)
    gradient = np.full(100, 1e-3, np.float32)
    gradient[3] = 1e30
    for step in range(1, 4):
        finite = rule.update(
            precision="fp32",
            weight=weight,
            master=None,
            gradient=gradient,
            state=state,
            hyper={"lr": 1e-3},
            step=step,
        )
        assert finite
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.isfinite(decode(as_moment(state, name))).all()


@pytest.mark.parametrize("name", ["adagrad", "sgd"])
def test_rules_without_8_bit_moments_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)8bit.*momentum.*optimizer is {name}"):
        eight_bit_rule(make_rule(name))


def test_bytes_of_an_element() -> None:
    """One scale for 64 codes: 2.125 instead of 8 with Adam, 4.125 instead of 10 with bf16."""
    for name, (fp32_bytes, eight_bit_bytes) in {
        "adamw": (8, 2.125),
        "adam": (8, 2.125),
        "sgd": (4, 1.0625),
        "lion": (4, 1.0625),
    }.items():
        for rule, expected in zip(rules_of(name), (fp32_bytes, eight_bit_bytes), strict=True):
            found = sum(spec.itemsize / spec.elements_per_value for spec in rule.state_specs)
            assert found == expected
            assert rule.name == name == RULES[name].name
