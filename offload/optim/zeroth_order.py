"""Forward-only training: the arithmetic of MeZO on the chunks of the weights.

[Note: Zeroth order]
With z the noise of step s (normal, one number for each element of each trainable parameter)

    g      = (loss(w + eps z) - loss(w - eps z)) / (2 eps)      projected gradient, a scalar
    w'     = w - lr (g z + weight_decay w)

z is never kept: it is drawn again from (seed, s, parameter, element) wherever it is needed, see
philox.py. Everything is computed in fp32; in bf16 and fp16 the perturbed and the updated weight are
rounded once, to nearest, ties to even. There is no master: an update of less than half a unit in
the last place of a 16-bit weight is lost, as it is in the authors' code.

Source: S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023,
arXiv 2305.17333, algorithm 1; weight decay as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
import torch

from offload.optim import kernels
from offload.optim.chunk_update import ChunkUpdate, ChunkWork, StepSettings
from offload.optim.compilation import compiled
from offload.optim.gradients import kernel_view
from offload.optim.philox import NOISE_BLOCK_NUMEL, Noise
from offload.optim.split import FIRST_UNHOLDABLE
from offload.partition.arrays import field_array
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket, Field, Segment, segments
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from offload.optim.rules import Hyper
    from offload.optim.split import Precision

# The noise of a piece stays in the cache of the thread that has drawn it.
PIECE_NUMEL = 32 * NOISE_BLOCK_NUMEL

_KERNEL_DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "uint16", "fp16": "int16"}


class ZerothOrderRule:
    """The settings of forward-only training; the step keeps no state for a parameter.

    Attributes:
        perturbation: the scale of the noise in the two passes, eps in [Note: Zeroth order].
        seed: of the noise.
    """

    name: ClassVar[str] = "mezo"
    hyper_defaults: ClassVar[dict[str, Any]] = {"lr": 1e-6, "weight_decay": 0.0}

    def __init__(self, *, perturbation: float, seed: int) -> None:
        self.perturbation = perturbation
        self.seed = seed


def perturb_weights(
    weight: NDArray[Any],
    perturbed: NDArray[Any],
    *,
    precision: Precision,
    noise: Noise,
    start: int,
    scale: float,
) -> None:
    """Set perturbed = weight + scale * noise; both are 1-D, fp32 or 16-bit floats as uint16 bits.

    `start` is the first element's place in its parameter, a multiple of 1024. `perturbed` may be
    `weight` itself.
    """
    dtype = _KERNEL_DTYPES[precision]
    kernel = compiled(kernels.perturb, dtype, "float32", dtype, 1)
    drawn = np.empty(len(weight), np.float32)
    noise.fill(drawn, start)
    kernel(
        kernel_view(weight, precision),
        drawn,
        kernel_view(perturbed, precision),
        (np.float32(scale),),
    )


def update_weights(
    weight: NDArray[Any],
    *,
    precision: Precision,
    noise: Noise,
    start: int,
    projected_gradient: float,
    hyper: Hyper,
) -> bool:
    """Apply one step in place; arguments as of `perturb_weights`.

    Returns:
        Whether all updated weights are finite. If not, they have been written.
    """
    dtype = _KERNEL_DTYPES[precision]
    kernel = compiled(kernels.zeroth_order, dtype, "float32", 3)
    drawn = np.empty(len(weight), np.float32)
    noise.fill(drawn, start)
    settings = {**ZerothOrderRule.hyper_defaults, **hyper}
    scalars = (projected_gradient, float(settings["weight_decay"]), float(settings["lr"]))
    largest = kernel(
        kernel_view(weight, precision), drawn, tuple(np.float32(scalar) for scalar in scalars)
    )
    return int(largest) < FIRST_UNHOLDABLE[precision]


class _Piece(NamedTuple):
    """`numel` weights of a parameter: where they start in it and in their chunk."""

    param: int
    start: int
    start_in_chunk: int
    numel: int
    field: Field

    def array(self, block: torch.Tensor) -> NDArray[Any]:
        """These weights in a chunk block, as kernels take them."""
        return field_array(block, self.field, self.start_in_chunk, self.numel)


class ZerothOrderUpdate(ChunkUpdate):
    """Perturbs and updates the weights of one chunk, cut into pieces for the pool's threads."""

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        store: BlockStore,
        rule: ZerothOrderRule,
        pool: ComputePool,
    ) -> None:
        super().__init__(parameters, store)
        self.rule = rule
        self._pool = pool

    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """See `ChunkUpdate.update`."""
        calls, owners = [], []
        block = work.staged["weights"].tensor
        for piece in self._pieces(work.bucket, work.chunk, work.segments):
            calls.append(
                partial(
                    update_weights,
                    piece.array(block),
                    precision=cast("Precision", work.bucket.dtype),
                    noise=Noise(self.rule.seed, settings.step, piece.param),
                    start=piece.start,
                    projected_gradient=settings.gradient_scale,
                    hyper=settings.hyper[piece.param],
                )
            )
            owners.append(piece.param)
        finite = self._pool.run(calls)
        return None if all(finite) else self._parameters[owners[finite.index(False)]]

    def perturb(
        self,
        bucket: Bucket,
        chunk: int,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        step: int,
        scales: Mapping[int, float],
    ) -> None:
        """Set the weights of chunk block `target` to those of `source` plus scale * noise.

        Both are uint8, 1-D, in memory that the CPU reaches. Padding of the target is not written.
        `scales` are by parameter; one that has none is copied.
        """
        parts = segments(bucket, bucket.chunks[chunk])
        self._pool.run(
            [
                partial(
                    perturb_weights,
                    piece.array(source),
                    piece.array(target),
                    precision=cast("Precision", bucket.dtype),
                    noise=Noise(self.rule.seed, step, piece.param),
                    start=piece.start,
                    scale=scales[piece.param],
                )
                if piece.param in scales
                else partial(np.copyto, piece.array(target), piece.array(source))
                for piece in self._pieces(bucket, chunk, parts)
            ]
        )

    def _pieces(self, bucket: Bucket, chunk: int, parts: Sequence[Segment]) -> Iterator[_Piece]:
        (field,) = self._store.block(bucket.index, "weights").layout.element_fields(chunk)
        for segment in parts:
            for start in range(0, segment.numel, PIECE_NUMEL):
                numel = min(PIECE_NUMEL, segment.numel - start)
                yield _Piece(
                    segment.param,
                    segment.start_in_param + start,
                    segment.start_in_chunk + start,
                    numel,
                    field,
                )
