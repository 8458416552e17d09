"""Archives of torch.save, read without unpickling, and written without pickling."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offload.errors import CheckpointError, StorageError
from offload.state import durable
from offload.state.stored_zip import ReadOnlyFile, StoredZip
from offload.state.torch_archive import ArchivedTensor, TorchArchive
from offload.state.torch_format import (
    encode,
    size,
    stored_zip,
    tensor_archive,
    value_archive,
)

TENSORS = {
    "matrix": torch.arange(24.0).reshape(4, 6),
    "transposed": torch.arange(24.0).reshape(4, 6).t(),
    "a view": torch.arange(10)[3:7],
    "every second": torch.arange(10.0)[::2],
    "parameter": nn.Parameter(torch.ones(2)),
    "bf16": torch.randn(3).bfloat16(),
    "fp16": torch.randn(3).half(),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "uint16": torch.arange(3).to(torch.uint16),
    "complex": torch.randn(3, dtype=torch.complex64),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "int8": torch.arange(3, dtype=torch.int8),
    "double": torch.randn(2, 1, 2, dtype=torch.float64),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def value_of(path: Path, **options):
    with ReadOnlyFile(path) as file:
        return TorchArchive(file, **options).value


def load(path: Path) -> dict:
    with ReadOnlyFile(path) as file:
        archive = TorchArchive(file)
        archive.verify()
        return {
            name: archive.read(value) if isinstance(value, ArchivedTensor) else value
            for name, value in archive.value.items()
        }


def test_every_kind_of_tensor_has_its_bits(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(TENSORS | {"n": [1, None, 2.5], "d": torch.float16, "s": torch.Size([1, 2])}, path)
    found = load(path)
    assert (found.pop("n"), found.pop("d"), found.pop("s")) == (
        [1, None, 2.5],
        torch.float16,
        (1, 2),
    )
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
        assert found[name].is_contiguous()


@pytest.mark.parametrize("name", TENSORS)
def test_torch_loads_what_is_written_here(tmp_path, name):
    tensor = TENSORS[name].detach().contiguous()
    data = b"".join(tensor_archive(tensor))
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert bits(found) == bits(tensor)
    (tmp_path / "a.pt").write_bytes(data)
    with ReadOnlyFile(tmp_path / "a.pt") as file:
        archive = TorchArchive(file)
        assert bits(archive.read(archive.value)) == bits(tensor)
    value = {"a": [1, -1, 2**40, None, True, 1.5, "é", (1, (2,))], 3: {}}
    assert torch.load(io.BytesIO(b"".join(value_archive(value))), weights_only=True) == value


def test_the_64_bit_forms(tmp_path):
    """As an entry of 4 GiB and more needs them; read by Python's zipfile, torch and offload."""
    tensor = torch.arange(5.0)
    with zipfile.ZipFile(io.BytesIO(b"".join(tensor_archive(tensor)))) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    data = b"".join(stored_zip(entries, wide_from=0))
    with zipfile.ZipFile(io.BytesIO(data)) as wide:
        assert wide.testzip() is None
        assert {name: wide.read(name) for name in wide.namelist()} == entries
    assert torch.equal(torch.load(io.BytesIO(data)), tensor)
    (tmp_path / "a.pt").write_bytes(data)
    with ReadOnlyFile(tmp_path / "a.pt") as file:
        archive = TorchArchive(file)
        assert torch.equal(archive.read(archive.value), tensor)


def test_an_archive_inside_of_a_file(tmp_path):
    one, two = b"".join(tensor_archive(torch.ones(3))), b"".join(value_archive({"a": 1}))
    path = tmp_path / "both"
    path.write_bytes(one + two)
    assert value_of(path, start=len(one), nbytes=len(two)) == {"a": 1}
    for start, nbytes in ((1, len(one)), (0, len(one) - 1), (len(one), 10**15), (-1, 5), (0, 0)):
        with pytest.raises(CheckpointError, match=r"no archive of torch\.save"):
            value_of(path, start=start, nbytes=nbytes)


def archived(value, storages: dict[str, bytes] | None = None, **entries: bytes | None) -> bytes:
    """An archive with a given pickle and storages."""
    content = {"data.pkl": value if isinstance(value, bytes) else encode(value)}
    content |= {f"data/{key}": data for key, data in (storages or {"0": bytes(16)}).items()}
    content |= {"byteorder": b"little", "version": b"3\n"}
    content |= {name.replace("__", "/"): data for name, data in entries.items()}
    kept = {f"a/{name}": data for name, data in content.items() if data is not None}
    return b"".join(stored_zip(kept))


def tensor_pickle(
    *, offset=0, shape=(2, 2), stride=(2, 1), hooks=b"ccollections\nOrderedDict\n)R",
    identity=None, rest=b"",
) -> bytes:  # fmt: skip
    """The pickle of one fp32 tensor over a storage of four elements, or of something like it."""
    body = lambda value: encode(value)[2:-1]  # noqa: E731
    if identity is None:
        identity = b"(" + body("storage") + b"ctorch\nFloatStorage\n" + body("0") + body("cpu")
        identity += body(4) + b"t"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + identity + b"Q" + body(offset)
        + body(shape) + body(stride) + b"\x89" + hooks + rest + b"tR."
    )  # fmt: skip


def identity(kind=b"ctorch\nFloatStorage\n", key="0", numel=4, tag="storage") -> bytes:
    body = lambda value: encode(value)[2:-1]  # noqa: E731
    return b"(" + body(tag) + kind + body(key) + body("cpu") + body(numel) + b"t"


BAD_TENSORS = {
    "offset beyond": tensor_pickle(offset=1),
    "negative offset": tensor_pickle(offset=-1),
    "offset of no number": tensor_pickle(offset="0"),
    "stride beyond": tensor_pickle(stride=(3, 1)),
    "negative stride": tensor_pickle(stride=(-1, 1)),
    "expanded": tensor_pickle(shape=(1 << 40, 1), stride=(0, 1)),
    "larger than its storage": tensor_pickle(shape=(5,), stride=(0,)),
    "overflowing": tensor_pickle(shape=(1 << 61, 1 << 61, 0), stride=(0, 0, 0)),
    "overflowing by strides": tensor_pickle(shape=(2, 2), stride=(1 << 61, 1 << 61)),
    "other dimensions": tensor_pickle(shape=(4,), stride=(1, 1)),
    "many dimensions": tensor_pickle(shape=(1,) * 65, stride=(1,) * 65),
    "shape of a list": tensor_pickle(shape=[2, 2]),
    "shape of floats": tensor_pickle(shape=(2.0, 2)),
    "hooks": tensor_pickle(hooks=b"}K\x01K\x02s"),
    "conjugate": tensor_pickle(rest=b"}X\x04\x00\x00\x00conj\x88s"),
    "absent storage": tensor_pickle(identity=identity(key="1")),
    "a path as storage": tensor_pickle(identity=identity(key="../../etc/passwd")),
    "more than the storage": tensor_pickle(identity=identity(numel=5)),
    "less than the storage": tensor_pickle(identity=identity(numel=3)),
    "negative elements": tensor_pickle(identity=identity(numel=-4)),
    "another dtype": tensor_pickle(identity=identity(kind=b"ctorch\nDoubleStorage\n")),
    "a module": tensor_pickle(identity=identity(tag="module")),
    "no class": tensor_pickle(identity=identity(kind=b"K\x01")),
    "an unknown class": tensor_pickle(identity=identity(kind=b"cbuiltins\nbytearray\n")),
    "bytes without dtype": tensor_pickle(
        identity=identity(kind=b"ctorch.storage\nUntypedStorage\n", numel=16)
    ),
    "an id of no tuple": tensor_pickle(identity=b"K\x01"),
}


@pytest.mark.parametrize("pickle", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_are_not_inside_their_storage_are_refused(tmp_path, pickle):
    path = tmp_path / "a.pt"
    path.write_bytes(archived(tensor_pickle()))
    with ReadOnlyFile(path) as file:
        archive = TorchArchive(file)
        assert archive.read(archive.value).tolist() == [[0, 0], [0, 0]]
    path.write_bytes(archived(pickle))
    with pytest.raises(CheckpointError, match="its pickle is refused"):
        value_of(path)


def patched(data: bytes, signature: bytes, at: int, form: str, value) -> bytes:
    """An archive with one field of its first header of that kind replaced."""
    found = data.index(signature) + at
    return data[:found] + struct.pack(form, value) + data[found + struct.calcsize(form) :]


def with_zipfile(compression=zipfile.ZIP_STORED, names=("a/data.pkl",), comment=b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        made.comment = comment
        for name in names:
            made.writestr(name, encode({"a": 1}))
    return out.getvalue()


GOOD = archived({"a": 1})
CENTRAL, LOCAL, LARGE, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x06\x06", b"PK\x05\x06"
BAD_ARCHIVES = {
    "empty": b"",
    "a legacy file of torch": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    "compressed": with_zipfile(zipfile.ZIP_DEFLATED),
    "a comment": with_zipfile(comment=b"x"),
    "bytes behind": GOOD + b"x",
    "two folders": with_zipfile(names=("a/data.pkl", "b/version")),
    "no folder": with_zipfile(names=("data.pkl",)),
    "a path": with_zipfile(names=("a/../data.pkl",)),
    "an absolute path": with_zipfile(names=("/data.pkl",)),
    "another name": with_zipfile(names=("a/data.pkl", "a/code/evil.py")),
    "no pickle": archived(None, **{"data.pkl": None}),
    "big-endian": archived({"a": 1}, byteorder=b"big"),
    "encrypted": patched(GOOD, CENTRAL, 8, "<H", 1),
    "another method": patched(GOOD, CENTRAL, 10, "<H", 12),
    "another disk": patched(GOOD, CENTRAL, 34, "<H", 1),
    "another size": patched(GOOD, CENTRAL, 24, "<I", 5),
    "a size beyond": patched(patched(GOOD, CENTRAL, 24, "<I", 9**9), CENTRAL, 20, "<I", 9**9),
    "a header beyond": patched(GOOD, CENTRAL, 42, "<I", 9**9),
    "a header elsewhere": patched(GOOD, CENTRAL, 42, "<I", 1),
    "a long name": patched(GOOD, CENTRAL, 28, "<H", 60_000),
    "another name at the bytes": patched(GOOD, LOCAL, 30, "<B", 98),
    "a long extra field": patched(GOOD, LOCAL, 28, "<H", 60_000),
    "no signature": patched(GOOD, LOCAL, 0, "<I", 0),
    "many entries": patched(GOOD, LARGE, 32, "<Q", 10**9),
    "fewer entries": patched(GOOD, LARGE, 32, "<Q", 1),
    "a directory beyond": patched(GOOD, LARGE, 48, "<Q", 10**15),
    "a long directory": patched(GOOD, LARGE, 40, "<Q", 10**15),
    "a locator elsewhere": patched(GOOD, b"PK\x06\x07", 8, "<Q", 5),
    "no end": GOOD[:-1],
    "half": GOOD[: len(GOOD) // 2],
    "a large pickle": archived(b"x" * (65 << 20)),
}


@pytest.mark.parametrize("data", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES.keys())
def test_archives_that_torch_does_not_write_are_refused(tmp_path, data):
    path = tmp_path / "a.pt"
    path.write_bytes(GOOD)
    assert value_of(path) == {"a": 1}
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no archive of torch\.save, or a damaged one: ."):
        value_of(path)


def test_entries_do_not_overlap_and_stand_once(tmp_path):
    one = {"a/data/0": bytes(100), "a/data/1": bytes(50), "a/data.pkl": encode(1)}
    data = b"".join(stored_zip(one))
    second = data.index(CENTRAL, data.index(CENTRAL) + 4)
    overlapping = data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :]
    twice = data.replace(b"a/data/1", b"a/data/0")
    # An entry inside the bytes of another, with a header of its own there.
    inner = struct.pack("<4s5H3I2H", LOCAL, 20, 0, 0, 0, 0, zlib.crc32(b""), 0, 0, 8, 0)
    nested = b"".join(
        stored_zip({"a/data/0": inner + b"a/data/1", "a/data/1": b"", "a/data.pkl": encode(1)})
    )
    second = nested.index(CENTRAL, nested.index(CENTRAL) + 4)
    inside = nested.index(inner, 4)
    nested = nested[: second + 42] + struct.pack("<I", inside) + nested[second + 46 :]
    for bad in (overlapping, twice, nested):
        (tmp_path / "a.pt").write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"no archive of torch\.save"):
            value_of(tmp_path / "a.pt")


def test_every_flipped_byte_of_a_tensor_or_pickle_is_found(tmp_path):
    path = tmp_path / "a.pt"
    values = {"a": torch.arange(40.0), "b": torch.arange(30)[3:20]}
    torch.save(values, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as packed:
        kept = [entry.filename for entry in packed.infolist()]
    assert len(kept) == 8
    generator = random.Random(0)
    found = 0
    for _ in range(400):
        at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            loaded = load(path)
        except (CheckpointError, StorageError):
            found += 1
            continue
        # A byte that says nothing: a date, padding, a size that only local headers repeat.
        assert all(torch.equal(loaded[name], values[name]) for name in values)
    assert found > 100


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "repeat", "end"]),
        st.integers(0, 5000),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=5,
)


def mutated(data: bytes, changes) -> bytes:
    for kind, at, piece in changes:
        at %= len(data) + 1
        if kind == "flip":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(piece) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 99] * len(piece) + data[at:]
        else:
            data = data[: at + 30]
    return data


VALUES = {"a": torch.arange(40.0), "b": torch.arange(30)[3:20], "c": [1, "x"]}


@given(MUTATIONS)
@settings(max_examples=600, deadline=None)
def test_mutated_files_are_refused_or_right(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    out = io.BytesIO()
    torch.save(VALUES, out)
    path.write_bytes(mutated(out.getvalue(), changes))
    try:
        found = load(path)
    except (CheckpointError, StorageError):
        return
    assert found["c"] == VALUES["c"]
    assert all(torch.equal(found[name], VALUES[name]) for name in "ab")


@given(MUTATIONS)
@settings(max_examples=600, deadline=None)
def test_mutated_pickles_with_a_right_checksum_are_refused_or_inside_their_storage(
    tmp_path_factory, changes
):
    path = tmp_path_factory.getbasetemp() / "forged.pt"
    path.write_bytes(archived(mutated(tensor_pickle(), changes)))
    try:
        with ReadOnlyFile(path) as file:
            archive = TorchArchive(file)
            if isinstance(archive.value, ArchivedTensor):
                assert archive.read(archive.value).numel() <= 4
    except (CheckpointError, StorageError):
        return


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("pipe", "link", "absent", "."):
        with pytest.raises(StorageError):
            ReadOnlyFile(tmp_path / name)


def test_a_read_error_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(GOOD)

    def fail(*_):
        raise OSError(errno.EIO, "bad disk")

    with ReadOnlyFile(path) as file:
        monkeypatch.setattr(durable, "read_all", fail)
        with pytest.raises(StorageError, match=r"a\.pt.*bad disk"):
            StoredZip(file, "version")


def test_a_storage_larger_than_a_piece_is_verified(tmp_path):
    path = tmp_path / "a.pt"
    large = torch.arange(3 << 20, dtype=torch.int32)
    torch.save({"a": large[5:9], "b": large}, path)
    assert load(path)["a"].tolist() == [5, 6, 7, 8]
    data = bytearray(path.read_bytes())
    data[-(1 << 20)] ^= 1
    path.write_bytes(data)
    with ReadOnlyFile(path) as file:
        archive = TorchArchive(file)
        for name in ("a", "b"):
            with pytest.raises(CheckpointError, match="data/0 does not have the CRC32"):
                archive.read(archive.value[name])


def test_the_checksums_are_those_of_zlib():
    data = b"".join(tensor_archive(torch.ones(3)))
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert zlib.crc32(bits(torch.ones(3))) == packed.getinfo("archive/data/0").CRC
    with pytest.raises(CheckpointError, match="has no plain form"):
        value_archive({"a": object()})
    assert torch.load(io.BytesIO(b"".join(value_archive(size((1, 2)))))) == (1, 2)
