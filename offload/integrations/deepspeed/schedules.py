"""DeepSpeed's learning rate schedules, number for number, as a torch scheduler.

[Note: DeepSpeed's count]
DeepSpeed steps its scheduler after every optimizer step that was taken, and counts from -1: after
`taken` steps its `last_batch_iteration` is `taken - 1`. So the warm-ups begin with two steps at the
lowest rate, and a cosine leaves its peak one step early. That is kept.

Source: DeepSpeed 0.19.8, `runtime/lr_schedules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# What each schedule's parameters are where they are not given; None: there is no such value.
DEFAULTS: dict[str, dict[str, Any]] = {
    "WarmupLR": {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": None,
        "warmup_num_steps": 1000,
        "warmup_type": "log",
    },
    "WarmupDecayLR": {
        "total_num_steps": None,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.001,
        "warmup_num_steps": 1000,
        "warmup_type": "log",
    },
    "WarmupCosineLR": {
        "total_num_steps": None,
        "warmup_min_ratio": 0.0,
        "warmup_num_steps": 1000,
        "cos_min_ratio": 0.0001,
        "warmup_type": "log",
    },
    "OneCycle": {
        "cycle_min_lr": None,
        "cycle_max_lr": None,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
}
NEEDED: dict[str, tuple[str, ...]] = {
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}
_CYCLE_BETA2 = 0.99  # DeepSpeed sets it whatever the optimizer's was


@dataclass(frozen=True, slots=True)
class Course:
    """A schedule of DeepSpeed with all its parameters.

    Attributes:
        name: a key of `DEFAULTS`.
        params: a value for each of its parameters.
    """

    name: str
    params: Mapping[str, Any]

    def rate(self, taken: int, base: float) -> float:
        """The learning rate after `taken` optimizer steps, of a group that was made with `base`."""
        return _RATES[self.name](self.params, taken - 1, base)

    def betas(self, taken: int) -> tuple[float, float] | None:
        """The betas that the schedule sets; None: it leaves them."""
        if self.name != "OneCycle" or not self.params["cycle_momentum"]:
            return None
        return _cycle_momentum(self.params, taken - 1), _CYCLE_BETA2


class CourseLR(LRScheduler):
    """The torch scheduler of a course.

    Attributes:
        course: what it follows; not part of the state.
    """

    def __init__(self, optimizer: Optimizer, course: Course) -> None:
        self.course = course
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [self.course.rate(self.last_epoch, float(base)) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        betas = self.course.betas(self.last_epoch)
        if betas is not None:
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = betas

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "course"}


def _warmup_gamma(params: Mapping[str, Any], iteration: int) -> float | None:
    """How far the warm-up is, 0 to 1; None when it is over."""
    steps = max(2, params["warmup_num_steps"])
    if iteration >= steps:
        return None
    if params["warmup_type"] == "linear":
        return float(iteration / steps)
    return (1.0 / math.log(steps)) * math.log(iteration + 1)


def _warmup(params: Mapping[str, Any], iteration: int, base: float) -> float:
    low = params["warmup_min_lr"]
    high = base if params["warmup_max_lr"] is None else params["warmup_max_lr"]
    if iteration < 0:
        return float(low)
    gamma = _warmup_gamma(params, iteration)
    return float(low + (high - low) * (1.0 if gamma is None else gamma))


def _warmup_decay(params: Mapping[str, Any], iteration: int, base: float) -> float:
    low, high = params["warmup_min_lr"], params["warmup_max_lr"]
    high = base if high is None else high
    if iteration < 0:
        return float(low)
    gamma = _warmup_gamma(params, iteration)
    if gamma is None:
        total, warmup = params["total_num_steps"], max(2, params["warmup_num_steps"])
        gamma = max(0.0, float(total - iteration) / float(max(1.0, total - warmup)))
    return float(low + (high - low) * gamma)


def _warmup_cosine(params: Mapping[str, Any], iteration: int, base: float) -> float:
    if iteration < 0:
        return 0.0
    gamma = _warmup_gamma(params, iteration)
    if gamma is not None:
        low = params["warmup_min_ratio"]
        return float(base * (low + gamma * (1.0 - low)))
    warmup = max(2, params["warmup_num_steps"])
    progress = min(1.0, (iteration - warmup + 1) / max(1, params["total_num_steps"] - warmup))
    low = params["cos_min_ratio"]
    ratio = (1 + math.cos(math.pi * progress)) / 2
    return float(base * max(0.0, low + (1.0 - low) * ratio))


def _cycle_sizes(params: Mapping[str, Any]) -> tuple[float, float]:
    first = float(params["cycle_first_step_size"])
    second = params["cycle_second_step_size"]
    return first, first if second is None else float(second)


def _cycle_scale(params: Mapping[str, Any], iteration: int) -> float:
    first, second = _cycle_sizes(params)
    total = first + second
    number = iteration + 1
    share = first / total
    place = 1.0 + number / total - math.floor(1 + number / total)
    rising = place <= share
    scale = place / share if rising else (place - 1) / (share - 1)
    first_stairs, second_stairs = (
        params["cycle_first_stair_count"],
        params["cycle_second_stair_count"],
    )
    stairs = first_stairs if rising or second_stairs is None else second_stairs
    if stairs > 0:
        inside = number % total
        stair = inside * stairs / first if inside <= first else (total - inside) * stairs / second
        return float(math.floor(stair) / stairs)
    return float(scale)


def _cycle_rate(params: Mapping[str, Any], iteration: int, _: float) -> float:
    low, high = params["cycle_min_lr"], params["cycle_max_lr"]
    if iteration < 0:
        return float(low)
    past = iteration - sum(_cycle_sizes(params))
    if past < 0:
        return float(low + (high - low) * _cycle_scale(params, iteration))
    if math.isclose(params["decay_step_size"], 0) or math.isclose(params["decay_lr_rate"], 0):
        return float(low)
    return float(low / (1 + params["decay_lr_rate"] * ((past + 1) / params["decay_step_size"])))


def _cycle_momentum(params: Mapping[str, Any], iteration: int) -> float:
    low, high = params["cycle_min_mom"], params["cycle_max_mom"]
    if iteration < 0:
        return float(low)
    past = iteration - sum(_cycle_sizes(params))
    if past < 0:
        return float(high - (high - low) * _cycle_scale(params, iteration))
    if math.isclose(params["decay_step_size"], 0) or math.isclose(params["decay_mom_rate"], 0):
        return float(high)
    return float(high * (1 + params["decay_mom_rate"] * ((past + 1) / params["decay_step_size"])))


def _range_test(params: Mapping[str, Any], iteration: int, _: float) -> float:
    interval = float(iteration + 1) / params["lr_range_test_step_size"]
    if params["lr_range_test_staircase"]:
        interval = math.floor(interval)
    rise = 1 + params["lr_range_test_step_rate"] * interval
    return float(params["lr_range_test_min_lr"] * rise)


_RATES: dict[str, Callable[[Mapping[str, Any], int, float], float]] = {
    "WarmupLR": _warmup,
    "WarmupDecayLR": _warmup_decay,
    "WarmupCosineLR": _warmup_cosine,
    "OneCycle": _cycle_rate,
    "LRRangeTest": _range_test,
}
