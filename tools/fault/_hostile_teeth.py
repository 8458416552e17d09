"""What part `hostile` breaks on purpose, in the process that trains; see [Note: teeth]."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault import _tiny
from offload.engine import build
from offload.native import IoEngine
from offload.state import durable
from offload.tiers import transfer
from offload.tiers.run_folder import StorePath

VARIABLE = "OFFLOAD_FAULTS_BREAK"


def _replace(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


def _io_uring_whatever_comes() -> None:
    _replace(build, "open_io", lambda _: IoEngine(backend="io_uring"))


def _no_deadlines() -> None:
    original = transfer.TicketTransfer.__init__

    def init(self: Any, *arguments: Any, deadline_seconds: float, **options: Any) -> None:
        original(self, *arguments, deadline_seconds=20 * deadline_seconds, **options)

    _replace(transfer.TicketTransfer, "__init__", init)


def _space_is_promised() -> None:
    def create(self: Any, nbytes: int) -> int:
        descriptor: int = self._create()
        os.ftruncate(descriptor, nbytes)
        return descriptor

    _replace(StorePath, "create", create)
    _replace(StorePath, "bytes_free", lambda _: 1 << 40)
    _replace(durable, "free_bytes", lambda _: 1 << 40)


def _other_numbers() -> None:
    original = _tiny.settings

    def settings(folder: Path, **sections: Any) -> dict[str, Any]:
        return original(folder, **sections, training={"max_grad_norm": 1e-3})

    _replace(_tiny, "settings", settings)


def _errors_are_not_translated() -> None:
    @contextlib.contextmanager
    def storage_errors(*_: Any, **__: Any) -> Iterator[None]:
        yield

    _replace(durable, "storage_errors", storage_errors)


# What is broken, how, and the row that must show it.
BREAKS: dict[str, tuple[Callable[[], None], str]] = {
    "io_uring is taken untried": (_io_uring_whatever_comes, "no io_uring"),
    "other numbers": (_other_numbers, "no asynchronous I/O"),
    "errors are not translated": (_errors_are_not_translated, "read-only path"),
    "space is promised, not allocated": (_space_is_promised, "full disk"),
    "deadlines are 20 times as long": (_no_deadlines, "hung disk"),
}


def break_as_told() -> None:
    """In the process that trains: break what the environment names, if it does."""
    name = os.environ.get(VARIABLE)
    if name:
        BREAKS[name][0]()
