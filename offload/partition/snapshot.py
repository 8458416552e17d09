"""Training state as it is at one moment: which bytes of which blocks it is, and their versions.

[Note: State map]
A tensor of the training state is made of *pieces*: ranges of chunk blocks, in the order of the
tensor's memory. Where a block lives does not matter to the map.

[Note: Versions]
A *version* is what a chunk block says at one moment, in the cheapest form that its home allows:

    home                  version                              it is good
    nvme                  a pinned extent ([Note: pins])       until it is released
    nvme, never written   zeros                                for ever
    host, device (CPU)    the memory of the home itself        while nobody overwrites the home
    device (GPU)          staging, a copy of the home          until it is released
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from offload.errors import OffloadError
from offload.partition.blocks import Block, BlockStore
from offload.partition.staging import Lend
from offload.tiers.pins import Pin


class BlockKey(NamedTuple):
    """A chunk block: bucket, state class, and number of the chunk."""

    bucket: int
    state_class: str
    chunk: int


class Piece(NamedTuple):
    """Bytes [offset, offset + nbytes) of a chunk block."""

    block: BlockKey
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One tensor of the training state; see [Note: State map].

    Attributes:
        kind: "parameter", or "gradient" for one that no step has used.
        name: the parameter's canonical name.
        field: see [Note: State fields].
        dtype, shape: of the tensor.
        stride: the order of its memory, dense, in elements; None: row-major.
        pieces: its bytes, in the order of its memory.
    """

    kind: str
    name: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """What a chunk block says; see [Note: Versions]. Neither `pin` nor `tensor`: zeros.

    Attributes:
        nbytes: of the block.
        pin: its extent.
        tensor: its bytes: uint8, 1-D, where the CPU reaches them.
        release: to be called once, when the version is not needed any more.
    """

    nbytes: int
    pin: Pin | None
    tensor: torch.Tensor | None
    release: Callable[[], None]


def block_nbytes(store: BlockStore, key: BlockKey) -> int:
    """Bytes of a chunk block."""
    return store.block(key.bucket, key.state_class).layout.chunk_nbytes[key.chunk]


def version_of(store: BlockStore, block: Block, chunk: int, lend: Lend) -> Version | None:
    """What the home of a chunk says now; None: it needs staging, and `lend` has none at present.

    Raises:
        StorageError: it could not be written, or not be read.
    """
    store.settle(block, chunk)
    nbytes = block.layout.chunk_nbytes[chunk]
    if store.in_place(block):
        return Version(nbytes, None, store.home(block, chunk), _nothing)
    if block.home == "nvme":
        pin = store.pin(block, chunk)
        assert store.nvme is not None, "a block on nvme comes with a store"
        return Version(
            nbytes, pin, None, _nothing if pin is None else partial(store.nvme.unpin, pin)
        )
    staged = store.start_load(block, chunk, wait=False, lend=lend)
    if staged is None:
        return None
    try:
        staged.transfer.wait(store.deadline_seconds)
    except OffloadError:
        store.late.release([staged])
        raise
    return Version(nbytes, None, staged.tensor, staged.release)


def _nothing() -> None:
    pass
