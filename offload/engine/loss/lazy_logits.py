"""Logits that are computed when they are used, in chunks of tokens where that is enough.

[Note: Lazy logits]
Logits of tokens x vocabulary are the largest activation of a language model, and a loss needs them
once. A `LazyLogits` is what a head returns in their place: a tensor of their shape, dtype and
device without memory, that knows the head's input and what was done to its output since:

  rows         slices, views and reshapes that keep the vocabulary whole: done to the head's input
  steps        elementwise ops with numbers (casts, scaling, soft-capping): kept, for later
  cross entropy   computed chunk by chunk of rows, each under activation checkpointing: backward
               computes the chunk's logits again, so no more than one chunk of them ever exists
  metadata     answered at once
  anything     the logits are computed as a whole, and the op runs on them: correct, only larger

An in-place op computes them too, and they stay; on logits that have views, or on a view, it is an
error while they are not computed.

What runs past `__torch_function__` (a custom autograd function, a reentrant checkpoint around the
head) is an error, never a wrong number: there is no memory to read, and the autograd node of a
`LazyLogits` has no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from offload.errors import GuardError

_PLAINLY = torch._C.DisableTorchFunctionSubclass
_REMEDY = "set training.loss_chunk_tokens to 0, or keep the logits to torch functions"

Step = Callable[[torch.Tensor], torch.Tensor]


def _members(*names: str) -> frozenset[object]:
    owners = (torch.Tensor, torch)
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return frozenset(member for member in found if member is not None)


def _properties(*names: str) -> frozenset[object]:
    return frozenset(getattr(torch.Tensor, name).__get__ for name in names)


_METADATA = _properties(
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize"),
    *("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_meta", "nbytes"),
) | _members(
    *("size", "dim", "numel", "nelement", "stride", "element_size", "get_device", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "__len__", "__hash__"),
)
_ELEMENTWISE = _members(
    *("float", "half", "bfloat16", "double", "to", "type", "tanh", "neg", "__neg__"),
    *("div", "divide", "true_divide", "__truediv__", "mul", "multiply", "__mul__", "__rmul__"),
    *("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub"),
    *("clamp", "clip"),
)
_RESHAPES = _members("view", "reshape", "flatten", "unflatten", "contiguous", "unsqueeze")
_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or")
)
_INDEX = torch.Tensor.__getitem__


class LazyHead:
    """The head that lazy logits come from: what computes them, and its weights as they were.

    Attributes:
        forward: (..., width) -> (..., vocabulary).
        vocabulary: the size of the last dimension.
        chunk_tokens: rows of logits that may exist at once.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        weights: Sequence[nn.Parameter],
        *,
        vocabulary: int,
        chunk_tokens: int,
    ) -> None:
        self.forward = forward
        self.vocabulary = vocabulary
        self.chunk_tokens = chunk_tokens
        self.weights = tuple(weights)
        self._versions = [weight._version for weight in weights]

    def check(self) -> None:
        """The weights are those of the forward pass.

        Raises:
            GuardError: they have changed: the logits that were meant are gone.
        """
        if [weight._version for weight in self.weights] != self._versions:
            raise GuardError(
                "logits that are computed late are looked at after a step has changed the weights",
                remedy="look at them before engine.step(), or set training.loss_chunk_tokens to 0",
            )


class LazyLogits(torch.Tensor):
    """Logits (..., vocabulary) without memory; see [Note: Lazy logits]."""

    _head: LazyHead
    _input: torch.Tensor
    _steps: tuple[Step, ...]
    _real: torch.Tensor | None
    _is_aliased: bool

    @classmethod
    def make(
        cls,
        head: LazyHead,
        given: torch.Tensor,
        dtype: torch.dtype,
        steps: tuple[Step, ...] = (),
    ) -> LazyLogits:
        """The logits of `given` (..., width), of `dtype` after `steps`."""

        def allocate() -> LazyLogits:
            shape = (*given.shape[:-1], head.vocabulary)
            made: LazyLogits = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=given.device
            )
            made._head, made._input, made._steps = head, given, steps
            made._real, made._is_aliased = None, False
            return made

        node: Any = _NoBackward
        lazy: LazyLogits = node.apply(allocate, given, *head.weights)
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no logits, or compute them for `func`."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with _PLAINLY():
                return func(*args, **kwargs)
        lazy = args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy._real is None:
            answer = None
            if _writes(func):
                lazy.compute_for_edit()
            else:
                answer = _answer(func, lazy, args[1:], kwargs)
            if answer is not None:
                return answer
        return func(*_computed(args), **_computed(dict(kwargs)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse what did not come by `__torch_function__`."""
        raise GuardError(f"{func} runs on logits that have not been computed", remedy=_REMEDY)

    def compute(self) -> torch.Tensor:
        """The logits with memory; kept for the next use if autograd is on.

        Raises:
            GuardError: the head's weights have changed since.
        """
        if self._real is not None:
            return self._real
        self._head.check()
        real = self.logits_of(self._input)
        if torch.is_grad_enabled():
            self._real = real
        return real

    def compute_for_edit(self) -> None:
        """Compute the logits, to be kept in any case: their values are about to be changed.

        Raises:
            GuardError: there are views of them, which would not see the change.
        """
        if self._is_aliased:
            raise GuardError(
                "an in-place op on logits that share their values with views, and that have not "
                "been computed",
                remedy=_REMEDY,
            )
        with torch.enable_grad():
            self.compute()

    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits of some rows of the head's input, after all steps."""
        logits = self._head.forward(rows)
        for step in self._steps:
            logits = step(logits)
        return logits

    def with_rows(self, rows: torch.Tensor) -> LazyLogits:
        """The same of other rows of the head's input; it counts as a view."""
        view = LazyLogits.make(self._head, rows, self.dtype, self._steps)
        self._is_aliased = view._is_aliased = True
        return view

    def with_step(self, step: Step, dtype: torch.dtype) -> LazyLogits:
        """The same after one more elementwise step, whose result has `dtype`."""
        return LazyLogits.make(self._head, self._input, dtype, (*self._steps, step))


class _NoBackward(Function):
    """Gives lazy logits their place in the graph, which only what bypasses them would follow."""

    @staticmethod
    def forward(ctx: Any, allocate: Callable[[], LazyLogits], *_: torch.Tensor) -> LazyLogits:
        del ctx
        return allocate()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        del ctx
        raise GuardError("a backward through logits that have not been computed", remedy=_REMEDY)


def _writes(func: Callable[..., Any]) -> bool:
    """Whether an op changes its first argument: by its name, as torch names them."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE_OPERATORS
    return name.endswith("_")


def _computed(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.compute()
    if type(value) in (tuple, list):
        return type(value)(_computed(item) for item in value)
    if type(value) is dict:
        return {key: _computed(item) for key, item in value.items()}
    return value


def _answer(
    func: Callable[..., Any], lazy: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """The result if it needs no logits now; None if it does."""
    if func is functional.cross_entropy:
        return _cross_entropy(lazy, *args, **kwargs)
    if func in _ELEMENTWISE and _are_numbers((*args, *kwargs.values()), lazy.device):
        return _stepped(func, lazy, args, kwargs)
    if func in _RESHAPES and not any(isinstance(arg, torch.dtype) for arg in args):
        return _reshaped(func, lazy, args, kwargs)
    if func is _INDEX:
        return _indexed(lazy, args[0])
    return None


def _are_numbers(values: Iterable[Any], device: torch.device) -> bool:
    def is_number(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.dim() == 0
        if isinstance(value, (torch.device, str)):
            return torch.device(value) == device
        return value is None or isinstance(value, (bool, int, float, torch.dtype))

    return all(map(is_number, values))


def _stepped(
    func: Callable[..., Any], lazy: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    def step(logits: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = func(logits, *args, **kwargs)
        return result

    empty = torch.empty(0, dtype=lazy.dtype, device=lazy.device)
    with torch.no_grad():
        result = step(empty)
    if result is empty:
        return lazy
    return lazy.with_step(step, result.dtype) if result.device == lazy.device else None


def _reshaped(
    func: Callable[..., Any], lazy: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    shape = func(torch.empty(lazy.shape, device="meta"), *args, **kwargs).shape
    if shape == lazy.shape:
        return lazy
    if not shape or shape[-1] != lazy._head.vocabulary:
        return None
    return lazy.with_rows(lazy._input.reshape(*shape[:-1], lazy._input.shape[-1]))


def _indexed(lazy: LazyLogits, index: Any) -> torch.Tensor | None:
    """Rows chosen by numbers, slices and masks or positions; None if the vocabulary is cut."""
    keys = index if isinstance(index, tuple) else (index,)
    used = sum(_dimensions(key) for key in keys)
    if any(key is Ellipsis for key in keys):
        after = keys[[key is Ellipsis for key in keys].index(True) + 1 :]
        reaches_last = sum(_dimensions(key) for key in after) > 0
    else:
        reaches_last = used >= lazy.dim()
    # `[..., :]` is the only key of the last dimension that keeps it whole.
    if reaches_last and not (isinstance(keys[-1], slice) and keys[-1] == slice(None)):
        return None
    if any(isinstance(key, (list, range)) for key in keys):
        return None
    return lazy.with_rows(lazy._input[index])


def _dimensions(key: Any) -> int:
    """Dimensions of the indexed tensor that a key uses up."""
    if key is None or key is Ellipsis:
        return 0
    if isinstance(key, torch.Tensor) and key.dtype in (torch.bool, torch.uint8):
        return key.dim()
    return 1


def _cross_entropy(
    lazy: LazyLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """`torch.nn.functional.cross_entropy` by chunks of rows; None for what is not simple."""
    is_simple = (
        lazy.dim() == 2
        and target.dim() == 1
        and target.shape[0] == lazy.shape[0]
        and not target.is_floating_point()
        and size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none")
    )
    step = lazy._head.chunk_tokens
    if not is_simple or lazy.shape[0] <= step:
        return None
    lazy._head.check()

    def losses_of(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            lazy.logits_of(rows),
            targets,
            weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    chunks = zip(lazy._input.split(step), target.split(step), strict=True)
    losses = torch.cat([checkpoint(losses_of, *chunk, use_reentrant=False) for chunk in chunks])
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    counted = target != ignore_index
    if weight is None:
        divisor = counted.sum()
    else:
        divisor = weight[target.where(counted, 0)].where(counted, 0).sum()
    return (losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / divisor).to(
        losses.dtype
    )
