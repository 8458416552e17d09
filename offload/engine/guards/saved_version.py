"""The version of a saved tensor: torch leaves its check out where saved-tensor hooks are set."""

from __future__ import annotations

from typing import NamedTuple

import torch


def version_error(what: str, now: int, expected: int) -> RuntimeError:
    """The error that torch raises for a saved tensor that was changed in place."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: {what} is at version {now}; expected version {expected} instead"
    )


class SavedVersion(NamedTuple):
    """A tensor's version when it was saved, and its version counter, without its memory."""

    counter: torch.Tensor
    version: int

    def check(self, what: str) -> None:
        """Nothing has changed the tensor since; `what` names it in the error.

        Raises:
            RuntimeError: something has, as plain PyTorch would find.
        """
        now = self.counter._version
        if now != self.version:
            raise version_error(what, now, self.version)


def version_of(tensor: torch.Tensor) -> SavedVersion:
    """The version of `tensor`, which is no inference tensor; keeps nothing of its memory alive."""
    counter = tensor.detach()  # shares the counter
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # and keeps it
    return SavedVersion(counter, tensor._version)
