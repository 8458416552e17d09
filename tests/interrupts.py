"""Ctrl-C at the n-th line of some code: every place where an interrupt may come, one by one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import offload

_SOURCES = offload.__file__.removesuffix("__init__.py")


class InterruptAt:
    """While entered, SIGINT comes before the `number`-th line that this thread runs in `folders`.

    `folders` are relative to the package; a file is one, too. `came` says whether it has come.
    """

    def __init__(self, number: int, *folders: str) -> None:
        self.came = False
        self._left = number
        self._folders = tuple(_SOURCES + folder for folder in folders)
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        sys.settrace(self._before)
        return kind is not None and issubclass(kind, KeyboardInterrupt)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        name = frame.f_code.co_filename
        wanted = name.startswith(self._folders) and not name.endswith("uninterrupted.py")
        return self._line if wanted and not self.came and not _is_in_del(frame) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        del frame, arg
        if event != "line" or self.came:
            return self._line
        self._left -= 1
        if self._left == 0:
            self.came = True
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self._line


def _is_in_del(frame: FrameType | None) -> bool:
    """Whether Python would ignore what is raised here."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def at_every_line(make: Callable[[], Any], *folders: str, step: int = 1) -> Iterator[Any]:
    """`make()` and an `InterruptAt`, for every line until the code has fewer."""
    number = 1
    while True:
        made, interrupt = make(), InterruptAt(number, *folders)
        yield made, interrupt
        if not interrupt.came:
            assert number > 1, "no line of it has run"
            return
        number += step
