from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offload.errors import CheckpointError, StorageError
from offload.state import safetensors_stream as stream
from offload.state.safetensors_stream import SafetensorsReader, SafetensorsWriter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.uint8, torch.bool,
          torch.int64]  # fmt: skip
NAMES = st.text(min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__" and n.encode("utf-8", "ignore").decode() == n
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> SafetensorsWriter:
    declared = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, declared, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    return writer


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    return raw.to(dtype)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_any_tensors_in_any_order_are_what_safetensors_reads(tmp_path, layout, order):
    path = tmp_path / "any.safetensors"
    path.unlink(missing_ok=True)
    tensors = {name: some_tensor(*kind) for name, kind in layout.items()}
    names = list(tensors)
    order.shuffle(names)
    declared = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, declared) as writer:
        for name in names:
            writer.write(name, tensors[name])
        writer.finish()
        entries = sorted(writer.entries.values(), key=lambda e: (e.begin, e.end))
    assert all(a.end == b.begin for a, b in itertools.pairwise(entries))
    assert all(e.begin % e.dtype.itemsize == 0 for e in entries), "aligned to their items"
    theirs = load_file(path)
    with SafetensorsReader(path) as reader:
        assert set(reader) == set(theirs) == set(tensors)
        assert reader.data_start_bytes % stream.DATA_ALIGNMENT_BYTES == 0
        assert reader.header_checksum == writer.header_checksum
        assert reader.nbytes == writer.nbytes == path.stat().st_size
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor)
            mine = reader.read(name)
            assert mine.dtype == tensor.dtype
            assert torch.equal(mine, tensor)
            assert stream.checksum_of(mine) == writer.checksums[name]


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    with SafetensorsReader(tmp_path / "theirs.safetensors") as reader:
        assert reader.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
            into = torch.empty_like(tensor)
            reader.read_into(name, into)
            assert torch.equal(into, tensor)
        with pytest.raises(CheckpointError, match="destination is"):
            reader.read_into("a", torch.empty(5, 3))


def test_strided_tensors_are_written_dense(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "t", {"m": matrix.t()})
    assert torch.equal(load_file(tmp_path / "t")["m"], matrix.t())


def test_unfinished_file_leaves_nothing_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "w.safetensors"
    write(path, {"a": torch.ones(4)})
    with (
        pytest.raises(RuntimeError, match="stop"),
        SafetensorsWriter(path, [("a", torch.float32, (4,)), ("b", torch.float32, (4,))]) as writer,
    ):
        writer.write("a", torch.zeros(4))
        raise RuntimeError("stop")
    assert names_in(tmp_path) == ["w.safetensors"]
    assert torch.equal(load_file(path)["a"], torch.ones(4))


def test_what_the_header_does_not_declare_is_refused(tmp_path):
    with SafetensorsWriter(tmp_path / "w", [("a", torch.float32, (4,))]) as writer:
        with pytest.raises(CheckpointError, match="'b' was not declared"):
            writer.write("b", torch.ones(4))
        with pytest.raises(CheckpointError, match=r"torch.bfloat16 \(4,\).*torch.float32 \(4,\)"):
            writer.write("a", torch.ones(4, dtype=torch.bfloat16))
        with pytest.raises(CheckpointError, match="without 1 declared tensors"):
            writer.finish()
        writer.write("a", torch.ones(4))
        with pytest.raises(CheckpointError, match="already written"):
            writer.write("a", torch.ones(4))
    with pytest.raises(CheckpointError, match="reserved or appears twice"):
        SafetensorsWriter(tmp_path / "w", [("a", torch.float32, (1,))] * 2)
    with pytest.raises(CheckpointError, match="complex128"):
        SafetensorsWriter(tmp_path / "w", [("a", torch.complex128, (1,))])
    assert names_in(tmp_path) == []


def test_files_are_private_and_the_space_is_allocated_first(tmp_path):
    path = tmp_path / "w"
    with SafetensorsWriter(path, [("a", torch.uint8, (1 << 20,))]) as writer:
        (pending,) = tmp_path.iterdir()
        assert pending.stat().st_blocks * 512 >= 1 << 20
        assert pending.stat().st_mode & 0o777 == 0o600
        assert writer.nbytes == (1 << 20) + stream.DATA_ALIGNMENT_BYTES


def forged(header: object, data: bytes = b"", *, claims: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text + data


def entry(begin: object, end: object, shape: object = (4,), dtype: object = "U8") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ATTACKS = {
    "empty": b"",
    "short prefix": b"\x01\x00",
    "header longer than file": forged({}, claims=1 << 20),
    "header of 2**63": forged({}, claims=1 << 63),
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "not json": forged(b"{'a': 1}"),
    "not utf-8": forged(b'{"\xff\xfe": 1}'),
    "nested": forged(b"[" * 100_000),
    "not an object": forged([]),
    "not an entry": forged({"a": 3}),
    "missing field": forged({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "extra field": forged({"a": entry(0, 4) | {"x": 1}}, bytes(4)),
    "unknown dtype": forged({"a": entry(0, 4, dtype="U9")}, bytes(4)),
    "dtype is a list": forged({"a": entry(0, 4, dtype=["U8"])}, bytes(4)),
    "negative dimension": forged({"a": entry(0, 4, shape=(-4,))}, bytes(4)),
    "boolean dimension": forged({"a": entry(0, 1, shape=(True,))}, bytes(1)),
    "fractional dimension": forged({"a": entry(0, 4, shape=(4.0,))}, bytes(4)),
    "negative offset": forged({"a": entry(-4, 0)}, bytes(4)),
    "end before begin": forged({"a": entry(4, 0)}, bytes(4)),
    "truncated data": forged({"a": entry(0, 4)}, bytes(3)),
    "data left over": forged({"a": entry(0, 4)}, bytes(5)),
    "size is not the shape's": forged({"a": entry(0, 4, shape=(3,))}, bytes(4)),
    "shape overflows 64 bits": forged({"a": entry(0, 0, shape=(1 << 62, 1 << 62, 0, 1 << 62))}),
    "2**62 elements": forged({"a": entry(0, 4, shape=(1 << 62,))}, bytes(4)),
    "overlap": forged({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "same bytes twice": forged({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "hole": forged({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)),
    "duplicate name": forged(b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":'
                             + json.dumps(entry(0, 4)).encode() + b"}", bytes(4)),
    "metadata of numbers": forged({"__metadata__": {"a": 1}}),
    "metadata is a list": forged({"__metadata__": ["a"]}),
    "100 dimensions": forged({"a": entry(0, 1, shape=(1,) * 100)}, bytes(1)),
}  # fmt: skip


@pytest.mark.parametrize("attack", [pytest.param(v, id=k) for k, v in ATTACKS.items()])
def test_forged_files_are_refused_before_allocation(tmp_path, attack, monkeypatch):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(attack)

    def no_allocation(*_args, **_kwargs):
        raise AssertionError("allocated for a forged header")

    monkeypatch.setattr(torch, "empty", no_allocation)
    with pytest.raises(CheckpointError, match=r"forged\.safetensors"):
        SafetensorsReader(path)


def test_the_control_of_the_attacks_is_accepted(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(forged({"a": entry(0, 4), "b": entry(4, 8)}, bytes(range(8))))
    with SafetensorsReader(path) as reader:
        assert reader.read("b").tolist() == [4, 5, 6, 7]


def test_names_never_become_paths(tmp_path):
    names = ["../../etc/passwd", "/etc/passwd", "a\0b", "..", "a/b"]
    folder = tmp_path / "inner"
    folder.mkdir()
    write(folder / "w", {name: torch.full((2,), i) for i, name in enumerate(names)})
    with SafetensorsReader(folder / "w") as reader:
        assert [reader.read(name)[0].item() for name in names] == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "w"]


def test_symbolic_links_pipes_and_folders_are_refused(tmp_path):
    write(tmp_path / "w", {"a": torch.ones(2)})
    (tmp_path / "link").symlink_to(tmp_path / "w")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "missing"):
        with pytest.raises(StorageError):
            SafetensorsReader(tmp_path / name)
    with SafetensorsReader(tmp_path / "link", follow_symlinks=True) as reader:
        assert torch.equal(reader.read("a"), torch.ones(2))


def test_a_file_cut_after_it_was_opened_is_an_error_that_names_the_tensor(tmp_path):
    write(tmp_path / "w", {"a": torch.ones(1000)})
    with SafetensorsReader(tmp_path / "w") as reader:
        os.truncate(tmp_path / "w", 5000)
        with pytest.raises(StorageError, match="read of a in"):
            reader.read("a")
