"""Ctrl-C and SIGTERM end a run between steps."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

EXIT_SIGNAL = 128  # plus the signal's number: the exit code of what it ended, as shells report it


class Interrupted(KeyboardInterrupt):
    """A second signal: the run ends at once, wherever it is."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopRequest:
    """While entered: the first SIGINT or SIGTERM sets `signal_number`, the second raises
    `Interrupted`.

    A run looks at it between steps, so the step that is under way is finished. Other processes
    that inherit this (forked data loaders) get the signals' default effect.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._second: int | None = None
        self._pid = os.getpid()
        self._previous: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        # Libraries wrap what is raised inside them, and what was cut off may fail on its way out.
        if self._second is not None and isinstance(error, Exception):
            raise Interrupted(self._second) from error

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.signal_number is not None:
            self._second = number
            raise Interrupted(number)
        self.signal_number = number
