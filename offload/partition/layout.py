"""Layout arithmetic of buckets, chunks and state fields; pure numbers, no torch.

[Note: Layout]
  parameter     one tensor of the module: a `ParamSpec`, numbered in registration order.
  bucket        parameters that move together: one dtype, all trainable or all frozen. Each has a
                `ParamSlot` that starts at a multiple of 64 bytes (a misaligned buffer changes the
                bits of a gemv); `Bucket.numel` counts the padding.
  chunk         the piece of a bucket that is staged and updated at once. A bucket of several
                parameters is one chunk; a parameter too large for a bucket is alone in one and is
                cut at multiples of `chunk_elements`.
  chunk block   the state of one class of one chunk: its fields one after the other, each at a
                multiple of 4096 bytes. A block is one O_DIRECT request with aligned fields.
  class layout  the chunk blocks of a bucket one after the other, the same on disk and in memory.
  value         what a field has for each element, or one for `elements_per_value` of them (a scale
                for a block of quantized ones): elements [k * n, k * n + n) of the bucket have value
                k. Slots then start at multiples of n, so that values are those of one parameter.

Counts named `numel`, `offset`, `start` are elements; bytes are named `nbytes` or `*_bytes`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from offload.errors import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SLOT_ALIGNMENT_BYTES = 64
BLOCK_ALIGNMENT_BYTES = 4096
# Reductions run over fixed blocks of this many elements: a chunk boundary is a block boundary.
REDUCTION_ELEMENTS = 65_536

# The state classes that an optimizer step writes.
UPDATED_CLASSES = ("weights", "optimizer")

MIN_BUCKET_ELEMENTS = 65_536
MAX_BUCKET_ELEMENTS = 2 * 1024 * 1024
MIN_BUCKETS_ON_DEVICE = 8


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter. `dtype` is a short name: "fp32", "bf16", "fp16", ...

    `tile_numel`: the device holds at most this many elements of it at once; None: all of them.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: str
    itemsize: int
    trainable: bool
    tile_numel: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def tile_nbytes(self) -> int:
        """Bytes of the largest part that the device holds at once."""
        return self.nbytes if self.tile_numel is None else self.tile_numel * self.itemsize


@dataclass(frozen=True, slots=True)
class ParamSlot:
    """The place of parameter number `param` in its bucket, in elements."""

    param: int
    offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, start + numel) of a bucket, padding included."""

    index: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """One page: slots in registration order; chunks cover [0, numel) without gap or overlap."""

    index: int
    dtype: str
    itemsize: int
    trainable: bool
    slots: tuple[ParamSlot, ...]
    numel: int
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, without the padding of chunk blocks to 4096."""
        return self.numel * self.itemsize


class FieldSpec(NamedTuple):
    """One array of a state class, with one value for `elements_per_value` elements of the bucket.

    `elements_per_value` divides 65536, so that a chunk begins with a value of its own.
    """

    name: str
    dtype: str
    itemsize: int
    elements_per_value: int = 1


@dataclass(frozen=True, slots=True)
class Field:
    """A field in a chunk block. `nbytes` is exact; the next starts at the next multiple of 4096."""

    name: str
    dtype: str
    itemsize: int
    offset_bytes: int
    nbytes: int
    elements_per_value: int = 1

    def values(self, start: int, numel: int) -> slice:
        """The values of `numel` elements from element `start` on, which begins one.

        The last value may have fewer elements than the others.
        """
        each = self.elements_per_value
        assert start % each == 0, "ranges begin where a value does"
        return slice(start // each, -(-(start + numel) // each))


class Segment(NamedTuple):
    """`numel` elements of `param` that lie in a chunk, and where they start in both."""

    param: int
    start_in_param: int
    start_in_chunk: int
    numel: int


def pack(
    specs: Sequence[ParamSpec],
    *,
    bucket_elements: int,
    chunk_elements: int | None = None,
    slot_elements: int = 1,
) -> tuple[Bucket, ...]:
    """Packs the parameters into buckets; buckets are ordered by their first parameter.

    One bucket is open for each (dtype, trainable), so parameters of different kinds that alternate
    (adapters between frozen weights) still fill buckets. A parameter larger than
    `bucket_elements`, or one that is tiled, is alone.

    Args:
        specs: the parameters in registration order.
        bucket_elements: most elements in a bucket of several parameters, padding included.
        chunk_elements: where a large parameter is cut; a multiple of 65536; by default
            `bucket_elements` rounded up to one.
        slot_elements: slots start at multiples of this many elements, too; a power of two.

    Raises:
        ValueError: a size is not positive, or `chunk_elements` is not a multiple of 65536.
    """
    if chunk_elements is None:
        chunk_elements = round_up(bucket_elements, REDUCTION_ELEMENTS)
    if bucket_elements <= 0:
        raise ValueError(f"bucket_elements is {bucket_elements}, expected a positive number")
    if chunk_elements <= 0 or chunk_elements % REDUCTION_ELEMENTS:
        raise ValueError(
            f"chunk_elements is {chunk_elements}, "
            f"expected a positive multiple of {REDUCTION_ELEMENTS}"
        )
    return tuple(
        _bucket(index, members, specs, chunk_elements, slot_elements)
        for index, members in enumerate(_groups(specs, bucket_elements, slot_elements))
    )


def _padded_numel(spec: ParamSpec, slot_elements: int) -> int:
    """Elements a parameter takes with its padding; an empty one takes none."""
    in_bytes = max(SLOT_ALIGNMENT_BYTES, slot_elements * spec.itemsize)
    return round_up(spec.nbytes, in_bytes) // spec.itemsize


def _groups(
    specs: Sequence[ParamSpec], bucket_elements: int, slot_elements: int
) -> list[list[int]]:
    groups: list[list[int]] = []
    open_groups: dict[tuple[str, bool], list[int]] = {}
    filled: dict[tuple[str, bool], int] = {}
    for param, spec in enumerate(specs):
        kind = (spec.dtype, spec.trainable)
        needed = _padded_numel(spec, slot_elements)
        if needed > bucket_elements or spec.tile_numel is not None:
            groups.append([param])
        elif kind in open_groups and filled[kind] + needed <= bucket_elements:
            open_groups[kind].append(param)
            filled[kind] += needed
        else:
            open_groups[kind] = [param]
            filled[kind] = needed
            groups.append(open_groups[kind])
    return groups


def _bucket(
    index: int,
    members: Sequence[int],
    specs: Sequence[ParamSpec],
    chunk_elements: int,
    slot_elements: int,
) -> Bucket:
    first = specs[members[0]]
    slots = []
    offset = 0
    for param in members:
        slots.append(ParamSlot(param, offset, specs[param].numel))
        offset += _padded_numel(specs[param], slot_elements)
    # A bucket of empty parameters still has one unit: leases and records are never empty.
    numel = max(offset, SLOT_ALIGNMENT_BYTES // first.itemsize)
    step = chunk_elements if len(members) == 1 else numel
    chunks = tuple(
        Chunk(number, start, min(step, numel - start))
        for number, start in enumerate(range(0, numel, step))
    )
    return Bucket(index, first.dtype, first.itemsize, first.trainable, tuple(slots), numel, chunks)


class BlockLayout(Protocol):
    """What a block needs of its layout: the bytes of its chunk blocks, one after the other."""

    @property
    def chunk_nbytes(self) -> Sequence[int]:
        """Bytes of each chunk block, multiples of 4096."""
        ...

    @property
    def chunk_offset_bytes(self) -> Sequence[int]:
        """Where each chunk block starts in a home in memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        ...

    def element_fields(self, chunk: int) -> Sequence[Field]:
        """The fields of a chunk block that have values for the elements of the chunk."""
        ...


class ClassLayout:
    """Where the fields of one state class of one bucket lie.

    Attributes:
        fields: the `FieldSpec`s in order.
        chunk_nbytes: bytes of each chunk block, a multiple of 4096.
        chunk_offset_bytes: where each chunk block starts in the home.
        nbytes: bytes of the home.
    """

    __slots__ = ("_chunks", "chunk_nbytes", "chunk_offset_bytes", "fields", "nbytes")

    def __init__(self, bucket: Bucket, fields: Sequence[FieldSpec]) -> None:
        self.fields = tuple(fields)
        chunks = []
        sizes = []
        offsets = []
        total = 0
        for chunk in bucket.chunks:
            placed, nbytes = _chunk_block(chunk, self.fields)
            chunks.append(placed)
            sizes.append(nbytes)
            offsets.append(total)
            total += nbytes
        self._chunks = tuple(chunks)
        self.chunk_nbytes = tuple(sizes)
        self.chunk_offset_bytes = tuple(offsets)
        self.nbytes = total

    def field(self, chunk: int, name: str) -> Field:
        """The field `name` of chunk number `chunk`; its offset counts from the chunk block.

        Raises:
            KeyError: the state class has no such field.
        """
        return self._chunks[chunk][name]

    def element_fields(self, chunk: int) -> Sequence[Field]:
        """The fields of chunk number `chunk`, which have values for its elements."""
        return tuple(self._chunks[chunk].values())


def _chunk_block(chunk: Chunk, fields: Sequence[FieldSpec]) -> tuple[dict[str, Field], int]:
    placed = {}
    offset = 0
    for spec in fields:
        nbytes = -(-chunk.numel // spec.elements_per_value) * spec.itemsize
        placed[spec.name] = Field(
            spec.name, spec.dtype, spec.itemsize, offset, nbytes, spec.elements_per_value
        )
        offset = round_up(offset + nbytes, BLOCK_ALIGNMENT_BYTES)
    assert len(placed) == len(fields), "field names of a state class are unique"
    return placed, offset


def segments(bucket: Bucket, chunk: Chunk) -> tuple[Segment, ...]:
    """The parts of parameters that lie in `chunk`, in order; padding belongs to none."""
    found = []
    end = chunk.start + chunk.numel
    for slot in bucket.slots:
        start = max(slot.offset, chunk.start)
        stop = min(slot.offset + slot.numel, end)
        if start < stop:
            found.append(
                Segment(slot.param, start - slot.offset, start - chunk.start, stop - start)
            )
    return tuple(found)


def chunk_contents(bucket: Bucket, names: Sequence[str]) -> list[str]:
    """For messages, of each chunk: some of the parameters in it, in brackets; "" without `names`.

    `names` are by parameter index.
    """
    inside = ([names[s.param] for s in segments(bucket, c)] for c in bucket.chunks if names)
    return [f" ({listed(each)})" for each in inside] or [""] * len(bucket.chunks)


def state_fields(
    bucket: Bucket, *, gradient_dtype: str, moments: Sequence[FieldSpec] | None
) -> dict[str, tuple[FieldSpec, ...]]:
    """The fields of each state class of a bucket; a frozen bucket has weights only.

    The optimizer class opens with what completes the weight to fp32: nothing for fp32, the int16
    `remainder` for bf16 (the weight is the high half), a whole fp32 `master` otherwise.

    Args:
        bucket: the bucket.
        gradient_dtype: "fp32", or "compute" for the bucket's own dtype.
        moments: the state of the update rule, which follows; None for a rule that needs weights
            only, without gradients and masters.
    """
    weights = FieldSpec("weight", bucket.dtype, bucket.itemsize)
    if not bucket.trainable or moments is None:
        return {"weights": (weights,)}
    if gradient_dtype == "compute":
        gradient = FieldSpec("gradient", bucket.dtype, bucket.itemsize)
    else:
        gradient = FieldSpec("gradient", "fp32", 4)
    completion: tuple[FieldSpec, ...]
    if bucket.dtype == "fp32":
        completion = ()
    elif bucket.dtype == "bf16":
        completion = (FieldSpec("remainder", "int16", 2),)
    else:
        completion = (FieldSpec("master", "fp32", 4),)
    state = (*completion, *moments)
    return {"weights": (weights,), "gradients": (gradient,), "optimizer": state}


def slot_elements(moments: Sequence[FieldSpec] | None) -> int:
    """Where slots have to start for these fields: multiples of the elements of a value."""
    return max((spec.elements_per_value for spec in moments or ()), default=1)


def resolve_bucket_elements(specs: Sequence[ParamSpec], device_budget_bytes: int) -> int:
    """The `auto` rule: the largest power of two in [65536, 2Mi] of which 8 buckets fit the device.

    Counted with the widest dtype of the model; when not even 8 of the smallest fit, the smallest.
    """
    itemsize = max((spec.itemsize for spec in specs), default=4)
    elements = MAX_BUCKET_ELEMENTS
    while (
        elements > MIN_BUCKET_ELEMENTS
        and MIN_BUCKETS_ON_DEVICE * elements * itemsize > device_budget_bytes
    ):
        elements //= 2
    return elements


def num_held(chunk_nbytes: Iterable[int], share: float) -> dict[int, int]:
    """Extents for held writes, by their bytes: for a share of the chunks of each size."""
    return {nbytes: int(count * share) for nbytes, count in Counter(chunk_nbytes).items()}
