"""One step in layer-major order: every micro-batch runs a layer before any runs the next.

[Note: Layer-major order]
    forward     each micro-batch is a coroutine (coroutines.py). The ones that wait at the foremost
                cut go on to their next one, number 0 first.
    check       every segment of every graph has to be by itself (graph.py); else nothing has moved
                yet, and `Crossed` says so
    backward    the segments in the opposite order, of each the micro-batches from number 0 on

So weights come once for the forward and once for the backward of all micro-batches, where the
usual order brings them for each, and the gradients of a layer arrive one after the other. What is
saved for backward is there for all micro-batches at once.

Nothing depends on micro-batches going the same way: one that skips a layer waits at the next cut
that it reaches, and the order of its backward is that of its own segments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from offload.engine.accumulation.buffers import Stamp, changed
from offload.engine.accumulation.coroutines import Coroutine
from offload.engine.accumulation.cuts import (
    START,
    Crossing,
    Cut,
    Place,
    cut_off,
    hooked,
    travelling,
)
from offload.engine.accumulation.graph import CanHold, Crossed, check_segments
from offload.engine.accumulation.ledger import Ledger, Piece
from offload.engine.accumulation.streams import Stream


class Losses(NamedTuple):
    """What the forward of a micro-batch returns: its loss, and what backward starts from."""

    loss: torch.Tensor
    scaled: torch.Tensor


class Surroundings(NamedTuple):
    """What the engine does around the parts of a step.

    Attributes:
        device: the engine's.
        unwind: after a forward that has failed, in its thread.
        in_one_run: around all forwards.
        in_backward: around all backwards, given what decides about each gradient that arrives.
        after_piece: after each call of autograd.
        can_hold: see `Ledger`.
        stamps: of the module's buffers; see [Note: Edited buffers].
    """

    device: torch.device
    unwind: Callable[[], None]
    in_one_run: Callable[[], AbstractContextManager[None]]
    in_backward: Callable[[Ledger], AbstractContextManager[None]]
    after_piece: Callable[[], None]
    can_hold: CanHold
    stamps: Callable[[], dict[str, Stamp]]


class _Segment:
    """The part of one graph from a cut on."""

    def __init__(self, cut: Cut, crossings: Sequence[Crossing]) -> None:
        self.cut = cut
        self.crossings = crossings


class _MicroBatch:
    """A micro-batch on its way through the module.

    Attributes:
        at: the cut at which its forward waits.
        segments: those that it has begun.
    """

    def __init__(
        self,
        call: Callable[[], Losses],
        stream: Stream,
        narrow: frozenset[Cut],
        surroundings: Surroundings,
    ) -> None:
        self.at = START
        self.segments = [_Segment(START, ())]
        self.stream = stream
        self.seen: set[Cut] = set()
        self._narrow = narrow

        def travel() -> Losses:
            with travelling(self):
                return call()

        self.coroutine = Coroutine(travel, unwind=surroundings.unwind, device=surroundings.device)

    def reach(self, cut: Cut, values: Any) -> Any:
        """At a narrow cut, cut the graph and let the others come this far."""
        self.seen.add(cut)
        if cut not in self._narrow:
            return values
        values, crossings = cut_off(values, len(self.segments))
        self.segments.append(_Segment(cut, crossings))
        self.at = cut
        self.coroutine.park()
        return values

    @property
    def cuts(self) -> list[Cut]:
        """Where its segments begin."""
        return [segment.cut for segment in self.segments]

    def root_nodes(self) -> Iterator[list[Any]]:
        """The nodes at which backward enters each segment."""
        for after in self.segments[1:]:
            yield [crossing.origin.node for crossing in after.crossings]
        last = self.coroutine.result.scaled.grad_fn
        yield [] if last is None else [last]

    def roots(self, segment: int) -> list[tuple[Any, torch.Tensor | None]]:
        """From where backward goes through a segment, with gradients; those are forgotten here."""
        if segment == len(self.segments) - 1:
            return [(self.coroutine.result.scaled, None)]
        after = self.segments[segment + 1]
        crossings, after.crossings = after.crossings, ()
        return [each.taken() for each in crossings if each.gradient is not None]


class LayerMajorStep:
    """The forwards and backwards of all micro-batches of one step.

    Args:
        calls: the forward of each micro-batch.
        streams: of each.
        places: where cuts can be.
        narrow: the cuts at which graphs are cut.
        surroundings: the engine's part.

    Attributes:
        seen: the cuts that micro-batches have passed.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Losses]],
        streams: Sequence[Stream],
        places: Sequence[Place],
        narrow: frozenset[Cut],
        surroundings: Surroundings,
    ) -> None:
        self._places = places
        self._surroundings = surroundings
        self._micro_batches = [
            _MicroBatch(call, stream, narrow, surroundings)
            for call, stream in zip(calls, streams, strict=True)
        ]
        self._edits: dict[str, int] = {}  # which micro-batch has changed a buffer last
        self._begun: dict[Piece, None] = {}  # in this order

    @property
    def seen(self) -> set[Cut]:
        """The cuts that micro-batches have passed."""
        return set().union(*(each.seen for each in self._micro_batches))

    def forward(self) -> None:
        """Run all forwards. An error in one ends the others.

        Raises:
            Crossed: a buffer is changed in another order than the usual one.
            BaseException: what a forward has raised.
        """
        with hooked(self._places), self._surroundings.in_one_run(), self._ending():
            while waiting := [m for m in self._micro_batches if not m.coroutine.is_over]:
                foremost = min(each.at for each in waiting)
                for number, each in enumerate(self._micro_batches):
                    if each in waiting and each.at == foremost:
                        self._resume(number, each)

    def _resume(self, number: int, micro_batch: _MicroBatch) -> None:
        piece = Piece(number, len(micro_batch.segments) - 1)
        self._begun.setdefault(piece)
        before = self._surroundings.stamps()
        with micro_batch.stream.entered():
            micro_batch.coroutine.resume()
        for name in changed(before, self._surroundings.stamps()):
            if self._edits.get(name, 0) > number:
                raise Crossed(dict.fromkeys(micro_batch.cuts, f"an edit of buffer {name}"))
            self._edits[name] = number

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        finally:
            for each in self._micro_batches:
                with each.stream.entered():
                    each.coroutine.end()

    def backward(self) -> list[torch.Tensor]:
        """Run all backwards; the losses of the micro-batches, in order, without their graphs.

        Raises:
            Crossed: a segment is not by itself; nothing has moved.
            BaseException: what a backward has raised.
        """
        micro_batches = self._micro_batches
        pieces = self._pieces()
        cuts = [each.cuts for each in micro_batches]
        uses = [check_segments(each.cuts, list(each.root_nodes())) for each in micro_batches]
        ledger = Ledger(pieces, uses, cuts, self._surroundings.can_hold)
        losses = [each.coroutine.result.loss.detach() for each in micro_batches]
        del uses
        with self._surroundings.in_backward(ledger):
            for piece in pieces:
                micro_batch = micro_batches[piece.micro_batch]
                roots = micro_batch.roots(piece.segment)
                with micro_batch.stream.entered():
                    _run([*roots, *ledger.begin(piece)])
                    for root in ledger.end(piece):
                        _run([root])  # alone: roots at one leaf would arrive as their sum
                del roots
                self._surroundings.after_piece()
        return losses

    def _pieces(self) -> list[Piece]:
        """Last layers first, of each layer the micro-batches from number 0 on."""
        layers: list[list[Piece]] = []
        last: Cut | None = None
        for piece in self._begun:
            cut = self._micro_batches[piece.micro_batch].segments[piece.segment].cut
            if cut != last:
                layers.append([])
                last = cut
            layers[-1].append(piece)
        return [piece for layer in reversed(layers) for piece in sorted(layer)]


def _run(roots: Sequence[tuple[Any, torch.Tensor | None]]) -> None:
    if roots:
        tensors, gradients = zip(*roots, strict=True)
        torch.autograd.backward(tensors, gradients)
