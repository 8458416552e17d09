"""A scheduler that was made for another optimizer, on the engine's."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def moved_to(optimizer: Optimizer, scheduler: LRScheduler) -> LRScheduler:
    """Let `scheduler` set the rates of `optimizer`, whose groups are copies of its own's.

    So are the schedulers that it consists of. Returns it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    # torch marks the optimizer of a scheduler, to warn of steps in the wrong order.
    LambdaLR(optimizer, lambda _: 1.0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _move(optimizer, scheduler)
    return scheduler


def _move(optimizer: Optimizer, scheduler: Any) -> None:
    scheduler.optimizer = optimizer
    for part in getattr(scheduler, "_schedulers", ()):
        _move(optimizer, part)
