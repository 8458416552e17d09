from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.optim.gradients import (
    BLOCK_NUMEL,
    accumulate_gradient,
    num_blocks,
)
from tests.optim.bits import array_of, same_bits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUMEL = 2 * BLOCK_NUMEL + 4_321


def accumulate(target, source, *, first: bool) -> np.ndarray:
    """Accumulate tensors; returns the block sums."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    sums = np.full(num_blocks(target.numel()), -1.0)
    accumulate_gradient(
        array_of(target),
        array_of(source),
        first=first,
        target_dtype=names[target.dtype],
        source_dtype=names[source.dtype],
        block_sums=sums,
    )
    return sums


def convert(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    source = torch.from_numpy(values)
    target = torch.empty(len(values), dtype=dtype)
    accumulate(target, source, first=True)
    return target


def rounding_patterns(dropped_bits: int) -> np.ndarray:
    """fp32 patterns around every tie of a format that drops so many bits, and random ones."""
    kept = np.arange(1 << 32 - dropped_bits, dtype=np.uint64) << np.uint64(dropped_bits)
    tie = 1 << dropped_bits - 1
    rng = np.random.default_rng(dropped_bits)
    kept = rng.choice(kept, 50_000)
    near = [(kept + offset) for offset in (0, 1, tie - 1, tie, tie + 1, 2 * tie - 1)]
    return np.concatenate([*near, rng.integers(0, 1 << 32, 200_000)]).astype(np.uint32)


def half_subnormal_ties() -> np.ndarray:
    """Midpoints between neighbouring fp16 values, subnormal ones too, and their fp32 neighbours."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float64).numpy()
    middles = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    values = [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))]
    top = np.array([65519.996, 65520, 65535, 65536, 1e30, np.inf, np.nan, 0.0], np.float32)
    return np.concatenate([*values, top])


def check_conversion(values: np.ndarray, dtype: torch.dtype) -> None:
    expected = torch.from_numpy(values).to(dtype)
    actual = convert(values, dtype)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    assert same_bits(array_of(actual)[~nan.numpy()], array_of(expected)[~nan.numpy()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoding_rounds_as_torch(dtype: torch.dtype) -> None:
    patterns = rounding_patterns(16 if dtype == torch.bfloat16 else 13)
    check_conversion(patterns.view(np.float32), dtype)
    ties = half_subnormal_ties()
    check_conversion(np.concatenate([ties, -ties]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoding_rounds_as_torch_for_all_patterns(dtype: torch.dtype) -> None:
    chunk = 1 << 24
    for start in range(0, 1 << 32, chunk):
        check_conversion(np.arange(start, start + chunk, dtype=np.uint32).view(np.float32), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_is_exact_for_all_patterns(dtype: torch.dtype) -> None:
    source = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    target = torch.empty(len(source))
    accumulate(target, source, first=True)
    expected = source.to(torch.float32)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(target), nan)
    assert same_bits(target[~nan].numpy(), expected[~nan].numpy())


@pytest.mark.parametrize(("target", "source"), list(itertools.product(DTYPES, DTYPES)))
def test_accumulation_equals_torch(target: str, source: str) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(NUMEL, generator=generator).to(DTYPES[source]) for _ in range(3)]
    total = torch.full((NUMEL,), torch.nan, dtype=DTYPES[target])
    expected = parts[0].to(DTYPES[target])
    accumulate(total, parts[0], first=True)
    assert torch.equal(total, expected)
    for part in parts[1:]:
        sums = accumulate(total, part, first=False)
        expected = (expected.to(torch.float32) + part.to(torch.float32)).to(DTYPES[target])
        assert torch.equal(total, expected)
        squares = total.to(torch.float64).square().split(BLOCK_NUMEL)
        assert sums == pytest.approx([math.fsum(block.tolist()) for block in squares], rel=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, NUMEL), st.sets(st.integers(1, 2)))
def test_sums_do_not_depend_on_the_calls(numel: int, cuts: set[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(numel, generator=generator).to(torch.bfloat16)
    start = torch.randn(numel, generator=generator)
    whole = start.clone()
    whole_sums = accumulate(whole, source, first=False)
    edges = [0, *sorted(c * BLOCK_NUMEL for c in cuts if c * BLOCK_NUMEL < numel), numel]
    pieces = start.clone()
    sums = [accumulate(pieces[a:b], source[a:b], first=False) for a, b in itertools.pairwise(edges)]
    assert same_bits(np.concatenate(sums), whole_sums)
    assert torch.equal(pieces, whole)
    alone = accumulate(torch.empty_like(whole), whole, first=True)
    assert same_bits(alone, whole_sums)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, BLOCK_NUMEL - 1, BLOCK_NUMEL, NUMEL - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_not_finite_iff_an_element_is_not(dtype: str, position: int, value: float) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    source = torch.full((NUMEL,), largest, dtype=DTYPES[dtype])
    assert np.isfinite(accumulate(torch.empty_like(source), source, first=True)).all()
    source[position] = value
    sums = accumulate(torch.empty_like(source), source, first=True)
    assert np.flatnonzero(~np.isfinite(sums)).tolist() == [position // BLOCK_NUMEL]


def test_a_sum_that_overflows_the_target_is_told() -> None:
    target = torch.full((10,), 60_000.0, dtype=torch.float16)
    assert accumulate(target, target.clone(), first=False).tolist() == [math.inf]
