"""Chunks are complete when every gradient that is due has arrived, each as often as it should."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from offload.optim.complete_chunks import CompleteChunks
from offload.partition.layout import Segment
from offload.partition.parameters import ParameterState


class State:
    """What is asked of a parameter's state."""

    def __init__(self, index: int) -> None:
        self.index = index


def state(index: int) -> ParameterState:
    return cast("ParameterState", State(index))


PARAMETERS = [(0,), (0, 1), (1,)]  # by chunk


def make() -> tuple[CompleteChunks, Any]:
    """A bucket of three chunks, and what waits for its gradients."""
    bucket = SimpleNamespace(index=0, chunks=[SimpleNamespace(index=i) for i in range(3)])
    return CompleteChunks(lambda _, chunk: [Segment(p, 0, 0, 1) for p in PARAMETERS[chunk]]), bucket


def test_a_chunk_waits_for_all_its_parameters() -> None:
    chunks, bucket = make()
    chunks.expect({0, 1}, 1)
    chunks.note(state(1), bucket)
    assert list(chunks) == [(0, 2)]
    chunks.note(state(0), bucket)
    assert list(chunks) == [(0, 2), (0, 0), (0, 1)]
    assert chunks.is_one_too_many(state(0))
    chunks.discard((0, 0))
    chunks.discard((0, 0))
    assert list(chunks) == [(0, 2), (0, 1)]
    chunks.expect({0, 1}, 1)
    assert not chunks


def test_arrivals_are_counted() -> None:
    chunks, bucket = make()
    chunks.expect({0, 1}, 2)
    chunks.note(state(1), bucket)
    assert not chunks
    assert not chunks.is_one_too_many(state(1))
    chunks.note(state(1), bucket)
    assert list(chunks) == [(0, 2)]


def test_what_is_not_due_is_not_waited_for() -> None:
    chunks, bucket = make()
    chunks.expect({0}, 1)
    chunks.note(state(1), bucket)
    assert not chunks
    chunks.note(state(0), bucket)
    assert list(chunks) == [(0, 0), (0, 1)]
