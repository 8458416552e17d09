"""The barrier between a snapshot and what overwrites homes."""

from __future__ import annotations

import os
import threading

from offload.errors import EngineStateError


class Captured(threading.Event):
    """Set when a snapshot does not need homes as they are any more; see [Note: Snapshot]."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def wait(self, timeout: float | None = None) -> bool:
        """As that of any event.

        Raises:
            EngineStateError: in a forked child, if it was not set before the fork: the thread that
                would set it is the parent's, and so are homes in memory.
        """
        if not self.is_set() and os.getpid() != self._pid:
            raise EngineStateError(
                f"a checkpoint of process {self._pid} has not got all of the state yet, and this "
                f"is its child {os.getpid()}, which must not change it",
                remedy="call engine.wait_for_checkpoint() before the fork",
            )
        return super().wait(timeout)
