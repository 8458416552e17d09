"""Replacing whole blocks of state, for a checkpoint that comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.partition.blocks import Block, BlockStore
from offload.partition.staging import Staged


@dataclass(frozen=True, slots=True)
class Replacement:
    """Memory for what a chunk block will say: the home itself, or staging. `commit` or `cancel`."""

    store: BlockStore
    block: Block
    chunk: int
    staged: Staged

    @property
    def tensor(self) -> torch.Tensor:
        """To be filled: uint8, 1-D, of the block's bytes."""
        return self.staged.tensor

    def commit(self) -> None:
        """The block says this from here on. Raises StorageError: it could not be written."""
        self.store.start_store(self.block, self.chunk, self.staged)

    def cancel(self) -> None:
        """The block's content is void."""
        self.staged.release()
