"""Memory of transfers that are late.

[Note: Late transfers]
A transfer that has not ended by its deadline still owns its buffers, and nobody waits for it any
more: what it was for has failed, and may be tried again. Its memory comes here, and goes back to
its tier when the transfer has ended, however late and whether well or not. Of one that hangs it
never does. So a disk that is slow for a while costs no memory for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from offload.errors import OffloadError
from offload.partition.staging import Staged, release_all
from offload.tiers.transfer import Transfer
from offload.tiers.uninterrupted import UninterruptedLock


class LateTransfers:
    """Transfers that nobody waits for; see [Note: Late transfers]. Thread-safe."""

    def __init__(self) -> None:
        self._lock = UninterruptedLock()
        self._kept: list[tuple[tuple[Transfer, ...], Callable[[], object]]] = []

    def __bool__(self) -> bool:
        """Whether there are any, as far as `collect` has looked."""
        with self._lock:
            return bool(self._kept)

    def release(self, held: Sequence[Staged], deadline_seconds: float = 0.0) -> None:
        """`release_all`; what is late is given back by a later `collect`."""
        for staged in release_all(held, deadline_seconds):
            self.keep([staged.transfer], staged.release)

    def keep(self, transfers: Sequence[Transfer], give_back: Callable[[], object]) -> None:
        """Call `give_back` once all the transfers have ended: it gives back what they own."""
        with self._lock:
            self._kept.append((tuple(transfers), give_back))

    def collect(self) -> None:
        """Give back what has ended since; waits for nothing, and raises nothing."""
        if not self._kept:
            return
        with self._lock:
            kept, self._kept = self._kept, []
            ended = [each for each in kept if all(transfer.done() for transfer in each[0])]
            self._kept = [each for each in kept if each not in ended]
        for transfers, give_back in ended:
            for transfer in transfers:
                with contextlib.suppress(OffloadError):  # whoever started it has been told
                    transfer.wait()
            give_back()
