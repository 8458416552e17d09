"""One parameter as linear and embedding ops see it: by tiles. See tiles.py for [Note: Tiles]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from offload.partition.parameters import ParameterState

Take = Callable[[int, torch.Tensor], None]
Arriving = Callable[[ParameterState], AbstractContextManager[Take]]


class Rows(NamedTuple):
    """A tile: the rows [start, stop)."""

    start: int
    stop: int


class Slots(Protocol):
    """What ops need of the device memory of tiles: `TileSlots` in tiles.py."""

    arriving: Arriving

    def lent(
        self, tiled: TiledParameter, order: Sequence[Rows], user: str
    ) -> AbstractContextManager[Iterator[tuple[Rows, torch.Tensor]]]:
        """The tiles in `order`, ascending, each with its values on the device until the next."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TiledParameter:
    """One parameter by tiles of `tile_rows` rows; its elements are contiguous, row after row.

    Attributes:
        state: what is true of the parameter wherever it is.
        bucket: the index of its page, which holds nothing else.
        tile_rows: rows of every tile but the last.
        slots: where its tiles come to.
    """

    state: ParameterState
    bucket: int
    tile_rows: int
    slots: Slots

    @property
    def num_rows(self) -> int:
        """Rows of the whole parameter."""
        return int(self.state.shape[0])

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return int(self.state.shape[1])

    @property
    def tiles(self) -> list[Rows]:
        """All tiles, in order."""
        return [
            Rows(start, min(start + self.tile_rows, self.num_rows))
            for start in range(0, self.num_rows, self.tile_rows)
        ]
