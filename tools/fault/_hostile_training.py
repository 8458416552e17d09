"""The training of `_hostile_child`, stage by stage; every error is kept with its stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault import _tiny
from offload.errors import OffloadError

_STEPS = 3


class Training:
    """Runs once; see `_hostile_child.main`.

    Attributes:
        bits: fingerprint of the last state; "" if it was not reached.
        errors: of each call that failed: stage, type, message, whether it is an `OffloadError`,
            and how long the call took.
        close_seconds: how long the engine took to close after that.
    """

    def __init__(
        self,
        nvme: Path,
        checkpoints: Path,
        home: str,
        io: dict[str, Any],
        pause: Callable[[str], None],
    ) -> None:
        self.config = _tiny.settings(nvme, home=home, io=io)
        self.checkpoints = checkpoints
        self.bits = self.backend = ""
        self.close_seconds = 0.0
        self.errors: list[dict[str, Any]] = []
        self._pause = pause
        self._engine: Any = None

    def run(self) -> None:
        """Train, save, train; then load in a new engine and train the last step again."""
        if not self._stage("build", self._build):
            return
        num_good = 0
        while num_good < _STEPS - 1 and self._stage("step", self._step):
            num_good += 1
        is_saved = num_good == _STEPS - 1 and self._stage("save", self._save)
        if num_good < _STEPS - 1 or not self._stage("step", self._step):
            self._close()
            return
        if not self._stage("read", self._read) or not is_saved:
            self._close()
            return
        self._stage("close", self._engine.close)
        self.bits = ""
        if not self._stage("build", self._build) or not self._stage("load", self._load):
            return
        if self._stage("step", self._step):
            self._stage("read", self._read)
        self._close()

    def _stage(self, name: str, call: Callable[[], None]) -> bool:
        self._pause(name)
        began = time.monotonic()
        try:
            call()
        except Exception as error:  # noqa: BLE001  other kinds are what is looked for
            self.errors.append(
                {
                    "stage": name,
                    "type": type(error).__name__,
                    "message": str(error),
                    "is_ours": isinstance(error, OffloadError),
                    "seconds": time.monotonic() - began,
                }
            )
            return False
        return True

    def _build(self) -> None:
        self._engine = _tiny.engine(self.config)
        self.backend = self._engine._parts.io.backend

    def _step(self) -> None:
        _tiny.step(self._engine)

    def _save(self) -> None:
        _tiny.save(self._engine, self.checkpoints)

    def _load(self) -> None:
        self._engine.load_checkpoint(self.checkpoints)

    def _read(self) -> None:
        self.bits = _tiny.fingerprint(self._engine)

    def _close(self) -> None:
        began = time.monotonic()
        with contextlib.suppress(OffloadError):
            self._engine.close()
        self.close_seconds = time.monotonic() - began
