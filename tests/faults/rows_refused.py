"""Rows: what works inside `gathered()` and is an error outside, and what cannot be paged at all."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from offload.engine.build import build
from offload.engine.engine import Engine
from offload.errors import OffloadError
from tests.faults.lab import Run, make_engine, row
from tests.faults.modules import WIDTH, Block, Blocks, inputs, loss_of, weight


def _gathered(run: Run, *, writable: bool = False) -> Any:
    if run.engine is None:
        return contextlib.nullcontext()
    return run.offloaded.gathered(writable=writable)


def _refused_unless_present(run: Run, act: Callable[[], Any], *, plain: Any) -> None:
    """Outside `gathered()`: what PyTorch gives, or an OffloadError; never anything else."""
    run.evict_all()
    if run.kind in ("plain", "device"):
        with contextlib.suppress(OffloadError):
            got, expected = act(), plain()
            for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                assert torch.equal(a, b)
        return
    with pytest.raises(OffloadError):
        act()


def _two_blocks() -> nn.Module:
    """So small that `gathered()` has room for all of it."""
    return Blocks(2)


@row("transforms", make=_two_blocks, pages=8)
def torch_func(run: Run) -> None:
    x = inputs()
    run.train(loss_of(run(x)))

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(run.module, parameters, (x,)).square().mean()

    def uses_weights() -> None:
        named = dict(run.module.named_parameters())
        run.record("grad", grad(loss)(named, x))
        each = vmap(grad(loss), (None, 0))(named, x.unsqueeze(1))
        run.record("per sample", each)

    with _gathered(run):
        uses_weights()
    weight = run.module.blocks[0].up.weight
    copies = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    _refused_unless_present(
        run,
        lambda: grad(loss)(dict(run.module.named_parameters()), x),
        plain=lambda: grad(loss)(copies, x),
    )
    _refused_unless_present(
        run,
        lambda: vmap(lambda one: weight @ one)(x),
        plain=lambda: vmap(lambda one: copies["blocks.0.up.weight"] @ one)(x),
    )
    _refused_unless_present(
        run,
        lambda: vmap(run.module)(x),
        plain=lambda: vmap(functional_call, (None, None, 0))(run.module, copies, x),
    )
    run.train(loss_of(run(x)))


@row("dispatch", make=Blocks)
def functional_call_without_transforms(run: Run) -> None:
    for step in range(3):
        half = {name: p * 0.5 for name, p in run.module.named_parameters()}
        run.train(loss_of(functional_call(run.module, half, (inputs(step),))))


@row("transforms", make=_two_blocks, pages=8)
def jit_trace(run: Run) -> None:
    x = inputs()
    run.train(loss_of(run(x)))
    block = run.module.blocks[0]
    with _gathered(run), torch.no_grad():
        traced = torch.jit.trace(block, x, check_trace=False)
        run.record("traced", traced(x))
    second = run.module.blocks[1]
    _refused_unless_present(
        run, lambda: torch.jit.trace(second, x, check_trace=False)(x), plain=lambda: second(x)
    )
    run.train(loss_of(run(x)))


@row("hook_names", make=_two_blocks, pages=8, runs=("device", "host", "nvme"))
def jit_script(run: Run) -> None:
    x = inputs()
    run.train(loss_of(run(x)))
    linear = run.module.blocks[0].up
    if run.kind != "device":
        with run.offloaded.gathered(), pytest.raises(OffloadError, match="script"):
            torch.jit.script(linear)
    with pytest.raises(OffloadError, match="script"):
        torch.jit.script(run.module)
    run.train(loss_of(run(x)))


class Raw(torch.autograd.Function):
    """x * w for a vector w, through pointers in forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, address: int, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.address = address
        return x * _at(address)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (x,) = ctx.saved_tensors
        return g * _at(ctx.address), None, (g * x).sum(0)


def _at(address: int) -> torch.Tensor:
    values = (ctypes.c_float * WIDTH).from_address(address)
    return torch.tensor(list(values))


class Extension(nn.Module):
    """As a C++ extension: the pointer is taken past every guard, and used in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.big = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            address = self.big.data_ptr()
        return Raw.apply(x, address, self.big[0])


class WithExtension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Blocks(2)
        self.extension = nn.Sequential(Extension())
        self.last = Blocks(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.extension(self.first(x)))


@row("gather", make=WithExtension, pages=3, guard={"gather": ["extension"]})
def extension_in_a_gathered_module(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


@row("set_data", "dispatch", make=Blocks)
def new_data(run: Run) -> None:
    run.train(loss_of(run(inputs())))
    values = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    # PyTorch would use the memory of `values` from here on; the engine has its own.
    run.module.blocks[0].up.weight.data = values if run.engine is not None else values.clone()
    run.record("data", run.module.blocks[0].up.weight.data)
    run.module.blocks[0].up.weight.data = run.module.blocks[0].up.weight.data
    run.evict_all()
    run.train(loss_of(run(inputs(1))))
    run.module.float()
    run.module.to("cpu")
    run.module.cpu()
    run.module.type(torch.float32)
    run.record("weights", run.weights())
    if run.engine is not None:
        for act in (
            run.module.half,
            run.module.double,
            lambda: run.module.to(torch.bfloat16),
            lambda: setattr(run.module.blocks[0].up.weight, "data", torch.zeros(3)),
        ):
            _keeps_or_refuses(run, act)
    values.fill_(9.0)
    run.module.zero_grad()
    run.train(loss_of(run(inputs(2))))


def _keeps_or_refuses(run: Run, act: Callable[[], Any]) -> None:
    before = run.weights()
    try:
        act()
    except OffloadError:
        pass
    else:
        raise AssertionError("a conversion of a laid-out parameter went through")
    after = run.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


@row("refused", make=Blocks)
def memory_that_belongs_to_the_engine(run: Run) -> None:
    run.train(loss_of(run(inputs())))
    if run.engine is not None:
        target = run.module.blocks[0].up.weight
        for act in (
            target.share_memory_,
            run.module.share_memory,
            lambda: target.data.resize_(3),
            lambda: target.data.resize_as_(torch.zeros(3)),
        ):
            run.evict_all()
            with pytest.raises(OffloadError):
                act()
    run.train(loss_of(run(inputs(1))))


@row("places", make=Blocks, runs=("device", "host", "nvme"))
def parameters_that_are_replaced(run: Run) -> None:
    x = inputs()
    run.train(loss_of(run(x)))
    first = run.module.blocks[0].up
    kept = first.weight
    first.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    loss = loss_of(run.module(x))
    run.backward(loss)
    for act in (lambda: run(x), run.offloaded.step):
        with pytest.raises(OffloadError, match=r"blocks\.0\.up\.weight was replaced"):
            act()
    first.weight = kept
    run.offloaded.optimizer.zero_grad()
    run.train(loss_of(run(x)))
    run.record("weights", run.weights())
    with torch.no_grad():
        first.weight.set_(torch.zeros(WIDTH, WIDTH))
    with pytest.raises(OffloadError, match="was replaced"):
        run(x)
    run.module.to("meta")
    with pytest.raises(OffloadError, match="was replaced"):
        run(x)
    run.module.to_empty(device="cpu")
    with pytest.raises(OffloadError, match="was replaced"):
        run(x)


class Doubled(torch.Tensor):
    """A wrapper subclass: its bytes are in another tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(value: Any) -> Any:
            return value.inner if isinstance(value, Doubled) else value

        result = func(*torch.utils._pytree.tree_map(bare, args), **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            return Doubled(result)
        return result


class WithSubclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.special = nn.Parameter(Doubled(torch.randn(WIDTH, WIDTH)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x @ self.special)


def _with_subclass_warning(module: nn.Module) -> nn.Module:
    return module


@row("resident", make=WithSubclass, runs=("plain",))
def tensor_subclass_parameters(run: Run) -> None:
    # The engines are made here, because making them warns.
    losses = []
    for kind in ("plain", "device", "host", "nvme"):
        torch.manual_seed(0)
        module = WithSubclass()
        if kind == "plain":
            engine = None
        else:
            (run.folder / kind).mkdir()
            with pytest.warns(UserWarning, match=r"special") as caught:
                engine = make_engine(module, kind, run.folder / kind)
            assert len(caught) == 1, [str(w.message) for w in caught]
            assert engine.report().tiers["device"].used_bytes >= WIDTH * WIDTH * 4
        inner = Run(kind, module, engine, run.folder, run.row)
        for step in range(3):
            inner.train(loss_of(inner(inputs(step))))
        losses.append([values for _, values in inner.records])
        if engine is not None:
            engine.close()
    for other in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses[0], other, strict=True))


class Slotted(nn.Parameter):
    """A parameter class with slots: the class of an instance can only be one of the same layout."""

    __slots__ = ("group", "tag")


class WithSlots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.slotted = Slotted(torch.randn(WIDTH, WIDTH) / 6)
        self.slotted.tag = "kept"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.slotted.tag == "kept"
        assert isinstance(self.slotted, Slotted)
        return self.blocks(x @ self.slotted)


@row("guard_per_class", make=WithSlots, runs=("plain",))
def parameter_class_with_slots(run: Run) -> None:
    losses = []
    for kind in ("plain", "device", "host", "nvme"):
        torch.manual_seed(0)
        module = WithSlots()
        engine = None
        if kind != "plain":
            (run.folder / kind).mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # resident, if this class cannot be guarded
                engine = make_engine(module, kind, run.folder / kind)
        inner = Run(kind, module, engine, run.folder, run.row)
        for step in range(3):
            inner.train(loss_of(inner(inputs(step))))
        losses.append([values for _, values in inner.records])
        if engine is not None:
            engine.close()
    for other in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses[0], other, strict=True))


@row("collect_check", make=Blocks, runs=("plain",))
def lazy_and_meta_modules(run: Run) -> None:
    lazy = nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(OffloadError, match="run one forward"):
        make_engine(lazy, "device", run.folder)
    lazy(inputs())
    make_engine(lazy, "device", run.folder).close()
    with torch.device("meta"):
        module = Blocks()
    with pytest.raises(OffloadError, match=r"blocks\.0\.up\.weight is on the meta device"):
        make_engine(module, "device", run.folder)
    assert build
    assert Engine


def _compiled(backend: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = Blocks()
        module.blocks[1] = torch.compile(module.blocks[1], backend=backend)
        module.blocks[2].compile(backend=backend)
        return module

    return make


def _compiled_before(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
    with torch.no_grad():
        run.record("evaluated", run(inputs(9)))


@row("forward", make=_compiled("eager"), pages=11)
def compiled_before_with_eager(run: Run) -> None:
    _compiled_before(run)


@row("forward", make=_compiled("aot_eager"), pages=11)
def compiled_before_with_aot_eager(run: Run) -> None:
    _compiled_before(run)


@row("forward", make=Blocks, pages=6)
def compiled_after(run: Run) -> None:
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(run.module.blocks[1], backend=backend)
        for step in range(2):
            x = inputs(step)
            first, second, _, fourth = run.module.blocks
            try:
                loss = loss_of(fourth(compiled(first(x))))
            except OffloadError:
                assert run.engine is not None
                loss = loss_of(fourth(second(first(x))))
            run.train(loss)


def _one_op_over_budget() -> nn.Module:
    module = nn.Module()
    module.weights = nn.ParameterList(weight(WIDTH, WIDTH) for _ in range(6))
    module.block = Block()
    module.forward = lambda x: module.block(x)  # type: ignore[method-assign]
    return module


@row("pins", make=_one_op_over_budget, runs=("host", "nvme"))
def op_that_exceeds_the_budget(run: Run) -> None:
    for _ in range(2):
        with pytest.raises(OffloadError) as caught:
            torch.stack(list(run.module.weights))
        text = str(caught.value)
        assert "stack" in text, text
        assert "weights.0" in text, text
        assert "24.0 KiB" in text or "24576" in text, text
        with pytest.raises(OffloadError), run.offloaded.gathered():
            pass
        run.check_at_rest()
        run.record("one", run.module.weights[3])
        run.train(run.module.block(inputs()).square().mean())
