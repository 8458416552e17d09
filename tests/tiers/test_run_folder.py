from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from pathlib import Path

import pytest
import torch

from offload.errors import DiskFullError, StorageError
from offload.native import IoEngine
from offload.tiers import run_folder
from offload.tiers.nvme import NvmeStore
from offload.tiers.run_folder import RunFolder, StorePath
from tests.conftest import MakeDisk
from tests.tiers.conftest import RunScript

PAGE = 4096
FILE_KINDS = ["tmpfile", "run_folder"]

# Refuses O_TMPFILE, as NFS and FAT do; in this process by `file_kind`, in scripts as text.
REFUSE_TMPFILE = """
import errno, os
real_open = os.open
def refuse(path, flags, *args, **kwargs):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
    return real_open(path, flags, *args, **kwargs)
os.open = refuse
"""
MAKE_FILE = """
import sys
from offload.tiers.run_folder import StorePath
path = StorePath(sys.argv[1])
fd = path.create(2 << 20)
print("ready", flush=True)
input()
"""
# Forks one child for each way to end, from a parent that has imported torch.
USE_STORE = """
import os, sys, torch
from offload.native import IoEngine
from offload.tiers.nvme import NvmeStore
from offload.tiers.run_folder import StorePath
folder = sys.argv[1]
backend = "threads" if IoEngine.probe()["threads"] == "ok" else "python"
def use():
    global io, store, record, data
    io = IoEngine(backend=backend, threads=1)
    store = NvmeStore([folder], io, checksum=False)
    record, = store.reserve([("bucket", 1 << 20)], spare=1)
    data = torch.full((1 << 20,), 7, dtype=torch.uint8)
    store.start_write(record, data).wait()
def check():
    data.zero_()
    store.start_read(record, data).wait()
    assert bool((data == 7).all())
def wait_for(child, status):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
"""


@pytest.fixture(params=FILE_KINDS)
def file_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "run_folder":
        scope: dict[str, object] = {}
        exec(REFUSE_TMPFILE.replace("os.open = refuse", ""), scope)
        monkeypatch.setattr(run_folder.os, "open", scope["refuse"])
    return str(request.param)


def script(file_kind: str, body: str) -> str:
    return (REFUSE_TMPFILE if file_kind == "run_folder" else "") + body


def use(store: NvmeStore, value: int) -> None:
    (record,) = store.reserve([("bucket", PAGE)], spare=1)
    store.start_write(record, torch.full((PAGE,), value, dtype=torch.uint8)).wait()
    buffer = torch.zeros(PAGE, dtype=torch.uint8)
    store.start_read(record, buffer).wait()
    assert bool((buffer == value).all())


def test_files_are_private_and_leave_nothing(io: IoEngine, tmp_path: Path, file_kind: str) -> None:
    with NvmeStore([tmp_path], io) as store:
        use(store, 1)
        status = os.fstat(store._files[0].io.fd)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0
        assert status.st_blocks * 512 >= 2 * PAGE
        names = [path.name for path in tmp_path.iterdir()]
        if file_kind == "tmpfile":
            assert names == []
        else:
            assert len(names) == 1
            assert names[0].startswith(f"offload-{os.getpid()}-")
            assert stat.S_IMODE((tmp_path / names[0]).stat().st_mode) == 0o700
            assert [path.name for path in (tmp_path / names[0]).iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_two_stores_share_a_path(io: IoEngine, tmp_path: Path, file_kind: str) -> None:
    with NvmeStore([tmp_path], io) as first:
        use(first, 1)
        with NvmeStore([tmp_path], io) as second:
            use(second, 2)
            use(first, 3)
        use(first, 4)
        assert len(list(tmp_path.iterdir())) == (0 if file_kind == "tmpfile" else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_two_processes_share_a_path(
    io: IoEngine, tmp_path: Path, kind: str, run_script: RunScript
) -> None:
    process = run_script(script(kind, MAKE_FILE), str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    theirs = set(tmp_path.iterdir())
    with NvmeStore([tmp_path], io) as store:  # sweeps at its start
        use(store, 1)
        assert set(tmp_path.iterdir()) == theirs


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_any_end_of_the_process_leaves_nothing(
    tmp_path: Path, kind: str, run_script: RunScript
) -> None:
    body = """
for ending in ("pass", "sys.exit(3)", "raise ValueError", "store.close(); sys.exit(3)"):
    if (child := os.fork()) == 0:
        use()
        sys.stderr = None
        exec(ending)
        sys.exit(3)
    wait_for(child, 1 if "Value" in ending else 3)
    assert os.listdir(folder) == [], ending
"""
    assert run_script(script(kind, USE_STORE + body), str(tmp_path)).wait(timeout=60) == 0


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_sigkill_leaves_no_bytes(make_disk: MakeDisk, kind: str, run_script: RunScript) -> None:
    disk = make_disk()
    lost_and_found = set(disk.iterdir())
    free = os.statvfs(disk).f_bfree
    process = run_script(script(kind, MAKE_FILE), str(disk))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert free - os.statvfs(disk).f_bfree >= 2 << 8  # 2 MiB in blocks of 4 KiB
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    left = set(disk.iterdir()) - lost_and_found
    assert len(left) == (0 if kind == "tmpfile" else 1)
    assert free - os.statvfs(disk).f_bfree <= 2, "more than an empty folder is left"
    StorePath(disk).close()  # the next job sweeps
    assert set(disk.iterdir()) == lost_and_found
    assert os.statvfs(disk).f_bfree == free


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_forked_child_takes_nothing_away(
    tmp_path: Path, kind: str, run_script: RunScript
) -> None:
    """A data loader's worker ends; the parent's files, folder and lock stay."""
    body = """
use()
before = os.listdir(folder)
for ending in ("sys.exit(0)", "store.close(); sys.exit(0)", "del store, record, transfer"):
    data.fill_(7)
    transfer = store.start_write(record, data)  # in flight while the child ends
    if (child := os.fork()) == 0:
        exec(ending)
        sys.exit(0)
    wait_for(child, 0)
    transfer.wait()
    assert os.listdir(folder) == before
    StorePath(folder).close()  # sweeps what is not locked
    assert os.listdir(folder) == before
    check()
store.close()
assert os.listdir(folder) == []
"""
    assert run_script(script(kind, USE_STORE + body), str(tmp_path)).wait(timeout=60) == 0


def open_files(folder: Path) -> set[str]:
    """What this process has open in `folder`, by the names that /proc gives."""
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(str(link.readlink()))
    return {name for name in names if name.startswith(str(folder))}


def dead_folder(parent: Path, name: str, *, lock: bool = True) -> Path:
    folder = parent / name
    folder.mkdir(mode=0o700)
    if lock:
        (folder / "lock").touch()
        (folder / "extents-0").write_bytes(bytes(PAGE))
    return folder


def test_sweeping_takes_dead_run_folders_and_nothing_else(tmp_path: Path) -> None:
    dead = dead_folder(tmp_path, "offload-1-0123456789abcdef")
    early = dead_folder(tmp_path, "offload-2-0123456789abcdef", lock=False)
    other_name = dead_folder(tmp_path, "offload-data")
    foreign = dead_folder(tmp_path, "offload-3-0123456789abcdef")
    (foreign / "thesis.tex").write_text("do not lose this")
    alive = dead_folder(tmp_path, "offload-4-0123456789abcdef")
    elsewhere = tmp_path / "elsewhere"
    target = dead_folder(tmp_path, "elsewhere")
    link = tmp_path / "offload-5-0123456789abcdef"
    link.symlink_to(elsewhere)
    with (alive / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        StorePath(tmp_path).close()
    assert not dead.exists()
    assert not early.exists()
    for kept in (other_name, alive, target):
        assert sorted(path.name for path in kept.iterdir()) == ["extents-0", "lock"]
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    assert link.is_symlink()


def test_another_users_run_folder_is_left_alone(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user")
    folder = dead_folder(tmp_path, "offload-1-0123456789abcdef")
    os.chown(folder, 12345, 12345)
    StorePath(tmp_path).close()
    assert folder.exists()


@pytest.mark.parametrize("strike_at", ["open folder", "open lock", "flock"])
def test_a_sweeper_that_is_faster_than_the_creator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strike_at: str
) -> None:
    """It strikes at one point between mkdir and flock; the creator starts over, with a lock."""
    parent_fd = os.open(tmp_path, os.O_RDONLY)
    real_open, real_flock = os.open, fcntl.flock
    swept: list[str] = []

    def strike(point: str) -> None:
        if point == strike_at and not swept:
            with monkeypatch.context() as quiet:
                quiet.setattr(run_folder.os, "open", real_open)
                quiet.setattr(run_folder.fcntl, "flock", real_flock)
                swept.extend(run_folder.sweep(parent_fd))

    def spying_open(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        strike("open lock" if path == "lock" else "open folder")
        return real_open(path, flags, *args, dir_fd=dir_fd)

    def spying_flock(fd: int, operation: int) -> None:
        strike("flock")
        real_flock(fd, operation)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "open", spying_open)
        patch.setattr(run_folder.fcntl, "flock", spying_flock)
        folder = RunFolder(parent_fd)
    assert len(swept) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert run_folder.sweep(parent_fd) == [], "the new folder is not locked"
    folder.close()
    assert list(tmp_path.iterdir()) == []
    os.close(parent_fd)


# Paths that cannot be used


@pytest.mark.parametrize("case", ["missing", "file", "loop"])
def test_unusable_paths_are_errors_with_a_remedy(io: IoEngine, tmp_path: Path, case: str) -> None:
    path = tmp_path / case
    if case == "file":
        path.touch()
    elif case == "loop":
        path.symlink_to(path)
    remedy = {"missing": "create the folder", "file": "give a folder", "loop": "symbolic links"}
    with pytest.raises(StorageError, match=remedy[case]) as caught:
        NvmeStore([tmp_path, path], io)
    assert caught.value.path == str(path)
    code = {"missing": errno.ENOENT, "file": errno.ENOTDIR, "loop": errno.ELOOP}
    assert caught.value.errno == code[case]


def test_a_link_to_a_folder_is_a_path(io: IoEngine, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with NvmeStore([tmp_path / "link"], io) as store:
        use(store, 1)


def test_a_read_only_file_system(io: IoEngine, make_disk: MakeDisk) -> None:
    disk = make_disk()
    os.system(f"mount -o remount,ro {disk}")
    with NvmeStore([disk], io) as store:
        with pytest.raises(StorageError, match="mount the file system for writing") as caught:
            use(store, 1)
        assert (caught.value.errno, caught.value.path) == (errno.EROFS, str(disk))
        assert store.used_bytes == 0


def test_a_folder_without_the_right_to_write(tmp_path: Path, run_script: RunScript) -> None:
    """In a child that gives its privileges up, since root may write anywhere."""
    body = """
import os, sys
from offload.tiers.run_folder import StorePath
os.setgroups([]) if os.geteuid() == 0 else None
os.setresuid(12345, 12345, 12345) if os.geteuid() == 0 else None
path = StorePath(sys.argv[1])
try:
    path.create(4096)
except Exception as error:
    print(type(error).__name__, error)
"""
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents:  # of pytest's own folders, which only root may enter
        if not parent.name.startswith(("pytest-", "popen-")):
            break
        parent.chmod(0o755)
    printed = run_script(body, str(tmp_path)).communicate(timeout=60)[0]
    assert printed.startswith("StorageError create of ")
    assert "the right to write there" in printed


def test_tmpfs_works_with_one_warning(io: IoEngine) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    with pytest.warns(RuntimeWarning, match="tmpfs is memory") as caught:
        store = NvmeStore([shm, shm], io)
    assert len(caught) == 1
    with store:
        use(store, 1)


# Room (P12)


def test_a_full_disk_is_refused_before_anything_is_allocated(
    io: IoEngine, make_disk: MakeDisk
) -> None:
    disk = make_disk()
    free = os.statvfs(disk).f_bfree
    with NvmeStore([disk, disk], io, capacity_bytes=1 << 30) as store:
        with pytest.raises(DiskFullError) as caught:
            store.reserve([(f"bucket {i}", 10 << 20) for i in range(6)], spare=2)
        error = caught.value
        assert (error.path, error.needed_bytes, error.errno) == (str(disk), 80 << 20, errno.ENOSPC)
        assert 40 << 20 < error.free_bytes < 64 << 20
        assert str(disk) in str(error)
        assert "free space there" in str(error)
        assert os.statvfs(disk).f_bfree == free
        assert store.used_bytes == 0
        use(store, 1)


def test_a_failed_fallocate_leaves_no_blocks(
    io: IoEngine, make_disk: MakeDisk, file_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the room between the question and the allocation."""
    disk = make_disk()
    free = os.statvfs(disk).f_bfree
    with NvmeStore([disk], io, capacity_bytes=1 << 30) as store:
        with monkeypatch.context() as patch:
            patch.setattr(StorePath, "bytes_free", lambda self: 1 << 40)
            with pytest.raises(DiskFullError):
                store.reserve([("bucket", 80 << 20)], spare=1)
        assert free - os.statvfs(disk).f_bfree <= 2
        use(store, 1)
    assert os.statvfs(disk).f_bfree == free


def test_a_second_path_that_is_full_gives_the_first_one_back(
    io: IoEngine, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = make_disk(mebibytes=64), make_disk(mebibytes=16)
    free = os.statvfs(large).f_bfree
    with NvmeStore([large, small], io, capacity_bytes=1 << 30) as store:
        monkeypatch.setattr(StorePath, "bytes_free", lambda self: 1 << 40)
        with pytest.raises(DiskFullError) as caught:
            store.reserve([("a", 20 << 20), ("b", 20 << 20)], spare=0)
        assert caught.value.path == str(small)
        assert os.statvfs(large).f_bfree == free


def test_allocated_extents_outlive_a_disk_that_others_fill(
    io: IoEngine, make_disk: MakeDisk
) -> None:
    disk = make_disk()
    with NvmeStore([disk], io) as store:
        records = store.reserve([(f"bucket {i}", 1 << 20) for i in range(8)], spare=2)
        with pytest.raises(OSError, match="No space left"), (disk / "greedy").open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        for value in range(3):
            for record in records:
                data = torch.full((1 << 20,), value, dtype=torch.uint8)
                store.start_write(record, data).wait()
                data.zero_()
                store.start_read(record, data).wait()
                assert bool((data == value).all())


def test_without_loop_devices_a_refused_allocation_leaves_no_descriptor(
    io: IoEngine, tmp_path: Path, file_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)
        raise OSError(errno.ENOSPC, "No space left on device")

    with NvmeStore([tmp_path], io) as store:
        before = open_files(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, "posix_fallocate", refuse)
            with pytest.raises(DiskFullError):
                store.reserve([("bucket", PAGE)], spare=1)
        assert len(open_files(tmp_path) - before) == (2 if file_kind == "run_folder" else 0)
        use(store, 1)


@pytest.mark.parametrize("file_system", ["ext2", "vfat"])
def test_file_systems_without_fallocate_are_allocated_by_writing(
    io: IoEngine, make_disk: MakeDisk, file_system: str
) -> None:
    disk = make_disk(file_system)
    free = os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize
    with NvmeStore([disk], io) as store:
        store.reserve([("bucket", 10 << 20)], spare=1)
        os.sync()
        assert free - os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize >= 20 << 20
        use(store, 1)


def test_a_disk_with_sectors_of_4096_bytes(io: IoEngine, make_disk: MakeDisk) -> None:
    disk = make_disk(sector_bytes=4096)
    with NvmeStore([disk], io) as store:
        for nbytes in (PAGE, 3 * PAGE, 5000):
            (record,) = store.reserve([(f"bucket {nbytes}", nbytes)], spare=1)
            data = torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)
            store.start_write(record, data).wait()
            buffer = torch.zeros(nbytes, dtype=torch.uint8)
            store.start_read(record, buffer).wait()
            assert torch.equal(buffer, data)


def test_a_limit_of_file_sizes_is_an_error_with_a_remedy(
    tmp_path: Path, run_script: RunScript
) -> None:
    body = """
import resource, sys
from offload.tiers.run_folder import StorePath
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    StorePath(sys.argv[1]).create(2 << 20)
except Exception as error:
    print(type(error).__name__, error)
"""
    printed = run_script(body, str(tmp_path)).communicate(timeout=60)[0]
    assert printed.startswith("StorageError allocate of ")
    assert "ulimit -f" in printed


@pytest.mark.parametrize("name", ["fstat", "scandir"])
def test_a_path_that_cannot_be_looked_at_leaves_nothing_open(tmp_path, monkeypatch, name):
    def open_files() -> list[str]:
        return sorted(path.name for path in Path("/proc/self/fd").iterdir())

    before = open_files()

    def refused(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refused)
        with pytest.raises(StorageError, match=r"open of the NVMe tier in .*dmesg") as caught:
            StorePath(tmp_path)
    assert (caught.value.errno, caught.value.path) == (errno.EIO, str(tmp_path))
    assert open_files() == before


def test_free_bytes_that_nobody_tells(tmp_path, monkeypatch):
    path = StorePath(tmp_path)

    def refused(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", refused)
        with pytest.raises(StorageError, match="statvfs of the NVMe tier"):
            path.bytes_free()
    path.close()


def test_a_folder_that_cannot_be_seen_into_is_left_to_the_next_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = StorePath(tmp_path)
    fd = path.create(1 << 16)
    path.anchor(fd)
    (folder,) = tmp_path.iterdir()

    def refuse(_: object) -> object:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        path.close()
    os.close(fd)
    assert len(list(folder.iterdir())) == 2, "the anchor, and the lock that tells that it is left"
    StorePath(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
