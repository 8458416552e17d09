"""Rows: double backward, partial backward, checkpointing, graphs that outlive a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Blocks, Chain, inputs, loss_of, tokens, weight


@row("pack", "version_check", make=Blocks)
def graph_kept_across_step_raises(run: Run) -> None:
    x = inputs()
    loss = loss_of(run(x))
    run.backward(loss, retain_graph=True)
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        run.backward(loss)
    if run.engine is not None:
        run.offloaded.optimizer.zero_grad()
    else:
        run.module.zero_grad()
    run.train(loss_of(run(x)))


@row("forward", "pack", make=Blocks)
def gradient_penalty(run: Run) -> None:
    for step in range(4):
        x = inputs(step).requires_grad_()
        out = run(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        run.record("slope", slope)
        run.train(2.0**-10 * (out.square().mean() + (slope.norm() - 1.0).square()))


@row("forward", "pack", make=Blocks)
def double_backward_through_the_engine(run: Run) -> None:
    for step in range(3):
        x = inputs(step).requires_grad_()
        run.backward(run(x).square().mean(), create_graph=True)
        assert x.grad is not None
        run.record("input gradient", x.grad)
        run.backward(x.grad.square().sum())
        x.grad = None
        run.step()


@row("forward", "pack", make=Blocks)
def gradient_with_respect_to_weights(run: Run) -> None:
    parameters = list(run.module.parameters())
    for step in range(3):
        loss = loss_of(run(inputs(step)))
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
        run.record("slopes", slopes)
        (one,) = torch.autograd.grad(loss, [parameters[2]], retain_graph=True)
        run.record("one", one)
        run.train(loss)


@row("forward", "pack", make=Blocks)
def second_derivative_of_weights(run: Run) -> None:
    parameters = list(run.module.parameters())
    for step in range(3):
        loss = loss_of(run(inputs(step)))
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        run.train(loss + sum(slope.square().sum() for slope in slopes))


@row("forward", "pack", make=Blocks)
def partial_backward(run: Run) -> None:
    for step in range(3):
        x = inputs(step).requires_grad_()
        middle = run.module.blocks[1](run.module.blocks[0](x))
        out = run.module.blocks[3](run.module.blocks[2](middle))
        (slope,) = torch.autograd.grad(out.square().mean(), middle, retain_graph=True)
        run.record("slope", slope)
        some = [run.module.blocks[1].up.weight, run.module.blocks[1].up.bias]
        middle.backward(slope, inputs=some)
        run.step()


@row("forward", "pack", make=Blocks)
def two_forwards_one_backward(run: Run) -> None:
    for step in range(3):
        first = run(inputs(step))
        second = run(inputs(step + 100))
        run.train(loss_of(first) + loss_of(second) + (first * second).mean())


@row("forward", "pack", make=Blocks)
def two_backwards_one_step(run: Run) -> None:
    for step in range(3):
        first = loss_of(run(inputs(step)))
        run.backward(first, retain_graph=True)
        second = loss_of(run(inputs(step + 100)))
        run.backward(second)
        run.backward(first)
        run.step()


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing, nested ones, and functions of weights of its own."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = Blocks()
        self.own = weight(WIDTH, WIDTH)
        self.other = weight(WIDTH, WIDTH)

    def _checkpoint(self, function: Any, *args: torch.Tensor) -> torch.Tensor:
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(torch.tanh(x @ self.own), self.other.t()))

    def _nested(self, x: torch.Tensor) -> torch.Tensor:
        first, second, *_ = self.body.blocks
        return self._checkpoint(self._own, self._checkpoint(second, first(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body.blocks:
            x = self._checkpoint(block, x)
        return self._checkpoint(self._nested, self._checkpoint(self._own, x))


def _checkpointed(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step).requires_grad_())))


@row(
    "dispatch",
    "pack",
    "innermost_hooks",
    make=lambda: Checkpointed(reentrant=False),
)
def checkpoint_not_reentrant(run: Run) -> None:
    _checkpointed(run)


@row("dispatch", "pack", make=lambda: Checkpointed(reentrant=True))
def checkpoint_reentrant(run: Run) -> None:
    _checkpointed(run)


class CheckpointLeaf(nn.Module):
    """A leaf module that checkpoints a function of its own weights."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a = weight(WIDTH, WIDTH)
        self.b = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def body(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.tanh(x @ self.a) @ self.b.t())

        return checkpoint(body, x, use_reentrant=self.reentrant)


@row(
    "dispatch",
    "pack",
    "innermost_hooks",
    make=lambda: nn.Sequential(*(CheckpointLeaf(reentrant=r) for r in (True, False, True, False))),
)
def checkpoint_inside_a_leaf_module(run: Run) -> None:
    _checkpointed(run)


@row("forward", "pack", "innermost_hooks", make=Chain)
def saved_tensors_on_the_cpu(run: Run) -> None:
    for step in range(3):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(run(tokens(step)), step)
        run.train(loss)


class Saves(nn.Module):
    """Ops whose backward needs the weight: prod, norm, embedding bag, conv, bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bilinear = nn.Bilinear(8, 16, WIDTH)
        self.prelu = nn.PReLU(WIDTH)
        self.bag = nn.EmbeddingBag(WIDTH, WIDTH)
        self.direction = weight(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.bag(ids)
        folded = self.conv(hidden.view(1, 8, -1)).view(4, WIDTH)
        mixed = self.prelu(self.bilinear(folded[:, :8], folded[:, 16:]))
        unit = F.normalize(self.direction, dim=1)
        return mixed @ unit + self.direction.exp().prod(1)


@row("dispatch", "pack", make=Saves)
def saved_tensors_in_backward(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(tokens(step))))


@row("forward", "pack", make=Blocks)
def plain_backward_and_optimizer(run: Run) -> None:
    for step in range(3):
        loss = loss_of(run(inputs(step)))
        loss.backward()
        if run.engine is None:
            run.step()
        else:
            run.record("gradients", run.gradients())
            run.offloaded.optimizer.step()
            run.offloaded.optimizer.zero_grad()
            run.check_at_rest()
