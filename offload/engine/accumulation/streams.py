"""What of the process one micro-batch has for itself while it runs.

[Note: Micro-batch streams]
In the usual order all micro-batches of a step draw from one stream of random numbers, one after the
other; how much the first takes says where the second begins. In layer-major order they would take
turns. So `engine.accumulate` gives every micro-batch a stream of its own, in both orders: for each
one a seed is drawn from torch's CPU generator, and the generators of torch (CPU and the engine's
device), of `random` and of numpy start from it. A stream goes on where it was whenever its
micro-batch runs, in forward and in backward. Afterwards the generators are as they were after the
seeds were drawn.

What else torch keeps once a process, and a forward may set for the time of a few layers, travels
with the stream: the default dtype, and which attention kernels are allowed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

_cuda: Any = torch.backends.cuda
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
)


class _Process(NamedTuple):
    """The state of the process that a stream replaces while it is entered."""

    torch_states: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any
    switches: tuple[Any, ...]


def draw_seeds(count: int) -> list[int]:
    """Seeds for `count` micro-batches, from torch's CPU generator."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device="cpu").tolist()


class Stream:
    """The random numbers and switches of one micro-batch; see [Note: Micro-batch streams].

    Args:
        seed: from `draw_seeds`.
        device: whose generator is part of it, beside that of the CPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = _generators(device)
        self._state: _Process | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A block in which the micro-batch runs."""
        outside = self._captured()
        try:
            self._enter()
            yield
        finally:
            self._state = self._captured()
            self._restore(outside)

    def _enter(self) -> None:
        if self._state is not None:
            self._restore(self._state)
            return
        for generator in self._generators:
            generator.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)  # noqa: NPY002 - the global generator is what models use

    def _captured(self) -> _Process:
        return _Process(
            tuple(generator.get_state() for generator in self._generators),
            random.getstate(),
            np.random.get_state(legacy=False),  # noqa: NPY002
            tuple(get() for get, _ in _SWITCHES),
        )

    def _restore(self, state: _Process) -> None:
        for generator, its_state in zip(self._generators, state.torch_states, strict=True):
            generator.set_state(its_state)
        random.setstate(state.python)
        np.random.set_state(state.numpy)  # noqa: NPY002
        for (get, set_), value in zip(_SWITCHES, state.switches, strict=True):
            if get() != value:
                set_(value)


def _generators(device: torch.device) -> tuple[torch.Generator, ...]:
    if device.type != "cuda":
        return (torch.default_generator,)
    return torch.default_generator, torch.cuda.default_generators[device.index]
