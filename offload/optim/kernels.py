"""Compiled loops over gradients, weights and optimizer state, one pass each.

[Note: number formats]

A 16-bit number travels as the integer array that holds its bits, and the integer type says which
format it is: uint16 is bf16, int16 is fp16 (fp32 is float32). A weight and its master are

    precision  weight         master             value
    fp32       float32        None               weight
    bf16       uint16 (bf16)  int16 remainder    (weight << 16) + remainder, as bits of an fp32
    fp16       int16 (fp16)   float32            master

[Note: bits do not depend on the cut]

Every element is computed by the same IEEE operations, in fp32, whatever its position: no fast-math,
so that nothing is contracted or reassociated, and the vector body of a loop equals its scalar
tail. The only sums are over fixed blocks, in `_sum_lanes`'s order.

[Note: largest pattern]

Update kernels return the largest magnitude they wrote, as the bit pattern of its absolute fp32
value: an integer maximum stays vectorised, orders as the values do, and is larger than every number
for a NaN. `rules` compares it with the first pattern that the weight's format cannot hold.

All loops are in this one file because numba's disk cache looks at the file of a function only.
"""

# ruff: noqa: ARG001 (an overload takes what its implementations take)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload, register_jitable

BLOCK_NUMEL = 65_536
"""Elements of one block of `add_gradient` and of its kin; see `gradients`."""

MOMENT_BLOCK = 64
"""Elements that share a scale; see [Note: 8-bit moments] in `moments`."""

_TILE = 8 * MOMENT_BLOCK  # decoded at a time, in the nearest cache beside what it is updated with
_LANES = 256  # partial sums of a block: element k adds to lane k % 256, so that the loop vectorises

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
_LARGEST_FINITE = np.uint32(0x7F7F_FFFF)
_ONE = np.uint32(1)
_HALF_SHIFT = np.uint32(13)  # fp32 has 23 bits of mantissa, fp16 has 10
_WORD_SHIFT = np.uint32(16)


# --- number formats: see [Note: number formats] ---------------------------------------------------


def _bitcast(argument: Any, result: Any) -> Any:
    def typing(_context: Any, _value: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), codegen

    return intrinsic(typing)


_bits: Any = _bitcast(types.float32, types.uint32)  # the bits of an fp32
_from_bits: Any = _bitcast(types.uint32, types.float32)  # the fp32 that has these bits


def _typed_select(_context: Any, _condition: Any, _first: Any, _second: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return types.uint32(types.boolean, types.uint32, types.uint32), codegen


# First if condition else second, without the branch that would keep a loop from vectorising.
_select: Any = intrinsic(_typed_select)


@register_jitable(inline="always")
def _decode_fp16(half: Any) -> Any:
    """Return the value of fp16 bits, exactly, subnormals and infinities included."""
    bits = np.uint32(half)
    magnitude = np.uint32(bits & np.uint32(0x7FFF))
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << _WORD_SHIFT)
    special = magnitude >= np.uint32(0x7C00)
    rebias = _select(special, np.uint32(0x7000_0000), np.uint32(0x3800_0000))
    normal = np.uint32(np.uint32(magnitude << _HALF_SHIFT) + rebias)
    subnormal = _bits(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    chosen = _select(magnitude < np.uint32(0x400), subnormal, normal)
    return _from_bits(np.uint32(chosen | sign))


@register_jitable(inline="always")
def _encode_fp16(value: Any) -> Any:
    """Return `value` as fp16 bits, to nearest, ties to even; from 65520 on as infinity.

    Source: F. Giesen, "float->half variants", float_to_half_fast3_rtne.
    """
    bits = _bits(value)
    magnitude = np.uint32(bits & _MAGNITUDE)
    sign = np.uint32(np.uint32(bits >> _WORD_SHIFT) & np.uint32(0x8000))
    odd = np.uint32(np.uint32(magnitude >> _HALF_SHIFT) & _ONE)
    rounded = np.uint32(np.uint32(magnitude + np.uint32(0xC800_0FFF)) + odd)
    normal = np.uint32(rounded >> _HALF_SHIFT)
    shifted = _from_bits(magnitude) + np.float32(0.5)  # its unit in the last place is fp16's least
    subnormal = np.uint32(_bits(shifted) - np.uint32(0x3F00_0000))
    chosen = _select(magnitude < np.uint32(0x3880_0000), subnormal, normal)
    chosen = _select(magnitude >= np.uint32(0x477F_F000), np.uint32(0x7C00), chosen)
    chosen = _select(magnitude > _INFINITY, np.uint32(0x7E00), chosen)
    return np.int16(np.uint32(chosen | sign))


@register_jitable(inline="always")
def _encode_bf16(value: Any) -> Any:
    """Return `value` as bf16 bits, to nearest, ties to even, as torch casts."""
    bits = _bits(value)
    odd = np.uint32(np.uint32(bits >> _WORD_SHIFT) & _ONE)
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
    high = np.uint32(rounded >> _WORD_SHIFT)
    not_a_number = np.uint32(bits & _MAGNITUDE) > _INFINITY
    return np.uint16(_select(not_a_number, np.uint32(0x7FC0), high))


# An overload and its implementations must agree in their annotations, too: numba compares them.


def _load(array: Any, i: Any) -> Any:  # the element as fp32
    raise NotImplementedError


@overload(_load, inline="always")
def _load_overload(array: Any, i: Any) -> Any:
    def load_bf16(array: Any, i: Any) -> Any:
        return _from_bits(np.uint32(np.uint32(array[i]) << _WORD_SHIFT))

    def load_fp16(array: Any, i: Any) -> Any:
        return _decode_fp16(np.uint16(array[i]))

    def load_fp32(array: Any, i: Any) -> Any:
        return array[i]

    return {types.uint16: load_bf16, types.int16: load_fp16, types.float32: load_fp32}[array.dtype]


def _store(array: Any, i: Any, value: Any) -> Any:  # rounds; returns what is stored, as fp32
    raise NotImplementedError


@overload(_store, inline="always")
def _store_overload(array: Any, i: Any, value: Any) -> Any:
    def store_bf16(array: Any, i: Any, value: Any) -> Any:
        half = _encode_bf16(value)
        array[i] = half
        return _from_bits(np.uint32(np.uint32(half) << _WORD_SHIFT))

    def store_fp16(array: Any, i: Any, value: Any) -> Any:
        half = _encode_fp16(value)
        array[i] = half
        return _decode_fp16(np.uint16(half))

    def store_fp32(array: Any, i: Any, value: Any) -> Any:
        array[i] = value
        return value

    stores = {types.uint16: store_bf16, types.int16: store_fp16, types.float32: store_fp32}
    return stores[array.dtype]


def _read_value(weight: Any, master: Any, i: Any) -> Any:  # the parameter's fp32 value
    raise NotImplementedError


@overload(_read_value, inline="always")
def _read_value_overload(weight: Any, master: Any, i: Any) -> Any:
    def read_fp32(weight: Any, master: Any, i: Any) -> Any:
        return weight[i]

    def merge_bf16(weight: Any, master: Any, i: Any) -> Any:
        high = np.uint32(np.uint32(weight[i]) << _WORD_SHIFT)
        return _from_bits(np.uint32(high + np.uint32(np.int32(master[i]))))

    def read_master(weight: Any, master: Any, i: Any) -> Any:
        return master[i]

    if isinstance(master, types.NoneType):
        return read_fp32
    return {types.int16: merge_bf16, types.float32: read_master}[master.dtype]


def _write_value(weight: Any, master: Any, i: Any, value: Any) -> Any:  # splits or rounds
    raise NotImplementedError


@overload(_write_value, inline="always")
def _write_value_overload(weight: Any, master: Any, i: Any, value: Any) -> Any:
    def write_fp32(weight: Any, master: Any, i: Any, value: Any) -> Any:
        weight[i] = value

    def split_bf16(weight: Any, master: Any, i: Any, value: Any) -> Any:
        # Round half up: the low 16 bits, read as signed, are then the whole remainder.
        bits = _bits(value)
        weight[i] = np.uint16(np.uint32(bits + np.uint32(0x8000)) >> _WORD_SHIFT)
        master[i] = np.int16(bits)

    def write_fp16(weight: Any, master: Any, i: Any, value: Any) -> Any:
        weight[i] = _encode_fp16(value)
        master[i] = value

    if isinstance(master, types.NoneType):
        return write_fp32
    return {types.int16: split_bf16, types.float32: write_fp16}[master.dtype]


@register_jitable(inline="always")
def _magnitude(value: Any) -> Any:
    """Return the pattern of the absolute value; see [Note: largest pattern]."""
    return np.uint32(_bits(value) & _MAGNITUDE)


# --- update rules: `scalars` are float32, in the order in which they are unpacked -----------------


@register_jitable
def adam(
    weight: Any, master: Any, gradient: Any, exp_avg: Any, exp_avg_sq: Any, scalars: Any
) -> Any:
    """Step Adam or AdamW: one of `decay` (1 = none) and `l2` (0 = none) is in use."""
    scale, decay, l2, rate1, beta2, rate2, step_size, correction2_sqrt, eps = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _read_value(weight, master, i)
        g = _load(gradient, i) * scale + l2 * value
        value = value * decay
        m = exp_avg[i]
        m = m + rate1 * (g - m)
        v = exp_avg_sq[i] * beta2 + (rate2 * g) * g
        value = value - (step_size * m) / (np.sqrt(v) / correction2_sqrt + eps)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        _write_value(weight, master, i, value)
        largest = max(largest, _magnitude(value))
    return largest


def sgd(weight: Any, master: Any, gradient: Any, scalars: Any) -> Any:
    """Step SGD without momentum."""
    scale, l2, lr = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _read_value(weight, master, i)
        value = value - lr * (_load(gradient, i) * scale + l2 * value)
        _write_value(weight, master, i, value)
        largest = max(largest, _magnitude(value))
    return largest


@register_jitable
def sgd_momentum(
    weight: Any, master: Any, gradient: Any, momentum_buffer: Any, scalars: Any
) -> Any:
    """Step SGD with momentum; the direction is `gradient_share` * g + `buffer_share` * buffer."""
    scale, l2, lr, momentum, rate, gradient_share, buffer_share = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _read_value(weight, master, i)
        g = _load(gradient, i) * scale + l2 * value
        buffer = momentum * momentum_buffer[i] + rate * g
        momentum_buffer[i] = buffer
        value = value - lr * (gradient_share * g + buffer_share * buffer)
        _write_value(weight, master, i, value)
        largest = max(largest, _magnitude(value))
    return largest


def adagrad(weight: Any, master: Any, gradient: Any, squares: Any, scalars: Any) -> Any:
    """Step Adagrad; `start` is added to the sum of squares (0 after a parameter's first step)."""
    scale, l2, lr, eps, start = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _read_value(weight, master, i)
        g = _load(gradient, i) * scale + l2 * value
        s = (squares[i] + start) + g * g
        squares[i] = s
        value = value - (lr * g) / (np.sqrt(s) + eps)
        _write_value(weight, master, i, value)
        largest = max(largest, _magnitude(value))
    return largest


@register_jitable
def lion(weight: Any, master: Any, gradient: Any, exp_avg: Any, scalars: Any) -> Any:
    """Step Lion. Source: Chen et al. 2302.06675, algorithm 2."""
    scale, decay, beta1, rate1, beta2, rate2, lr = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _read_value(weight, master, i) * decay
        g = _load(gradient, i) * scale
        m = exp_avg[i]
        direction = beta1 * m + rate1 * g
        sign = np.float32(direction > np.float32(0)) - np.float32(direction < np.float32(0))
        exp_avg[i] = beta2 * m + rate2 * g
        value = value - lr * sign
        _write_value(weight, master, i, value)
        largest = max(largest, _magnitude(value))
    return largest


# --- 8-bit moments: see [Note: 8-bit moments] in `moments`; arrays begin with a block -------------


@register_jitable
def decode_signed(codes: Any, scales: Any, values: Any) -> None:
    """Write the moments that int8 codes stand for."""
    for block in range(len(scales)):
        scale = scales[block]
        first = np.uint64(block) * np.uint64(MOMENT_BLOCK)
        for k in range(min(MOMENT_BLOCK, len(codes) - block * MOMENT_BLOCK)):
            i = first + np.uint64(k)
            q = np.float32(codes[i])
            values[i] = scale * (q / (np.float32(254) - abs(q)))


@register_jitable
def decode_unsigned(codes: Any, scales: Any, values: Any) -> None:
    """Write the moments that uint8 codes stand for."""
    for block in range(len(scales)):
        scale = scales[block]
        first = np.uint64(block) * np.uint64(MOMENT_BLOCK)
        for k in range(min(MOMENT_BLOCK, len(codes) - block * MOMENT_BLOCK)):
            i = first + np.uint64(k)
            root = scale * (np.float32(codes[i]) * np.float32(1 / 255))
            values[i] = root * root


@register_jitable(inline="always")
def _block_largest(values: Any, first: Any, numel: Any) -> Any:
    """Return the largest finite magnitude of a block, as its pattern."""
    largest = np.uint32(0)
    for k in range(numel):
        largest = max(largest, _magnitude(values[first + np.uint64(k)]))
    return min(largest, _LARGEST_FINITE)


@register_jitable
def encode_signed(values: Any, codes: Any, scales: Any) -> None:
    """Write the int8 codes and scales of moments."""
    for block in range(len(scales)):
        first = np.uint64(block) * np.uint64(MOMENT_BLOCK)
        numel = min(MOMENT_BLOCK, len(codes) - block * MOMENT_BLOCK)
        largest = _from_bits(_block_largest(values, first, numel))
        scale = np.float32(0)
        inverse = np.float32(0)
        if largest >= np.float32(2.0**-108):  # else every code would be 0
            scale = min(max(largest, np.float32(2.0**-100)), np.float32(2.0**126))
            inverse = np.float32(1) / scale
        scales[block] = scale
        for k in range(numel):
            i = first + np.uint64(k)
            bits = _bits(values[i])
            x = _from_bits(min(np.uint32(bits & _MAGNITUDE), _bits(scale))) * inverse
            q = np.int32(np.float32(254) * (x / (np.float32(1) + x)) + np.float32(0.5))
            sign = np.int32(bits) >> np.int32(31)  # -1 or 0
            codes[i] = np.int8((q ^ sign) - sign)


@register_jitable
def encode_unsigned(values: Any, codes: Any, scales: Any) -> None:
    """Write the uint8 codes and scales of moments that are no less than 0."""
    for block in range(len(scales)):
        first = np.uint64(block) * np.uint64(MOMENT_BLOCK)
        numel = min(MOMENT_BLOCK, len(codes) - block * MOMENT_BLOCK)
        largest = _from_bits(_block_largest(values, first, numel))
        scale = np.float32(0)
        inverse = np.float32(0)
        if largest > 0:
            scale = max(np.sqrt(largest), np.float32(2.0**-55))
            inverse = np.float32(1) / scale
        scales[block] = scale
        for k in range(numel):
            i = first + np.uint64(k)
            pattern = min(_magnitude(values[i]), _LARGEST_FINITE)
            root = np.sqrt(_from_bits(pattern)) * inverse
            q = np.uint32(np.int32(np.float32(255) * root + np.float32(0.5)))
            codes[i] = np.uint8(max(q, min(pattern, _ONE)))


def _cut(array: Any, start: Any, stop: Any) -> Any:  # a part of an array, or None of None
    raise NotImplementedError


@overload(_cut, inline="always")
def _cut_overload(array: Any, start: Any, stop: Any) -> Any:
    def nothing(array: Any, start: Any, stop: Any) -> Any:
        return None

    def part(array: Any, start: Any, stop: Any) -> Any:
        return array[start:stop]

    return nothing if isinstance(array, types.NoneType) else part


def adam_8bit(
    weight: Any,
    master: Any,
    gradient: Any,
    exp_avg: Any,
    exp_avg_scale: Any,
    exp_avg_sq: Any,
    exp_avg_sq_scale: Any,
    scalars: Any,
) -> Any:
    """Step `adam` between decoding and encoding its moments."""
    m = np.empty(_TILE, np.float32)
    v = np.empty(_TILE, np.float32)
    largest = np.uint32(0)
    for start in range(0, len(weight), _TILE):
        stop = min(start + _TILE, len(weight))
        first, last = start // MOMENT_BLOCK, -(-stop // MOMENT_BLOCK)
        average, scale = exp_avg[start:stop], exp_avg_scale[first:last]
        squares, root_scale = exp_avg_sq[start:stop], exp_avg_sq_scale[first:last]
        decode_signed(average, scale, m)
        decode_unsigned(squares, root_scale, v)
        cut = _cut(master, start, stop)
        found = adam(weight[start:stop], cut, gradient[start:stop], m, v, scalars)
        encode_signed(m, average, scale)
        encode_unsigned(v, squares, root_scale)
        largest = max(largest, found)
    return largest


@register_jitable
def _step_signed(
    loop: Any, weight: Any, master: Any, gradient: Any, codes: Any, scales: Any, scalars: Any
) -> Any:
    """Step a loop with one signed moment between decoding and encoding it."""
    m = np.empty(_TILE, np.float32)
    largest = np.uint32(0)
    for start in range(0, len(weight), _TILE):
        stop = min(start + _TILE, len(weight))
        average = codes[start:stop]
        scale = scales[start // MOMENT_BLOCK : -(-stop // MOMENT_BLOCK)]
        decode_signed(average, scale, m)
        cut = _cut(master, start, stop)
        found = loop(weight[start:stop], cut, gradient[start:stop], m, scalars)
        encode_signed(m, average, scale)
        largest = max(largest, found)
    return largest


def sgd_momentum_8bit(
    weight: Any, master: Any, gradient: Any, buffer: Any, buffer_scale: Any, scalars: Any
) -> Any:
    """Step `sgd_momentum` with an 8-bit momentum buffer."""
    return _step_signed(sgd_momentum, weight, master, gradient, buffer, buffer_scale, scalars)


def lion_8bit(
    weight: Any, master: Any, gradient: Any, exp_avg: Any, exp_avg_scale: Any, scalars: Any
) -> Any:
    """Step `lion` with an 8-bit average."""
    return _step_signed(lion, weight, master, gradient, exp_avg, exp_avg_scale, scalars)


# --- forward-only training: a weight without a master, and the normals of its elements ------------


def perturb(weight: Any, noise: Any, perturbed: Any, scalars: Any) -> None:
    """Set perturbed = weight + scale * noise, added in fp32 and rounded to the weight's format."""
    (scale,) = scalars
    for i in range(len(weight)):
        _store(perturbed, i, _load(weight, i) + scale * noise[i])


def zeroth_order(weight: Any, noise: Any, scalars: Any) -> Any:
    """Step along the noise, which the projected gradient turns into a gradient."""
    projected, weight_decay, lr = scalars
    largest = np.uint32(0)
    for i in range(len(weight)):
        value = _load(weight, i)
        value = value - lr * (projected * noise[i] + weight_decay * value)
        _store(weight, i, value)
        largest = max(largest, _magnitude(value))
    return largest


# --- splitting ------------------------------------------------------------------------------------


def split(values: Any, weight: Any, master: Any) -> Any:
    """Write fp32 `values` as weight and master; returns the largest pattern."""
    largest = np.uint32(0)
    for i in range(len(weight)):
        _write_value(weight, master, i, values[i])
        largest = max(largest, _magnitude(values[i]))
    return largest


def merge(weight: Any, master: Any, values: Any) -> None:
    """Write the fp32 `values` of weight and master."""
    for i in range(len(weight)):
        values[i] = _read_value(weight, master, i)


# --- gradients: `sums` has one fp64 a block of BLOCK_NUMEL elements -------------------------------


@register_jitable(inline="always")
def _sum_lanes(lanes: Any) -> Any:
    """Add up the lanes of a block pairwise and clear them; the order is fixed."""
    half = _LANES // 2
    while half >= 1:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    total = lanes[0]
    lanes[:] = 0.0
    return total


# The index is unsigned because numba lets a signed one count from the end, which costs the loop
# its vectors.


def copy_gradient(target: Any, source: Any, sums: Any) -> None:
    """Set target = source, in target's format, and the sums of squares of the target."""
    lanes = np.zeros(_LANES, np.float64)
    for block in range(len(sums)):
        stop = min(len(target), (block + 1) * BLOCK_NUMEL)
        for row in range(block * BLOCK_NUMEL, stop, _LANES):
            for k in range(min(_LANES, stop - row)):
                i = np.uint64(row) + np.uint64(k)
                written = np.float64(_store(target, i, _load(source, i)))
                lanes[k] += written * written
        sums[block] = _sum_lanes(lanes)


def add_gradient(target: Any, source: Any, sums: Any) -> None:
    """Set target = target + source, added in fp32, and the sums of squares of the target."""
    lanes = np.zeros(_LANES, np.float64)
    for block in range(len(sums)):
        stop = min(len(target), (block + 1) * BLOCK_NUMEL)
        for row in range(block * BLOCK_NUMEL, stop, _LANES):
            for k in range(min(_LANES, stop - row)):
                i = np.uint64(row) + np.uint64(k)
                written = np.float64(_store(target, i, _load(target, i) + _load(source, i)))
                lanes[k] += written * written
        sums[block] = _sum_lanes(lanes)
