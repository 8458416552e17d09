"""Staging: chunks of state where the CPU can reach them, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.errors import OffloadError
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.tiers.uninterrupted import UninterruptedLock

ZEROED_LANE = "cpu"


class StagingLease(Protocol):
    """Host memory that a chunk is staged in: `tensor` is uint8, 1-D, at least of its bytes."""

    @property
    def tensor(self) -> torch.Tensor:
        """The memory."""
        ...

    def release(self) -> None:
        """Give it back, once, with no transfer in flight on it."""
        ...


# Staging of so many bytes from elsewhere than the arena; None: there is none at present.
Lend = Callable[[int], StagingLease | None]


@dataclass(slots=True, eq=False)
class Staged:
    """One chunk block where the CPU can reach it, once `transfer` has been waited for.

    `tensor` is uint8, 1-D, of the chunk block's bytes. `release` gives the staging back; a buffer
    that is the home itself has none.
    """

    tensor: torch.Tensor
    transfer: Transfer
    lease: StagingLease | None

    def release(self) -> None:
        """Give the staging memory back, once."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def shared(self) -> Staged:
        """The same buffer for a reader: the memory goes back when both have been released."""
        if self.lease is not None and not isinstance(self.lease, _SharedLease):
            self.lease = _SharedLease(self.lease)
        if self.lease is not None:
            self.lease.add_holder()
        return Staged(self.tensor, CompletedTransfer(ZEROED_LANE), self.lease)


class _SharedLease:
    """A lease that several hold. Thread-safe."""

    def __init__(self, lease: StagingLease) -> None:
        self._lease = lease
        self._num_holders = 1
        self._lock = UninterruptedLock()

    @property
    def tensor(self) -> torch.Tensor:
        return self._lease.tensor

    def add_holder(self) -> None:
        with self._lock:
            self._num_holders += 1

    def release(self) -> None:
        with self._lock:
            self._num_holders -= 1
            is_last = self._num_holders == 0
        if is_last:
            self._lease.release()


def release_all(held: Sequence[Staged], deadline_seconds: float = 0.0) -> list[Staged]:
    """Give staging back once its transfers have ended; what is in flight keeps its buffer.

    All of them together get `deadline_seconds`. Returns those that are late.
    """
    deadline = time.monotonic() + deadline_seconds
    late = []
    for staged in held:
        try:
            staged.transfer.wait(max(0.0, deadline - time.monotonic()))
        except OffloadError:
            if not staged.transfer.done():
                late.append(staged)
                continue
        staged.release()
    return late
