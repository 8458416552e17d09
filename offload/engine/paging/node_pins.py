"""Pins of autograd nodes: a page that was unpacked for a node stays until the node has ended.

torch does not say when a node ends. It has ended when its thread runs another node of the same
backward, or of one that encloses it (numbers of graph tasks grow), or when the backward is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from offload.engine.paging.pages import WeightPage


class _Held(NamedTuple):
    task: int
    node: object
    page: WeightPage


class NodePins:
    """The pins that running autograd nodes hold, by thread. Called under `lock`, the pager's."""

    def __init__(
        self, unpin: Callable[[Sequence[WeightPage]], None], lock: AbstractContextManager[object]
    ) -> None:
        self._unpin = unpin
        self._lock = lock
        self._held: dict[int, list[_Held]] = {}
        self._watched_tasks: set[int] = set()

    def enter_node(self) -> None:
        """This thread runs the node that torch says it runs: nodes before it have ended."""
        held = self._held.get(threading.get_ident())
        if not held:
            return
        task = torch._C._current_graph_task_id()
        node = torch._C._current_autograd_node()
        ended = [h for h in held if h.task > task or (h.task == task and h.node is not node)]
        if ended:
            held[:] = [h for h in held if h not in ended]
            self._unpin([h.page for h in ended])

    def add(self, page: WeightPage) -> None:
        """Hold a pin of `page` for the node that runs in this thread."""
        task = torch._C._current_graph_task_id()
        held = self._held.setdefault(threading.get_ident(), [])
        held.append(_Held(task, torch._C._current_autograd_node(), page))
        if task not in self._watched_tasks:
            self._watched_tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _end(self, task: int) -> None:
        with self._lock:
            self._watched_tasks.discard(task)
            for thread in list(self._held):
                self._release(thread, task)

    def release_thread(self) -> None:
        """This thread runs no backward: what a failed one has left is free."""
        self._release(threading.get_ident(), None)

    def release_all(self) -> None:
        """No thread runs a backward."""
        self._watched_tasks.clear()
        for thread in list(self._held):
            self._release(thread, None)

    def _release(self, thread: int, task: int | None) -> None:
        held = self._held.get(thread, [])
        ended = [h for h in held if task is None or h.task == task]
        left = [h for h in held if task is not None and h.task != task]
        if left:
            self._held[thread] = left
        else:
            self._held.pop(thread, None)
        self._unpin([h.page for h in ended])
