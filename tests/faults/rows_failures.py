"""Rows: exceptions and interrupts in the middle, and use after the end."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from offload.errors import OffloadError
from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Blocks, inputs, loss_of, weight
from tests.threads import run_in_threads


class StopError(Exception):
    """What rows throw."""


class Fails(torch.autograd.Function):
    """Its backward raises, if it is told to, when the weight has been brought back for it."""

    now = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        if Fails.now:
            raise StopError
        return g @ w.t(), x.t() @ g


def _is_consistent(run: Run) -> None:
    if run.engine is None:
        return
    for page in run.offloaded._parts.pages:
        assert page.windows == 0, f"bucket {page.index} is in a window"
        for parameter in page.parameters:
            plain = type(parameter.state.parameter) is parameter.plain_class
            assert plain is (parameter.plain_depth > 0)
            assert parameter.plain_depth == 0 or not page.is_paged
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def _forget_gradients(run: Run) -> None:
    if run.engine is not None:
        run.offloaded.optimizer.zero_grad()
    else:
        run.module.zero_grad()


@row("forward", "failed_forward", make=Blocks)
def exception_in_forward(run: Run) -> None:
    stop = []

    def hook(*_: Any) -> None:
        if stop:
            raise stop.pop()

    run.module.blocks[2].up.register_forward_pre_hook(hook)
    run.module.blocks[2].down.register_forward_hook(hook)
    for step in range(4):
        stop.append(StopError())
        with pytest.raises(StopError):
            run(inputs(step))
        _is_consistent(run)
        run.train(loss_of(run(inputs(step))))


@row("unwind", make=Blocks)
def interrupt_in_forward(run: Run) -> None:
    stop = []

    def hook(*_: Any) -> None:
        if stop:
            raise stop.pop()

    run.module.blocks[2].up.register_forward_pre_hook(hook)
    for step in range(4):
        stop.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(inputs(step))
        _is_consistent(run)
        run.train(loss_of(run(inputs(step))))


class FailsInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Blocks(2)
        self.middle = weight(WIDTH, WIDTH)
        self.last = Blocks(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(Fails.apply(self.first(x), self.middle))


@row("node_release", make=FailsInBackward)
def exception_in_backward(run: Run) -> None:
    for step in range(4):
        loss = loss_of(run(inputs(step)))
        Fails.now = True
        try:
            with pytest.raises(StopError):
                run.backward(loss)
        finally:
            Fails.now = False
        _is_consistent(run)
        _forget_gradients(run)
        if run.engine is not None:
            run.check_at_rest()
        run.train(loss_of(run(inputs(step))))


@row("node_release", make=FailsInBackward)
def exception_in_plain_backward(run: Run) -> None:
    for step in range(4):
        loss = loss_of(run(inputs(step)))
        Fails.now = True
        try:
            with pytest.raises(StopError):
                loss.backward()
        finally:
            Fails.now = False
        _forget_gradients(run)
        run.train(loss_of(run(inputs(step))))


@row("closing", make=Blocks, runs=("host", "nvme", "device"))
def use_after_close(run: Run) -> None:
    engine = run.offloaded
    x = inputs()
    run.train(loss_of(run(x)))
    kept = loss_of(run(x))
    engine.close()
    engine.close()
    for act in (
        lambda: engine(x),
        lambda: engine.backward(kept),
        engine.step,
        engine.state_dict,
        lambda: run.module(x),
        kept.backward,
        lambda: run.module.blocks[0].up.weight.sum(),
        lambda: run.module.blocks[0].up.weight.data.sum(),
        lambda: run.module.blocks[0].up.bias.numpy(),
        lambda: run.module.blocks[0].up.weight.fill_(0.0),
        lambda: torch.save(run.module.blocks[0].up.weight, run.folder / "one"),
    ):
        with (
            torch.no_grad() if act is not kept.backward else torch.enable_grad(),
            pytest.raises(OffloadError),
        ):
            act()
    assert run.module.blocks[0].up.weight.shape == (32, 32)


@row("hooks_left", make=Blocks, runs=("host", "nvme", "device"))
def nothing_keeps_a_closed_engine(run: Run) -> None:
    run.train(loss_of(run(inputs())))
    run.offloaded.close()
    seen = weakref.ref(run.offloaded)
    module = run.module
    run.engine = None
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    assert not any(hooks)
    del run.row, module
    gc.collect()
    assert seen() is None or gc.get_referrers(seen())


@row("forward", make=Blocks, pages=8)
def exception_in_one_of_many_threads(run: Run) -> None:
    for step in range(3):
        stop = threading.local()

        def hook(*_: Any, stop: threading.local = stop) -> None:
            if getattr(stop, "now", False):
                raise StopError

        handle = run.module.blocks[2].register_forward_pre_hook(hook)
        results: list[Any] = [None] * 3

        def work(
            index: int,
            stop: threading.local = stop,
            results: list[Any] = results,
            step: int = step,
        ) -> None:
            stop.now = index == 1
            try:
                results[index] = run(inputs(step + index)).detach()
            except StopError:
                results[index] = torch.zeros(1)

        run_in_threads(*(partial(work, i) for i in range(3)))
        handle.remove()
        run.record("results", results)
        _is_consistent(run)
        run.train(loss_of(run(inputs(step))))
