"""Forward-only training in memory: plain PyTorch, and Philox written from its paper in numpy.

Knows nothing of `offload`. Logarithm, sine and cosine are those of the C library in extended
precision, so that the last bit is right whatever series the package uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Words = npt.NDArray[np.uint64]


def philox(counter: tuple[Words, ...], key: tuple[int, int]) -> tuple[Words, ...]:
    """Philox4x32-10 (Salmon et al. 2011, figure 4) on arrays of counters."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    left, right = (np.uint64(multiplier) for multiplier in (0xD2511F53, 0xCD9E8D57))
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * left, c2 * right
        c0, c2 = (second >> shift) ^ c1 ^ np.uint64(k0), (first >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & mask, first & mask
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def normals(numel: int, *, seed: int, step: int, parameter: int) -> npt.NDArray[np.float32]:
    """The first `numel` normals of a parameter in a step."""
    blocks = -(-numel // 1024)
    counter = np.arange(256 * blocks, dtype=np.uint64)
    words = philox(
        (
            counter & np.uint64(0xFFFFFFFF),
            counter >> np.uint64(32),
            np.full_like(counter, parameter),
            np.full_like(counter, step),
        ),
        (seed % 2**32, seed >> 32),
    )
    wide = np.longdouble
    pi = 4 * np.arctan(wide(1))
    parts = []
    for x, y in (words[:2], words[2:]):
        radius = np.sqrt(-2 * np.log((x.astype(wide) + wide(0.5)) / wide(2**32)))
        angle = 2 * pi * (y.astype(wide) / wide(2**32))
        parts += [radius * np.cos(angle), radius * np.sin(angle)]
    drawn = np.stack([part.astype(np.float32).reshape(blocks, 256) for part in parts], axis=1)
    return drawn.reshape(-1)[:numel]


class PlainMezo:
    """MeZO's algorithm 1 on a module in memory; each weight is rounded once where it changes."""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        perturbation: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.module = module
        self.lr = lr
        self.perturbation = perturbation
        self.weight_decay = weight_decay
        self.seed = seed
        self.steps = 0
        self.losses: list[float] = []
        self.projected: list[float] = []
        self._trained: list[tuple[int, nn.Parameter]] = []

    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        """Two passes with the same random numbers, and the update."""
        self.update(self.project(closure))

    def project(self, closure: Callable[[], torch.Tensor]) -> float:
        """The projected gradient of a new step; the weights are as before."""
        self.steps += 1
        self._trained = [
            (index, p) for index, p in enumerate(self.module.parameters()) if p.requires_grad
        ]
        eps = self.perturbation
        true = {index: p.detach().clone() for index, p in self._trained}
        losses = []
        state = torch.get_rng_state()
        with torch.no_grad():
            for sign in (1, -1):
                torch.set_rng_state(state)
                for index, parameter in self._trained:
                    moved = _fp32(true[index]) + np.float32(sign * eps) * self._noise(index)
                    parameter.copy_(_like(moved, parameter))
                losses.append(closure().item())
            for index, parameter in self._trained:
                parameter.copy_(true[index])
        self.losses.append(sum(losses) / 2)
        self.projected.append((losses[0] - losses[1]) / (2 * eps))
        return self.projected[-1]

    def update(self, projected: float) -> None:
        """Step along the noise of the step that was projected last."""
        with torch.no_grad():
            for index, parameter in self._trained:
                weight = _fp32(parameter.detach())
                decay = np.float32(self.weight_decay) * weight
                gradient = np.float32(projected) * self._noise(index) + decay
                parameter.copy_(_like(weight - np.float32(self.lr) * gradient, parameter))

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def _noise(self, index: int) -> npt.NDArray[np.float32]:
        numel = dict(self._trained)[index].numel()
        return normals(numel, seed=self.seed, step=self.steps, parameter=index)


def _fp32(tensor: torch.Tensor) -> Any:
    """In memory order; the parameters of these tests are contiguous, or transposed."""
    order = tensor if tensor.is_contiguous() else tensor.t()
    return order.float().flatten().numpy()


def _like(values: Any, parameter: torch.Tensor) -> torch.Tensor:
    flat = torch.from_numpy(values).to(parameter.dtype)
    return flat.as_strided(parameter.shape, parameter.stride())
