"""Module hooks: they say which pages a module is about to use. All hooks of the engine stand here.

[Note: Windows]
  window   from before a module's forward to after it, for the parameters that are directly its own
           (for a gathered or compiled module: of its whole subtree). Its pages are brought in, and
           the parameters that have proven safe wear their plain class: ops on them cost nothing
           extra.
  root     the window of the engine's module, for the pages whose home is the device. Its hooks also
           begin and end runs, i.e. traces, and let activations leave the device.

A parameter is proven once its module has run under guard and nothing of it escaped; see
`needs_guard` in pages.py. If its module behaves otherwise later on, the page stays until the step
ends. The pages of gathered modules stay pinned until the backward through them is over.

Under a torch.func transform or jit tracing no window may do anything: what it would use must be
there already, as inside `gathered()`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from offload.engine.activations.store import ActivationStore
from offload.engine.guards.guard import refuse_transforms
from offload.engine.guards.saved import pop_page_hooks, push_page_hooks
from offload.engine.guards.transforms import active_transform
from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import PagedParameter, WeightPage
from offload.errors import GuardError
from offload.tiers.uninterrupted import uninterrupted

# The parameters that went plain, whether hooks were pushed, the grad mode. None: under a transform.
_Entered = tuple[list[PagedParameter], bool, bool]


class Window:
    """The parameters one module is about to use, and what is open of it in each thread.

    Tiled parameters are in none: they stay guarded, and come by tiles.
    """

    def __init__(
        self, module: nn.Module, name: str, parameters: Sequence[PagedParameter], pager: Pager
    ) -> None:
        self.module = module
        self.name = name or type(module).__name__
        self.parameters = tuple(parameters)
        self.pages: tuple[WeightPage, ...] = tuple(
            dict.fromkeys(parameter.page for parameter in parameters)
        )
        self.pager = pager
        self._open = threading.local()

    @uninterrupted()
    def enter(self) -> None:
        """Before the forward: bring the pages in."""
        if active_transform() is not None:
            if not all(parameter.plain_depth for parameter in self.parameters):
                refuse_transforms(f"module {self.name}")
            self._stack().append(None)
            return
        _stop_autocast_cache()
        self.pager.open_window(self.pages, f"module {self.name}")
        grad_mode = torch.is_grad_enabled()
        plain = [p for p in self.parameters if self._may_be_plain(p, grad_mode=grad_mode)]
        for parameter in plain:
            parameter.wear_plain()
        self._stack().append((plain, push_page_hooks(), grad_mode))

    @uninterrupted()
    def leave(self) -> None:
        """After the forward, also one that has failed."""
        stack = self._stack()
        if not stack:
            return  # `enter` itself has failed
        entered = stack.pop()
        if entered is None:
            return
        plain, pushed, grad_mode = entered
        if pushed:
            pop_page_hooks()
        for parameter in plain:
            if parameter.has_escaped:
                parameter.needs_guard = True
                self.pager.keep_until_step(parameter.page)
            parameter.wear_guard()
        for parameter in self.parameters:
            parameter.proven.add(grad_mode)
        self.pager.close_window(self.pages)

    @uninterrupted()
    def unwind(self) -> None:
        """Leave as often as this thread has entered: the forward was cut off by an interrupt."""
        while self._stack():
            self.leave()

    def _may_be_plain(self, parameter: PagedParameter, *, grad_mode: bool) -> bool:
        return grad_mode in parameter.proven and not parameter.needs_guard

    def _stack(self) -> list[_Entered | None]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        stack: list[_Entered | None] = self._open.stack
        return stack


class GatheredWindow(Window):
    """The window of a module whose code sees raw memory: everything below it stays put.

    Its pages are pinned from its forward to the end of the step's backward, its parameters plain.
    """

    def __init__(
        self, module: nn.Module, name: str, parameters: Sequence[PagedParameter], pager: Pager
    ) -> None:
        super().__init__(module, name, parameters, pager)
        self._pinned = 0

    @uninterrupted()
    def enter(self) -> None:
        """Before the forward: bring everything in and pin it."""
        self.pager.pin(self.pages, f"gathered module {self.name}")
        try:
            super().enter()
        except BaseException:
            self.pager.unpin(self.pages)
            raise
        self._pinned += 1

    @uninterrupted()
    def leave(self) -> None:
        """After the forward: without gradients nothing needs the pages any more."""
        entered = bool(self._stack())
        super().leave()
        if entered and not torch.is_grad_enabled():
            self._pinned -= 1
            self.pager.unpin(self.pages)

    @uninterrupted()
    def release(self) -> None:
        """The backward is over."""
        while self._pinned:
            self._pinned -= 1
            self.pager.unpin(self.pages)

    def _may_be_plain(self, parameter: PagedParameter, *, grad_mode: bool) -> bool:
        del parameter, grad_mode
        return True


class FusedWindow(Window):
    """The window of a module that runs as one kernel over all its weights, unless it sees a guard.

    Its other way has the same results only nearly, and placements must agree to the bit: so where
    the kernel can run, all weights are brought in and plain.
    """

    def enter_ahead(self) -> None:
        """Enter before the forward: who will run it asks the weights now; see `EncoderWindow`."""
        self.enter()
        self._open.is_ahead = True

    def leave_ahead(self) -> None:
        """Undo `enter_ahead` if the forward has not run since."""
        if self._take_ahead():
            self.leave()

    def _take_ahead(self) -> bool:
        is_ahead: bool = getattr(self._open, "is_ahead", False)
        self._open.is_ahead = False
        return is_ahead

    @uninterrupted()
    def enter(self) -> None:
        """Before the forward: if the kernel may run, bring everything in and pin it."""
        if self._take_ahead():
            return
        differentiates = torch.is_grad_enabled() and any(
            parameter.state.parameter.requires_grad for parameter in self.parameters
        )
        if self.module.training or differentiates or active_transform() is not None:
            self._entered().append(False)
            return
        self.pager.pin(self.pages, f"module {self.name}")
        try:
            super().enter()
        except BaseException:
            self.pager.unpin(self.pages)
            raise
        self._entered().append(True)

    @uninterrupted()
    def leave(self) -> None:
        """After the forward."""
        if self._entered() and self._entered().pop():
            super().leave()
            self.pager.unpin(self.pages)

    @uninterrupted()
    def unwind(self) -> None:
        """Leave as often as this thread has entered."""
        self._take_ahead()
        while self._entered():
            self.leave()

    def _may_be_plain(self, parameter: PagedParameter, *, grad_mode: bool) -> bool:
        del parameter, grad_mode
        return True

    def _entered(self) -> list[bool]:
        if not hasattr(self._open, "entered"):
            self._open.entered = []
        entered: list[bool] = self._open.entered
        return entered


class EncoderWindow:
    """The window of nn.TransformerEncoder, which asks its first layer's weights before it runs it.

    What it asks is whether they are of a class like the guard. If not, a padded batch becomes a
    nested tensor, whose padding comes out as zeros; if so, it stays as it is, and the padding comes
    out as numbers. So the first layer's window opens before the encoder's forward.
    """

    def __init__(self, module: nn.TransformerEncoder, first: FusedWindow) -> None:
        self.module = module
        self._first = first

    def enter(self) -> None:
        """Before the encoder's forward."""
        self._first.enter_ahead()

    def leave(self) -> None:
        """After it, also if it has failed before its first layer."""
        self._first.leave_ahead()


class RootWindow:
    """The window of the whole module: pages that never leave, and the beginning of runs.

    Resident parameters stay plain until `rest`, so that recomputation in backward finds them so;
    a run without gradients has none, and leaves them guarded if it has found them so. One whose
    update is pending stays guarded in this run, so that its first use applies it.

    Attributes:
        order: the name under which `one_run` keeps the trace of the last run with gradients; ()
            for a run that is one forward.
    """

    def __init__(
        self,
        module: nn.Module,
        resident: Sequence[PagedParameter],
        pager: Pager,
        activations: ActivationStore | None,
        *,
        before_run: Callable[[], None],
    ) -> None:
        self.module = module
        self.pager = pager
        self._activations = activations
        self._before_run = before_run
        self._resident = tuple(resident)
        self._awake: list[PagedParameter] | None = None  # what is plain
        self._wakes_until_leave = False
        self._is_held = False
        self.order: tuple[object, ...] = ()
        self._open = threading.local()

    def enter(self) -> None:
        """Before the forward of the whole module: a run begins."""
        stack = self._stack()
        if active_transform() is not None:
            stack.append(False)
            return
        if not stack:
            _stop_autocast_cache()
            if not self._is_held:
                self._begin(())
        stack.append(push_page_hooks(self._activations))

    def _begin(self, order: tuple[object, ...]) -> None:
        self._before_run()
        if torch.is_grad_enabled():
            self.order = order
        self.pager.begin((self.module.training, torch.is_grad_enabled(), *order))
        if self._awake is None:
            self._awake = [p for p in self._resident if not self.pager.is_pending(p.page)]
            self._wakes_until_leave = not torch.is_grad_enabled()
            for parameter in self._awake:
                parameter.wear_plain()
        if self._activations is not None:
            self._activations.begin(self.module)

    @contextlib.contextmanager
    def one_run(self, *order: object) -> Iterator[None]:
        """A block whose forwards are all one run, whose trace is kept under the name `order`."""
        self._begin(order)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def leave(self) -> None:
        """After it. A run without gradients has no backward: it ends here."""
        stack = self._stack()
        if not stack:
            return
        if stack.pop():
            pop_page_hooks()
        if not stack and not torch.is_grad_enabled() and not self._is_held:
            self.pager.end()
            if self._wakes_until_leave:
                self.rest()

    @property
    def is_open(self) -> bool:
        """Whether this thread is in the module's forward."""
        return bool(self._stack())

    def rest(self) -> None:
        """The step is over: guards watch the resident parameters until the next run."""
        if self._awake is not None:
            for parameter in self._awake:
                parameter.wear_guard()
            self._awake = None
            self._wakes_until_leave = False

    def unwind(self) -> None:
        """Leave as often as this thread has entered."""
        while self._stack():
            self.leave()

    def _stack(self) -> list[bool]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        stack: list[bool] = self._open.stack
        return stack


class _Hook:
    """A module hook that belongs to one module and one engine; copies of the module have none."""

    __slots__ = ("_act", "_module")

    @property
    def __name__(self) -> str:
        """torch.jit.script asks for it, to compile the hook."""
        raise GuardError(
            "torch.jit.script of a module whose weights come and go",
            remedy="trace it inside `engine.gathered()`, or script it before offload.initialize",
        )

    def __init__(self, module: nn.Module, act: Callable[[], None]) -> None:
        self._module = module
        self._act = act

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is self._module:
            _run(self._act)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Callable[..., object], tuple[()]]:
        return _make_no_hook, ()


@_disable_dynamo
def _run(act: Callable[[], None]) -> None:
    """Run a hook; torch.compile leaves it as it is."""
    act()


def _make_no_hook() -> Callable[..., None]:
    """What a pickled hook becomes; a function of no arguments, as pickle wants it."""
    return _no_hook


def _no_hook(*_: Any) -> None:
    """What a copied or pickled module has in place of the engine's hooks."""


def install(window: Window | EncoderWindow | RootWindow) -> list[RemovableHandle]:
    """Hook a window to its module; the handles remove it."""
    module = window.module
    return [
        module.register_forward_pre_hook(_Hook(module, window.enter), prepend=True),
        module.register_forward_hook(_Hook(module, window.leave), always_call=True),
    ]


def encoder_windows(module: nn.Module, fused: Sequence[FusedWindow]) -> list[EncoderWindow]:
    """The windows of the encoders below `module` whose first layers have the windows `fused`."""
    window_of = {id(window.module): window for window in fused}
    return [
        EncoderWindow(child, window_of[id(child.layers[0])])
        for child in module.modules()
        if isinstance(child, nn.TransformerEncoder) and id(child.layers[0]) in window_of
    ]


def _stop_autocast_cache() -> None:
    """Keep autocast from holding casts of weights that leave; its own exit restores the setting."""
    if torch._C._is_any_autocast_enabled():
        torch.set_autocast_cache_enabled(False)
