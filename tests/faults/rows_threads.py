"""Rows: forward and backward in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Blocks, inputs, loss_of, weight
from tests.threads import SECONDS, run_in_threads


def _in_threads(count: int, work: Any) -> None:
    run_in_threads(*(partial(work, index) for index in range(count)))


@row("forward", "pack", make=Blocks, pages=4)
def backward_in_four_threads(run: Run) -> None:
    for step in range(5):
        roots = [inputs(step * 10 + i).requires_grad_() for i in range(4)]
        losses = [loss_of(run(x)) for x in roots]
        slopes: list[Any] = [None] * 4

        def work(
            index: int,
            losses: list[torch.Tensor] = losses,
            roots: list[torch.Tensor] = roots,
            slopes: list[Any] = slopes,
        ) -> None:
            (slopes[index],) = torch.autograd.grad(losses[index], roots[index], retain_graph=True)

        _in_threads(4, work)
        run.record("slopes", slopes)
        run.train(sum(losses))  # type: ignore[arg-type]


@row("forward", "pack", make=Blocks, pages=8)
def forward_and_backward_in_four_threads(run: Run) -> None:
    for step in range(5):
        slopes: list[Any] = [None] * 4

        def work(index: int, step: int = step, slopes: list[Any] = slopes) -> None:
            x = inputs(step * 10 + index).requires_grad_()
            (slopes[index],) = torch.autograd.grad(loss_of(run(x)), x)

        _in_threads(4, work)
        run.record("slopes", slopes)
        run.train(loss_of(run(inputs(step))))


class _Busy(threading.local):
    """What a thread does in the middle of an op, None for nothing."""

    work: Callable[[], None] | None = None

    def run(self) -> None:
        if self.work is not None:
            self.work()


_BUSY = _Busy()


@torch.library.custom_op("offload_rows::slow_matmul", mutates_args=())
def _slow_matmul(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A product that reads its matrix only after a while."""
    _BUSY.run()
    return x @ matrix


class _SlowBackward(torch.autograd.Function):
    """A product whose backward reads its matrix only after a while."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(matrix)
        return x @ matrix

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[torch.Tensor, None]:
        (matrix,) = ctx.saved_tensors
        _BUSY.run()
        with torch._C.DisableTorchFunctionSubclass():  # reads it as a node in C++ does
            return slopes[0] @ matrix.t(), None


class BlocksAndMatrix(nn.Module):
    """Blocks, and a matrix that may be the only one to be used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Blocks()
        self.matrix = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, slowly: bool = False) -> torch.Tensor:
        if slowly:
            return _SlowBackward.apply(x, self.matrix)  # type: ignore[no-any-return]
        return self.body(x) @ self.matrix


def _while_another_thread_uses_all_pages(run: Run, step: int, slow: Callable[[], Any]) -> Any:
    """`slow()` in a thread; in the middle of its op another runs the whole module."""
    results: list[Any] = [None, None]
    in_the_middle, done = threading.Event(), threading.Event()

    def wait() -> None:
        in_the_middle.set()
        came = done.wait(SECONDS)
        assert came

    def work(index: int) -> None:
        if index == 0:
            _BUSY.work = wait
            results[0] = slow()
            return
        came = in_the_middle.wait(SECONDS)
        assert came
        try:
            x = inputs(step).requires_grad_()
            (results[1],) = torch.autograd.grad(loss_of(run(x)), x)
        finally:
            done.set()

    _in_threads(2, work)
    return results


@row("dispatch", "pins", make=BlocksAndMatrix, pages=3)
def other_threads_leave_the_pages_of_a_running_op(run: Run) -> None:
    for step in range(3):

        def slow(step: int = step) -> torch.Tensor:
            return _slow_matmul(inputs(step), run.module.matrix)  # type: ignore[arg-type]

        with torch.no_grad():
            run.record("before", _slow_matmul(inputs(step), run.module.matrix))  # type: ignore[arg-type]
        run.record("results", _while_another_thread_uses_all_pages(run, step, slow))
        run.train(loss_of(run(inputs(step))))


@row("pack", "node_pin", make=BlocksAndMatrix, pages=3)
def other_threads_leave_the_pages_of_a_running_node(run: Run) -> None:
    for step in range(3):
        x = inputs(step + 10).requires_grad_()
        out = loss_of(run(x, slowly=True))

        def slow(out: torch.Tensor = out, x: torch.Tensor = x) -> torch.Tensor:
            return torch.autograd.grad(out, x)[0]

        run.record("results", _while_another_thread_uses_all_pages(run, step, slow))
        run.train(loss_of(run(inputs(step))))
