"""Gradients in parts, or out of order: held back until they arrive as in the usual order.

[Note: Held gradients]
In the usual order each parameter gets one gradient from each micro-batch, that of number 0 first;
one that is used in several places, such as an embedding that is the head too, gets the sum. Where
backward runs segment by segment, such a parameter's gradient comes in parts, those of all
micro-batches at one place before those at the next. And if micro-batches take different ways
through the module, a later one's may come first.

What backward is going to bring is known before it starts. So the parts of those parameters are held
back: each is the first summand of the next part of the same micro-batch, which makes autograd add
them in the order that it has in a whole graph. A sum that is complete goes home when those of all
micro-batches before it have. Until then it is on the device, beside the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from offload.engine.accumulation.cuts import Cut
from offload.engine.accumulation.graph import CanHold, Crossed, Uses
from offload.errors import EngineStateError
from offload.partition.parameters import ParameterState

_NO_GUARD = torch._C.DisableTorchFunctionSubclass


class Piece(NamedTuple):
    """One call of autograd: the backward of one segment of one micro-batch."""

    micro_batch: int
    segment: int


@dataclass(slots=True, eq=False)
class _Held:
    """A parameter whose gradients are held back.

    Attributes:
        edge: where its gradient is accumulated.
        missing: pieces that bring parts, by micro-batch; those that are home are taken out.
        sums: of the parts that have come, by micro-batch.
    """

    edge: GradientEdge
    missing: dict[int, set[Piece]]
    sums: dict[int, torch.Tensor] = field(default_factory=dict)


class Ledger:
    """What arrives in one backward of several micro-batches, and what has to wait.

    Args:
        pieces: in the order in which they run.
        uses: of each micro-batch.
        cuts: of each micro-batch, where its segments begin.
        can_hold: of leaves.

    Raises:
        Crossed: a leaf that cannot be held back would have to be.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        uses: Sequence[Uses],
        cuts: Sequence[Sequence[Cut]],
        can_hold: CanHold,
    ) -> None:
        self._running: Piece | None = None
        self._arrived_in: dict[int, Piece] = {}
        self._held: dict[int, _Held] = {}
        self._of_piece: dict[Piece, list[_Held]] = {}
        by_leaf: dict[int, list[Piece]] = {}
        leaves: dict[int, torch.Tensor] = {}
        for piece in pieces:
            mine = uses[piece.micro_batch]
            for leaf, segments in mine.segments.items():
                if piece.segment in segments:
                    by_leaf.setdefault(leaf, []).append(piece)
                    leaves[leaf] = mine.leaves[leaf]
        for leaf, bringing in by_leaf.items():
            order = [piece.micro_batch for piece in bringing]
            if order == sorted(set(order)):
                continue
            if not can_hold(leaves[leaf]):
                raise Crossed(_cuts_around(bringing, cuts, leaves[leaf]))
            self._hold(leaves[leaf], bringing)

    def _hold(self, leaf: torch.Tensor, pieces: Sequence[Piece]) -> None:
        missing: dict[int, set[Piece]] = {}
        for piece in pieces:
            missing.setdefault(piece.micro_batch, set()).add(piece)
        with _NO_GUARD():
            held = _Held(get_gradient_edge(leaf), dict(sorted(missing.items())))
        self._held[id(leaf)] = held
        for piece in pieces:
            self._of_piece.setdefault(piece, []).append(held)

    def begin(self, piece: Piece) -> list[tuple[GradientEdge, torch.Tensor]]:
        """A piece is about to run; what has to be added first to what it brings."""
        self._running = piece
        held = self._of_piece.get(piece, ())
        number = piece.micro_batch
        return [(one.edge, one.sums.pop(number)) for one in held if number in one.sums]

    def end(self, piece: Piece) -> list[tuple[GradientEdge, torch.Tensor]]:
        """The piece has run; the gradients that may go home now, in order."""
        self._running = None
        ready = []
        for held in self._of_piece.get(piece, ()):
            held.missing[piece.micro_batch].discard(piece)
            while held.missing and not next(iter(held.missing.values())):
                number = next(iter(held.missing))
                del held.missing[number]
                if number in held.sums:
                    ready.append((held.edge, held.sums.pop(number)))
        return ready

    def keep(self, state: ParameterState, gradient: torch.Tensor | None) -> bool:
        """A gradient is about to go home; whether it is kept here instead.

        None: of a parameter that takes its gradient by tiles.

        Raises:
            EngineStateError: it comes from where no graph has shown it, and in a wrong order.
        """
        piece = self._running
        if piece is None:
            return False
        held = self._held.get(id(state.parameter))
        if held is not None and gradient is not None:
            held.sums[piece.micro_batch] = gradient.detach()
            return True
        last = self._arrived_in.setdefault(state.index, piece)
        if last != piece and piece.micro_batch <= last.micro_batch:
            raise EngineStateError(
                f"the gradient of parameter {state.name} comes in parts from inside of functions "
                "that hide its uses, such as reentrant checkpoints",
                remedy='set training.accumulation = "micro_batch_major"',
            )
        self._arrived_in[state.index] = piece
        return False


def _cuts_around(
    pieces: Sequence[Piece], cuts: Sequence[Sequence[Cut]], leaf: torch.Tensor
) -> dict[Cut, str]:
    """Every cut from the first use of a leaf to its last, in each micro-batch."""
    found: list[Cut] = []
    for number, own_cuts in enumerate(cuts):
        segments = [piece.segment for piece in pieces if piece.micro_batch == number]
        if segments:
            found += own_cuts[min(segments) : max(segments) + 1]
    return dict.fromkeys(found, f"a leaf of shape {list(leaf.shape)}, which is used on both sides")
