"""A snapshot in a simulated training: taken beside it, and compared long after.

As in `offload.engine.snapshot`: what is on NVMe is pinned, what is in memory is copied before the
next step may overwrite it, and a thread of its own does both while forward and backward run.
"""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
import torch

from fault._virtual import VirtualEvent
from fault._world import State, World
from offload.errors import OffloadError
from offload.partition.arrays import field_array
from offload.partition.blocks import Block
from offload.partition.layout import UPDATED_CLASSES, segments
from offload.partition.snapshot import Version, version_of
from offload.schedule.executor import Background
from offload.tiers.transfer import Transfer

_MOST_TRIES = 40
_PAUSE_SECONDS = 0.05

Key = tuple[int, str, int]


class SimulatedSnapshot:
    """The state of a world at the call, which `expected` says.

    Attributes:
        is_whole: whether everything could be captured.
    """

    def __init__(self, world: World, expected: State) -> None:
        self.is_whole = False
        self._world = world
        self._expected = expected[0]
        self._bytes: dict[Key, torch.Tensor] = {}
        self._versions: dict[Key, Version] = {}
        self._reads: dict[Key, list[Transfer]] = {}
        self._captured = VirtualEvent()
        world.store.captured = cast("threading.Event", self._captured)
        self._background = Background("offload-checkpoint")
        self._background.start(self._capture)

    def end(self) -> None:
        """Wait for the thread."""
        self._background.wait()

    def release(self) -> None:
        """Give up what is pinned."""
        for key, version in self._versions.items():
            self._world.store.late.keep(self._reads.get(key, []), version.release)
        self._versions.clear()
        self._world.store.late.collect()

    def compare(self) -> None:
        """Every byte that was captured is what it was at the call. Raises StorageError."""
        for key, version in self._versions.items():
            if version.pin is not None and key not in self._bytes:
                buffer = torch.empty(version.nbytes, dtype=torch.uint8)
                transfer = self._world.nvme.start_read_pinned(version.pin, buffer)
                self._reads.setdefault(key, []).append(transfer)
                transfer.wait()
                self._bytes[key] = buffer
        for (bucket, state_class, chunk), found in self._bytes.items():
            block = self._world.store.block(bucket, state_class)
            self._compare(block, chunk, found)

    def _capture(self) -> None:
        world = self._world
        try:
            for block in world.store.blocks():
                if block.state_class in UPDATED_CLASSES:
                    for chunk in range(len(block.layout.chunk_nbytes)):
                        if not self._capture_chunk(block, chunk):
                            return
            self.is_whole = True
        finally:
            self._captured.set()

    def _capture_chunk(self, block: Block, chunk: int) -> bool:
        world, key = self._world, (block.bucket.index, block.state_class, chunk)
        for _ in range(_MOST_TRIES):
            try:
                world.updates.apply(block.bucket.index)
                version = version_of(
                    world.store, block, chunk, lambda nbytes: world.host.visit(nbytes, "a snapshot")
                )
            except OffloadError:
                version = None
            if version is None:
                world.clock.advance(_PAUSE_SECONDS)
                continue
            if version.tensor is not None:
                self._bytes[key] = version.tensor.clone()
                version.release()
            elif version.pin is None:
                self._bytes[key] = torch.zeros(version.nbytes, dtype=torch.uint8)
            else:
                self._versions[key] = version
            return True
        return False

    def _compare(self, block: Block, chunk: int, found: torch.Tensor) -> None:
        bucket = block.bucket
        for field in block.layout.element_fields(chunk):
            for segment in segments(bucket, bucket.chunks[chunk]):
                array = field_array(found, field, segment.start_in_chunk, segment.numel)
                values = field.values(segment.start_in_param, segment.numel)
                expected = self._expected[segment.param][field.name][values]
                same = np.array_equal(array.view(np.uint8), expected.view(np.uint8))
                assert same, f"{field.name} of p{segment.param} in a snapshot is another"
