"""Random modules with random control flow, one for each seed: plain PyTorch, then every placement.

    python -m tests.engine.random_modules FIRST COUNT    seeds [FIRST, FIRST + COUNT)

writes a line `start SEED` before each module and a line of JSON after it. `count_outcomes` runs
that in child processes, so that a crash or a hang of a module is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from offload.engine.engine import Engine
from tests.faults.lab import LEARNING_RATE, make_engine

WIDTH = 32
PLACES = ("device", "host", "nvme", "roomy")
_EVERY_PAGE = 1000

KINDS = (
    "linear",
    "borrow",
    "view",
    "product",
    "checkpoint",
    "reentrant",
    "tied",
    "clamp",
    "skip",
    "norm",
    "batch norm",
    "weight norm",
    "lstm",
    "conv",
    "embedding",
    "function",
    "keeps",
    "experts",
    "in place",
    "dropout",
    "noise",
    "frozen",
    "exit",
    "loop",
    "no grad",
)
PASSES = (
    "one",
    "one",
    "two forwards",
    "two backwards",
    "micro",
    "double",
    "partial",
    "fails in forward",
    "fails in backward",
    "forgotten",
    "plain",
)
EDITS = ("none", "none", "scale", "data", "view", "load", "clip")


class StopError(Exception):
    """What a module throws in the middle."""


class Matmul(torch.autograd.Function):
    """Saves the weight and a view of it; its backward raises if it is told to."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w, w.t())
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, transposed = ctx.saved_tensors
        if Matmul.fails:
            raise StopError
        return (g @ w.t() + g @ transposed) / 2, x.t() @ g


class Keeps(torch.autograd.Function):
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


class Layer(nn.Module):
    """One layer of any kind: (4, 32) -> (4, 32)."""

    def __init__(self, kind: str, shared: nn.Parameter) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.weight = shared if kind == "tied" else nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.more: nn.Module
        match kind:
            case "lstm":
                self.more = nn.LSTM(WIDTH, WIDTH // 4, batch_first=True)
            case "conv":
                self.more = nn.Conv1d(4, 4, 3, padding=1)
            case "experts":
                self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            case "batch norm":
                self.more = nn.BatchNorm1d(WIDTH)
            case "weight norm":
                self.inner = parametrizations.weight_norm(self.inner)
            case "frozen":
                self.inner.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "borrow":
                x = torch.addmm(self.inner.bias, x, self.inner.weight.t())
            case "view":
                first, second = self.weight.chunk(2)
                x = self.inner(x) @ first.t() @ second
            case "product":
                x = x @ (self.weight * self.scale)
            case "checkpoint" | "reentrant":
                reentrant = self.kind == "reentrant"
                return torch.as_tensor(checkpoint(self._body, x, use_reentrant=reentrant))
            case "clamp":
                with torch.no_grad():
                    self.weight.clamp_(-0.25, 0.25)
                x = x @ self.weight
            case "skip":
                return x + torch.tanh(self.inner(x)) * self.scale
            case "norm":
                return F.layer_norm(x, (WIDTH,), self.scale, self.inner.bias)
            case "batch norm":
                return torch.as_tensor(self.more(x @ self.weight))
            case "lstm":
                x = F.pad(self.more(x[None])[0][0], (0, 3 * WIDTH // 4)) + self.inner(x)
            case "conv":
                x = self.more(x.view(4, 4, 8)).view(4, WIDTH) @ self.weight
            case "embedding":
                x = x + F.embedding((x.detach().abs()[:, 0] * 8).long() % WIDTH, self.weight)
            case "function":
                x = Matmul.apply(self.inner(x), self.weight)
            case "keeps":
                x = Keeps.apply(x, self.weight)
            case "experts":
                x = self._routed(x)
            case "in place":
                return torch.relu_(self.inner(x)).add_(self.scale).mul(0.5)
            case "dropout":
                x = F.dropout(self.inner(x), 0.25, training=self.training) @ self.weight
            case "noise":
                x = self.inner(x) + 0.1 * torch.randn_like(x) * self.scale
            case "loop":
                count = 0
                while x.norm() > 3 and count < 4:
                    x = torch.tanh(x @ self.weight) * 0.6
                    count += 1
            case "no grad":
                with torch.no_grad():
                    gate = torch.sigmoid(x @ self.weight)
                x = self.inner(x) * gate
            case _:
                x = self.inner(x) @ self.weight
        return torch.tanh(x)

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(torch.tanh(F.dropout(x, 0.1) @ self.weight)))

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x.detach()[:, :3].argmax(-1)
        out = x * self.scale
        assert isinstance(self.more, nn.ModuleList)
        for index, expert in enumerate(self.more):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class Random(nn.Module):
    """Runs the layers that it is told to, until one throws or lets it end early."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.layers = nn.ModuleList(Layer(kind, shared) for kind in kinds)

    def forward(
        self, x: torch.Tensor, order: Sequence[int], fails_at: int | None = None
    ) -> torch.Tensor:
        for place, index in enumerate(order):
            layer = self.layers[index % len(self.layers)]
            x = layer(x)
            if place == fails_at:
                raise StopError
            if layer.kind == "exit" and x.sum() > 0:
                break
        return x


@dataclass(frozen=True)
class Step:
    """What one step does: the layers that run, in order, and what is done with them."""

    order: tuple[int, ...]
    passes: str
    evaluates: bool
    edit: str


@dataclass(frozen=True)
class Case:
    """Everything that a seed decides."""

    kinds: tuple[str, ...]
    steps: tuple[Step, ...]
    pages: int


def make_case(seed: int) -> Case:
    """The case of a seed; the same on every machine."""
    draw = random.Random(seed)
    kinds = tuple(draw.choices(KINDS, k=draw.randint(2, 7)))
    steps = tuple(
        Step(
            tuple(draw.randrange(7) for _ in range(draw.randint(1, 6))),
            draw.choice(PASSES),
            draw.random() < 0.4,
            draw.choice(EDITS),
        )
        for _ in range(draw.randint(2, 4))
    )
    return Case(kinds, steps, draw.randint(6 if "lstm" in kinds else 3, 8))


class Training:
    """One run of a case; `records` have to be the same bits in every run of it."""

    def __init__(self, case: Case, seed: int, place: str, folder: Path) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.module = Random(case.kinds)
        self.engine: Engine | None = None
        if place == "roomy":
            self.engine = make_engine(self.module, "host", folder, pages=_EVERY_PAGE)
        elif place != "plain":
            self.engine = make_engine(self.module, place, folder, pages=case.pages)
        self.call: Any = self.engine or self.module
        self.records: list[torch.Tensor] = []
        self.num_steps = 0
        self.error: str | None = None

    def run(self) -> list[torch.Tensor]:
        """Take all steps, or as many as plain PyTorch can, and close the engine.

        `num_steps` says how many, `error` which error has ended them.
        """
        try:
            for number, step in enumerate(self.case.steps):
                torch.manual_seed(number)
                try:
                    self._step(number, step)
                except RuntimeError as error:  # what was saved has been changed in place, say
                    self.error = _kind_of(error)
                    break
                self.num_steps += 1
            self._finish()
        finally:
            if self.engine is not None:
                self.engine.close()
        return self.records

    def _finish(self) -> None:
        if self.engine is None:
            self._note(*self.module.parameters())
        else:
            self._note(*(s.get("master", s["weight"]) for _, s in self.engine.named_state()))
        self._note(*self.module.buffers())

    def _note(self, *values: torch.Tensor) -> None:
        self.records += [value.detach().clone() for value in values]

    def _step(self, number: int, step: Step) -> None:
        if step.evaluates:
            self.module.eval()
            with torch.no_grad():
                self._note(self.call(self._input(number), step.order[::-1]))
            self.module.train()
        getattr(self, "_" + step.passes.replace(" ", "_"))(number, step)
        self._update()
        self._edit(step)

    def _input(self, number: int) -> torch.Tensor:
        return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))

    def _loss(self, number: int, order: Sequence[int]) -> torch.Tensor:
        loss = self.call(self._input(number), order).square().mean()
        self._note(loss)
        return torch.as_tensor(loss)

    def _backward(self, loss: torch.Tensor, **options: Any) -> None:
        if not loss.requires_grad:
            return  # nothing but frozen weights has run
        (loss.backward if self.engine is None else self._offloaded(loss))(**options)

    def _offloaded(self, loss: torch.Tensor) -> Any:
        assert self.engine is not None
        engine = self.engine
        return lambda **options: engine.backward(loss, **options)

    def _one(self, number: int, step: Step) -> None:
        self._backward(self._loss(number, step.order))

    def _plain(self, number: int, step: Step) -> None:
        loss = self._loss(number, step.order)
        if loss.requires_grad:
            loss.backward()

    def _two_forwards(self, number: int, step: Step) -> None:
        first = self._loss(number, step.order)
        self._backward(first + self._loss(number + 50, step.order[1:] or (0,)))

    def _two_backwards(self, number: int, step: Step) -> None:
        loss = self._loss(number, step.order)
        self._backward(loss, retain_graph=True)
        self._backward(loss * 0.5)

    def _micro(self, number: int, step: Step) -> None:
        for part in range(3):
            self._backward(self._loss(number + 50 * part, step.order[part:] or (part,)) / 4)

    def _double(self, number: int, step: Step) -> None:
        x = self._input(number).requires_grad_()
        out = self.call(x, step.order).square().mean()
        slope = None
        if out.requires_grad:
            (slope,) = torch.autograd.grad(out, x, create_graph=True, allow_unused=True)
        if slope is None:
            return self._backward(out)
        self._note(slope)
        return self._backward(out + slope.square().sum())

    def _partial(self, number: int, step: Step) -> None:
        loss = self._loss(number, step.order)
        wanted = [p for p in self.module.layers[0].parameters() if p.requires_grad]
        if loss.requires_grad:
            options = {"retain_graph": True, "materialize_grads": True}
            self._note(*torch.autograd.grad(loss, wanted, **options))
        self._backward(loss, inputs=wanted)

    def _fails_in_forward(self, number: int, step: Step) -> None:
        with contextlib.suppress(StopError):
            self.call(self._input(number), step.order, fails_at=number % 3)
        self._one(number, step)

    def _fails_in_backward(self, number: int, step: Step) -> None:
        Matmul.fails = True
        try:
            self._backward(self._loss(number, step.order))
        except StopError:
            pass
        finally:
            Matmul.fails = False
        self.module.zero_grad()
        self._one(number, step)

    def _forgotten(self, number: int, step: Step) -> None:
        self._one(number, step)
        self.module.zero_grad()
        self._one(number + 50, step)

    def _update(self) -> None:
        if self.engine is not None:
            taken = self.engine.step()
            assert taken
            held = [p for p in self.engine._parts.pages if p.pins or p.windows or p.kept]
            assert not held, held
            for tier in (self.engine._parts.device, self.engine._parts.host):
                assert tier.peak_bytes <= tier.budget_bytes
            return
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                    parameter.grad = None

    def _edit(self, step: Step) -> None:
        layer = self.module.layers[step.order[0] % len(self.module.layers)]
        weight = layer.weight
        with torch.no_grad():
            match step.edit:
                case "scale":
                    weight.mul_(0.5)
                case "data":
                    layer.inner.bias.data[3] = 0.25
                case "view":
                    weight.detach()[:, 1].fill_(0.125)
                case "clip":
                    for parameter in layer.parameters():
                        parameter.data.clamp_(-0.5, 0.5)
                case "load":
                    state = {n: v.clone() * 0.75 for n, v in layer.state_dict().items()}
                    layer.load_state_dict(state)


def _kind_of(error: RuntimeError) -> str:
    """Its type and what its message says before the names of tensors."""
    return f"{type(error).__name__}: {str(error).split(':')[0]}"


def check(seed: int, places: Sequence[str] = PLACES) -> int:
    """Run a seed in plain PyTorch and in the placements; the steps finished in all of these.

    Raises:
        AssertionError: a number or an error differs, something is left held, or a budget was
            exceeded.
        Exception: what a run has thrown.
    """
    case = make_case(seed)
    num_steps = 0
    with tempfile.TemporaryDirectory() as folder:
        plain = Training(case, seed, "plain", Path(folder))
        expected = plain.run()
        for place in places:
            training = Training(case, seed, place, Path(folder))
            got = training.run()
            num_steps += training.num_steps
            where = f"seed {seed}, {place}: {case}"
            ended = (training.num_steps, training.error)
            assert ended == (plain.num_steps, plain.error), f"{ended}, {where}"
            assert len(expected) == len(got), where
            for number, (a, b) in enumerate(zip(expected, got, strict=True)):
                assert torch.equal(a, b), f"record {number} of {len(expected)}, {where}"
    return num_steps


def count_outcomes(
    first: int, count: int, *, seconds: float = 120.0, program: Sequence[str] = ("-m", __name__)
) -> Counter[str]:
    """Run seeds in child processes; how many modules are `equal`, or failed, crashed or hung.

    `steps` counts the steps finished in all placements. What went wrong is written to stderr with
    its seed.

    Args:
        first: the first seed.
        count: how many.
        seconds: a module that takes longer hangs.
        program: what Python runs, with the first seed and the number of seeds as arguments.
    """
    outcomes: Counter[str] = Counter()
    following, end = first, first + count
    while following < end:
        child = _Child(program, following, end - following)
        began = following
        following = child.watch(outcomes, seconds)
        assert following > began, "the child did not start"
    return outcomes


class _Child:
    """A process that runs seeds; it may die in any of them."""

    def __init__(self, program: Sequence[str], first: int, count: int) -> None:
        self._first = first
        self._process = subprocess.Popen(
            [sys.executable, *program, str(first), str(count)],
            stdout=subprocess.PIPE,
            bufsize=0,  # what `select` does not see must not be waiting here
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )

    def watch(self, outcomes: Counter[str], seconds: float) -> int:
        """Count what it says until it ends; the seed after the last one that it has started."""
        running, following = None, self._first
        with self._process:
            while (line := self._line(seconds)) != "":
                if line is None:
                    outcomes["hung"] += 1
                    sys.stderr.write(f"seed {running} hangs\n")
                    self._process.kill()
                    return following
                if line.startswith("start "):
                    running = int(line.split()[1])
                    following = running + 1
                    continue
                running = None
                answer = json.loads(line)
                outcomes[answer["outcome"]] += 1
                outcomes["steps"] += answer["steps"]
                if answer["outcome"] != "equal":
                    sys.stderr.write(f"seed {answer['seed']}: {answer['detail']}\n")
            try:
                code = self._process.wait(seconds)
            except subprocess.TimeoutExpired:  # it has nothing more to say, and does not end
                self._process.kill()
                code = self._process.wait(seconds)
        if running is not None or code:
            outcomes["crashed"] += 1
            sys.stderr.write(f"seed {following - 1} ends the process with {code}\n")
        return following

    def _line(self, seconds: float) -> str | None:
        """A line, "" at the end, or None if none comes in time."""
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], seconds)[0]:
            return None
        return stream.readline().decode()


def main(first: int, count: int) -> None:
    """Run seeds, and say so on stdout."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in range(first, first + count):
        print(f"start {seed}", flush=True)
        answer: dict[str, Any] = {"seed": seed, "outcome": "equal", "steps": 0}
        try:
            answer["steps"] = check(seed)
        except BaseException as error:
            answer |= {"outcome": "failed", "detail": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
