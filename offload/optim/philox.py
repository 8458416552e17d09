"""Normal random numbers that are a function of their place: a counter-based generator.

[Note: Noise]
Element j of parameter p in step s is drawn as

    words       Philox4x32-10 of the counter (c mod 2^32, c / 2^32, p, s), key (seed mod 2^32, seed
                / 2^32). Blocks of 1024 elements take 256 counters: element j of block b = j / 1024
                takes word w of counter c = 256 b + k, where j mod 1024 = 256 w + k.
    normals     Box-Muller of the words (0, 1) and (2, 3) of a counter: with u = (x + 1/2) / 2^32
                and the angle a = 2 pi y / 2^32 the first is sqrt(-2 ln u) cos a, the second
                sqrt(-2 ln u) sin a; computed in fp64 and rounded to fp32. At most 6.8 in size.

Nothing is kept between calls, so the numbers do not depend on buckets, chunks, placement, threads
or the order of calls. Logarithm, sine and cosine are series of IEEE operations and not those of the
C library, of which each version and processor has its own last bit: workers on different machines
draw the same bits.

Sources: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; G. Box and
M. Muller, "A note on the generation of random normal deviates", 1958.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from offload.optim import kernels
from offload.optim.compilation import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOISE_BLOCK_NUMEL = 1024
"""Normals of one block: whoever draws starts at a multiple of it, counted in its parameter."""

_COUNTERS = NOISE_BLOCK_NUMEL // 4
_WORD = 0xFFFF_FFFF

_ROUNDS = 10
_MULTIPLIER0, _MULTIPLIER1 = np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57)
_WEYL0, _WEYL1 = np.uint64(0x9E37_79B9), np.uint64(0xBB67_AE85)
_LOW = np.uint64(_WORD)
_HALF = np.uint64(32)
_ONE, _TWO = np.uint64(1), np.uint64(2)

_LN2 = 0.6931471805599453
_EXPONENT_SHIFT = np.uint64(52)
_SQRT_HALF_BITS = np.uint64(0x3FE6_A09E_667F_3BCD)
_EXPONENT_BIAS = np.uint64(1024)  # keeps the shifted exponent positive, so that its shift is plain
_RADIANS = 2.0 * np.pi / 2.0**32

_bits64: Any = kernels._bitcast(types.float64, types.uint64)
_from_bits64: Any = kernels._bitcast(types.uint64, types.float64)


@dataclass(frozen=True, slots=True)
class Noise:
    """The normals of one parameter in one step; see [Note: Noise].

    Attributes:
        seed: of the run; 64 bits.
        step: number of the step; taken modulo 2^32, as `parameter` is.
        parameter: number of the parameter.
    """

    seed: int
    step: int
    parameter: int

    def fill(self, out: NDArray[np.float32], start: int) -> None:
        """Write the normals of the elements from `start`, a multiple of 1024, on; out is 1-D."""
        assert start % NOISE_BLOCK_NUMEL == 0
        counter = start // 4
        key = np.array(
            [
                self.seed & _WORD,
                self.seed >> 32 & _WORD,
                counter & _WORD,
                counter >> 32,
                self.parameter & _WORD,
                self.step & _WORD,
            ],
            dtype=np.uint64,
        )
        compiled(normals, "float32", "uint64")(out, key)


@register_jitable(inline="always")
def four_words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Return the four words of Philox4x32-10; every word is a uint64 below 2^32."""
    for _ in range(_ROUNDS):
        first = np.uint64(_MULTIPLIER0 * c0)
        second = np.uint64(_MULTIPLIER1 * c2)
        c0, c1, c2, c3 = (
            np.uint64(np.uint64(second >> _HALF) ^ c1 ^ k0),
            np.uint64(second & _LOW),
            np.uint64(np.uint64(first >> _HALF) ^ c3 ^ k1),
            np.uint64(first & _LOW),
        )
        k0 = np.uint64(np.uint64(k0 + _WEYL0) & _LOW)
        k1 = np.uint64(np.uint64(k1 + _WEYL1) & _LOW)
    return c0, c1, c2, c3


@register_jitable(inline="always")
def _ln(value: Any) -> Any:
    """Return ln of a normal fp64 in (0, 1]: value = m 2^e, ln m = 2 atanh((m - 1) / (m + 1))."""
    bits = _bits64(value)
    raised = np.uint64(bits - _SQRT_HALF_BITS + np.uint64(_EXPONENT_BIAS << _EXPONENT_SHIFT))
    shifted = np.uint64(raised >> _EXPONENT_SHIFT)
    # `shifted` is e + 1024, modulo 4096 because a borrow may run out at the top.
    e = np.float64(np.int32(np.uint32(shifted & np.uint64(0xFFF)))) - 1024.0
    scale = np.uint64(np.uint64(shifted - _EXPONENT_BIAS) << _EXPONENT_SHIFT)
    m = _from_bits64(np.uint64(bits - scale))
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = 1.0 / 19.0
    series = series * t + 1.0 / 17.0
    series = series * t + 1.0 / 15.0
    series = series * t + 1.0 / 13.0
    series = series * t + 1.0 / 11.0
    series = series * t + 1.0 / 9.0
    series = series * t + 1.0 / 7.0
    series = series * t + 1.0 / 5.0
    series = series * t + 1.0 / 3.0
    return e * _LN2 + 2.0 * (s + s * (t * series))


@register_jitable(inline="always")
def _sine(angle: Any, square: Any) -> Any:
    """Return the sine of an angle of at most pi / 4."""
    series = -1.0 / 1307674368000.0
    series = series * square + 1.0 / 6227020800.0
    series = series * square - 1.0 / 39916800.0
    series = series * square + 1.0 / 362880.0
    series = series * square - 1.0 / 5040.0
    series = series * square + 1.0 / 120.0
    series = series * square - 1.0 / 6.0
    return angle + angle * (square * series)


@register_jitable(inline="always")
def _cosine(square: Any) -> Any:
    """Return the cosine of an angle of at most pi / 4."""
    series = 1.0 / 20922789888000.0
    series = series * square - 1.0 / 87178291200.0
    series = series * square + 1.0 / 479001600.0
    series = series * square - 1.0 / 3628800.0
    series = series * square + 1.0 / 40320.0
    series = series * square - 1.0 / 720.0
    series = series * square + 1.0 / 24.0
    series = series * square - 0.5
    return 1.0 + square * series


@register_jitable(inline="always")
def _two_normals(x: Any, y: Any) -> Any:
    """Return the two normals of two words."""
    radius = np.sqrt(-2.0 * _ln((np.float64(np.int64(x)) + 0.5) * 2.0**-32))
    # The angle is q quarter turns and a rest between -pi / 4 and pi / 4.
    q = np.uint64(np.uint64(y + np.uint64(0x2000_0000)) >> np.uint64(30))
    rest = np.float64(np.int64(y) - np.int64(np.uint64(q << np.uint64(30)))) * _RADIANS
    square = rest * rest
    sine, cosine = _bits64(_sine(rest, square)), _bits64(_cosine(square))
    # An odd q exchanges the two; the sign bit is bit 1 of q (of q + 1 for the cosine).
    swap = np.uint64(np.uint64(sine ^ cosine) & np.uint64(np.uint64(0) - np.uint64(q & _ONE)))
    first_sign = np.uint64(np.uint64(np.uint64(q + _ONE) & _TWO) << np.uint64(62))
    second_sign = np.uint64(np.uint64(q & _TWO) << np.uint64(62))
    first = _from_bits64(np.uint64(np.uint64(cosine ^ swap) ^ first_sign))
    second = _from_bits64(np.uint64(np.uint64(sine ^ swap) ^ second_sign))
    return np.float32(radius * first), np.float32(radius * second)


def normals(out: Any, key: Any) -> None:
    """Fill `out`; `key`: seed low and high, first counter low and high, parameter, step."""
    k0, k1, parameter, step = key[0], key[1], key[4], key[5]
    first = np.uint64(key[2] | np.uint64(key[3] << _HALF))
    block = np.empty(NOISE_BLOCK_NUMEL, np.float32)
    for start in range(0, len(out), NOISE_BLOCK_NUMEL):
        base = np.uint64(first + np.uint64(start // 4))
        for k in range(_COUNTERS):
            counter = np.uint64(base + np.uint64(k))
            x0, x1, x2, x3 = four_words(
                np.uint64(counter & _LOW), np.uint64(counter >> _HALF), parameter, step, k0, k1
            )
            n0, n1 = _two_normals(x0, x1)
            n2, n3 = _two_normals(x2, x3)
            block[k] = n0
            block[k + _COUNTERS] = n1
            block[k + 2 * _COUNTERS] = n2
            block[k + 3 * _COUNTERS] = n3
        rest = min(NOISE_BLOCK_NUMEL, len(out) - start)
        for k in range(rest):
            out[start + k] = block[k]
