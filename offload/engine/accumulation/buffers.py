"""The buffers of a module: which have changed, and how they were.

[Note: Edited buffers]
A buffer that a forward changes, such as the running statistics of a batch norm, is the state that
one micro-batch hands to the next. It is as in the usual order if each micro-batch is done with it
before the next one begins: if nothing changes it in two segments of one forward, nor in backward,
where a checkpoint that recomputes would.

torch counts the edits that autograd sees; a batch norm's kernel edits below that, but its module
counts the batch in a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from offload.errors import EngineStateError

Stamp = tuple[int, int]


class _Buffer(NamedTuple):
    owner: nn.Module
    key: str
    tensor: torch.Tensor
    version: int


class Buffers:
    """The buffers of a module as they are now.

    Args:
        module: the module.
        saved: names of those whose values are kept; None: all. Of the others only those edits are
            known that torch counts.
    """

    def __init__(self, module: nn.Module, saved: set[str] | None = None) -> None:
        self._buffers = dict(_buffers(module))
        with torch.no_grad():
            self._values = {
                name: each.tensor.clone()
                for name, each in self._buffers.items()
                if saved is None or name in saved
            }

    def edited(self) -> set[str]:
        """The names of those that have changed since, or are others."""
        return {name for name in self._buffers if self._differs(name)}

    def _differs(self, name: str) -> bool:
        owner, key, tensor, version = self._buffers[name]
        if owner._buffers.get(key) is not tensor or _version(tensor) != version:
            return True
        values = self._values.get(name)
        return values is not None and not torch.equal(_bits(tensor), _bits(values))

    def stamps(self) -> dict[str, Stamp]:
        """What is another number after an edit that torch counts, by name."""
        found = {}
        for name, (owner, key, _, _) in self._buffers.items():
            tensor = owner._buffers.get(key)
            found[name] = (0, 0) if tensor is None else (id(tensor), _version(tensor))
        return found

    def restore(self) -> None:
        """Undo what has changed.

        Raises:
            EngineStateError: a buffer has changed whose value was not saved.
        """
        lost = self.edited() - self._values.keys()
        if lost:
            raise EngineStateError(
                f"buffer {min(lost)} has changed in a forward that has to run again",
                remedy='set training.accumulation = "micro_batch_major"',
            )
        with torch.no_grad():
            for name, values in self._values.items():
                owner, key, tensor, _ = self._buffers[name]
                owner._buffers[key] = tensor
                tensor.copy_(values)


def changed(before: dict[str, Stamp], after: dict[str, Stamp]) -> set[str]:
    """The names whose stamps differ."""
    return {name for name, stamp in after.items() if before[name] != stamp}


def _buffers(module: nn.Module) -> Iterator[tuple[str, _Buffer]]:
    for path, owner in module.named_modules():
        for key, tensor in owner._buffers.items():
            if tensor is not None:
                name = f"{path}.{key}" if path else key
                yield name, _Buffer(owner, key, tensor, _version(tensor))


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
