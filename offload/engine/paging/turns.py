"""Who opens windows: a thread, or several threads of which only one runs at a time."""

from __future__ import annotations

import threading


class _Turns(threading.local):
    ident: int | None = None


_turns = _Turns()


def take_turns_with(ident: int) -> None:
    """This thread runs only while the thread `ident` waits for it: their windows are one's."""
    _turns.ident = ident


def turn() -> int:
    """The thread to which the windows that this thread opens belong."""
    return _turns.ident or threading.get_ident()
