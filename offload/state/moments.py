"""A checkpoint with 8-bit moments read by an engine with fp32 ones, and the other way round.

An 8-bit moment is stored as two fields: codes, int8 or uint8, and their scales (see [Note: State
fields] in engine.state_access). What the checkpoint has and the engine keeps otherwise is decoded
here, which is exact, or encoded where it is written, which rounds as a step does.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping

import torch

from offload.optim.kernels import MOMENT_BLOCK
from offload.optim.moments import EncodedMoment, decode
from offload.optim.rules import scale_field
from offload.state.manifest import TensorRecord
from offload.state.stored import StoredCheckpoint

Key = tuple[str, str, str]
"""Kind, name and field of a tensor."""
Described = tuple[str, tuple[int, ...]]
"""Its dtype, as torch prints it, and its shape."""

_FP32 = str(torch.float32)
_CODES = (str(torch.int8), str(torch.uint8))


def as_wanted(
    stored: Mapping[Key, Described], wanted: Mapping[Key, Described]
) -> dict[Key, Described]:
    """What a checkpoint holds, with moments as the engine keeps them where it can have them so."""
    found = dict(stored)
    for key in stored.keys() & wanted.keys():
        if is_encoded(key, wanted) and stored[key] == (_FP32, wanted[key][1]):
            found |= {each: wanted[each] for each in (key, scale_key(key))}
        elif is_encoded(key, stored) and wanted[key] == (_FP32, stored[key][1]):
            found[key] = wanted[key]
            del found[scale_key(key)]
    return found


def tensors_as_wanted(
    checkpoint: StoredCheckpoint, wanted: Mapping[Key, Described]
) -> Generator[tuple[TensorRecord, torch.Tensor], None, None]:
    """Every tensor of a checkpoint that is wanted; codes are decoded for who keeps fp32 moments."""
    records = {(r.kind, r.name, r.field): r for r in checkpoint.records() if r.kind != "gradient"}
    stored = {key: (r.dtype, r.shape) for key, r in records.items()}
    decoded = {key for key in wanted if is_encoded(key, stored) and wanted[key][0] == _FP32}
    scales = {scale_key(key) for key in decoded}
    for key, record in records.items():
        if key in scales:
            continue
        yield (
            record,
            (
                decoded_moment(checkpoint, records, key)
                if key in decoded
                else checkpoint.read(record)
            ),
        )


def decoded_moment(
    checkpoint: StoredCheckpoint, records: Mapping[Key, TensorRecord], key: Key
) -> torch.Tensor:
    """The fp32 values of a moment that is stored as codes, of which `key` is."""
    codes, scale = checkpoint.read(records[key]), checkpoint.read(records[scale_key(key)])
    return decode(EncodedMoment(codes.flatten(), scale)).view(records[key].shape)


def scale_key(key: Key) -> Key:
    """The scales that belong to codes."""
    return key[0], key[1], scale_field(key[2])


def is_encoded(key: Key, described: Mapping[Key, Described]) -> bool:
    """Whether it is the codes of a moment that has as many scales as it needs."""
    scale = described.get(scale_key(key))
    dtype, shape = described.get(key, (_FP32, ()))
    return dtype in _CODES and scale == (_FP32, (-(-math.prod(shape) // MOMENT_BLOCK),))
