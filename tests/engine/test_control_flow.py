"""Control flow of every kind: no hang, no crash, and the bits of plain PyTorch in every placement.

Beside this file `tests/faults` has, among others: layers chosen at random, ties, graphs kept across
a step, gradient penalties, partial backward, averaged copies, clipping between steps, loading state
in mid-run, autocast, generation, exceptions and interrupts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from offload.engine.engine import Engine
from tests.faults.lab import LEARNING_RATE, Run, make_engine, run_everywhere
from tests.faults.modules import WIDTH, Block, Blocks, Chain, inputs, loss_of, tokens, weight
from tests.threads import run_in_threads

Use = tuple[Callable[[Run], None], Callable[[], nn.Module], dict[str, Any]]
USES: dict[str, Use] = {}


def use(make: Callable[[], nn.Module], **options: Any) -> Callable[[Callable[[Run], None]], None]:
    """Register a body that runs in every placement."""

    def register(body: Callable[[Run], None]) -> None:
        USES[body.__name__] = (body, make, options)

    return register


@pytest.mark.parametrize("name", USES)
def test_the_bits_are_those_of_plain_pytorch(name: str, tmp_path: Path) -> None:
    body, make, options = USES[name]
    run_everywhere(body, tmp_path, make, **options)


class Depth(nn.Module):
    """Drops layers at random, and repeats the ones it keeps for as long as the data asks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(5))
        self.shrink = weight(WIDTH, WIDTH)
        self.early = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.kept: list[int] = []  # layers, one entry for each forward
        self.left: list[bool] = []  # early
        self.counts: list[int] = []  # of the loop, of those that have come to it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(0)
        self.left.append(False)
        for layer in self.layers:
            if torch.rand(()) < 0.4:
                continue
            self.kept[-1] += 1
            x = layer(layer(x))
            if x.abs().amax() > 3.8:
                self.left[-1] = True
                return self.early(x)
        count = 0
        while x.norm() > 3 and count < 6:
            x = torch.tanh(x @ self.shrink) * 0.7
            count += 1
        self.counts.append(count)
        return x


@use(Depth)
def random_depth_and_loops_on_data(run: Run) -> None:
    for step in range(10):
        torch.manual_seed(step)
        run.train(loss_of(run(inputs(step))))
    depth = run.module
    run.record("control flow", [depth.kept, depth.left, depth.counts])
    assert len(set(depth.kept)) > 2, "layers are dropped, now more and now fewer"
    assert set(depth.left) == {False, True}, "some forwards leave early"
    assert len(set(depth.counts)) > 1, "the loop asks the data"


class Routed(nn.Module):
    """Each row goes to its two best of six experts; most batches leave some expert without one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 6)
        self.experts = nn.ModuleList(Block() for _ in range(6))
        self.counts: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            self.counts.append(len(rows))
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, places, None])
        return out


@use(Routed)
def experts_without_tokens(run: Run) -> None:
    for step in range(6):
        run.train(loss_of(run(inputs(step)[:2])))
    assert 0 in run.module.counts
    assert any(run.module.counts)


class RunsEmpty(Routed):
    """As many implementations do: every expert runs, some on no rows at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out.index_add(0, (chosen == index).nonzero()[:, 0], expert(x[chosen == index]))
        return out


@use(RunsEmpty)
def experts_that_run_on_nothing(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))
        run.record("gradients of the idle", [torch.tensor(len(run.gradients()))])


class Nested(nn.Module):
    """Grad modes inside each other, in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.layers
        x = first(x)
        with torch.no_grad():
            target = second(x)
            with torch.enable_grad():
                x = x + third(x)
            target = target + fourth(target)
            with torch.inference_mode():
                seen = second(x.detach()).sum().item()
        return fourth(x) + target * (seen > 0)


@use(Nested)
def nested_grad_modes(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))
        with torch.inference_mode(), torch.no_grad():
            run.record("evaluated", run(inputs(step + 50)).clone())


@use(Chain, training={"gradient_accumulation_steps": 4})
def evaluation_between_micro_batches(run: Run) -> None:
    for step in range(3):
        for part in range(4):
            number = step * 4 + part
            loss = loss_of(run(tokens(number)), number)
            if run.engine is None:
                (loss / 4).backward()
            else:
                run.engine.backward(loss)
            run.module.eval()
            with torch.no_grad():
                run.record("evaluated", run(tokens(number + 100)))
            run.module.train()
            if part < 3 and run.engine is not None:
                taken = run.engine.step()
                assert taken is False
        run.step()


class Alternates(nn.Module):
    """One of two branches, by turns; a third is run and its result thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Block() for _ in range(3))
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        self.branches[2](x)
        return self.branches[self.turn % 2](x)


@use(Alternates)
def parameters_used_in_some_steps(run: Run) -> None:
    for step in range(5):
        run.train(loss_of(run(inputs(step))))
        run.record("how many", len(run.gradients()))


@use(lambda: Blocks(5))
def recursion(run: Run) -> None:
    """The module runs inside itself: its hooks are entered twice."""

    def again(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if out.requires_grad and len(depth) < 2:
            depth.append(0)
            entered.append(len(depth))
            out = run.module(out)
            depth.pop()
        return out

    depth: list[int] = []
    entered: list[int] = []
    run.module.blocks[3].register_forward_hook(again)
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
    assert entered == [1, 2] * 3


class Two(nn.Module):
    """Two weights, one after the other: its window wants both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight(WIDTH, WIDTH)
        self.b = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x @ self.a) @ self.b)


class HoldsAView(nn.Module):
    """Runs itself in the middle; from the third step on over a view that it has made before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = weight(WIDTH, WIDTH)
        self.inner = nn.ModuleList(Two() for _ in range(3))
        self.turn = 0

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        self.turn += again
        view = self.table.t() if again and self.turn > 2 else None
        x = x @ self.table
        if again:
            x = self(x, again=False)
        for layer in self.inner:
            x = layer(x)
        return x if view is None else x @ view


@use(HoldsAView)
def view_held_over_a_recursion(run: Run) -> None:
    for step in range(5):
        run.train(loss_of(run(inputs(step))))


class Whole(nn.Module):
    """Weights and inputs are small whole numbers: sums of gradients are exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randint(-1, 2, (WIDTH, WIDTH)) * (torch.rand(WIDTH) < 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@use(Whole, pages=6)
def four_threads_in_backward_at_once(run: Run) -> None:
    for step in range(4):
        drawn = torch.Generator().manual_seed(step)
        losses = [
            run(torch.randint(-2, 3, (4, WIDTH), generator=drawn).float()).sum() for _ in range(4)
        ]
        run_in_threads(*(loss.backward for loss in losses))
        gradients = run.gradients()
        run.record("gradients", gradients)
        assert all(torch.equal(g, g.round()) and g.any() for g in gradients.values())
        if run.engine is None:
            run.module.zero_grad()
        else:
            run.engine.optimizer.zero_grad()
            run.check_at_rest()


@use(Blocks)
def interrupts_in_the_module_itself(run: Run) -> None:
    """A forward of `engine.module` that is cut off leaves nothing that holds the next steps up."""
    stop: list[BaseException] = []

    def hook(*_: Any) -> None:
        if stop:
            raise stop.pop()

    run.module.blocks[2].up.register_forward_pre_hook(hook)
    for step in range(4):
        stop.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run.module(inputs(step))
        loss = loss_of(run.module(inputs(step)))
        run.train(loss)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@use(lambda: Blocks(6))
def views_that_nested_holders_leave(run: Run) -> None:
    """A view made inside `gathered()`, or inside one in another, is good until the step ends."""
    for step in range(3):
        first, second = run.module.blocks[0].up.weight, run.module.blocks[1].up.weight
        if run.engine is None:
            views = [first[:4], second.t(), first.detach()]
        else:
            with run.engine.gathered("blocks.0.up.weight"):
                views = [first[:4]]
                with run.engine.gathered(["blocks.0.up.weight", "blocks.1.up.weight"]):
                    views.append(second.t())
                views.append(first.detach())
            run.evict_all()
        run.record("views", views)
        del views
        if run.engine is not None:  # two pages are all the room that there is
            run.engine._parts.pager.end_raw_access()
        run.train(loss_of(run(inputs(step))))


# -- two engines ----------------------------------------------------------------------------------


class Pair:
    """A generator and a discriminator, plain or each under an engine of its own."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.modules = (Blocks(3), nn.Sequential(Blocks(2), nn.Linear(WIDTH, 1)))
        self.engines: list[Engine] = []
        if kind != "plain":
            home, pages = ("host", 1000) if kind == "roomy" else (kind, 2)
            self.engines = [make_engine(m, home, folder, pages=pages) for m in self.modules]
        self.generate, self.judge = self.engines or self.modules
        self.losses: list[torch.Tensor] = []

    def step(self, which: int, loss: torch.Tensor) -> None:
        """A step of one of the two; the other's gradients are forgotten, as usual, by zero_grad."""
        self.losses.append(loss.detach().clone())
        other = self.modules[1 - which]
        if self.engines:
            self.engines[which].backward(loss)
            taken = self.engines[which].step()
            assert taken
            other.zero_grad()
            for engine in self.engines:
                assert not any(p.pins or p.windows or p.kept for p in engine._parts.pages)
            return
        loss.backward()
        with torch.no_grad():
            for parameter in self.modules[which].parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                parameter.grad = None
        other.zero_grad()

    def train(self) -> list[torch.Tensor]:
        """Five rounds; everything that must agree."""
        for number in range(5):
            real, noise = inputs(number), inputs(number + 50)
            fake = self.generate(noise)
            judged = self.judge(real), self.judge(fake.detach())
            self.step(1, F.softplus(-judged[0]).mean() + F.softplus(judged[1]).mean())
            self.step(0, F.softplus(-self.judge(fake)).mean())
        found = [*self.losses]
        for engine in self.engines:
            found += [state["master"] for _, state in engine.named_state()]
            engine.close()
        if not self.engines:
            found += [p.detach() for m in self.modules for p in m.parameters()]
        return found


@pytest.mark.parametrize("kind", ["device", "host", "nvme", "roomy"])
def test_two_engines_whose_losses_flow_through_each_other(kind: str, tmp_path: Path) -> None:
    expected, found = Pair("plain", tmp_path).train(), Pair(kind, tmp_path).train()
    assert len(expected) == len(found)
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), number
