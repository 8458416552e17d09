"""Directories of torch.distributed.checkpoint: chunks, forged metadata, mutated files."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from offload.errors import CheckpointError, StorageError
from offload.state.dcp import DcpDirectory, open_dcp
from offload.state.foreign import Known
from offload.state.torch_format import tensor_archive

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FOREIGN = Path(__file__).with_name("foreign")


@pytest.fixture
def two_ranks(tmp_path):
    with zipfile.ZipFile(FOREIGN / "dcp_two_ranks.zip") as packed:
        packed.extractall(tmp_path)
    return tmp_path / "dcp"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with DcpDirectory(folder) as directory:
        return {key: tensor.read() for key, tensor in directory.tensors.items()}


def test_chunks_of_ranks_become_what_torch_makes_of_them(two_ranks, tmp_path):
    dcp_to_torch_save(two_ranks, tmp_path / "all.pt")
    expected = torch.load(tmp_path / "all.pt", weights_only=False)
    found = tensors_of(two_ranks)
    with DcpDirectory(two_ranks) as directory:
        assert directory.value("train_state.step") == 3
        assert directory.value("train_state.name") == "run"
    for key, tensor in found.items():
        section, _, name = key.partition(".")
        if section == "model":
            value = expected["model"][name]
        else:
            name, field = name.removeprefix("state.").rsplit(".", 1)
            value = expected["optim"]["state"][name][field]
        assert torch.equal(tensor, value), key
    assert len(found) > 20


def grid(folder: Path, boxes) -> None:
    """A 6 x 4 tensor of its own numbers, written by hand in boxes, as ranks of a mesh would."""
    whole = torch.arange(24.0).reshape(6, 4)
    folder.mkdir(exist_ok=True)
    chunks, places, data = [], {}, b""
    for rows, columns in boxes:
        part = whole[rows, columns].contiguous()
        offsets = torch.Size((rows.start, columns.start))
        archive = b"".join(tensor_archive(part))
        index = torch_metadata.MetadataIndex("w", offsets)
        places[index] = _StorageInfo("__0_0.distcp", len(data), len(archive))
        chunks.append(torch_metadata.ChunkStorageMetadata(offsets, part.size()))
        data += archive
    described = torch_metadata.TensorStorageMetadata(
        torch_metadata.TensorProperties(torch.float32), whole.size(), chunks
    )
    content = torch_metadata.Metadata({"w": described}, None, places, None, "1.0.0")
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    (folder / "__0_0.distcp").write_bytes(data)


QUARTERS = [(slice(r, r + 3), slice(c, c + 2)) for r in (0, 3) for c in (0, 2)]


def test_a_grid_of_chunks_and_what_is_no_cover(tmp_path):
    grid(tmp_path / "a", QUARTERS)
    whole = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(tensors_of(tmp_path / "a")["w"], whole)
    by_torch = {"w": torch.zeros(6, 4)}
    dcp.load(by_torch, checkpoint_id=tmp_path / "a", no_dist=True)
    assert torch.equal(by_torch["w"], whole)
    row = [(slice(r, r + 1), slice(0, 4)) for r in range(6)]
    grid(tmp_path / "a", row[::-1])
    assert torch.equal(tensors_of(tmp_path / "a")["w"], whole)
    overlapping = [(slice(0, 3), slice(0, 4)), (slice(2, 5), slice(0, 4))]
    for boxes, message in ((QUARTERS[1:], "do not cover it"), (overlapping, "overlap")):
        grid(tmp_path / "a", boxes)
        with pytest.raises(CheckpointError, match=message):
            DcpDirectory(tmp_path / "a")


def forged(folder: Path, change) -> None:
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def described(content):
    return content.state_dict_metadata["w"]


def place(content):
    return next(iter(content.storage_data.values()))


def set_name(name):
    return lambda content: setattr(place(content), "relative_path", name)


FORGED = {
    "a path": set_name("../../etc/passwd"),
    "an absolute path": set_name("/etc/passwd"),
    "the parent": set_name(".."),
    "itself": set_name("."),
    "no name": set_name(""),
    "a number as name": set_name(5),
    "an extension": lambda c: setattr(place(c), "transform_descriptors", ["zstd"]),
    "no entry": lambda c: c.storage_data.clear(),
    "an offset of no number": lambda c: setattr(place(c), "offset", "0"),
    "a chunk outside": lambda c: setattr(described(c), "size", torch.Size((5, 4))),
    "a larger tensor": lambda c: setattr(described(c), "size", torch.Size((7, 4))),
    "other dimensions": lambda c: setattr(described(c), "size", torch.Size((24,))),
    "no size": lambda c: setattr(described(c), "size", 24),
    "no dtype": lambda c: setattr(described(c).properties, "dtype", "float32"),
    "no chunks": lambda c: setattr(described(c), "chunks", None),
    "no description": lambda c: c.state_dict_metadata.update(w=1),
    "no tensors": lambda c: setattr(c, "state_dict_metadata", None),
    "no places": lambda c: setattr(c, "storage_data", None),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_forged_metadata_is_refused(tmp_path, change):
    grid(tmp_path / "a", QUARTERS)
    forged(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=r"\.metadata: the metadata is malformed"):
        DcpDirectory(tmp_path / "a")


def swapped(content) -> None:
    one, two, *_ = content.storage_data.values()
    one.offset, two.offset = two.offset + 1, one.offset


def other_dtype(content) -> None:
    described(content).properties.dtype = torch.float64


def absent_file(content) -> None:
    place(content).relative_path = "absent"


@pytest.mark.parametrize("change", [swapped, other_dtype, absent_file])
def test_entries_that_are_not_what_the_metadata_says(tmp_path, change):
    grid(tmp_path / "a", QUARTERS)
    forged(tmp_path / "a", change)
    with pytest.raises((CheckpointError, StorageError)):
        tensors_of(tmp_path / "a")


def test_links_are_not_followed(tmp_path):
    grid(tmp_path / "a", QUARTERS)
    (tmp_path / "a" / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        tensors_of(tmp_path / "a")


def test_few_files_are_open_at_a_time(tmp_path):
    state = {f"t{i}": torch.full((3,), float(i)) for i in range(40)}
    writer = dcp.FileSystemWriter(tmp_path / "a", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer, no_dist=True)
    with DcpDirectory(tmp_path / "a") as directory:
        for key, tensor in [*directory.tensors.items()] * 2:
            assert torch.equal(tensor.read(), state[key])
            assert len(directory._files) <= 16


def test_other_classes_are_refused(tmp_path):
    grid(tmp_path / "a", QUARTERS)
    forged(tmp_path / "a", lambda c: setattr(c, "planner_data", Path))
    with pytest.raises(CheckpointError, match=r"it names 'pathlib\S*Path', which is not known"):
        DcpDirectory(tmp_path / "a")


def member_of(owner, name):
    """As Python 3.11.2 pickles a member of an enumeration."""

    class Member:
        def __reduce__(self):
            return getattr, (owner, name)

    return Member()


@pytest.mark.parametrize(
    ("owner", "name", "is_known"),
    [
        (torch_metadata._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", True),
        (torch_metadata._MEM_FORMAT_ENCODING, 3, False),
        (torch_metadata.Metadata, "planner_data", False),
        (None, "__class__", False),
    ],
)
def test_members_of_enumerations_as_older_pythons_write_them(tmp_path, owner, name, is_known):
    grid(tmp_path / "a", QUARTERS)
    forged(tmp_path / "a", lambda c: setattr(c, "planner_data", member_of(owner, name)))
    if is_known:
        DcpDirectory(tmp_path / "a").close()
    else:
        with pytest.raises(CheckpointError, match="no known enumeration"):
            DcpDirectory(tmp_path / "a")


def test_keys_without_any_known_name(tmp_path):
    dcp.save({"x.y": torch.ones(2), "z": 1}, checkpoint_id=tmp_path / "a", no_dist=True)
    with DcpDirectory(tmp_path / "a") as directory:
        foreign = open_dcp(directory, Known(frozenset({"weight"}), frozenset({"exp_avg"})))
    assert (foreign.weights, foreign.state) == ({}, {})
    assert foreign.not_resumed == ["x", "z"]


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut"]),
        st.integers(0, 12_000),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


@given(MUTATIONS, st.sampled_from([".metadata", "__0_0.distcp", "__1_0.distcp"]))
@settings(max_examples=120, deadline=None)
def test_mutated_directories_are_refused_or_read(tmp_path_factory, changes, name):
    """An entry has a checksum; the metadata has none, and then says something else."""
    folder = tmp_path_factory.getbasetemp() / "mutated_dcp"
    if not folder.exists():
        with zipfile.ZipFile(FOREIGN / "dcp_two_ranks.zip") as packed:
            packed.extractall(folder)
        shutil.copytree(folder / "dcp", folder / "whole")
        torch.save(tensors_of(folder / "whole"), folder / "tensors.pt")
    whole = torch.load(folder / "tensors.pt")
    data = (folder / "whole" / name).read_bytes()
    for kind, at, piece in changes:
        at %= len(data) + 1
        rest = at + (len(piece) if kind != "insert" else 0)
        data = data[:at] + (b"" if kind == "cut" else piece) + data[rest:]
    (folder / "dcp" / name).write_bytes(data)
    try:
        with DcpDirectory(folder / "dcp") as directory:
            for key, tensor in directory.tensors.items():
                if key in whole and tensor.shape == whole[key].shape:
                    value = tensor.read()
                    if name != ".metadata":
                        assert torch.equal(value, whole[key])
    except (CheckpointError, StorageError):
        pass
    finally:
        shutil.copy(folder / "whole" / name, folder / "dcp" / name)


def test_the_fixture_is_not_changed_by_reading(two_ranks):
    before = {path.name: path.read_bytes() for path in two_ranks.iterdir()}
    tensors_of(two_ranks)
    assert {path.name: path.read_bytes() for path in two_ranks.iterdir()} == before
