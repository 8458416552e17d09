"""Moments with 8 bits a value: what the codes mean, and conversion of whole tensors.

[Note: 8-bit moments]
Blocks of 64 elements share an fp32 scale s. They are aligned in the parameter (64 elements in the
order of its memory, from its first on), so that no block depends on buckets, chunks or tiers. A
signed moment m has int8 codes q, a moment v that is no less than 0 has uint8 codes:

    m = s * q / (254 - |q|)    q = round(254 * x / (1 + |x|)), x = m / s, s = the block's max |m|
    v = (s * (q / 255))^2      q = round(255 * sqrt(v) / s), 1 at least if v > 0, s = max sqrt(v)

Sources: FlashOptim (Gonzalez Ortiz et al. 2602.23349, algorithms 2 and 3), whose companding
functions these are, softsign 2x / (1 + |x|) and the square root; block-wise scales are of Dettmers
et al. 2110.02861, section 2.1. Three things differ from FlashOptim. Blocks of 64 with an fp32 scale
are as many bytes as its 32 with fp16, and do not overflow. A v above 0 never becomes 0, by which
Adam would divide. Scales are kept in [2^-100, 2^126] for m, or 0 if all of a block are below
2^-108, and from 2^-55 on for v, so that no arithmetic meets a subnormal.

The error of one rounding, with w = sqrt(v), up to a few units in the last place:

    |m' - m| <= s/508 * (1 + max(|m|, |m'|) / s)^2     from s/508 near 0 to s/127 near s
    |w' - w| <= s/510, or w' = s/255 where 0 < w < s/510; hence w' >= 2/3 w

The largest of a block is exact (but for an m above 2^126, which is cut off, and for blocks that are
all below the least scale). Zeros are exact, and code 0 with scale 0 is zero: memory that was never
written is a zero state. Magnitudes count as the largest finite fp32 at most: no code stands for
infinity or NaN. Codes and scales of decoded values are the codes and scales they came from.

An update decodes a block, steps in fp32 as ever, and encodes it: `kernels.adam_8bit` and its kin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from offload.optim import kernels
from offload.optim.compilation import compiled


class EncodedMoment(NamedTuple):
    """A moment in 8 bits.

    `codes`: int8 (signed) or uint8 (no less than 0), 1-D; `scales`: fp32, one for 64 codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def encode(values: torch.Tensor, *, signed: bool) -> EncodedMoment:
    """Encode a whole parameter's moment: fp32, 1-D, on the CPU."""
    blocks = -(-values.numel() // kernels.MOMENT_BLOCK)
    codes = torch.empty(values.numel(), dtype=torch.int8 if signed else torch.uint8)
    scales = torch.empty(blocks, dtype=torch.float32)
    loop = kernels.encode_signed if signed else kernels.encode_unsigned
    kernel = compiled(loop, "float32", "int8" if signed else "uint8", "float32")
    kernel(values.contiguous().numpy(), codes.numpy(), scales.numpy())
    return EncodedMoment(codes, scales)


def decode(encoded: EncodedMoment) -> torch.Tensor:
    """The fp32 values of a whole parameter's moment, 1-D."""
    codes, scales = encoded
    values = torch.empty(codes.numel(), dtype=torch.float32)
    signed = codes.dtype is torch.int8
    loop = kernels.decode_signed if signed else kernels.decode_unsigned
    kernel = compiled(loop, "int8" if signed else "uint8", "float32", "float32")
    kernel(codes.contiguous().numpy(), scales.contiguous().numpy(), values.numpy())
    return values
