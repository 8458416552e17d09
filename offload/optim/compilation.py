"""Compilation of the loops over arrays, cached in memory and on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

from numba import njit, types

Kernel = Callable[..., Any]

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "parallel": False,
    "fastmath": False,
    "error_model": "numpy",
}
_compiled: dict[str, Kernel] = {}
_compile_lock = threading.Lock()


def compiled(function: Callable[..., Any], *arguments: str | int | None) -> Kernel:
    """Return `function` compiled for these arguments, from the disk cache where there is one.

    Args:
        function: A loop of `kernels`, or of a module with loops of its own.
        *arguments: For each parameter the dtype of its array (``"float32"``, ``"int16"``, ...),
            None for None, or the number of its float32 scalars.
    """
    name = "_".join([function.__name__, *(str(argument) for argument in arguments)])
    kernel = _compiled.get(name)
    if kernel is None:
        with _compile_lock:
            kernel = _compiled.get(name)
            if kernel is None:
                kernel = _compile(function, name, tuple(_numba_type(a) for a in arguments))
                _compiled[name] = kernel
    return kernel


def _numba_type(argument: str | int | None) -> Any:
    if argument is None:
        return types.none
    if isinstance(argument, int):
        return types.UniTuple(types.float32, argument)
    return types.Array(getattr(types, argument), 1, "C")


def _compile(function: Callable[..., Any], name: str, signature: tuple[Any, ...]) -> Kernel:
    # Each signature is cached under its own name: numba's index file of a function loses or mixes
    # up entries when two processes add different signatures to it at once.
    assert isinstance(function, FunctionType)
    named = FunctionType(function.__code__, function.__globals__, name)
    named.__qualname__ = name
    named.__module__ = function.__module__
    try:
        kernel: Kernel = njit(signature, cache=True, **_OPTIONS)(named)
    except Exception:  # noqa: BLE001 - whatever is wrong with the cache, we can do without it
        kernel = njit(signature, cache=False, **_OPTIONS)(named)
    return kernel
