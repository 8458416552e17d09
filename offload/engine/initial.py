"""Where the values come from that a bucket starts with.

The default is the parameter's own memory. A source that makes them on demand (deferred
initialization, a file) lets a model be placed that was never in memory as a whole.
"""

from __future__ import annotations

from typing import Protocol

import torch

from offload.partition.arrays import memory_order
from offload.partition.parameters import ParameterState


class InitialWeights(Protocol):
    """The initial weights of a module, a range at a time."""

    def read(self, state: ParameterState, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the parameter in the order of its memory: 1-D.

        `start` and `numel` count as `state.numel` does (a complex element is two). The dtype is
        the source's own: a floating one is converted by the caller, from fp32 without loss. The
        ranges of a parameter are read in order, and those of one parameter after the other.

        Raises:
            OffloadError: the values cannot be had; parameters read before have moved.
        """
        ...


class OwnMemory:
    """The values that the parameters hold themselves."""

    def read(self, state: ParameterState, start: int, numel: int) -> torch.Tensor:
        """As `InitialWeights.read`; a view where the parameter lies in memory as it is stored."""
        return memory_order(state.parameter, state)[start : start + numel]
