"""Checkpoints that refer to extents go on doing so when the names of a backing file have gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from offload.errors import DiskFullError, StorageError
from offload.state import durable, manifest
from offload.state.data_file import DataFileWriter
from offload.state.saving import CheckpointWriter
from offload.tiers.backing_files import BackingFiles
from offload.tiers.run_folder import RunFolder, StorePath
from tests.state.test_instant import (
    assert_equal_state,
    full_state,
    loaded_state,
    make_engine,
    own_bytes,
    train,
    used_bytes,
)

BUFFER_BYTES = 8192  # what is in memory alone


def fail(*_arguments, **_options):
    raise StorageError(operation="fsync", path="disk", errno=5)


def save(engine, root: Path, tag: str) -> Path:
    path = engine.save_checkpoint(root, tag)
    assert engine.wait_for_checkpoint() == path
    return path


def assert_linked(engine, checkpoint: Path) -> None:
    """Of state on NVMe, nothing was copied."""
    assert own_bytes(checkpoint) <= BUFFER_BYTES
    files = {file.identity for file in engine._parts.nvme._files._files}
    data = [checkpoint / manifest.data_file_name(n) for n in (1, 2)]
    linked = {(file.stat().st_dev, file.stat().st_ino) for file in data if file.exists()}
    assert linked
    assert linked <= files


def left_in_nvme(folder: Path) -> list[str]:
    return [path.name for path in (folder / "nvme").iterdir()]


@pytest.mark.parametrize("point", ["data", "manifest", "publish"])
def test_a_first_save_that_fails_costs_the_next_one_nothing(tmp_path, monkeypatch, point):
    root = tmp_path / "ckpt"
    owner, name = {
        "data": (DataFileWriter, "finish"),
        "manifest": (durable, "write_file"),
        "publish": (CheckpointWriter, "_publish"),
    }[point]
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        assert left_in_nvme(tmp_path) == []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            engine.save_checkpoint(root, "one")
            with pytest.raises(StorageError, match="fsync of disk"):
                engine.wait_for_checkpoint()
        assert list(root.iterdir()) == []
        assert_linked(engine, save(engine, root, "two"))
        train(engine, 1)
        assert_linked(engine, save(engine, root, "three"))
        expected = full_state(engine)
    assert left_in_nvme(tmp_path) == []
    _, state = loaded_state(tmp_path, root, "three")
    assert_equal_state(state, expected)


@pytest.mark.parametrize("what", ["checkpoint", "directory"])
def test_the_only_checkpoint_is_deleted_by_hand(tmp_path, what):
    root = tmp_path / "ckpt"
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        save(engine, root, "one")
        train(engine, 1)
        save(engine, root, "two")
        used = engine._parts.nvme.used_bytes
        for number in range(4):
            for path in [root] if what == "directory" else list(root.glob("[a-z]*")):
                shutil.rmtree(path)
            train(engine, 1)
            assert_linked(engine, save(engine, root, f"later-{number}"))
        assert engine._parts.nvme.used_bytes == used, "extents of the deleted ones are used again"
        expected = full_state(engine)
    assert left_in_nvme(tmp_path) == []
    _, state = loaded_state(tmp_path, root)
    assert_equal_state(state, expected)


def test_retention_between_portable_copies(tmp_path):
    root = tmp_path / "ckpt"
    with make_engine(tmp_path, checkpoint={"keep_last": 1}) as engine:
        for step in range(1, 7):
            train(engine, 1)
            path = engine.save_checkpoint(root, portable=step % 2 == 0)
            engine.wait_for_checkpoint()
            assert [p.name for p in root.glob("step-*")] == [path.name]
            if step % 2:
                assert_linked(engine, path)
        used = engine._parts.nvme.used_bytes
        for _ in range(4):
            train(engine, 1)
            engine.save_checkpoint(root)
            engine.wait_for_checkpoint()
        assert engine._parts.nvme.used_bytes == used
    assert left_in_nvme(tmp_path) == []


def test_a_checkpoint_that_was_moved_away_keeps_its_extents_beside_the_anchor(tmp_path):
    """The anchor is not mistaken for a name of it, nor one of its names for the anchor."""
    root = tmp_path / "ckpt"
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        path = save(engine, root, "one")
        expected = full_state(engine)
        (tmp_path / "safe").mkdir()
        path.rename(tmp_path / "safe" / "one")
        shutil.rmtree(next((tmp_path / "nvme").glob("offload-*")))
        for number in range(5):
            train(engine, 1)
            assert_linked(engine, save(engine, root, f"next-{number % 2}"))
    _, state = loaded_state(tmp_path, tmp_path / "safe", "one")
    assert_equal_state(state, expected)


def test_what_cannot_be_linked_any_more_is_in_the_room_that_is_needed(tmp_path, monkeypatch):
    """Where there can be no anchor, as without a right to make folders."""
    root = tmp_path / "ckpt"

    def refuse(_path, _fd):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(StorePath, "anchor", refuse)
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        shutil.rmtree(save(engine, root, "one"))
        with monkeypatch.context() as patch:
            patch.setattr(durable, "free_bytes", lambda _folder: 100_000)
            with pytest.raises(DiskFullError, match="free are 100000 bytes"):
                engine.save_checkpoint(root, "two")
        train(engine, 1)
        path = save(engine, root, "two")
        assert own_bytes(path) > 100_000
        expected = full_state(engine)
    _, state = loaded_state(tmp_path, root)
    assert_equal_state(state, expected)


def test_a_file_that_could_not_be_synced_is_in_the_room_that_is_needed(tmp_path, monkeypatch):
    root = tmp_path / "ckpt"
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        with monkeypatch.context() as patch:
            patch.setattr(DataFileWriter, "finish", lambda _self: None)
            patch.setattr(engine._parts.io, "fsync", fail)
            engine.save_checkpoint(root, "one")
            with pytest.raises(StorageError, match="fsync of disk"):
                engine.wait_for_checkpoint()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "free_bytes", lambda _folder: 100_000)
            with pytest.raises(DiskFullError):
                engine.save_checkpoint(root, "two")


def test_a_killed_process_is_swept_and_trimmed(tmp_path, monkeypatch):
    """By the next one on its path; one with another path leaves what it does not know."""
    root = tmp_path / "ckpt"

    def die(folder):
        for fd in (folder._fd, folder._lock_fd):
            os.close(fd)  # with the lock; all names stay
        folder._fd = -1

    with monkeypatch.context() as patch:
        patch.setattr(BackingFiles, "trim", lambda *_: None)
        patch.setattr(RunFolder, "close", die)
        with make_engine(tmp_path) as engine:
            train(engine, 2)
            save(engine, root, "one")
            expected = full_state(engine)
    assert len(left_in_nvme(tmp_path)) == 1
    killed = used_bytes(root)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with make_engine(elsewhere) as engine:
        shutil.rmtree(save(engine, root, "two"))
    assert used_bytes(root) == killed
    assert len(left_in_nvme(tmp_path)) == 1
    with make_engine(tmp_path) as engine:
        assert left_in_nvme(tmp_path) == []
        shutil.rmtree(save(engine, root, "three"))
    assert left_in_nvme(tmp_path) == []
    needed = sum(block.nbytes for block in manifest.read(root / "one").blocks)
    assert used_bytes(root) <= needed + (1 << 16) < killed
    _, state = loaded_state(tmp_path, root, "one")
    assert_equal_state(state, expected)
