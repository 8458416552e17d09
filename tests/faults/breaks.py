"""Builds with one guard taken out, each by a function that patches the engine of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from offload.engine import build, collect, departed
from offload.engine import engine as engine_module
from offload.engine.engine import Engine
from offload.engine.guards import composite, guard, saved, windows
from offload.engine.guards import places as module_places
from offload.engine.paging import node_pins
from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import PagedParameter, WeightPage

BREAKS: dict[str, Callable[[], None]] = {}


def _break(patch: Callable[[], None]) -> Callable[[], None]:
    BREAKS[patch.__name__] = patch
    return patch


def _nothing(*_: Any, **__: Any) -> None:
    return None


@_break
def dispatch() -> None:
    """Ops on absent parameters run as they are."""

    def run(
        cls: type,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    guard.Guarded.__torch_function__ = classmethod(run)  # type: ignore[assignment]


@_break
def forward() -> None:
    """Nothing brings pages in before an op: neither windows nor guards."""
    dispatch()
    windows.Window.enter = _nothing  # type: ignore[method-assign]
    windows.Window.leave = _nothing  # type: ignore[method-assign]


@_break
def pack() -> None:
    """Autograd saves weights as they are."""
    saved._pack_page = _nothing  # type: ignore[assignment]


@_break
def version_check() -> None:
    """Backward does not notice that a weight has changed since forward."""
    real = saved._pack_page

    def pack_page(tensor: torch.Tensor) -> Any:
        page = real(tensor)
        return page and page._replace(version=None)

    saved._pack_page = pack_page


@_break
def pins() -> None:
    """Pages are brought in and not held."""
    real = Pager.pin

    def pin(self: Pager, pages: Sequence[WeightPage], user: str) -> None:
        real(self, pages, user)
        for page in pages:
            page.pins -= 1

    Pager.pin = pin  # type: ignore[method-assign]
    Pager.unpin = _nothing  # type: ignore[method-assign]


@_break
def node_pin() -> None:
    """A page that was unpacked for a node is not held while the node runs."""

    def pin_for_node(self: Pager, page: WeightPage) -> None:
        self.pin((page,), "a node")
        self.unpin((page,))

    Pager.pin_for_node = pin_for_node  # type: ignore[method-assign]


@_break
def node_release() -> None:
    """Pins of a backward stay when it has failed."""
    Pager.release_nodes = _nothing  # type: ignore[method-assign]
    node_pins.NodePins.release_thread = _nothing  # type: ignore[method-assign]
    node_pins.NodePins._end = _nothing  # type: ignore[method-assign]


@_break
def write_back() -> None:
    """Edits leave with the page."""
    Pager.write_back = _nothing  # type: ignore[method-assign]


@_break
def master_edits() -> None:
    """Edits reach the weight and not what completes it to fp32."""

    def mark_edited(self: PagedParameter) -> None:
        self.home_is_stale = True

    PagedParameter.mark_edited = mark_edited  # type: ignore[method-assign]


@_break
def raw_access() -> None:
    """A page leaves although a raw pointer to it is out."""
    Pager.keep_until_step = _nothing  # type: ignore[method-assign]
    Pager.end_raw_access = _nothing  # type: ignore[method-assign]


@_break
def views() -> None:
    """Views of a parameter are plain tensors."""
    guard._guard_views = lambda result, touched: result  # type: ignore[assignment]


@_break
def window_class() -> None:
    """A page that leaves during its window leaves plain parameters behind."""

    def drop(self: Pager, page: WeightPage) -> None:
        page.move(type(page.residency).HOME)
        del self._present[page]
        page.point_parameters_away()
        self._release_lease(page)

    Pager._drop = drop  # type: ignore[method-assign]


@_break
def proven() -> None:
    """Parameters wear the plain class whatever their module does with them."""
    windows.Window._may_be_plain = (  # type: ignore[method-assign]
        lambda self, parameter, *, grad_mode: True
    )


@_break
def innermost_hooks() -> None:
    """Somebody else's saved-tensor hooks get the weights."""
    windows.push_page_hooks = lambda: saved._top(False) is None and saved.push_page_hooks()
    guard.hooks_are_ours = lambda: True


@_break
def transforms() -> None:
    """torch.func and tracing are let through."""
    guard.refuse_transforms = _nothing  # type: ignore[assignment]
    windows.refuse_transforms = _nothing  # type: ignore[assignment]


@_break
def autocast_cache() -> None:
    """Autocast keeps its casts of weights."""
    windows._stop_autocast_cache = _nothing  # type: ignore[assignment]


@_break
def gather() -> None:
    """Modules that take raw pointers, or are compiled, are treated as any other."""
    engine_module.gathered_modules = lambda *_: {}  # type: ignore[assignment]


@_break
def copies() -> None:
    """Copies and pickles take what torch takes."""
    del guard.Guarded.__deepcopy__
    del guard.Guarded.__reduce_ex__


@_break
def hook_copies() -> None:
    """Copies of a module and of its parameters keep the engine's hooks."""
    del windows._Hook.__deepcopy__
    del windows._Hook.__reduce__
    del departed._AfterHooks.__deepcopy__


@_break
def failed_forward() -> None:
    """Windows close only if the forward has ended well."""
    Engine._unwind = _nothing  # type: ignore[method-assign]
    register = torch.nn.Module.register_forward_hook
    torch.nn.Module.register_forward_hook = (  # type: ignore[method-assign]
        lambda self, hook, *, always_call: register(self, hook)
    )


@_break
def hooks_left() -> None:
    """The engine's hooks stay when it is closed."""
    torch.utils.hooks.RemovableHandle.remove = _nothing  # type: ignore[method-assign]


@_break
def unwind() -> None:
    """A forward that was cut off leaves its windows open."""
    Engine._unwind = _nothing  # type: ignore[method-assign]


@_break
def refused() -> None:
    """set_, resize_ and share_memory_ reach the storage."""
    guard.REFUSED = frozenset()


@_break
def set_data() -> None:
    """`p.data = x` takes x's storage."""
    guard._SET_DATA = object()


@_break
def collect_check() -> None:
    """Lazy and meta parameters are taken as any other."""
    collect._check = _nothing  # type: ignore[assignment]


@_break
def resident() -> None:
    """Parameters that cannot be paged are paged."""
    collect._check_pageable = _nothing  # type: ignore[assignment]


@_break
def composites() -> None:
    """What lies in several tensors wears its own class: only its inner tensors are guarded."""
    composite.Composite.follow = _nothing  # type: ignore[method-assign]


@_break
def companions() -> None:
    """Tensors that belong to a parameter are not guarded while they are away."""
    real = PagedParameter.wear

    def wear(self: PagedParameter, parameter_class: type[torch.Tensor]) -> None:
        is_companion = not isinstance(self.state.parameter, torch.nn.Parameter)
        real(self, self.plain_class if is_companion else parameter_class)

    PagedParameter.wear = wear  # type: ignore[method-assign]


@_break
def guard_per_class() -> None:
    """Every parameter gets the guard of nn.Parameter, whatever its class."""
    real = guard.guard_class_of
    for module in (build, collect):
        module.guard_class_of = lambda plain: real(torch.nn.Parameter)  # type: ignore[attr-defined]


@_break
def places() -> None:
    """The engine trains parameters that are no longer the module's."""
    module_places.Places.check = _nothing  # type: ignore[method-assign]


@_break
def fused() -> None:
    """Modules that look for overrides see guards."""
    engine_module.fused_modules = lambda *_: {}  # type: ignore[assignment]


@_break
def ahead() -> None:
    """An encoder sees the guards of its first layer, whose kernel then does not."""
    windows.FusedWindow.enter_ahead = _nothing  # type: ignore[method-assign]


@_break
def escapes() -> None:
    """Views that leave a plain module are not looked for."""
    PagedParameter.has_plain_views = False  # type: ignore[assignment,method-assign]


@_break
def foreach() -> None:
    """Ops on lists of weights want them all at once."""
    guard._FOREACH = frozenset()


@_break
def hook_names() -> None:
    """torch.jit.script finds hooks like any other."""
    windows.GuardError = lambda *_, **__: AttributeError("__name__")  # type: ignore[assignment]


@_break
def closing() -> None:
    """A closed engine does not tell its parameters."""
    Pager.close = _nothing  # type: ignore[method-assign]


@_break
def stale_copies() -> None:
    """Device copies stay after the update."""
    Engine._forget_stale = _nothing  # type: ignore[method-assign]
