"""Rows: ops, views, ties, weights outside their modules, control flow, custom functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Chain, inputs, loss_of, tokens, weight


@row("forward", "pack", "stale_copies", make=Chain)
def plain_ops(run: Run) -> None:
    for step in range(5):
        run.train(loss_of(run(tokens(step)), step))


class Experts(nn.Module):
    """Weights used through views: an indexed expert, `W.t()`, a chunk, an expand."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = weight(4, WIDTH, WIDTH // 4)
        self.mixed = weight(WIDTH, WIDTH)
        self.joint = weight(WIDTH, WIDTH)
        self.scale = weight(1, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x @ self.experts[i] for i in range(4)], -1)
        first, second = self.joint.chunk(2, 0)
        x = F.linear(F.linear(x, self.mixed.t()), first) @ second
        return x * self.scale.expand(4, WIDTH)


@row("dispatch", "pack", make=Experts)
def views_of_weights(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class Slices(nn.Module):
    """A module that returns a part of its weight, to be used after it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.table = weight(WIDTH, WIDTH)

    def forward(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.table[:16], {"rest": self.table[16:].t()}


class ReturnsViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slices = Slices()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, named = self.slices()
        for layer in self.layers:
            x = layer(x)
        return (x @ first.t()) @ first + (x @ named["rest"]) @ named["rest"].t()


@row("dispatch", "pack", "views", "proven", make=ReturnsViews)
def views_returned_by_a_module(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class Leaks(nn.Module):
    """Behaves for two runs; then it takes a view, and uses or returns it after other pages came."""

    def __init__(self) -> None:
        super().__init__()
        self.table = weight(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.turn = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.turn += 1
        view = self.table.t() if self.turn > 2 else None
        x = x @ self.table
        for layer in self.inner:
            x = torch.tanh(layer(x))
        if view is not None:
            x = x @ view
        return x, None if view is None else view[4:8]


class LeaksLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leak = Leaks()
        self.last = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, view = self.leak(x)
        for layer in self.last:
            x = torch.tanh(layer(x))
        return x if view is None else x + x @ view.t() @ view


@row("escapes", "dispatch", make=LeaksLate, pages=3)
def view_that_escapes_in_a_later_run(run: Run) -> None:
    for step in range(6):
        run.train(loss_of(run(inputs(step))))


class Outer(nn.Module):
    """Uses its own weight before and after its children, whose pages push it out meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.table = weight(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.table)
        for layer in self.inner:
            x = torch.tanh(layer(x))
        return x @ self.table


@row("window_class", "forward", "pack", make=Outer)
def window_that_loses_its_page(run: Run) -> None:
    for step in range(5):
        run.train(loss_of(run(inputs(step))))


class Stashes(nn.Module):
    """Views made once, in the first forward, and used in all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = weight(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.stash: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.stash:
            self.stash = [self.table.detach()[:16], self.table.detach().t()]
        for layer in self.layers:
            x = layer(x)
        return x @ self.stash[0].t() @ self.stash[0] + x @ self.stash[1] + x @ self.table


@row("dispatch", "views", make=Stashes)
def views_stashed_over_steps(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


@row("forward", "pack", make=lambda: Chain(tied=True))
def tied_weights(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(tokens(step)), step))


class Borrows(nn.Module):
    """Weights used by others than their modules, and by nobody's module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.loose = nn.ParameterDict({"w": weight(WIDTH, WIDTH), "v": weight(WIDTH, WIDTH)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = torch.addmm(layer.bias, hidden.flatten(0, 1), layer.weight).view_as(hidden)
        hidden = torch.einsum("btd,de->bte", hidden, self.loose["w"]) @ self.loose["v"].T
        return F.linear(hidden, self.embed.weight)


@row("dispatch", "pack", make=Borrows)
def weight_used_outside_its_module(run: Run) -> None:
    for step in range(4):
        loss = loss_of(run(tokens(step)), step)
        penalty = sum(p.square().sum() for p in run.module.parameters())
        run.train(loss + 2.0**-10 * penalty)


@row("dispatch", "pack", make=Chain)
def loss_on_weights_alone(run: Run) -> None:
    for step in range(3):
        norm = torch.stack([p.norm() for p in run.module.parameters()]).sum()
        run.train(norm * (step + 1))
        with torch.no_grad():
            run.record("norms", [p.abs().max() for p in run.module.parameters()])


class Matmul(torch.autograd.Function):
    """Saves the weight and a view of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        transposed = w.t()
        ctx.save_for_backward(x, w, transposed)
        return x @ transposed

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, transposed = ctx.saved_tensors
        return (g @ w + g @ transposed.t()) / 2, g.t() @ x


class KeepsWeight(torch.autograd.Function):
    """Keeps the weight on the context, past all saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = w
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        return g @ ctx.weight.t(), x.t() @ g


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weight(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.weights:
            x = torch.tanh(self.function.apply(x, w))
        return x


@row("dispatch", "pack", make=lambda: Custom(Matmul))
def custom_function(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


@row("dispatch", make=lambda: Custom(KeepsWeight))
def custom_function_that_keeps_the_weight(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class CustomLayer(nn.Module):
    """The same inside a leaf module, whose window makes its weight plain."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.weight = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.function.apply(x, self.weight))


@row(
    "dispatch",
    make=lambda: nn.Sequential(*(CustomLayer(f) for f in (KeepsWeight, Matmul) * 3)),
)
def custom_function_in_a_leaf_module(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class Wanders(Chain):
    """Other layers, in another order, some of them twice, each time it runs."""

    def __init__(self) -> None:
        super().__init__(depth=6)
        self.turn = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        chosen = torch.randint(0, 6, (self.turn % 5 + 1,), generator=self._dice())
        hidden = self.embed(ids)
        for index in chosen.tolist():
            hidden = torch.tanh(self.layers[index](hidden))
        if self.turn % 3 == 0:
            return F.linear(hidden, self.embed.weight)
        return self.head(self.norm(hidden))

    def _dice(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.turn)


@row("dispatch", "pack", make=Wanders)
def control_flow_that_changes(run: Run) -> None:
    for step in range(12):
        run.train(loss_of(run(tokens(step)), step))


class Outs(nn.Module):
    """`out=`, lists of tensors, keyword tensors, in-place ops with a weight as the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight(WIDTH, WIDTH) for _ in range(4))
        self.bias = weight(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.weights
        x = torch.mm(input=x, mat2=a)
        x = torch.cat([x, b[:4]], dim=0) @ c
        x = x.clone().add_(self.bias).mul_(d[0])
        with torch.no_grad():
            plain = torch.empty(x.shape)
            torch.matmul(x, d, out=plain)
        return torch.linalg.multi_dot([x, a.detach(), b]) + plain + torch.stack((c, d)).sum(0)[:8]


@row("dispatch", "pack", make=Outs)
def odd_ways_to_pass_a_weight(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(inputs(step))))


class SumsTwo(nn.Module):
    """Every op uses two weights, so both must stay for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for a, b in zip(self.weights, self.weights[1:], strict=False):
            x = torch.tanh(x @ torch.mul(a, b))
        return x


@row("dispatch", "pack", "pins", "node_pin", make=SumsTwo)
def op_that_uses_as_many_pages_as_fit(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(inputs(step))))


@row("dispatch", make=Chain)
def metadata_moves_nothing(run: Run) -> None:
    if run.engine is not None:
        before = run.offloaded._parts.pager.faults
    for parameter in run.module.parameters():
        run.record("shape", tuple(parameter.shape))
        run.record("numbers", (parameter.numel(), parameter.element_size(), parameter.dim()))
        assert parameter.dtype is torch.float32
        assert parameter.is_contiguous()
        assert parameter.device.type == "cpu"
        assert parameter.is_leaf
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is None
    assert len(set(run.module.parameters())) == len(list(run.module.parameters()))
    if run.engine is not None:
        assert run.offloaded._parts.pager.faults == before
    run.record("text", [float(len(repr(p))) for p in run.module.parameters()])
    run.record("value", [p[0].flatten()[0].item() for p in run.module.parameters()])
    run.record("list", [p.tolist()[0] for p in run.module.parameters()])
