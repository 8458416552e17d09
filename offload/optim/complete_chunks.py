"""Which chunks have all the gradients of a step, while backward still brings others home."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from offload.partition.layout import Bucket, Segment
from offload.partition.parameters import ParameterState

Key = tuple[int, int]


class CompleteChunks:
    """Chunks whose gradients have all arrived, in the order in which they were complete.

    Not thread-safe: its user has a lock.

    Args:
        segments: of a chunk of a bucket, by their numbers.
    """

    def __init__(self, segments: Callable[[int, int], Sequence[Segment]]) -> None:
        self._segments = segments
        self._due: Collection[int] = ()  # parameters
        self._num_due = 1
        self._num_arrived: Counter[int] = Counter()  # by parameter
        self._keys: dict[Key, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._keys))

    def expect(self, due: Collection[int], arrivals: int) -> None:
        """A backward begins: each of these parameters gets a gradient so many times."""
        self.clear()
        self._due = due
        self._num_due = arrivals

    def clear(self) -> None:
        """Forget what has arrived."""
        self._num_arrived.clear()
        self._keys.clear()

    def is_one_too_many(self, state: ParameterState) -> bool:
        """Whether a gradient of the parameter that arrives now was not expected."""
        return self._num_arrived[state.index] == self._num_due

    def note(self, state: ParameterState, bucket: Bucket) -> None:
        """A gradient of a parameter of the bucket has arrived."""
        self._num_arrived[state.index] += 1
        for chunk in bucket.chunks:
            key = (bucket.index, chunk.index)
            due = {segment.param for segment in self._segments(*key)}.intersection(self._due)
            if state.index in due and all(self._num_arrived[p] == self._num_due for p in due):
                self._keys[key] = None

    def discard(self, key: Key) -> None:
        """Somebody has taken this chunk, or given it up."""
        self._keys.pop(key, None)
