"""What is true of one parameter, wherever its bytes are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch


@dataclass(slots=True, eq=False)
class ParameterState:
    """One parameter of the module: its place in its bucket, and the facts that outlive a step.

    Attributes:
        index: place in registration order.
        names: every name it has in the module; the first is its canonical name.
        parameter: the module's own object, or a tensor inside one that is a composite; its storage
            comes and goes.
        shape, stride: as the module sees it, in elements; the stride is dense.
        numel: elements in memory order (a complex parameter counts its real and imaginary parts,
            a part of a composite its bytes).
        bucket, offset: where its elements start, in elements of the bucket.
        trainable: it has a gradient and optimizer state; whether it gets a gradient at present is
            for its `requires_grad` to say.
        steps: optimizer steps this parameter has taken (0 before its first gradient).
        edited: the weight was changed by something other than the optimizer, and what completes it
            to fp32 (remainder, master) has not followed yet; whoever touches that next sets it
            from the weight.
        gradient_sums: fp64 sums of squares of its gradient over fixed blocks of 65,536 elements
            (non-finite if an element is); None while no gradient has arrived in this step.
    """

    index: int
    names: tuple[str, ...]
    parameter: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    numel: int
    bucket: int
    offset: int
    trainable: bool = True
    steps: int = 0
    edited: bool = False
    gradient_sums: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The canonical name: the first under which the module registered it."""
        return self.names[0]
