"""What a step in the usual order shows of a module: where its graphs can be cut, if at all.

[Note: Survey]
The first step runs in the usual order and is watched: every graph is marked at its cuts and walked
(graph.py); gradients are counted as they arrive, and edits of buffers too. So is a later step if
micro-batches pass cuts that no survey has seen. Two findings rule layer-major order out for good:

  a parameter whose gradient arrives twice in one backward: the graph does not show all its uses
  (functions that run a backward of their own hide them), so that nobody knows which parts belong
  together
  a buffer that changes in backward, see [Note: Edited buffers]
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from offload.engine.accumulation.buffers import Buffers
from offload.engine.accumulation.cuts import Cut, Place, crossing_edges, hooked, travelling
from offload.engine.accumulation.graph import CanHold, Mark, wide_cuts
from offload.partition.parameters import ParameterState


class Knowledge:
    """What surveys have found, and later steps have added.

    Attributes:
        places: where cuts can be.
        narrow: the cuts that were narrow in every graph so far.
        wide: what has crossed the others.
        edited: names of the buffers that forwards change.
        refusal: why layer-major order is out of the question; None: it is not.
        is_due: the next step is one to watch.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.narrow: frozenset[Cut] = frozenset()
        self.wide: dict[Cut, str] = {}
        self.edited: set[str] = set()
        self.refusal: str | None = None if places else "the module has no list of equal blocks"
        self.is_due = True

    def add(self, seen: set[Cut], wide: dict[Cut, str]) -> None:
        """Graphs have passed the cuts `seen`, of which those in `wide` were not narrow."""
        self.wide.update(wide)
        self.narrow = (self.narrow | seen) - self.wide.keys()

    def conclude(self) -> None:
        """A survey is over."""
        self.is_due = False
        if self.refusal is None and not self.narrow:
            self.refusal = "; ".join(
                f"{reason} crosses the cut {self.places[cut.place]}"
                for cut, reason in sorted(self.wide.items())[:2]
            ) or (
                "no block has run with gradients; reentrant checkpoints hide them: "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )


class Survey:
    """Watches one micro-batch in the usual order."""

    def __init__(self, module: nn.Module, knowledge: Knowledge, can_hold: CanHold) -> None:
        self._module = module
        self._knowledge = knowledge
        self._can_hold = can_hold
        self._marks: list[Mark] = []
        self._arrivals: Counter[str] = Counter()
        self._buffers = Buffers(module)
        self._edits: dict[str, list[int]] = {}  # of each buffer, the numbers of marks before them

    def reach(self, cut: Cut, values: Any) -> Any:
        """Mark the graph at the cut."""
        self._note_edits()
        position = torch._C._autograd._get_sequence_nr()
        self._marks.append(Mark(cut, position, crossing_edges(values)))
        return values

    def keep(self, state: ParameterState, gradient: torch.Tensor | None) -> bool:
        """Count a gradient that arrives; those of tiles come in parts that the graph shows."""
        self._arrivals[state.name] += gradient is not None
        return False

    def forward(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a forward, and see what of its graph can be cut."""
        with hooked(self._knowledge.places), travelling(self):
            loss = call()
        self._note_edits()
        self._knowledge.edited |= self._edits.keys()
        wide = {
            mark.cut: f"an edit of buffer {name}, after another on the other side,"
            for name, edits in self._edits.items()
            for mark in self._marks[edits[0] : edits[-1]]
        }
        if loss.grad_fn is not None:
            wide |= wide_cuts(loss.grad_fn, self._marks, self._can_hold)
        self._knowledge.add({mark.cut for mark in self._marks}, wide)
        return loss

    def _note_edits(self) -> None:
        edited = self._buffers.edited()
        if edited:
            for name in edited:
                self._edits.setdefault(name, []).append(len(self._marks))
            self._buffers = Buffers(self._module)

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """A block in which its backward runs, with `keep` asked about every gradient."""
        before = Buffers(self._module)
        yield
        edited = before.edited()
        hidden = [name for name, count in self._arrivals.items() if count > 1]
        if edited:
            self._knowledge.refusal = f"buffer {min(edited)} changes in backward"
        elif hidden:
            self._knowledge.refusal = (
                f"the gradient of parameter {hidden[0]} comes in parts, from inside of functions "
                "that hide them"
            )
