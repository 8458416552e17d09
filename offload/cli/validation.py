"""What the held-out losses of a run say: which was lowest, and whether to go on.

[Note: validation and resuming]
What is known goes into every checkpoint with the step of its last evaluation. A checkpoint that the
engine saves in a step is older than the evaluation after that step: the run that goes on from it
evaluates then, with the same result. So best step, patience and end are those of a run that was not
interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from offload.config import RunSection

BEST = "best"  # the tag of the checkpoint with the lowest held-out loss


class Best(NamedTuple):
    """The lowest held-out loss after a step, and which that was."""

    step: int
    loss: float


@dataclass(slots=True)
class Validation:
    """The evaluations of a run, in short.

    Attributes:
        every: steps between two; 0 = before the first step and after the last.
        patience: evaluations without a new best one that end the run; 0 = none do.
        before: held-out loss before the first step.
        best: None before the first evaluation after a step.
        stale: evaluations since the best one.
        last: the step of the last evaluation.
    """

    every: int
    patience: int
    before: float | None = None
    best: Best | None = None
    stale: int = 0
    last: int | None = None

    @classmethod
    def from_client_state(cls, state: Mapping[str, Any], section: RunSection) -> Validation:
        """As a checkpoint has it; an empty mapping is a new run."""
        made = cls(section.eval_every, section.patience, before=state.get("held_out_before"))
        if state.get("best") is not None:
            made.best = Best(*state["best"])
        made.stale, made.last = state.get("stale", 0), state.get("evaluated")
        return made

    def to_client_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "held_out_before": self.before,
            "best": None if self.best is None else list(self.best),
            "stale": self.stale,
            "evaluated": self.last,
        }

    @property
    def is_over(self) -> bool:
        """Whether the run ends early."""
        return 0 < self.patience <= self.stale

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this many steps, unless that was done."""
        if self.before is None:
            return True
        return bool(self.every) and step > 0 and step % self.every == 0 and step != self.last

    def add(self, step: int, loss: float) -> bool:
        """Take note of an evaluation; whether it is the best so far after a step."""
        repeated = step == self.last
        self.last = step
        if step == 0 or self.before is None:
            self.before = loss
            return False
        if repeated:
            return False
        if self.best is None or loss < self.best.loss:
            self.best, self.stale = Best(step, loss), 0
            return True
        self.stale += 1
        return False

    def describe_end(self) -> str:
        """Why the run is over."""
        assert self.best is not None
        return (
            f"stopped early: {self.stale} evaluations without a loss below that of step "
            f"{self.best.step}, {self.best.loss:.4f}"
        )
