from __future__ import annotations

import numpy as np
import pytest
import torch

from offload.optim.split import merge_master, merge_tensor, split_master, split_tensor
from tests.optim.bits import array_of, same_bits

SIGN = np.uint32(0x8000_0000)


def edge_patterns() -> np.ndarray:
    """Every high half with the low halves at which rounding changes."""
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    low = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    return (high[:, None] | low[None, :]).reshape(-1)


def split(patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    weight = np.empty(len(patterns), np.uint16)
    remainder = np.empty(len(patterns), np.int16)
    finite = split_master(patterns.view(np.float32), weight, remainder)
    return weight, remainder, finite


def check(patterns: np.ndarray) -> tuple[int, int]:
    """Returns the numbers of finite values of infinite weight, and of NaNs of zero weight."""
    weight, remainder, finite = split(patterns)
    merged = np.empty(len(patterns), np.float32)
    merge_master(weight, remainder, merged)
    assert np.array_equal(merged.view(np.uint32), patterns)
    expected = ((patterns.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)  # round half up
    assert np.array_equal(weight, expected)
    magnitude = patterns & np.uint32(0x7FFF_FFFF)
    assert finite == bool((magnitude < 0x7F7F_8000).all())
    infinite_weight = (weight & 0x7FFF) == 0x7F80
    lost_values = int((infinite_weight & (magnitude < 0x7F80_0000)).sum())
    lost_nans = int((((weight & 0x7FFF) == 0) & (magnitude > 0x7F80_0000)).sum())
    return lost_values, lost_nans


def test_every_high_half_at_its_edges_and_a_sample() -> None:
    check(edge_patterns())
    check(np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32))


@pytest.mark.slow
def test_all_patterns() -> None:
    chunk = 1 << 24
    counts = [check(np.arange(i, i + chunk, dtype=np.uint32)) for i in range(0, 1 << 32, chunk)]
    assert np.sum(counts, axis=0).tolist() == [65_536, 65_536]


@pytest.mark.parametrize("sign", [0, SIGN])
@pytest.mark.parametrize(
    ("pattern", "finite"),
    [(0x7F7F_7FFF, True), (0x7F7F_8000, False), (0x7F80_0000, False), (0x7FFF_8000, False)],
)
def test_a_value_that_bf16_cannot_hold_is_told(pattern: int, finite: bool, sign: int) -> None:
    patterns = np.full(37, 0x3F80_0000, np.uint32)
    patterns[21] = np.uint32(pattern) | np.uint32(sign)
    assert split(patterns)[2] is finite


def test_tensors_split_like_arrays() -> None:
    patterns = edge_patterns()
    values = torch.from_numpy(patterns.view(np.float32)).reshape(2, -1)
    weight, remainder = split_tensor(values)
    assert weight.shape == remainder.shape == values.shape
    expected_weight, expected_remainder, _ = split(patterns)
    assert same_bits(array_of(weight), expected_weight)
    assert same_bits(array_of(remainder), expected_remainder)
    merged = merge_tensor(weight, remainder)
    assert merged.shape == values.shape
    assert np.array_equal(array_of(merged).view(np.uint32), patterns)
