"""Notebooks: a cell that runs again replaces the engine that it has made before.

[Note: Cells that run again]
    engine = offload.initialize(model, "config.toml")

In a cell that runs again, the old engine would live beside the new one until the name is bound
anew, and its budgets with it: the second run would not fit. So, in IPython and only there, what the
name on the left is bound to is closed first, if it is an engine or has one, and a warning says at
which step it was. Nothing else is closed: engines under other names are not.

An engine whose own module is given again is not closed: the weights are in it, and would be lost.
"""

from __future__ import annotations

import dis
import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn

from offload.engine.engine import Engine
from offload.errors import EngineStateError

_BETWEEN = ("COPY", "PRECALL", "CACHE", "EXTENDED_ARG", "SWAP")
_STORES = ("STORE_NAME", "STORE_GLOBAL")


def close_replaced(model: nn.Module | None = None) -> None:
    """Close the engine that the caller's assignment replaces; see [Note: Cells that run again].

    Args:
        model: of which a new engine is to be made.

    Raises:
        EngineStateError: the engine that is to be replaced trains this very module.
        StorageError: as `OffloadEngine.close`; it is closed all the same.
    """
    frame = _caller()
    if frame is None or not _is_cell(frame):
        return
    for name in _names_assigned(frame):
        bound = frame.f_globals.get(name)
        engine = bound if isinstance(bound, Engine) else getattr(bound, "offload_engine", None)
        if not isinstance(engine, Engine) or engine.is_closed:
            continue
        if engine.module is model:
            raise EngineStateError(
                f"{name!r} trains this very module, at step {engine.global_steps}",
                remedy=f"go on with {name!r}; or build the module anew before initialize, in the "
                "same cell, to start again",
            )
        warnings.warn(
            f"the engine of {name!r}, at step {engine.global_steps}, is closed: this cell makes "
            "another one of that name, and what has not been saved of it is gone",
            RuntimeWarning,
            stacklevel=3,
        )
        engine.close()


def _caller() -> FrameType | None:
    """The frame that has called into this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package(frame) == __name__.partition(".")[0]:
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_cell(frame: FrameType) -> bool:
    """Whether it is code of the user's namespace that IPython runs."""
    module: Any = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return shell is not None and frame.f_globals is shell.user_global_ns


def _names_assigned(frame: FrameType) -> list[str]:
    """The names that the result of the call under way will be bound to: ``a = b = call()``."""
    names: list[str] = []
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset <= frame.f_lasti or instruction.opname in _BETWEEN:
            continue
        if instruction.opname not in _STORES:
            break
        names.append(instruction.argval)
    return names
