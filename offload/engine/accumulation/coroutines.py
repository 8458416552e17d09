"""A call that can be put aside in the middle: a micro-batch whose forward waits at a cut.

[Note: Coroutines]
To stop a forward of any module between two of its layers, and to go on with it later, its call
stack has to be kept. Python keeps one only for generators, which a module is not, and for threads.
So each forward has a thread, and a baton: `resume` gives it to the thread and waits until the
thread hands it back, by `park` or by its end. At any time one thread runs and all others wait, so
nothing here happens in parallel. A thread also has its own of what torch keeps for each thread
(grad mode, autocast, hooks on saved tensors, modes), so that a micro-batch keeps what its forward
has set while others run; it starts with what its maker has.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from offload.engine.paging.turns import take_turns_with, turn

Result = TypeVar("Result")

_autograd: Any = torch._C._autograd


class Ended(BaseException):
    """Raised in a parked coroutine whose result nobody wants any more, to unwind its stack."""


class Coroutine(Generic[Result]):
    """One call in a thread of its own that runs only between `resume` and `park`.

    `resume` and `end` are for the thread that made it, `park` for the call.

    Args:
        call: what to run.
        unwind: called in the thread when the call has failed.
        device: the accelerator on whose current stream the call goes on.

    Attributes:
        result: what the call has returned, once `is_over`.
        is_over: whether the call has returned or raised.
    """

    result: Result

    def __init__(
        self, call: Callable[[], Result], *, unwind: Callable[[], None], device: torch.device
    ) -> None:
        self.is_over = False
        self._call = call
        self._unwind = unwind
        self._setting = _Setting(device)
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._has_baton = False
        self._must_end = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="micro-batch", daemon=True)

    def resume(self) -> None:
        """Let the call run until it parks or is over.

        Raises:
            BaseException: what the call has raised.
        """
        self._pass_baton()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def park(self) -> None:
        """Hand the baton back, and wait for the next `resume`.

        Raises:
            Ended: the coroutine is ended instead.
        """
        self._back.release()
        self._go.acquire()
        if self._must_end:
            raise Ended

    def end(self) -> None:
        """Unwind the call if it is parked; what it raises on the way is dropped."""
        self._must_end = True
        if self._has_baton:  # an interrupt has ended the wait in `resume`
            self._await_baton()
        while self._thread.is_alive() and not self.is_over:
            self._pass_baton()

    def _pass_baton(self) -> None:
        self._has_baton = True
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._await_baton()

    def _await_baton(self) -> None:
        self._back.acquire()
        self._has_baton = False
        if self.is_over:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._setting.enter()
            self.result = self._setting.context.run(self._call)
        except Ended:
            self._unwind()
        except BaseException as error:  # noqa: BLE001 - `resume` raises it
            self._error = error
            self._unwind()
        finally:
            self.is_over = True
            self._back.release()


class _Setting:
    """What the maker of a coroutine has set for its thread."""

    def __init__(self, device: torch.device) -> None:
        self.context = contextvars.copy_context()
        self._turn = turn()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._grad_mode = torch.is_grad_enabled()
        kinds = {"cpu", device.type}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in kinds if _autocasts(kind)
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._saved_hooks = _autograd._top_saved_tensors_default_hooks(False)
        self._function_modes = _get_current_function_mode_stack()
        self._dispatch_modes = _get_current_dispatch_mode_stack()

    def enter(self) -> None:
        """Set the same in this thread, for all of its life."""
        take_turns_with(self._turn)
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)
            torch.cuda.set_stream(self._stream)
        torch.set_grad_enabled(self._grad_mode)
        for kind, dtype in self._autocast:
            torch.set_autocast_enabled(kind, True)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self._autocast_cache)
        if self._saved_hooks is not None:
            _autograd._push_saved_tensors_default_hooks(*self._saved_hooks)
        for mode in self._function_modes:
            torch._C._push_on_torch_function_stack(mode)
        for mode in self._dispatch_modes:
            torch._C._push_on_torch_dispatch_stack(mode)


def _autocasts(kind: str) -> bool:
    return torch.is_autocast_enabled(kind)
