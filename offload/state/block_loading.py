"""The fast way back: blocks of a checkpoint that are blocks of the engine, as they are.

Where a block lives does not matter; how parameters are grouped into buckets, cut into chunks, and
which fields they have does. What differs in that goes tensor by tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from offload.partition.snapshot import BlockKey, MappedTensor
from offload.state.data_file import DEPTH, Reading
from offload.state.manifest import Manifest, TensorRecord
from offload.state.source import Replacement, StateSource
from offload.state.stored import StoredCheckpoint


def shared_blocks(
    tensors: Sequence[MappedTensor], nbytes: Callable[[BlockKey], int], content: Manifest
) -> tuple[dict[BlockKey, int], list[TensorRecord]] | None:
    """The number in the checkpoint of each block of the engine, and the tensors outside of them.

    `nbytes` are those of a block of the engine. None: its tensors are not cut in the same way.
    """
    records = {(r.kind, r.name, r.field): r for r in content.tensors if r.kind != "gradient"}
    numbers: dict[BlockKey, int] = {}
    for tensor in tensors:
        record = records.pop((tensor.kind, tensor.name, tensor.field), None)
        if record is None or not _is_cut_alike(tensor, record):
            return None
        for piece, stored in zip(tensor.pieces, record.pieces, strict=True):
            if numbers.setdefault(piece.block, stored.block) != stored.block:
                return None
    if len(set(numbers.values())) != len(numbers):
        return None
    if any(content.blocks[n].nbytes != nbytes(key) for key, n in numbers.items()):
        return None
    return numbers, list(records.values())


def load_blocks(engine: StateSource, found: StoredCheckpoint, numbers: dict[BlockKey, int]) -> None:
    """Replace whole blocks of the engine, some at a time; each is verified before it counts.

    Raises:
        CheckpointError, StorageError: as `Reading.finish`; or a block could not be written.
    """
    under_way: deque[tuple[Reading, Replacement]] = deque()

    def finish_oldest() -> None:
        reading, replacement = under_way[0]
        with found.reading():
            reading.finish()
        under_way.popleft()
        replacement.commit()

    try:
        order = sorted(numbers, key=lambda key: found.content.blocks[numbers[key]])
        for key in order:
            replacement = engine.start_replacing(key, wait=not under_way)
            while replacement is None:
                finish_oldest()
                replacement = engine.start_replacing(key, wait=not under_way)
            try:
                with found.reading():
                    reading = found.reader.start(numbers[key], replacement.tensor)
            except BaseException:
                replacement.cancel()
                raise
            under_way.append((reading, replacement))
            if len(under_way) > DEPTH:
                finish_oldest()
        while under_way:
            finish_oldest()
    finally:
        for reading, replacement in under_way:
            if reading.abandon():
                replacement.cancel()


def _is_cut_alike(tensor: MappedTensor, record: TensorRecord) -> bool:
    mine = (str(tensor.dtype), tensor.shape, tensor.stride)
    if mine != (record.dtype, record.shape, record.stride):
        return False
    return [(piece.offset, piece.nbytes) for piece in tensor.pieces] == [
        (piece.offset, piece.nbytes) for piece in record.pieces
    ]
