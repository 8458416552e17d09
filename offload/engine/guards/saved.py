"""Saved-tensor hooks: what autograd saves of a parameter is its page, not its memory.

[Note: Saved pages]
Autograd saves weights, and views of them, for the backward pass. The hooks replace what shares a
paged storage by `SavedPage` (which page, and how the view lies in it) and bring the page back when
the node runs, pinned until the node has ended. Of the rest, what is large leaves the device where
activations have their home below it; see activations/store.py. The hooks repeat the version check
that torch leaves out when hooks are set.

torch asks only the innermost pair of hooks. The engine's pair is outermost around the module; where
somebody else's (activation checkpointing, save_on_cpu) lies on top, windows and guarded ops put a
pair on top of that which takes the pages and hands everything else on. So weights never become part
of what a checkpointed region saves or recomputes, in the first run and in the recomputation alike.

Under `create_graph` a node's own backward saves what was unpacked for it; torch restores the hooks
around every node to those of the `backward` call, so `unpack` puts the pair in place for its node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from offload.engine.activations.store import ActivationStore, SavedActivation, SavedOnDevice
from offload.engine.guards.composite import (
    guard_classes,
    is_wrapper,
    plain_class_of,
    unwrapped,
)
from offload.engine.guards.saved_version import version_error
from offload.engine.paging.pages import PagedParameter, find_paged

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks

_Hook = Callable[[Any], Any]
_top: Callable[[bool], tuple[_Hook, _Hook] | None] = (
    torch._C._autograd._top_saved_tensors_default_hooks
)


class SavedPage(NamedTuple):
    """A tensor that shares a paged storage, without its memory."""

    paged: PagedParameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    version: int | None


class SavedWrapper(NamedTuple):
    """A wrapper with a paged storage inside, without its memory; see composite.py."""

    paged: PagedParameter
    plain: Any
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    inner: dict[str, Any]
    version: int | None


class SavedHere(NamedTuple):
    """A tensor that stays as it is: detached, else an op's own output would never be freed."""

    tensor: torch.Tensor
    version: int

    def unpack(self) -> torch.Tensor:
        """The tensor.

        Raises:
            RuntimeError: it has been changed in place since, as plain PyTorch would find.
        """
        now = self.tensor._version
        if now != self.version:
            size = list(self.tensor.size())
            raise version_error(f"a tensor of shape {size}", now, self.version)
        return self.tensor


class SavedElsewhere(NamedTuple):
    """What other hooks made of a tensor that is not ours, and how they undo it."""

    unpack: _Hook
    packed: Any


def _pack_page(tensor: torch.Tensor) -> SavedPage | SavedWrapper | None:
    with _NO_GUARD():
        if is_wrapper(tensor):
            return _pack_wrapper(tensor)
        paged = find_paged(tensor)
        if paged is None:
            return None
        version = None if tensor.is_inference() else tensor._version
        if version != paged.state.parameter._version:
            version = None  # made from `.data`: it has a counter of its own, as in plain PyTorch
        return SavedPage(
            paged,
            tensor.size(),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            version,
        )


def _pack_wrapper(wrapper: Any) -> SavedWrapper | None:
    inner, context = unwrapped(wrapper)
    pages = {n: _pack_page(value) for n, value in inner.items() if isinstance(value, torch.Tensor)}
    paged = next((page.paged for page in pages.values() if page is not None), None)
    if paged is None:
        return None
    version = wrapper._version
    return SavedWrapper(
        paged,
        plain_class_of(type(wrapper)),
        context,
        wrapper.size(),
        wrapper.stride(),
        {name: pages.get(name) or value for name, value in inner.items()},
        version if version == paged.owner._version else None,
    )


def _pack(tensor: torch.Tensor) -> Any:
    return _pack_page(tensor) or _pack_here(tensor)


def _pack_here(tensor: torch.Tensor) -> Any:
    if tensor.is_inference():
        return tensor
    with _NO_GUARD():
        here = tensor if tensor.grad_fn is None else tensor.detach()
        return SavedHere(here, tensor._version)


def _unpack(saved: Any) -> Any:
    if isinstance(saved, SavedPage):
        return _unpack_page(saved)
    if isinstance(saved, SavedWrapper):
        return _unpack_wrapper(saved)
    if isinstance(saved, SavedElsewhere):
        return saved.unpack(saved.packed)
    if isinstance(saved, (SavedHere, SavedActivation, SavedOnDevice)):
        return saved.unpack()
    return saved


def _unpack_page(saved: SavedPage) -> torch.Tensor:
    paged = saved.paged
    _check_version(paged, saved.version, paged.state.parameter._version)
    in_backward = torch._C._current_graph_task_id() != -1
    with _NO_GUARD():
        if in_backward:
            paged.page.holder.pin_for_node(paged.page)
        with torch.no_grad():
            view = torch.empty(0, dtype=saved.dtype, device=paged.state.parameter.device)
            view.set_(paged.storage, saved.offset, saved.size, saved.stride)
    if not in_backward:
        view.__class__ = paged.view_class
    elif torch.is_grad_enabled() and not hooks_are_ours():
        _push(_pack, _unpack)
    return view


def _check_version(paged: PagedParameter, saved: int | None, now: int) -> None:
    if saved is not None and saved != now:
        raise version_error(f"parameter {paged.state.name}", now, saved)


def _unpack_wrapper(saved: SavedWrapper) -> torch.Tensor:
    _check_version(saved.paged, saved.version, saved.paged.owner._version)
    inner = {name: _unpack(value) for name, value in saved.inner.items()}
    with _NO_GUARD():
        wrapper: torch.Tensor = saved.plain.__tensor_unflatten__(
            inner, saved.context, saved.size, saved.stride
        )
    if torch._C._current_graph_task_id() == -1:
        wrapper.__class__ = guard_classes[saved.plain]
    return wrapper


def hooks_are_ours() -> bool:
    """Whether what autograd saves at this moment goes through the engine's hooks first."""
    top = _top(False)
    return top is not None and top[1] is _unpack


def push_page_hooks(activations: ActivationStore | None = None) -> bool:
    """Put the engine's hooks on top, to `pop_page_hooks` later; False if they are there already.

    With `activations`, and no hooks of somebody else below, other tensors leave the device too.
    """
    top = _top(False)
    if top is None:
        _push(_pack if activations is None else _packing(activations), _unpack)
        return True
    below_pack, below_unpack = top
    if below_unpack is _unpack:
        return False

    def pack(tensor: torch.Tensor) -> Any:
        return _pack_page(tensor) or SavedElsewhere(below_unpack, below_pack(tensor))

    _push(pack, _unpack)
    return True


def _packing(activations: ActivationStore) -> _Hook:
    def pack(tensor: torch.Tensor) -> Any:
        return _pack_page(tensor) or activations.pack(tensor) or _pack_here(tensor)

    return pack


def pop_page_hooks() -> None:
    """Undo one `push_page_hooks` that answered True."""
    _pop()


@contextlib.contextmanager
def page_hooks() -> Iterator[None]:
    """The engine's hooks on top for the duration of a block."""
    pushed = push_page_hooks()
    try:
        yield
    finally:
        if pushed:
            pop_page_hooks()
