from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.partition.layout import (
    BLOCK_ALIGNMENT_BYTES,
    MAX_BUCKET_ELEMENTS,
    MIN_BUCKET_ELEMENTS,
    REDUCTION_ELEMENTS,
    SLOT_ALIGNMENT_BYTES,
    Bucket,
    ClassLayout,
    FieldSpec,
    ParamSpec,
    pack,
    resolve_bucket_elements,
    round_up,
    segments,
    slot_elements,
    state_fields,
)

MOMENTS = (FieldSpec("exp_avg", "fp32", 4), FieldSpec("exp_avg_sq", "fp32", 4))
ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8, "uint8": 1}
NUMELS = st.one_of(
    st.integers(0, 200),
    st.integers(0, 5000),
    st.integers(60_000, 300_000),
    st.sampled_from([65_535, 65_536, 65_537, 131_072]),
)


def spec(
    numel: int, dtype: str = "bf16", *, trainable: bool = True, name: str = "weight"
) -> ParamSpec:
    return ParamSpec(name, (numel,), numel, dtype, ITEMSIZES[dtype], trainable)


specs_of_models = st.lists(
    st.builds(spec, NUMELS, st.sampled_from(sorted(ITEMSIZES)), trainable=st.booleans()),
    max_size=20,
)
bucket_sizes = st.one_of(st.integers(1, 2000), st.sampled_from([65_536, 131_072, 100_000]))


@given(
    specs=specs_of_models,
    bucket_elements=bucket_sizes,
    multiple=st.sampled_from([1, 16, 64, 256]),
)
def test_every_parameter_has_one_aligned_slot(
    specs: list[ParamSpec], bucket_elements: int, multiple: int
) -> None:
    buckets = pack(specs, bucket_elements=bucket_elements, slot_elements=multiple)
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert sorted(slot.param for bucket in buckets for slot in bucket.slots) == list(
        range(len(specs))
    )
    for bucket in buckets:
        params = [slot.param for slot in bucket.slots]
        assert params == sorted(params), "registration order"
        end = 0
        for slot in bucket.slots:
            of = specs[slot.param]
            assert (of.dtype, of.itemsize) == (bucket.dtype, bucket.itemsize)
            assert of.trainable == bucket.trainable
            assert slot.numel == of.numel
            assert slot.offset >= end, "slots do not overlap"
            assert slot.offset * bucket.itemsize % SLOT_ALIGNMENT_BYTES == 0
            assert slot.offset % multiple == 0
            alignment_bytes = max(SLOT_ALIGNMENT_BYTES, multiple * bucket.itemsize)
            assert (slot.offset - end) * bucket.itemsize < alignment_bytes, "least padding"
            end = slot.offset + slot.numel
        assert bucket.numel >= max(end, 1)
        assert bucket.nbytes % SLOT_ALIGNMENT_BYTES == 0
        least_bytes = max(SLOT_ALIGNMENT_BYTES, multiple * bucket.itemsize)
        assert bucket.nbytes - end * bucket.itemsize <= least_bytes
    firsts = [bucket.slots[0].param for bucket in buckets]
    assert firsts == sorted(firsts), "buckets are in the order of their first parameters"


@given(specs=specs_of_models, bucket_elements=bucket_sizes)
def test_buckets_are_filled_and_no_larger_than_asked(
    specs: list[ParamSpec], bucket_elements: int
) -> None:
    buckets = pack(specs, bucket_elements=bucket_elements)
    last: dict[tuple[str, bool], Bucket] = {}
    for bucket in buckets:
        unit = SLOT_ALIGNMENT_BYTES // bucket.itemsize
        if bucket.numel > max(bucket_elements, unit):
            assert len(bucket.slots) == 1, "a parameter larger than a bucket is alone"
            continue
        kind = (bucket.dtype, bucket.trainable)
        if kind in last:
            first = specs[bucket.slots[0].param]
            needed = round_up(first.nbytes, SLOT_ALIGNMENT_BYTES) // first.itemsize
            assert last[kind].numel + needed > bucket_elements, "the bucket before was full"
        last[kind] = bucket


@given(
    specs=specs_of_models,
    bucket_elements=bucket_sizes,
    chunk_blocks=st.one_of(st.none(), st.integers(1, 3)),
)
def test_chunks_cover_and_segments_conserve(
    specs: list[ParamSpec], bucket_elements: int, chunk_blocks: int | None
) -> None:
    chunk_elements = None if chunk_blocks is None else chunk_blocks * REDUCTION_ELEMENTS
    cut = chunk_elements or round_up(bucket_elements, REDUCTION_ELEMENTS)
    buckets = pack(specs, bucket_elements=bucket_elements, chunk_elements=chunk_elements)
    for bucket in buckets:
        end = 0
        for number, chunk in enumerate(bucket.chunks):
            assert (chunk.index, chunk.start) == (number, end)
            assert chunk.numel > 0
            end += chunk.numel
        assert end == bucket.numel
        if len(bucket.slots) > 1:
            assert len(bucket.chunks) == 1
        else:
            assert all(chunk.numel == cut for chunk in bucket.chunks[:-1])
            assert bucket.chunks[-1].numel <= cut
        covered = {slot.param: 0 for slot in bucket.slots}
        offsets = {slot.param: slot.offset for slot in bucket.slots}
        for chunk in bucket.chunks:
            for part in segments(bucket, chunk):
                assert part.numel > 0
                assert part.start_in_param == covered[part.param], "in order, without gaps"
                assert part.start_in_param % REDUCTION_ELEMENTS == 0
                in_bucket = chunk.start + part.start_in_chunk
                assert in_bucket == offsets[part.param] + part.start_in_param
                assert part.start_in_chunk + part.numel <= chunk.numel
                covered[part.param] += part.numel
        assert covered == {slot.param: slot.numel for slot in bucket.slots}


@given(
    specs=specs_of_models,
    bucket_elements=bucket_sizes,
    sizes=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 64, 65_536])), max_size=4
    ),
)
def test_class_layouts_do_not_overlap(
    specs: list[ParamSpec], bucket_elements: int, sizes: list[tuple[int, int]]
) -> None:
    fields = [FieldSpec(f"field{n}", "any", *each) for n, each in enumerate(sizes)]
    for bucket in pack(specs, bucket_elements=bucket_elements):
        layout = ClassLayout(bucket, fields)
        end = 0
        for chunk in bucket.chunks:
            assert layout.chunk_offset_bytes[chunk.index] == end
            filled = 0
            for wanted in fields:
                field = layout.field(chunk.index, wanted.name)
                assert (field.name, field.dtype, field.itemsize, field.elements_per_value) == wanted
                values = field.values(0, chunk.numel)
                assert values.start == 0
                assert chunk.numel <= values.stop * wanted.elements_per_value
                assert (values.stop - 1) * wanted.elements_per_value < chunk.numel
                assert field.nbytes == values.stop * wanted.itemsize
                assert field.offset_bytes % BLOCK_ALIGNMENT_BYTES == 0
                assert 0 <= field.offset_bytes - filled < BLOCK_ALIGNMENT_BYTES
                filled = field.offset_bytes + field.nbytes
            assert layout.chunk_nbytes[chunk.index] == round_up(filled, BLOCK_ALIGNMENT_BYTES)
            end += layout.chunk_nbytes[chunk.index]
        assert layout.nbytes == end


def test_small_parameters_share_a_bucket_around_large_ones() -> None:
    buckets = pack(
        [spec(10), spec(5000), spec(20), spec(7, trainable=False), spec(3, "fp32"), spec(0)],
        bucket_elements=1000,
    )
    assert [[slot.param for slot in bucket.slots] for bucket in buckets] == [
        [0, 2, 5],
        [1],
        [3],
        [4],
    ]
    assert [slot.offset for slot in buckets[0].slots] == [0, 32, 64]


def test_only_a_parameter_that_is_alone_is_cut() -> None:
    shared, alone = pack(
        [spec(50_000), spec(40_000), spec(90_000)], bucket_elements=100_000, chunk_elements=65_536
    )
    assert [chunk.numel for chunk in shared.chunks] == [90_016]
    assert [chunk.numel for chunk in alone.chunks] == [65_536, 90_016 - 65_536]


def test_a_bucket_of_empty_parameters_is_not_empty() -> None:
    (bucket,) = pack([spec(0), spec(0)], bucket_elements=100)
    assert bucket.nbytes == SLOT_ALIGNMENT_BYTES
    assert len(bucket.slots) == 2
    assert segments(bucket, bucket.chunks[0]) == ()


def test_no_parameters_make_no_buckets() -> None:
    assert pack([], bucket_elements=100) == ()


@pytest.mark.parametrize(("bucket_elements", "chunk_elements"), [(0, None), (10, 0), (10, 65_535)])
def test_sizes_that_cannot_be_are_refused(bucket_elements: int, chunk_elements: int | None) -> None:
    with pytest.raises(ValueError, match="expected a positive"):
        pack([spec(1)], bucket_elements=bucket_elements, chunk_elements=chunk_elements)


@pytest.mark.parametrize(
    ("dtype", "optimizer_bytes"), [("fp32", 4 + 4), ("bf16", 2 + 4 + 4), ("fp16", 4 + 4 + 4)]
)
def test_state_fields_complete_the_weight_to_fp32(dtype: str, optimizer_bytes: int) -> None:
    (bucket,) = pack([spec(100, dtype)], bucket_elements=1000)
    fields = state_fields(bucket, gradient_dtype="compute", moments=MOMENTS)
    assert sum(field.itemsize for field in fields["optimizer"]) == optimizer_bytes
    assert fields["weights"] == (FieldSpec("weight", dtype, ITEMSIZES[dtype]),)
    assert fields["gradients"] == (FieldSpec("gradient", dtype, ITEMSIZES[dtype]),)
    in_fp32 = state_fields(bucket, gradient_dtype="fp32", moments=())
    assert in_fp32["gradients"] == (FieldSpec("gradient", "fp32", 4),)


def test_a_frozen_bucket_has_weights_only() -> None:
    (bucket,) = pack([spec(100, trainable=False)], bucket_elements=1000)
    assert list(state_fields(bucket, gradient_dtype="fp32", moments=MOMENTS)) == ["weights"]


@given(budget=st.integers(0, 2**40), dtype=st.sampled_from(sorted(ITEMSIZES)))
def test_automatic_buckets_leave_room_for_eight(budget: int, dtype: str) -> None:
    itemsize = ITEMSIZES[dtype]
    elements = resolve_bucket_elements([spec(10, dtype)], budget)
    assert elements.bit_count() == 1
    assert MIN_BUCKET_ELEMENTS <= elements <= MAX_BUCKET_ELEMENTS
    if elements > MIN_BUCKET_ELEMENTS:
        assert 8 * elements * itemsize <= budget
    if elements < MAX_BUCKET_ELEMENTS:
        assert 8 * 2 * elements * itemsize > budget


@given(
    specs=specs_of_models,
    bucket_elements=bucket_sizes,
    each=st.sampled_from([2, 64, 256]),
)
def test_a_value_of_several_elements_is_of_one_parameter(
    specs: list[ParamSpec], bucket_elements: int, each: int
) -> None:
    """And which elements of the parameter share it does not depend on the buckets."""
    scale = FieldSpec("scale", "fp32", 4, each)
    assert slot_elements([*MOMENTS, scale]) == each
    for bucket in pack(specs, bucket_elements=bucket_elements, slot_elements=each):
        layout = ClassLayout(bucket, [scale])
        for chunk in bucket.chunks:
            taken = 0
            for part in segments(bucket, chunk):
                values = layout.field(chunk.index, "scale").values(part.start_in_chunk, part.numel)
                assert values.stop - values.start == -(-part.numel // each)
                assert part.start_in_param % each == 0
                assert values.start >= taken, "no parameter before has a part of the first value"
                taken = values.stop
            assert taken <= layout.field(chunk.index, "scale").nbytes // scale.itemsize
