"""How gradients leave backward for their homes, and what `p.grad` shows of them.

[Note: Departed gradients]
A gradient is taken when autograd is about to accumulate it, and sent home (gradients.py); autograd
itself adds nothing to `p.grad`, so that threads that are in backward at once do not meet there. A
`DepartedGradient` takes its place in `p.grad`: of its shape, dtype and device, and without its
values. So `p.grad is None` says what it says in plain PyTorch, in every placement;
`clip_grad_norm_`, or whatever else wants the values, gets a GuardError that says what to use.

What the user puts into `p.grad` counts, as in plain PyTorch:

    in p.grad       the gradient is                            the next one to arrive
    departed        at home                                    is added to it
    None            forgotten (`module.zero_grad()` too)       is the first
    a tensor        that tensor; the one at home is forgotten  is added to that

A gradient that somebody else refers to, say a buffer that a custom function returns each time, may
change as soon as the hook returns; autograd itself would copy it. It is at home by then.

Post-accumulate hooks of the user want to see the sum in `p.grad`, and may change it. For their
parameters it is brought back before autograd adds to it, and goes home when they all have run.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import torch
from torch.utils.hooks import RemovableHandle

from offload.engine.gradients import GradientHome
from offload.engine.guards.guard import METADATA
from offload.errors import EngineStateError, GuardError
from offload.partition.parameters import ParameterState
from offload.tiers.uninterrupted import UninterruptedLock

_NO_GUARD = torch._C.DisableTorchFunctionSubclass


class DepartedGradient(torch.Tensor):
    """Stands in `p.grad` for a gradient that is at home; every use of its values is an error."""

    _name: str

    @staticmethod
    def __new__(cls, state: ParameterState) -> Self:
        """The stand-in for the gradient of one parameter."""
        like = state.parameter
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._name = state.name
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """What it stands for; the values are not at hand."""
        return f"<gradient of {self._name}, at home: see engine.named_state()>"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer questions about shape and dtype, refuse the rest."""
        if func in METADATA:
            with _NO_GUARD():
                return func(*args, **(kwargs or {}))
        raise _refusal(func, args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse what reaches the values from below torch's functions."""
        raise _refusal(func, args)


def _refusal(func: Any, args: Sequence[Any]) -> GuardError:
    name = getattr(func, "__name__", str(func))
    owners = (a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    owner = next((a for a in owners if isinstance(a, DepartedGradient)), None)
    whose = "a parameter" if owner is None else f"parameter {owner._name}"
    return GuardError(
        f"{name} of the gradient of {whose}, which has gone home as soon as it was finished",
        remedy="to clip, set training.max_grad_norm (engine.grad_norm is the norm); to read it, "
        "use engine.named_state(); to replace it, assign to p.grad or use engine.set_state()",
    )


class ArrivalOrder(Protocol):
    """Decides when gradients may go home."""

    def keep(self, state: ParameterState, gradient: torch.Tensor | None) -> bool:
        """Whether a gradient does not go home now; None: one that comes by tiles, and does."""
        ...


class _Slot:
    """One parameter's `p.grad`. Its methods are to be called with guards off."""

    def __init__(self, slots: GradientSlots, state: ParameterState) -> None:
        self.state = state
        self._slots = slots
        self._lock = UninterruptedLock(reentrant=True)
        self._is_shown = False  # `p.grad` has said that there is a gradient at home
        self._departed: DepartedGradient | None = None
        self._after: RemovableHandle | None = None  # runs after the user's hooks, if there are any
        # The node, and with it the hook, would end with the graphs that use it.
        self._node = torch.autograd.graph.get_gradient_edge(state.parameter).node
        self._before: RemovableHandle = self._node.register_prehook(self._take)

    def place(self, gradient: torch.Tensor) -> None:
        """Replace the gradient by a tensor that stays the caller's."""
        with self._lock:
            self.state.gradient_sums = None
            self._arrive(gradient)
            self._slots.home.land()

    def adopt(self) -> None:
        """Let the home have what the user has put into `p.grad`, if that is something else."""
        with self._lock:
            gradient = self.state.parameter.grad
            if gradient is not None and gradient is not self._departed:
                self.place(gradient)
            elif gradient is None and self._is_shown:
                self.state.gradient_sums = None
                self._is_shown = False

    def alone(self) -> AbstractContextManager[object]:
        """A block in which no other thread's gradient arrives."""
        return self._lock

    def expect(self) -> None:
        """A gradient is about to arrive that never is with autograd as a whole."""
        self.adopt()
        self._slots.check(self.state)
        self._slots.keeps(self.state, None)
        self._show()

    def hide(self) -> None:
        """There is no gradient, and `p.grad` says so."""
        if self._is_shown or self.state.parameter.grad is not None:
            self.state.parameter.grad = None
            self._is_shown = False

    def remove(self) -> None:
        """The engine is closed."""
        self._before.remove()
        if self._after is not None:
            self._after.remove()
        if self.state.parameter.grad is self._departed:
            self.hide()

    def _arrive(self, gradient: torch.Tensor) -> None:
        self._slots.home.arrive(self.state, gradient.detach().resolve_conj().resolve_neg())
        self._show()

    def _show(self) -> None:
        if self._departed is None:
            self._departed = DepartedGradient(self.state)
        self.state.parameter.grad = self._departed
        self._is_shown = True

    def _take(self, gradients: Sequence[torch.Tensor | None]) -> tuple[None] | None:
        """The hook before accumulation; returns what autograd is left to accumulate, if not all."""
        is_shared = _is_shared(gradients)
        (gradient,) = gradients
        if gradient is None:
            return None
        with _NO_GUARD(), torch.no_grad(), self._lock, self._slots.losing(self):
            self.adopt()
            self._slots.check(self.state)
            if self._slots.keeps(self.state, gradient):
                return (None,)
            if self._has_hooks_of_the_user():
                self._bring_back()
                return None
            self._arrive(gradient)
            if is_shared:
                self._slots.home.land()
        return (None,)

    def _has_hooks_of_the_user(self) -> bool:
        """Whether there are post-accumulate hooks beside the slot's own, which is put last then."""
        hooks: Any = self.state.parameter._post_accumulate_grad_hooks
        own = self._after is not None
        if not hooks or (own and len(hooks) == 1):
            return False
        if self._after is None:
            hook = _AfterHooks(self)
            self._after = self.state.parameter.register_post_accumulate_grad_hook(hook)
        elif next(reversed(hooks)) != self._after.id:
            hooks[self._after.id] = hooks.pop(self._after.id)
        return True

    def _bring_back(self) -> None:
        """Let `p.grad` be the gradient at home, for autograd to add to."""
        parameter = self.state.parameter
        parameter.grad = None
        if self.state.gradient_sums is not None:
            parameter.grad = self._slots.bring_back(self.state)

    def send_back(self) -> None:
        """The hooks of the user, if any are left, have run: they may have taken it."""
        with _NO_GUARD(), torch.no_grad(), self._lock, self._slots.losing(self):
            self.adopt()


def _num_references(gradients: Sequence[torch.Tensor | None]) -> tuple[int, int]:
    """References to the one gradient of a hook: of Python, this function's included, and of C++."""
    (gradient,) = gradients
    num_uses: int = gradient._use_count()  # type: ignore[union-attr]
    return sys.getrefcount(gradient), num_uses


@functools.cache
def _own_references() -> tuple[int, int]:
    """Those to a gradient that nobody but autograd and its hook has; torch's own, so measured."""
    found: list[tuple[int, int]] = []
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.ones(1, requires_grad=True)
        node = torch.autograd.graph.get_gradient_edge(leaf).node
        node.register_prehook(lambda gradients: found.append(_num_references(gradients)))
        (leaf * 2).backward()
    return found[0]


def _is_shared(gradients: Sequence[torch.Tensor | None]) -> bool:
    """Whether somebody else has the gradient too, as torch asks before it takes one over."""
    if gradients[0] is None:
        return False
    return any(
        n > own for n, own in zip(_num_references(gradients), _own_references(), strict=True)
    )


class _AfterHooks:
    """The last post-accumulate hook of a parameter; copies of the parameter have none."""

    __slots__ = ("_slot",)

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot

    def __call__(self, _parameter: torch.Tensor) -> None:
        self._slot.send_back()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[torch.Tensor], None]:
        return _no_hook


def _no_hook(parameter: torch.Tensor) -> None:
    """What a copied parameter has in place of the engine's hook."""


class _Losing:
    """A block in which an error loses a gradient."""

    __slots__ = ("_slot", "_slots")

    def __init__(self, slots: GradientSlots, slot: _Slot) -> None:
        self._slots = slots
        self._slot = slot

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._slots.home.lost = self._slots.home.lost or self._slot.state.name
            self._slot.hide()


class GradientSlots:
    """The `p.grad` of every trained parameter; see [Note: Departed gradients]. Thread-safe.

    Args:
        parameters: those that are trained.
        home: where gradients go.
        bring_back: a copy of the gradient at home, as autograd would have it in `p.grad`.
        check: called before a gradient is taken. An error it raises drops the gradient.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        home: GradientHome,
        *,
        bring_back: Callable[[ParameterState], torch.Tensor],
        check: Callable[[ParameterState], None],
    ) -> None:
        self.home = home
        self.bring_back = bring_back
        self.check = check
        self._order: ArrivalOrder | None = None
        self._slots: dict[int, _Slot] = {}
        _own_references()  # before any backward runs
        self.admit(parameters)

    def admit(self, parameters: Sequence[ParameterState]) -> None:
        """These are trained from now on; a gradient that they have in `p.grad` counts."""
        with _NO_GUARD():
            self._slots.update({state.index: _Slot(self, state) for state in parameters})

    @contextlib.contextmanager
    def ordered_by(self, order: ArrivalOrder) -> Iterator[None]:
        """A block in which `order` is asked about every gradient that autograd brings."""
        self._order = order
        try:
            yield
        finally:
            self._order = None

    def keeps(self, state: ParameterState, gradient: torch.Tensor | None) -> bool:
        """Whether a gradient does not go home now."""
        return self._order is not None and self._order.keep(state, gradient)

    def losing(self, slot: _Slot) -> _Losing:
        """A block whose errors lose the gradient: the accumulation has to start again."""
        return _Losing(self, slot)

    def place(self, state: ParameterState, gradient: torch.Tensor) -> None:
        """Replace the gradient of a parameter."""
        with _NO_GUARD(), torch.no_grad():
            self._slots[state.index].place(gradient)

    @contextlib.contextmanager
    def arriving(self, state: ParameterState) -> Iterator[Callable[[int, torch.Tensor], None]]:
        """`GradientHome.arriving` of a gradient that autograd never has as a whole."""
        slot = self._slots[state.index]
        with _NO_GUARD(), torch.no_grad(), slot.alone(), self.losing(slot):
            slot.expect()
            with self.home.arriving(state) as take:
                yield take

    def adopt(self, state: ParameterState) -> None:
        """Let the home have what the user has put into the parameter's `p.grad`."""
        if state.index in self._slots:
            with _NO_GUARD(), torch.no_grad():
                self._slots[state.index].adopt()

    def adopt_all(self) -> None:
        """`adopt` for all of them: a step begins.

        Raises:
            EngineStateError: a gradient was lost on its way home.
        """
        lost = self.home.lost
        if lost is not None:
            raise EngineStateError(
                f"the gradient of parameter {lost} was lost on its way home, so that those "
                "of this step are incomplete",
                remedy="call engine.optimizer.zero_grad() and run all its backward passes again",
            )
        with _NO_GUARD(), torch.no_grad():
            for slot in self._slots.values():
                slot.adopt()

    def is_any_shown(self) -> bool:
        """Whether a parameter has a gradient as far as its `p.grad` says; takes no lock."""
        with _NO_GUARD():
            return any(slot.state.parameter.grad is not None for slot in self._slots.values())

    def clear(self) -> None:
        """There are no gradients any more."""
        self.home.clear()
        with _NO_GUARD():
            for slot in self._slots.values():
                slot.hide()

    def remove(self) -> None:
        """The engine is closed."""
        with _NO_GUARD():
            for slot in self._slots.values():
                slot.remove()
