"""Rows: quantized weights, whose bytes lie in several tensors."""

from __future__ import annotations

from typing import Any, Self

import bitsandbytes as bnb
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Block, inputs, loss_of


class Coded(torch.Tensor):
    """int8 codes with a scale per row, which decides below autograd what ops on it do."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: None, size: Any, stride: Any) -> Coded:
        return Coded(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # as torchao does
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            made = Coded(args[0].codes.detach(), args[0].scale.detach())
            return return_and_correct_aliasing(func, args, kwargs, made)

        def values(coded: Coded) -> torch.Tensor:
            return coded.codes.float() * coded.scale

        return func(*tree_map_only(Coded, values, args), **(kwargs or {}))


class Borrowed(nn.Module):
    """Blocks around a product with a weight of a module that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Block(), Block()
        self.owner = nn.Module()
        codes = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8)
        coded = Coded(codes, torch.rand(WIDTH, 1) / 300)
        self.owner.weight = nn.Parameter(coded, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.before(x) @ self.owner.weight
        return self.after(hidden * self.owner.weight.sum())


@row("composites", make=Borrowed, pages=6)
def wrapper_used_outside_its_module(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))
        run.evict_all()
        run.record("between steps", run.module.owner.weight @ inputs(step).t())


class Nf4(nn.Module):
    """A 4-bit layer whose scales are quantized as well."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Block(), Block()
        layer = bnb.nn.Linear4bit(
            WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.support_avx512bf16_for_cpu = False
        self.layer = layer.to("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.before(x)))


@row("companions", "dispatch", make=Nf4, pages=8)
def scales_of_bitsandbytes(run: Run) -> None:
    for step in range(4):
        loss = loss_of(run(inputs(step)))
        run.evict_all()
        run.train(loss)
        run.evict_all()
        layer = run.module.layer
        state = layer.weight.quant_state
        run.record("values", bnb.functional.dequantize_4bit(layer.weight.data, state))
