"""Ctrl-C at the n-th line of some code: every place where an interrupt may come, one by one.

The line of a `with` is left out. Python traces it once more before `__exit__`, and what is raised
there would leave that out; a signal never comes there (only behind calls and jumps), but before the
call, where `__exit__` is made.
"""

from __future__ import annotations

import ast
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
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
        del arg
        if event != "line" or self.came or is_with(frame):
            return self._line
        self._left -= 1
        if self._left == 0:
            self.came = True
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self._line


def is_with(frame: FrameType) -> bool:
    """Whether the line is that of a `with`."""
    return frame.f_lineno in _with_lines(frame.f_code.co_filename)


@functools.cache
def _with_lines(path: str) -> set[int]:
    return {
        line
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(node, ast.With)
        for item in node.items
        for line in range(node.lineno, 1 + (item.context_expr.end_lineno or 0))
    }


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
