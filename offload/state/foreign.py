"""Checkpoints of other programs, as one thing: what each format's reader hands to the import.

[Note: foreign checkpoint]
Names are those of the module's parameters and buffers; a tied parameter may stand under any or all
of its names. Tensors are described when the checkpoint is opened and read one at a time. Moments
have the names that torch gives them; a step count is the number of updates a parameter has had.
Nothing is unpickled: see pickled.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.state.torch_archive import ArchivedTensor, TorchArchive

OPTIMIZER_GROUPS = "the optimizer's groups (learning rates and so on: those of the config count)"
"""What no import takes."""


@dataclass(frozen=True, slots=True, eq=False)
class ForeignTensor:
    """A tensor of another program's checkpoint.

    Attributes:
        dtype, shape: of it, as the file says.
        read: reads and checks it: CheckpointError where it is damaged, StorageError.
        may_be_flat: it is 1-D where the parameter has another shape of as many elements.
        may_be_float: it is fp32 where the buffer has whole numbers.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    may_be_flat: bool = False
    may_be_float: bool = False


@dataclass(slots=True)
class Foreign:
    """An open checkpoint of another program; see [Note: foreign checkpoint].

    Attributes:
        path: where it is.
        form: what it is, for people.
        weights: parameters and buffers.
        state: name -> field -> tensor or plain value, of the optimizer; "step" among them.
        expected_missing: names that the module's class allows it to lack.
        global_steps: optimizer steps taken, without skipped ones; None if it does not say.
        skipped_steps: steps that were skipped; None if it does not say.
        not_resumed: what it has, or its program had, and the import leaves.
    """

    path: Path
    form: str
    weights: dict[str, ForeignTensor] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected_missing: frozenset[str] = frozenset()
    global_steps: int | None = None
    skipped_steps: int | None = None
    not_resumed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Known:
    """What the engine has, by which a format's reader tells names from prefixes.

    Attributes:
        names: of parameters, aliases and persistent buffers.
        fields: of the optimizer's state, "step" among them.
    """

    names: frozenset[str]
    fields: frozenset[str]


def shared_prefix(rests: Mapping[str, Iterable[str]]) -> str | None:
    """The prefix under which most names are; of two, the shorter. None if there is no name.

    `rests`: key -> prefixes of it behind which a name stands.
    """
    counts = Counter(prefix for prefixes in rests.values() for prefix in prefixes)
    if not counts:
        return None
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def prefixes_of(key: str) -> Iterable[tuple[str, str]]:
    """(prefix, rest) at every dot of a key, and ("", key)."""
    yield "", key
    at = key.find(".")
    while at >= 0:
        yield key[: at + 1], key[at + 1 :]
        at = key.find(".", at + 1)


def count_of(value: Any, archive: TorchArchive | None, where: str) -> int:
    """A step count: an int, a whole float, or a tensor of one element.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, ArchivedTensor) and archive is not None and value.numel == 1:
        value = archive.read(value).item()
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise CheckpointError(f"{where}: the step is no count")
    return value
