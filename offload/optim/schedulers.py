"""Learning rate schedules of the config's `[lr_scheduler]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offload.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from offload.config import LrSchedulerSection


def make_lr_scheduler(
    section: LrSchedulerSection, optimizer: Optimizer, *, total_steps: int | None = None
) -> LRScheduler:
    """Return the scheduler of the section, as a `LambdaLR` on all of the optimizer's groups.

    Args:
        section: `[lr_scheduler]`.
        optimizer: Whose learning rates it sets.
        total_steps: What `total_steps = "auto"` means: the steps of the run, if it is known.

    Raises:
        ConfigError: A decay has no end: `total_steps` is neither set nor known.
    """
    from torch.optim.lr_scheduler import LambdaLR

    steps = total_steps if section.total_steps == "auto" else section.total_steps
    return LambdaLR(optimizer, lr_share(section, steps))


def adopt_group(scheduler: LRScheduler, group: dict[str, Any]) -> None:
    """Let the scheduler of `make_lr_scheduler` set the rate of a group that came after it.

    The group's rate is what it has at its peak, as that of the other groups was.
    """
    from torch.optim.lr_scheduler import LambdaLR

    assert isinstance(scheduler, LambdaLR)
    share = scheduler.lr_lambdas[0]
    group["initial_lr"] = group["lr"]
    group["lr"] = group["initial_lr"] * share(scheduler.last_epoch)
    scheduler.base_lrs.append(group["initial_lr"])
    scheduler.lr_lambdas.append(share)
    scheduler._last_lr.append(group["lr"])


def lr_share(section: LrSchedulerSection, total_steps: int | None) -> Callable[[int], float]:
    """Return the share of the learning rate as a function of the steps taken (0 at the start).

    It rises linearly from 0 to 1 in `warmup_steps`; after that `constant` stays at 1, and `linear`
    and `cosine` reach `min_lr_ratio` at `total_steps` and stay there.
    """
    if section.name == "constant":
        return lambda step: _warmup_share(section, step)
    if total_steps is None:
        problem = (
            f"lr_scheduler.total_steps is auto with name = {section.name!r}: expected a number "
            "where run.steps is not set"
        )
        raise ConfigError(problems=[problem])
    decay_steps = max(1, total_steps - section.warmup_steps)

    def share(step: int) -> float:
        if step < section.warmup_steps:
            return _warmup_share(section, step)
        progress = min(1.0, (step - section.warmup_steps) / decay_steps)
        falling = (
            1 - progress if section.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        return section.min_lr_ratio + (1 - section.min_lr_ratio) * falling

    return share


def _warmup_share(section: LrSchedulerSection, step: int) -> float:
    return min(1.0, step / section.warmup_steps) if section.warmup_steps else 1.0
