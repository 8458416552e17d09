"""The noise of forward-only training: Random123's vectors, an independent normal, the moments."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from numba import njit

from offload.optim import philox
from offload.optim.philox import Noise
from tests import zeroth_oracle
from tests.threads import run_in_threads

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@njit
def four_words(c0, c1, c2, c3, k0, k1):
    return philox.four_words(c0, c1, c2, c3, k0, k1)


def drawn(numel: int, start: int = 0, *, seed: int = 7, step: int = 3, parameter: int = 5):
    out = np.full(numel, np.nan, np.float32)
    Noise(seed, step, parameter).fill(out, start)
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    given = [np.uint64(int(word, 16)) for word in (counter + " " + key).split()]
    assert [f"{int(word):08x}" for word in four_words(*given)] == expected.split()
    counters = tuple(np.array([word]) for word in given[:4])
    found = zeroth_oracle.philox(counters, (int(given[4]), int(given[5])))
    assert [f"{int(word[0]):08x}" for word in found] == expected.split()


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_equal_to_an_independent_implementation(seed: int) -> None:
    place = {"seed": seed, "step": 2**31, "parameter": 11}
    expected = zeroth_oracle.normals(200_000, **place)
    assert np.array_equal(drawn(200_000, **place), expected)


@pytest.mark.parametrize(("start", "numel"), [(1024, 1), (2048, 1023), (65536, 5000), (0, 0)])
def test_any_part_has_the_bits_of_the_whole(start: int, numel: int) -> None:
    whole = drawn(start + numel)
    assert np.array_equal(drawn(numel, start), whole[start:])


def test_the_counter_has_more_than_32_bits() -> None:
    far = drawn(4096, 4 * 2**32)
    assert not np.array_equal(far, drawn(4096))
    assert np.array_equal(far[2048:], drawn(2048, 4 * 2**32 + 2048))


def test_moments_and_tails() -> None:
    numel = 4_000_000
    z = drawn(numel).astype(np.float64)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean() - expected) < 5 * math.sqrt(variance / numel), power
    for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(limit / math.sqrt(2))
        deviation = math.sqrt(share * (1 - share) / numel)
        assert abs((np.abs(z) > limit).mean() - share) < 5 * deviation, limit
    for lag in (1, 256, 512, 768, 1024):
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / math.sqrt(numel), lag
    assert np.abs(z).max() < 6.8


def test_seeds_steps_and_parameters_are_independent() -> None:
    numel = 1_000_000
    one = drawn(numel).astype(np.float64)
    for other in ({"seed": 8}, {"seed": 7 + 2**32}, {"step": 4}, {"parameter": 6}):
        correlation = (one * drawn(numel, **other)).mean()
        assert abs(correlation) < 5 / math.sqrt(numel), other


def test_threads_draw_the_same() -> None:
    found: dict[int, np.ndarray] = {}

    def draw(part: int) -> None:
        found[part] = drawn(65536, part * 65536)

    run_in_threads(*(partial(draw, part) for part in range(4)))
    assert np.array_equal(np.concatenate([found[part] for part in range(4)]), drawn(4 * 65536))
