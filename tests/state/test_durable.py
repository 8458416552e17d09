"""System calls that fail below files that are whole or absent: repeated, or typed errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from offload.errors import DiskFullError, StorageError
from offload.state import durable


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int) -> None:
    """Let the next `times` calls of a function of os fail."""
    original, left = getattr(os, name), [times]

    def call(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_a_refused_transfer_is_repeated(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    if name == "preadv":
        durable.write_file(path, b"some bytes")
    failing(monkeypatch, name, errno.EAGAIN, 3)
    if name == "pwrite":
        durable.write_file(path, b"some bytes")
    assert durable.read_small_file(path, limit_bytes=100) == b"some bytes"


def test_a_transfer_that_is_refused_for_ever_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_RETRY_SECONDS", 0.0)
    failing(monkeypatch, "pwrite", errno.EAGAIN, 1 << 30)
    with pytest.raises(StorageError, match=r"write of file in .*EAGAIN"):
        durable.write_file(tmp_path / "file", b"some bytes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["stat", "mkdir"])
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, name):
    failing(monkeypatch, name, errno.EIO, 1)
    with pytest.raises(StorageError, match=r"create of folder in .*EIO"):
        durable.make_folder(tmp_path / "one" / "two")


def test_free_bytes_that_nobody_tells(tmp_path, monkeypatch):
    failing(monkeypatch, "statvfs", errno.EIO, 1)
    with pytest.raises(StorageError, match=r"statvfs of free space in .*EIO"):
        durable.free_bytes(tmp_path)


def test_a_full_disk_of_which_nobody_says_how_full(tmp_path, monkeypatch):
    failing(monkeypatch, "statvfs", errno.ENOSPC, 1 << 30)
    failing(monkeypatch, "mkdir", errno.ENOSPC, 1)
    with pytest.raises(DiskFullError, match="there is no room; free are 0 bytes") as caught:
        durable.make_folder(Path(tmp_path / "one"))
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (0, 0)
