"""Where the layers of a module begin, and the graph cut in two there.

[Note: Cuts]
  block      a module that runs beside others of its class: the children of one class of an
             nn.ModuleList or nn.Sequential, where there are two or more with parameters. Blocks
             inside blocks (experts, branches) are none.
  place      before a block, or after the last block of its list.
  cut        one passage of a place: (passages of the place before it, number of the place).
  crossing   a tensor with a gradient that a block is given, or the last one returns, at a cut. Its
             history is taken off and kept: the tensor goes on as the output of a node that, in
             backward, keeps the gradient instead of handing it on.
  segment    the part of a graph between two cuts. Backward runs through it alone, from the
             gradients that were kept at the cut at its end.

A crossing is cut in place: whoever else holds the tensor, such as a residual connection around the
block or an encoder's output that every block is given, holds the cut tensor then. The seams are
invisible: autograd adds up the same gradients in the same order, because a node's sequence number
says when it runs, and within a thread that is the order of creation.

Of what cannot be cut in place (a view, a tensor with hooks) the block is given a cut alias. What
crosses a cut otherwise makes it *wide*; see graph.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from offload.engine.guards.transforms import active_transform

_preserve_version = torch.autograd.grad_mode._unsafe_preserve_version_counter


class Cut(NamedTuple):
    """A passage of a place; in ascending order a forward passes them, if it is a usual one."""

    occurrence: int
    place: int


START = Cut(-1, -1)


class Place(NamedTuple):
    """Where a cut can be."""

    name: str
    module: nn.Module
    is_after: bool

    def __str__(self) -> str:
        """For messages."""
        return f"{'after' if self.is_after else 'before'} {self.name}"


class Traveller(Protocol):
    """A forward that is told where it is."""

    def reach(self, cut: Cut, values: Any) -> Any:
        """The forward is at a cut, and `values` pass it; returns what goes on in their place."""
        ...


class Crossing:
    """One tensor at a cut.

    Attributes:
        origin: where its gradient goes on.
        segment: number of the segment that begins at the cut.
        gradient: what backward has brought to the cut; None: nothing yet.
    """

    __slots__ = ("gradient", "origin", "segment")

    def __init__(self, origin: GradientEdge, segment: int) -> None:
        self.origin = origin
        self.segment = segment
        self.gradient: torch.Tensor | None = None

    def taken(self) -> tuple[GradientEdge, torch.Tensor | None]:
        """Where backward goes on, and with what, which is forgotten here."""
        gradient, self.gradient = self.gradient, None
        return self.origin, gradient


class _Seam(torch.autograd.Function):
    """Nothing in forward; in backward the gradient stays in the crossing."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, tensor: torch.Tensor, crossing: Crossing
    ) -> torch.Tensor:
        del token  # what makes the output one with a history
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(tensor)
        ctx.crossing = crossing
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None]:
        (ctx.crossing.gradient,) = gradients
        return None, None, None


_TOKEN = torch.zeros((), requires_grad=True)


def seam_of(node: Any) -> Crossing | None:
    """The crossing whose gradient ends at the node, if it is a seam."""
    crossing = getattr(node, "crossing", None)
    return crossing if isinstance(crossing, Crossing) else None


def can_cross(value: object) -> bool:
    """Whether a value that passes a cut is a tensor with a history that can be cut off."""
    return (
        type(value) is torch.Tensor
        and value.requires_grad
        and value.grad_fn is not None
        and value.layout is torch.strided
        and not value.is_nested
    )


def crossing_edges(values: Any) -> frozenset[tuple[Any, int]]:
    """The gradient edges of the tensors among `values` that can be cut."""
    edges = (get_gradient_edge(leaf) for leaf in tree_leaves(values) if can_cross(leaf))
    return frozenset((edge.node, edge.output_nr) for edge in edges)


def cut_off(values: Any, segment: int) -> tuple[Any, list[Crossing]]:
    """Cut all tensors among `values` that can be; what goes on in their place, and the crossings.

    Args:
        values: lists, tuples, dictionaries and what else is a pytree.
        segment: number of the segment that begins here.
    """
    known: dict[int, torch.Tensor] = {}
    crossings: list[Crossing] = []

    def replaced(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        if not can_cross(value):
            return value
        crossing = Crossing(get_gradient_edge(value), segment)
        crossings.append(crossing)
        known[id(value)] = after = _cut(value, crossing)
        known[id(after)] = after
        return after

    return tree_map(replaced, values), crossings


def _cut(tensor: torch.Tensor, crossing: Crossing) -> torch.Tensor:
    in_place = not (tensor._is_view() or tensor.retains_grad or tensor._backward_hooks)
    with _preserve_version(tensor):
        bare = tensor.detach_() if in_place else tensor.detach()
        result: torch.Tensor = _Seam.apply(_TOKEN, bare, crossing)  # type: ignore[no-untyped-call]
    return result


def find_places(module: nn.Module, excluded: Sequence[nn.Module]) -> list[Place]:
    """Every place of a module, in the order in which its blocks are registered.

    Args:
        module: the whole.
        excluded: modules that run as one, e.g. compiled ones: there is no place inside them.
    """
    barred = {id(one) for one in excluded}
    return list(_places_below(module, "", barred))


def _places_below(module: nn.Module, path: str, barred: set[int]) -> Iterator[Place]:
    if id(module) in barred or isinstance(module, torch.jit.ScriptModule):
        return
    blocks = _blocks(module, barred) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if child in blocks:
            yield Place(child_path, child, is_after=False)
            if child is blocks[-1]:
                yield Place(child_path, child, is_after=True)
        else:
            yield from _places_below(child, child_path, barred)


def _blocks(container: nn.Module, barred: set[int]) -> list[nn.Module]:
    """The children of the class that has most parameters among those with two or more of them."""
    by_class: dict[type, list[nn.Module]] = {}
    for child in container.children():
        usable = id(child) not in barred and not isinstance(child, torch.jit.ScriptModule)
        if usable and any(True for _ in child.parameters()):
            by_class.setdefault(type(child), []).append(child)
    lists = [children for children in by_class.values() if len(children) > 1]
    return max(lists, key=_num_elements, default=[])


def _num_elements(modules: Sequence[nn.Module]) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return sum(parameter.numel() for module in modules for parameter in module.parameters())


class _Way(threading.local):
    """The forward that runs in this thread, and how often it has passed each place."""

    traveller: Traveller | None = None
    passages: Counter[int]


_way = _Way()


@contextlib.contextmanager
def travelling(traveller: Traveller) -> Iterator[None]:
    """A block whose forward is `traveller`'s: it is told of every cut."""
    _way.traveller, _way.passages = traveller, Counter()
    try:
        yield
    finally:
        _way.traveller = None


@contextlib.contextmanager
def hooked(places: Sequence[Place]) -> Iterator[None]:
    """A block in which the places have hooks; forwards that nobody travels with pass them by."""
    handles: list[RemovableHandle] = []
    try:
        for number, place in enumerate(places):
            handles.append(_hook(number, place))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(number: int, place: Place) -> RemovableHandle:
    if place.is_after:

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            return _reach(number, output)

        return place.module.register_forward_hook(after)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _reach(number, (args, kwargs))

    # Before the block's window opens.
    return place.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)


@_disable_dynamo
def _reach(place: int, values: Any) -> Any:
    """What a hook does; without gradients there is nothing to cut."""
    traveller = _way.traveller
    if traveller is None or not torch.is_grad_enabled() or active_transform() is not None:
        return None
    cut = Cut(_way.passages[place], place)
    _way.passages[place] += 1
    return traveller.reach(cut, values)
