"""Names of backing files: the anchor and those that checkpoints give."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.native import IoEngine
from offload.tiers import run_folder
from offload.tiers.backing_files import BackingFiles
from offload.tiers.nvme import NvmeStore
from offload.tiers.pins import BackingFile
from offload.tiers.records import Record
from offload.tiers.run_folder import StorePath
from tests.conftest import MakeDisk
from tests.tiers.conftest import RunScript

PAGE = 4096
# Names the file of a store on argv[1], as a checkpoint does, and deletes that name.
NAME_A_FILE = """
import os, sys, torch
from pathlib import Path
from offload.native import IoEngine
from offload.tiers.backing_files import BackingFiles
from offload.tiers.nvme import NvmeStore
folder = Path(sys.argv[1])
io = IoEngine(backend="python", threads=1)
store = NvmeStore([folder], io)
record, = store.reserve([("bucket", 2 << 20)], spare=1)
store.start_write(record, torch.zeros(2 << 20, dtype=torch.uint8)).wait()
name = folder / "name"
store._files[record.current.file].link(name)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.fixture
def store(io: IoEngine, folder: Path) -> Iterator[NvmeStore]:
    with NvmeStore([folder], io) as store:
        yield store


def written(store: NvmeStore, nbytes: int = PAGE) -> tuple[Record, BackingFile]:
    (record,) = store.reserve([("bucket", nbytes)], spare=1)
    store.start_write(record, torch.ones(nbytes, dtype=torch.uint8)).wait()
    assert record.current is not None
    return record, store._files[record.current.file]


def run_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("offload-*"))


def refuse(code: int):
    def refused(*_arguments, **_options):
        raise OSError(code, os.strerror(code))

    return refused


def test_a_file_keeps_an_anchor_when_its_names_go(store: NvmeStore, folder: Path) -> None:
    record, file = written(store)
    assert run_folders(folder) == [], "only what is named has an anchor"
    for number in range(3):
        name = folder.parent / f"name-{number}"
        file.link(name)
        assert (name.stat().st_dev, name.stat().st_ino) == file.identity
        assert file.num_names() == 1
        name.unlink()
        assert file.num_names() == 0
        assert store.device_of(record) == folder.stat().st_dev
    (anchors,) = run_folders(folder)
    assert stat.S_IMODE(anchors.stat().st_mode) == 0o700
    assert sorted(path.name for path in anchors.iterdir()) == [
        f"extents-{file.identity[1]}",
        "lock",
    ]
    StorePath(folder).close()  # a second job sweeps what is not locked
    assert run_folders(folder) == [anchors]
    store.close()
    assert list(folder.iterdir()) == []


def test_closing_leaves_what_a_name_needs_and_no_anchor(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, file = written(store)
    _, other = written(store, 2 * PAGE)
    other.link(folder.parent / "other")
    (folder.parent / "other").unlink()
    given_back = []
    honest = run_folder.give_back_range

    def give_back(fd: int, offset: int, nbytes: int) -> None:
        given_back.append(os.fstat(fd).st_ino)
        honest(fd, offset, nbytes)

    monkeypatch.setattr(run_folder, "give_back_range", give_back)
    pin = store.pin(record)
    assert pin is not None
    name = folder.parent / "name"
    file.link(name)
    blocks = name.stat().st_blocks
    inode = name.stat().st_ino
    store.close()
    assert list(folder.iterdir()) == []
    assert given_back == [inode], "a file whose anchor was its last name is free as a whole"
    assert name.stat().st_nlink == 1
    assert name.stat().st_blocks == blocks // 2, "the extent that is not pinned is free"
    with name.open("rb") as data:
        data.seek(pin.extent.offset)
        assert data.read(PAGE) == bytes([1]) * PAGE


def test_an_anchor_that_somebody_removes_is_no_anchor(store: NvmeStore, folder: Path) -> None:
    """Else a name too few would be counted, and extents that it needs be written again."""
    record, file = written(store)
    file.link(folder.parent / "one")
    (anchors,) = run_folders(folder)
    anchor = anchors / f"extents-{file.identity[1]}"
    anchor.unlink()
    assert file.num_names() == 1
    file.link(folder.parent / "two")
    assert anchor.stat().st_nlink == 3, "it got another"
    assert file.num_names() == 2
    for path in (anchor, folder.parent / "one", folder.parent / "two"):
        path.unlink()
    assert file.num_names() == 0
    assert store.device_of(record) is None, "it is known that there are no more names for it"
    with pytest.raises(FileNotFoundError):
        file.link(folder.parent / "three")
    other, _ = written(store, 2 * PAGE)  # in another file
    assert store.device_of(other) == folder.stat().st_dev


@pytest.mark.parametrize(
    ("call", "code"), [("mkdir", errno.ENOSPC), ("mkdir", errno.EACCES), ("open", errno.EMFILE)]
)
def test_a_path_without_room_for_an_anchor(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    record, file = written(store)
    real = os.open

    def refused(path: str, *arguments: int, **options: int) -> int:
        if path == "lock":
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    name = folder.parent / "name"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, call, refused if call == "open" else refuse(code))
        file.link(name)
    assert list(folder.iterdir()) == []
    assert file.num_names() == 1
    assert store.device_of(record) == folder.stat().st_dev
    name.unlink()
    assert store.device_of(record) is None


def test_a_doubtful_file_gets_no_more_names(store: NvmeStore) -> None:
    record, file = written(store)
    file.is_doubtful = True
    assert store.device_of(record) is None


def test_no_anchor_is_made_behind_a_store_that_closes(store: NvmeStore, folder: Path) -> None:
    """A save may be under way beside a close that was interrupted."""
    _, file = written(store)
    store._files.trim([])
    file.link(folder.parent / "name")
    assert list(folder.iterdir()) == []
    assert file.num_names() == 1


def test_an_interrupted_close_leaves_no_anchor(
    store: NvmeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    _, file = written(store)
    file.link(folder.parent / "name")
    monkeypatch.setattr(BackingFiles, "trim", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("is_deleted", [False, True])
def test_the_next_run_sweeps_the_anchors_of_a_killed_one(
    make_disk: MakeDisk, run_script: RunScript, is_deleted: bool
) -> None:
    disk = make_disk()
    before = set(disk.iterdir())
    free = os.statvfs(disk).f_bfree
    end = ("name.unlink()\n" if is_deleted else "") + "print('ready', flush=True)\ninput()\n"
    process = run_script(NAME_A_FILE + end, str(disk))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert free - os.statvfs(disk).f_bfree >= 4 << 8, "4 MiB in blocks of 4 KiB"
    StorePath(disk).close()
    assert set(disk.iterdir()) - before == (set() if is_deleted else {disk / "name"})
    if is_deleted:
        assert os.statvfs(disk).f_bfree == free
    else:
        assert (disk / "name").stat().st_nlink == 1


def test_a_forked_child_leaves_anchors_alone(folder: Path, run_script: RunScript) -> None:
    body = """
before = os.listdir(folder)
assert len(before) == 2
for ending in ("sys.exit(0)", "store.close(); sys.exit(0)", "del store; sys.exit(0)"):
    if (child := os.fork()) == 0:
        exec(ending)
        sys.exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(folder) == before
name.unlink()
store._files[0].link(name)
name.unlink()
"""  # it ends without closing the store
    assert run_script(NAME_A_FILE + body, str(folder)).wait(timeout=60) == 0
    assert list(folder.iterdir()) == []
