"""Linear and embedding of a tiled weight, forward and backward, tile by tile.

[Note: Tiled ops]
    linear     forward   output[:, rows] = input @ tile^T + bias[rows]
               backward  grad input     += grad output[:, rows] @ tile     summed in fp32
                         grad tile       = grad output[:, rows]^T @ input
    embedding  forward   output[tokens in rows] = tile[tokens - first row]; other tiles stay at home
               backward  grad tile = rows of grad output, summed by token
The gradient of the weight never exists as a whole: each tile of it goes home at once, and autograd
gets none. So a hook of the user that could change it is refused. Only `torch.autograd.grad` for the
weight itself, whose result is the caller's, is given all of it.

The weight is an input of the autograd node, so that what depends on it requires gradients; what
the node saves is the input of the op and the weight's version, never the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import Function

from offload.engine.guards.autocast import autocast_dtype, autocast_to
from offload.engine.guards.saved_version import version_error
from offload.engine.paging.pages import PagedParameter, find_paged
from offload.engine.tiling.tiled import Rows, TiledParameter
from offload.errors import GuardError

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_TakeTile = Callable[[Rows, torch.Tensor], None]
_TWICE = b"a tiled weight has no double backward: give the device room for it, or make it smaller"


def is_tiled_weight(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    touched: Sequence[tuple[torch.Tensor, PagedParameter]],
) -> bool:
    """Whether the weight of a linear or embedding op is a tiled parameter itself, not a view."""
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    return any(
        tensor is weight and paged.tiles is not None and paged.state.parameter is weight
        for tensor, paged in touched
    )


def tiled_linear(
    input: torch.Tensor,  # noqa: A002 - torch's name, which callers use
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear` of a tiled weight: (..., in), (out, in), (out) -> (..., out)."""
    tiled = _tiles_of(weight)
    dtype = autocast_dtype(input)
    if dtype is None:
        return _apply(_TiledLinear, input, weight, bias, tiled, None)
    # The casts are recorded outside of the node: autograd casts the gradients back.
    bias = None if bias is None else autocast_to(bias, dtype)
    return _apply(_TiledLinear, autocast_to(input, dtype), weight, bias, tiled, dtype)


def tiled_embedding(
    input: torch.Tensor,  # noqa: A002 - torch's name, which callers use
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.embedding` of a tiled weight.

    Raises:
        GuardError: an option that needs the whole table at once.
    """
    del norm_type  # of max_norm
    tiled = _tiles_of(weight)
    refused = {"max_norm": max_norm is not None, "scale_grad_by_freq": scale_grad_by_freq}
    refused["sparse"] = sparse
    for option, is_set in refused.items():
        if is_set:
            raise GuardError(
                f"embedding with {option} of parameter {tiled.state.name}, which is tiled",
                remedy=f"leave {option} out, or give the device room for the whole table",
            )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += tiled.num_rows
    return _apply(_TiledEmbedding, input, weight, padding_idx, tiled)


TILED_OPS: Mapping[Any, Callable[..., torch.Tensor]] = {
    torch.nn.functional.linear: tiled_linear,
    torch.nn.functional.embedding: tiled_embedding,
}


class _TiledLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tiled: TiledParameter,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        _remember(ctx, tiled, weight)
        ctx.dtype = dtype
        ctx.input_shape = given.shape
        ctx.input_dtype = given.dtype
        ctx.save_for_backward(given if weight.requires_grad else None)
        output: torch.Tensor | None = None
        with _plainly(given), tiled.slots.lent(tiled, tiled.tiles, "linear") as tiles:
            for rows, tile in tiles:
                part_bias = None if bias is None else bias[rows.start : rows.stop]
                values = tile if dtype is None else autocast_to(tile, dtype)
                part = torch.nn.functional.linear(given, values, part_bias)
                if output is None:
                    output = part.new_empty((*part.shape[:-1], tiled.num_rows))
                output[..., rows.start : rows.stop] = part
        assert output is not None, "a tiled parameter has rows"
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, None, None
        tiled: TiledParameter = ctx.tiled
        wants_input, _, wants_bias, *_ = ctx.needs_input_grad
        (given,) = ctx.saved_tensors
        with _plainly(gradient):
            flat = gradient.reshape(-1, tiled.num_rows)
            flat_input = None if given is None else given.reshape(-1, tiled.row_numel)
            grad_input = _GradientSum(ctx.input_dtype) if wants_input else None
            with _arrival(ctx) as (take, whole):
                for rows, tile in _tiles_for(ctx, wanted=wants_input):
                    part = flat[:, rows.start : rows.stop]
                    if grad_input is not None and tile is not None:
                        values = tile if ctx.dtype is None else autocast_to(tile, ctx.dtype)
                        grad_input.add(part, values)
                    if take is not None:
                        assert flat_input is not None
                        take(rows, part.t() @ flat_input)
            grad_bias = flat.sum(0) if wants_bias else None
            found = None if grad_input is None else grad_input.total.view(ctx.input_shape)
        return _once(found, _joined(whole), grad_bias, None, None)


class _TiledEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        weight: torch.Tensor,
        padding_idx: int | None,
        tiled: TiledParameter,
    ) -> torch.Tensor:
        _remember(ctx, tiled, weight)
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(given)
        tokens = given.reshape(-1)
        output = torch.empty(
            (tokens.numel(), tiled.row_numel), dtype=weight.dtype, device=weight.device
        )
        if tokens.numel():
            low, high = torch.stack(torch.aminmax(tokens)).tolist()
            if low < 0 or high >= tiled.num_rows:
                raise IndexError("index out of range in self")
        hit = set((tokens // tiled.tile_rows).unique().tolist())
        order = [rows for number, rows in enumerate(tiled.tiles) if number in hit]
        with _plainly(weight), tiled.slots.lent(tiled, order, "embedding") as tiles:
            for rows, tile in tiles:
                where = _inside(tokens, rows)
                output[where] = tile.index_select(0, tokens[where] - rows.start)
        return output.view(*given.shape, tiled.row_numel)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, None
        tiled: TiledParameter = ctx.tiled
        with _plainly(gradient):
            tokens = ctx.saved_tensors[0].reshape(-1)
            flat = gradient.reshape(-1, tiled.row_numel)
            padding = -1 if ctx.padding_idx is None else ctx.padding_idx
            with _arrival(ctx) as (take, whole):
                for rows in tiled.tiles if take is not None else ():
                    where = _inside(tokens, rows)
                    tile = torch.ops.aten.embedding_dense_backward(
                        flat[where],
                        tokens[where] - rows.start,
                        rows.stop - rows.start,
                        padding - rows.start if rows.start <= padding < rows.stop else -1,
                        False,
                    )
                    assert take is not None
                    take(rows, tile)
        return _once(None, _joined(whole), None, None)


def _apply(function: Any, *args: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)
    return result


class _GradientSum:
    """The gradient of an input, summed over tiles: in fp32 if it is narrower."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sum: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, tile: torch.Tensor) -> None:
        """Add `gradient @ tile`."""
        if self._sum is None:
            self._sum = gradient @ tile
            if self._dtype.itemsize < torch.float32.itemsize:
                self._sum = self._sum.float()
        elif self._sum.dtype == gradient.dtype:
            self._sum.addmm_(gradient, tile)
        else:
            self._sum += gradient @ tile

    @property
    def total(self) -> torch.Tensor:
        """The sum in the dtype of the input."""
        assert self._sum is not None, "a tiled parameter has rows"
        return self._sum.to(self._dtype)


def _tiles_of(weight: torch.Tensor) -> TiledParameter:
    paged = find_paged(weight)
    assert paged is not None
    assert paged.tiles is not None
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    if hooks and weight.requires_grad and torch.is_grad_enabled():
        raise GuardError(
            f"a hook on the gradient of parameter {paged.state.name}, which is tiled: its gradient "
            "never exists as a whole",
            remedy="remove the hook, or give the device room for the whole weight",
        )
    return paged.tiles


def _remember(ctx: Any, tiled: TiledParameter, weight: torch.Tensor) -> None:
    ctx.tiled = tiled
    ctx.version = None if weight.is_inference() else weight._version
    ctx.set_materialize_grads(False)


@contextlib.contextmanager
def _plainly(tensor: torch.Tensor) -> Iterator[None]:
    """No guards, no autograd, no autocast: backward may run inside the user's autocast."""
    with _NO_GUARD(), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _inside(tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
    return ((tokens >= rows.start) & (tokens < rows.stop)).nonzero().squeeze(1)


def _tiles_for(ctx: Any, *, wanted: bool) -> Iterator[tuple[Rows, torch.Tensor | None]]:
    """The tiles of a backward: with their values if those are wanted."""
    tiled: TiledParameter = ctx.tiled
    if not wanted:
        yield from ((rows, None) for rows in tiled.tiles)
        return
    _check_version(ctx)
    with tiled.slots.lent(tiled, tiled.tiles, "the backward of linear") as tiles:
        yield from tiles


def _check_version(ctx: Any) -> None:
    """A graph that was kept while the weight changed is void, as in plain PyTorch.

    Raises:
        RuntimeError: the weight has changed.
    """
    state, saved = ctx.tiled.state, ctx.version
    now = state.parameter._version
    if saved is not None and saved != now:
        raise version_error(f"parameter {state.name}", now, saved)


@contextlib.contextmanager
def _arrival(ctx: Any) -> Iterator[tuple[_TakeTile | None, list[torch.Tensor]]]:
    """Where the tiles of the weight's gradient go: home, into the list, or (None) nowhere."""
    tiled: TiledParameter = ctx.tiled
    state = tiled.state
    dtype = state.parameter.dtype
    wanted = _gradient_wanted(state.parameter) if ctx.needs_input_grad[1] else None
    whole: list[torch.Tensor] = []
    if wanted is None:
        yield None, whole
    elif wanted == "whole":
        yield (lambda _, values: whole.append(values.to(dtype))), whole
    else:
        _check_trained(tiled)
        with tiled.slots.arriving(state) as take:

            def take_home(rows: Rows, values: torch.Tensor) -> None:
                take(rows.start * tiled.row_numel, values.to(dtype).reshape(-1))

            yield take_home, whole


def _gradient_wanted(parameter: torch.Tensor) -> str | None:
    """What the backward that runs does with the parameter's gradient: "home", "whole", nothing.

    `torch.autograd.grad` returns those of its inputs whole, and accumulates no others.
    """
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return "home" if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # how torch says that autograd.grad returns the gradient of this node
        return "whole"


def _check_trained(tiled: TiledParameter) -> None:
    if not tiled.state.trainable:
        raise GuardError(
            f"a gradient of parameter {tiled.state.name}, which is tiled and not trained",
            remedy="set requires_grad to False; or unfreeze it, and with an optimizer of your own "
            "call add_param_group, before a forward of the whole model",
        )


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(list(parts)) if parts else None


def _once(*gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients; under `create_graph` such that to differentiate them again is an error."""
    if not torch.is_grad_enabled():
        return gradients
    present = [g.detach().requires_grad_() for g in gradients if g is not None]
    delayed: Any = torch._C._functions.DelayedError(_TWICE, len(present))
    failing = iter(delayed(*present)) if present else iter(())
    return tuple(None if g is None else next(failing) for g in gradients)
