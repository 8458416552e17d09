from __future__ import annotations

from pathlib import Path

from offload.tiers.disks import Disk, disk_of

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:5 / /dev rw - devtmpfs devtmpfs rw
41 22 259:2 / /mnt/my\\040disk rw,noatime - xfs /dev/nvme0n1p1 rw
42 41 259:3 /sub /mnt/my\\040disk/deep rw master:3 - btrfs /dev/nvme1n1 rw
43 22 259:4 / /mnt/my\\040disk rw - ext4 /dev/mapper/stacked rw
broken line
"""


def root_of(tmp_path: Path, mounts: str) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    return tmp_path


def test_the_deepest_mount_point_counts_and_of_equals_the_last(tmp_path: Path) -> None:
    root = root_of(tmp_path, MOUNTS)
    assert disk_of("/mnt/my disk/a/b", root) == Disk("/dev/mapper/stacked", "/mnt/my disk", "ext4")
    deep = disk_of("/mnt/my disk/deep/er", root)
    assert deep == Disk("/dev/nvme1n1", "/mnt/my disk/deep", "btrfs")
    assert str(deep) == "/dev/nvme1n1 (btrfs, mounted at /mnt/my disk/deep)"
    assert disk_of("/mnt/my diskette", root) == Disk("/dev/sda1", "/", "ext4")


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    mounts = f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path}/target rw - ext4 /dev/b rw\n"
    found = disk_of(str(tmp_path / "link"), root_of(tmp_path, mounts))
    assert found is not None
    assert found.device == "/dev/b"


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert disk_of("/mnt", tmp_path) is None


def test_this_system(tmp_path: Path) -> None:
    found = disk_of(str(tmp_path))
    assert found is not None
    assert tmp_path.is_relative_to(found.mount_point)
