"""The dynamic loss scale of fp16 training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from offload.errors import CheckpointError


class LossScale:
    """A loss scale that equals `torch.amp.GradScaler`, number for number; it is an fp32 value.

    After a step with a non-finite gradient it is multiplied by `backoff_factor`, after
    `growth_interval` steps in a row without one by `growth_factor`, unless that overflows fp32.

    Source: torch `_amp_update_scale_`.
    """

    scale: float

    def __init__(
        self,
        *,
        initial: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = float(np.float32(initial))
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._good_steps = 0

    def update(self, found_nonfinite: bool) -> None:
        """Move on after a step whose gradients held a non-finite element, or did not."""
        if found_nonfinite:
            self.scale = _as_fp32(self.scale * self._backoff_factor)
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps == self._growth_interval:
            grown = _as_fp32(self.scale * self._growth_factor)
            if math.isfinite(grown):
                self.scale = grown
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state under GradScaler's keys."""
        return {
            "scale": self.scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a `LossScale` or GradScaler.

        Raises:
            CheckpointError: A key is absent; this object is unchanged.
        """
        absent = sorted(set(self.state_dict()) - set(state))
        if absent:
            raise CheckpointError(
                f"the loss scale's state lacks {', '.join(absent)}",
                expected="what LossScale.state_dict() or GradScaler.state_dict() returned",
            )
        self.scale = float(state["scale"])
        self._growth_factor = float(state["growth_factor"])
        self._backoff_factor = float(state["backoff_factor"])
        self._growth_interval = int(state["growth_interval"])
        self._good_steps = int(state["_growth_tracker"])


def _as_fp32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))
