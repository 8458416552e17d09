"""Fixtures of several folders' tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.engine import planning


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 64 MiB on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    try:
        for command in (
            ["mkfs.ext4", "-q", "-m", "0", image],
            ["mount", "-o", "loop", image, mount],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    yield mount
    subprocess.run(["umount", mount], check=True, timeout=60)


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer steps are taken between backward and forward, reads ahead and writes behind."""
    monkeypatch.setattr(planning, "flow_bytes", lambda *_: 0)
