"""Fixtures of several folders' tests."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.engine import planning


@pytest.fixture(autouse=True)
def _no_measurements(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `offload bench` has kept of this machine is not found, and not written over."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / uuid.uuid4().hex))


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer steps are taken between backward and forward, reads ahead and writes behind."""
    monkeypatch.setattr(planning, "flow_bytes", lambda *_: 0)


MakeDisk = Callable[..., Path]


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Return a function that formats and mounts a small file system in a file."""
    mounts: list[Path] = []
    loops: list[str] = []

    def run(*command: str) -> str:
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"no loop devices here: {' '.join(command)}: {reason.strip()}")
        return done.stdout.strip()

    def make(file_system: str = "ext4", *, mebibytes: int = 64, sector_bytes: int = 512) -> Path:
        if os.geteuid() != 0:
            pytest.skip("loop devices need root")
        image = tmp_path / f"image{len(mounts)}"
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        loop = run("losetup", "-b", str(sector_bytes), "--find", "--show", str(image))
        loops.append(loop)
        run(f"mkfs.{file_system}", "-q", *(["-m", "0"] if "ext" in file_system else []), loop)
        mount = tmp_path / f"disk{len(mounts)}"
        mount.mkdir()
        run("mount", loop, str(mount))
        mounts.append(mount)
        return mount

    yield make
    # A mount that stays would break every later test run's clean-up, so a busy one goes lazily.
    busy = [mount for mount in mounts if subprocess.run(["umount", mount], timeout=60).returncode]
    for mount in busy:
        subprocess.run(["umount", "--lazy", mount], check=True, timeout=60)
    for loop in loops:
        subprocess.run(["losetup", "-d", loop], check=True, timeout=60)
    assert not busy, "a file on the disk is still open"


@pytest.fixture
def small_disk(make_disk: MakeDisk) -> Path:
    """An ext4 of 64 MiB on a loop device."""
    return make_disk()
