"""Where the state of an arbitrary optimizer lies: whole tensors of any shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from offload.partition.layout import BLOCK_ALIGNMENT_BYTES, Bucket, Field, FieldSpec, round_up


class StateTensorSpec(NamedTuple):
    """One tensor of a parameter's optimizer state."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorLayout:
    """One block for a one-chunk bucket: what completes the weights, then all tensors.

    Every tensor starts at a multiple of 64 bytes, the block ends at a multiple of 4096.

    Attributes:
        chunk_nbytes, chunk_offset_bytes, nbytes: as of `ClassLayout`, with one chunk.
    """

    def __init__(
        self,
        bucket: Bucket,
        completion: Sequence[FieldSpec],
        tensors: Mapping[int, Sequence[StateTensorSpec]],
    ) -> None:
        assert len(bucket.chunks) == 1, "whole parameters are staged at once"
        self._fields: dict[str, Field] = {}
        self._places: dict[int, list[tuple[StateTensorSpec, int]]] = {}
        offset = 0
        for spec in completion:
            nbytes = bucket.numel * spec.itemsize
            self._fields[spec.name] = Field(spec.name, spec.dtype, spec.itemsize, offset, nbytes)
            offset = round_up(offset + nbytes, BLOCK_ALIGNMENT_BYTES)
        for param, specs in tensors.items():
            self._places[param] = []
            for tensor in specs:
                self._places[param].append((tensor, offset))
                nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
                offset = round_up(offset + nbytes, 64)
        # The block is never empty: the optimizer's scalars make the bucket have a state.
        self.nbytes = round_up(max(offset, 1), BLOCK_ALIGNMENT_BYTES)
        self.chunk_nbytes: tuple[int, ...] = (self.nbytes,)
        self.chunk_offset_bytes: tuple[int, ...] = (0,)

    def element_fields(self, chunk: int) -> Sequence[Field]:
        """The fields with one element for each element of the bucket."""
        assert chunk == 0
        return tuple(self._fields.values())

    def keys(self, param: int) -> Sequence[StateTensorSpec]:
        """The state tensors of a parameter."""
        return [spec for spec, _ in self._places[param]]

    def places(self, param: int) -> dict[str, tuple[int, int]]:
        """Where a parameter's state tensors are in the block, by key: offset and bytes."""
        return {
            spec.key: (offset, math.prod(spec.shape) * spec.dtype.itemsize)
            for spec, offset in self._places[param]
        }

    def tensors(self, param: int, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a parameter's state tensors in the bytes of the block (uint8, 1-D)."""
        found = {}
        for spec, (offset, nbytes) in zip(
            self.keys(param), self.places(param).values(), strict=True
        ):
            flat = block[offset : offset + nbytes].view(spec.dtype)
            found[spec.key] = flat.view(spec.shape)
        return found
