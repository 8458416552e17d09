"""What part `slopes` breaks on purpose, see [Note: teeth] in result.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fault import _tiny


@dataclass(frozen=True)
class Tooth:
    """One leak, where the state is at home meanwhile, and the row that must show it."""

    name: str
    broken: Callable[[], AbstractContextManager[object]]
    home: str
    sees: str


def _beside_a_step(leak: Callable[[Any], object]) -> AbstractContextManager[object]:
    original, kept = _tiny.step, []

    def step(engine: Any) -> float:
        kept.append(leak(engine))
        return original(engine)

    return mock.patch.object(_tiny, "step", step)


def _memory() -> AbstractContextManager[object]:
    return _beside_a_step(lambda _: os.urandom(2048))


def _descriptors() -> AbstractContextManager[object]:
    def open_one(engine: Any) -> object:
        return engine.micro_steps % 100 or Path(os.devnull).open()

    return _beside_a_step(open_one)


def _leases() -> AbstractContextManager[object]:
    def lease(engine: Any) -> object:
        return engine.micro_steps % 100 or engine._parts.device.lease(1, "a leak")

    return _beside_a_step(lease)


def _threads() -> AbstractContextManager[object]:
    def wait(engine: Any) -> object:
        if engine.micro_steps % 100 == 0:
            threading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()
        return None

    return _beside_a_step(wait)


TEETH = (
    Tooth("two kilobytes a step are kept", _memory, "host", "RSS"),
    Tooth("a file in 100 steps stays open", _descriptors, "host", "descriptors"),
    Tooth("a lease in 100 steps is kept", _leases, "host", "pages, bytes leased"),
    Tooth("a thread in 100 steps goes on", _threads, "host", "threads"),
)
