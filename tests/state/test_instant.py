"""Checkpoints that refer to extents, and those that are written while training goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.engine.promotion import Promotion
from offload.errors import (
    BudgetError,
    CheckpointError,
    DiskFullError,
    EngineStateError,
    StorageError,
)
from offload.native import IoEngine
from offload.state import durable, folders, manifest
from offload.state.data_file import DataFileWriter
from offload.state.saver import Saver
from offload.state.saving import CheckpointWriter
from offload.tiers.backing_files import BackingFiles

WIDTH = 96


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.frozen.weight.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.frozen(self.norm(x)).square().mean()


def make_engine(folder: Path, placement: str = "nvme", **sections) -> offload.OffloadEngine:
    """With `placement` one of nvme, host, device, or several of them: mixed."""
    (folder / "nvme").mkdir(exist_ok=True)
    homes = {"mixed": {"weights": "device", "optimizer": "nvme", "gradients": "host"}}
    home = {"weights": placement, "optimizer": placement, "gradients": placement}
    torch.manual_seed(0)
    config = {
        "tiers": {
            "device": {"kind": "cpu", "memory": "16MiB"},
            "host": {"memory": "32MiB"},
            "nvme": {"paths": [str(folder / "nvme")]},
        },
        "placement": homes.get(placement, home),
        "precision": {"compute": "bf16"},
        "partition": {"bucket_elements": 16384},
        "optimizer": {"lr": 1e-2},
    }
    return offload.initialize(Net(), config | sections)


def train(engine, steps: int, seed: int | None = None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
    for _ in range(steps):
        engine.backward(engine(torch.randn(4, WIDTH)))
        assert engine.step()


def full_state(engine) -> dict[tuple[str, str], torch.Tensor]:
    state = {
        (name, field): engine.read_state(name, field)
        for name in engine.parameter_names()
        for field in engine.state_fields(name)
    }
    return state | {("buffer", n): b.clone() for n, b in engine.module.named_buffers()}


def assert_equal_state(first, second) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def loaded_state(folder: Path, root: Path, tag: str | None = None, placement: str = "host"):
    with make_engine(folder, placement) as engine:
        engine.load_checkpoint(root, tag)
        return engine.global_steps, full_state(engine)


def own_bytes(checkpoint: Path) -> int:
    return (checkpoint / manifest.data_file_name(0)).stat().st_size


def test_state_on_nvme_is_linked_and_not_copied(tmp_path):
    with make_engine(tmp_path, overlap={"optimizer": False}) as engine:
        train(engine, 2)
        written = engine._parts.io.lanes()["nvme_write"][0]
        path = engine.save_checkpoint(tmp_path / "ckpt")
        assert engine.wait_for_checkpoint() == path
        moved = engine._parts.io.lanes()["nvme_write"][0] - written
        expected = full_state(engine)
    content = manifest.read(path)
    state_bytes = sum(t.nbytes for t in content.tensors if t.kind == "parameter")
    assert own_bytes(path) <= 8192, "buffers"
    assert moved <= 8192 < state_bytes // 10, "buffers"
    assert (path / manifest.data_file_name(1)).stat().st_mode & 0o777 == 0o600
    step, state = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 2
    assert_equal_state(state, expected)


@pytest.mark.parametrize("placement", ["nvme", "host", "device", "mixed"])
@pytest.mark.parametrize("portable", [False, True])
def test_later_steps_never_leak_into_a_checkpoint(tmp_path, placement, portable):
    states = {}
    with make_engine(tmp_path, placement) as engine:
        train(engine, 1, seed=3)
        for step in range(2, 6):
            engine.save_checkpoint(tmp_path / "ckpt", f"at-{step}", portable=portable)
            train(engine, 1)
    with make_engine(tmp_path, "host", checkpoint={"asynchronous": False}) as engine:
        train(engine, 1, seed=3)
        for step in range(2, 6):
            states[step] = full_state(engine)
            train(engine, 1)
    for step, expected in states.items():
        _, state = loaded_state(tmp_path, tmp_path / "ckpt", f"at-{step}")
        assert_equal_state(state, expected)


def test_a_portable_checkpoint_refers_to_nothing(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt", portable=True)
        engine.wait_for_checkpoint()
        expected = full_state(engine)
    names = sorted(p.name for p in path.iterdir())
    assert names == [manifest.data_file_name(0), manifest.MANIFEST_NAME]
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "ckpt", moved)
    _, state = loaded_state(tmp_path, moved)
    assert_equal_state(state, expected)


def test_retention_keeps_the_newest_and_frees_their_extents(tmp_path):
    settings = {"directory": tmp_path / "ckpt", "every_steps": 1, "keep_last": 1}
    with make_engine(tmp_path, checkpoint=settings) as engine:
        train(engine, 3)
        engine.save_checkpoint(tmp_path / "ckpt", "mine")
        engine.wait_for_checkpoint()
        used = engine._parts.nvme.used_bytes
        train(engine, 12)
        engine.wait_for_checkpoint()
        grown = engine._parts.nvme.used_bytes
        expected = full_state(engine)
        names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
        assert names == ["LATEST", "mine", "step-00000015"]
        shutil.rmtree(tmp_path / "ckpt" / "mine")
        train(engine, 6)
        engine.wait_for_checkpoint()
        assert engine._parts.nvme.used_bytes == grown, "what was removed is used again"
    assert grown <= 2 * used
    step, state = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 21
    assert state.keys() == expected.keys()


def test_room_for_planned_checkpoints_is_there_before_the_first_step(tmp_path):
    settings = {"directory": tmp_path / "ckpt", "every_steps": 1, "keep_last": 2}
    with make_engine(tmp_path) as engine:
        without = engine._parts.nvme.used_bytes
    with make_engine(tmp_path, checkpoint=settings) as engine:
        used = engine._parts.nvme.used_bytes
        assert engine.plan.peak_bytes["nvme"] >= used > without
        train(engine, 6)
        engine.wait_for_checkpoint()
        assert engine._parts.nvme.used_bytes == used
        names = sorted(p.name for p in (tmp_path / "ckpt").glob("step-*"))
    assert names == ["step-00000005", "step-00000006"]


def test_a_checkpoint_that_was_moved_away_keeps_its_extents(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt", "one")
        engine.wait_for_checkpoint()
        expected = full_state(engine)
        (tmp_path / "safe").mkdir()
        path.rename(tmp_path / "safe" / "one")
        for number in range(4):
            train(engine, 1)
            engine.save_checkpoint(tmp_path / "ckpt", f"next-{number % 2}")
        engine.wait_for_checkpoint()
    _, state = loaded_state(tmp_path, tmp_path / "safe", "one")
    assert_equal_state(state, expected)


def test_closing_gives_back_what_no_checkpoint_refers_to(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 2)
        path = engine.save_checkpoint(tmp_path / "ckpt")
        train(engine, 1)
        engine.wait_for_checkpoint()
        before = sum(file.stat().st_blocks for file in path.iterdir())
    after = sum(file.stat().st_blocks for file in path.iterdir())
    blocks = manifest.read(path).blocks
    assert after < before
    assert after * 512 <= sum(block.nbytes for block in blocks) + (1 << 20)
    loaded_state(tmp_path, tmp_path / "ckpt")


class Gate:
    """Holds the saver's thread where it is about to make a checkpoint durable."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        publish = CheckpointWriter._publish

        def held(writer, *arguments):
            self.reached.set()
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error
            return publish(writer, *arguments)

        monkeypatch.setattr(CheckpointWriter, "_publish", held)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt")
        expected = full_state(engine)
        assert gate.reached.wait(60)
        train(engine, 3)
        assert not path.exists(), "it is not acknowledged"
        gate.open.set()
        assert engine.wait_for_checkpoint() == path
        engine.load_checkpoint(tmp_path / "ckpt")
        assert engine.global_steps == 1
        assert_equal_state(full_state(engine), expected)


def test_a_save_that_is_due_while_another_runs_can_be_skipped(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with make_engine(tmp_path, checkpoint={"when_busy": "skip"}) as engine:
        train(engine, 1)
        first = engine.save_checkpoint(tmp_path / "ckpt")
        assert gate.reached.wait(60)
        train(engine, 1)
        assert engine.save_checkpoint(tmp_path / "ckpt") == first
        gate.open.set()
        engine.wait_for_checkpoint()
        assert engine.save_checkpoint(tmp_path / "ckpt") != first
        engine.wait_for_checkpoint()
    assert len(list((tmp_path / "ckpt").glob("step-*"))) == 2


def test_a_failure_in_the_background_surfaces_once_and_leaves_nothing(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    gate.error = StorageError(operation="fsync", path="disk", errno=5)
    gate.open.set()
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine._saver._background._thread.join()
        with pytest.raises(StorageError, match="fsync of disk") as caught:
            engine(torch.randn(4, WIDTH))
        assert "step-00000001" in "".join(caught.value.__notes__)
        assert list((tmp_path / "ckpt").iterdir()) == []
        gate.error = None
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
        expected = full_state(engine)
    _, state = loaded_state(tmp_path, tmp_path / "ckpt")
    assert_equal_state(state, expected)


def test_an_edit_waits_for_what_it_would_change(tmp_path):
    for placement in ("host", "nvme"):
        folder = tmp_path / placement
        folder.mkdir()
        with make_engine(folder, placement) as engine:
            train(engine, 1)
            expected = full_state(engine)
            engine.save_checkpoint(folder / "ckpt", "one")
            with torch.no_grad():
                engine.module.layers[0].weight.add_(1)
            engine.set_state("layers.1.bias", {"weight": torch.ones(WIDTH)})
            train(engine, 1)
            engine.wait_for_checkpoint()
        _, state = loaded_state(folder, folder / "ckpt", "one")
        assert_equal_state(state, expected)


def test_no_room_for_later_steps_is_found_before_anything_is_written(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine._parts.nvme.capacity_bytes = engine._parts.nvme.used_bytes + 4096
        with pytest.raises(BudgetError, match=r"tiers\.nvme\.capacity"):
            engine.save_checkpoint(tmp_path / "ckpt")
        assert not (tmp_path / "ckpt").exists()
        engine.save_checkpoint(tmp_path / "ckpt", portable=True)
        train(engine, 2)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    with make_engine(tmp_path, "host") as engine:
        train(engine, 1)
        monkeypatch.setattr(durable, "free_bytes", lambda _folder: 10_000)
        with pytest.raises(DiskFullError, match="free are 10000 bytes"):
            engine.save_checkpoint(tmp_path / "ckpt")
        monkeypatch.undo()
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")


def test_a_folder_without_links_is_copied_to(tmp_path, monkeypatch):
    """As on a file system that cannot name what has no name."""

    def refuse(*_arguments, **_options):
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt")
        train(engine, 1)
        engine.wait_for_checkpoint()
    assert not (path / manifest.data_file_name(1)).exists()
    step, _ = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 1


def test_without_checksums_everything_is_copied(tmp_path):
    with make_engine(tmp_path, io={"checksum": False}) as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
        expected = full_state(engine)
    assert not (path / manifest.data_file_name(1)).exists()
    _, state = loaded_state(tmp_path, tmp_path / "ckpt")
    assert_equal_state(state, expected)


def test_a_flip_in_an_extent_is_found(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt", "good")
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt", "bad")
        engine.wait_for_checkpoint()
    content = manifest.read(path)
    record = content.find("parameter", "layers.3.weight", "exp_avg")
    block = content.blocks[record.pieces[0].block]
    assert block.file > 0, "it is linked"
    with (path / manifest.data_file_name(block.file)).open("r+b") as file:
        file.seek(block.offset + record.pieces[0].offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(CheckpointError, match=r"exp_avg of 'layers.3.weight'"):
        loaded_state(tmp_path, tmp_path / "ckpt", "bad")
    with pytest.warns(RuntimeWarning, match="passed over a damaged checkpoint"):
        step, _ = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 1


def test_what_is_being_removed_is_swept(tmp_path, monkeypatch):
    with make_engine(tmp_path, checkpoint={"keep_last": 1}) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
        train(engine, 1)
        with monkeypatch.context() as patch:
            patch.setattr(folders.shutil, "rmtree", lambda *_a, **_k: None)  # killed here
            engine.save_checkpoint(tmp_path / "ckpt")
            engine.wait_for_checkpoint()
        left = [p for p in (tmp_path / "ckpt").iterdir() if p.name.startswith(".gone-")]
        assert len(left) == 1
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["LATEST", "step-00000003"]


def test_data_are_synced_before_the_name(tmp_path, monkeypatch):
    log = []
    real_fsync, real_rename = IoEngine.fsync, Path.rename

    def fsync(io, file):
        log.append("data")
        real_fsync(io, file)

    def rename(path, target):
        log.append(path.name[:5])
        return real_rename(path, target)

    monkeypatch.setattr(IoEngine, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
    assert log[:4] == ["data", "data", ".mani", ".tmp-"]


@pytest.mark.parametrize("file_system", ["xfs", "btrfs"])
def test_a_portable_copy_shares_blocks_where_the_file_system_can(
    make_disk, monkeypatch, file_system
):
    if shutil.which(f"mkfs.{file_system}") is None:
        pytest.skip(f"no mkfs.{file_system} here")
    disk = make_disk(file_system, mebibytes=512)
    cloned = []
    clone = DataFileWriter.clone

    def counted(writer, source, offset, nbytes):
        found = clone(writer, source, offset, nbytes)
        cloned.append(found is not None)
        return found

    monkeypatch.setattr(DataFileWriter, "clone", counted)
    with make_engine(disk) as engine:
        train(engine, 2)
        path = engine.save_checkpoint(disk / "ckpt", portable=True)
        engine.wait_for_checkpoint()
        expected = full_state(engine)
        train(engine, 2)
        assert len(cloned) > 10
        assert all(cloned)
        assert not (path / manifest.data_file_name(1)).exists()
    step, state = loaded_state(disk, disk / "ckpt")
    assert step == 2
    assert_equal_state(state, expected)


def used_bytes(checkpoints: Path) -> int:
    blocks = {f.stat().st_ino: f.stat().st_blocks for f in checkpoints.glob("*/data-*.bin")}
    return 512 * sum(blocks.values())


def test_what_a_killed_process_has_left_is_given_back(tmp_path, monkeypatch):
    """Its files keep all their room; the next process that saves there takes what nobody needs."""
    with monkeypatch.context() as patch:
        patch.setattr(BackingFiles, "trim", lambda *_: None)  # killed before
        with make_engine(tmp_path) as engine:
            for step in (1, 2):
                train(engine, 1)
                engine.save_checkpoint(tmp_path / "ckpt", f"at-{step}")
            engine.wait_for_checkpoint()
            shutil.copytree(tmp_path / "ckpt" / "at-1", tmp_path / "copy", copy_function=os.link)
            with make_engine(tmp_path) as other:
                other.save_checkpoint(tmp_path / "ckpt", "other")
                other.wait_for_checkpoint()
            expected = full_state(engine)
    with make_engine(tmp_path) as engine:
        engine.save_checkpoint(tmp_path / "ckpt", "new")
    kept = used_bytes(tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "copy")
    with make_engine(tmp_path) as engine:
        engine.save_checkpoint(tmp_path / "ckpt", "new")
    after = used_bytes(tmp_path / "ckpt")
    blocks = {
        (file.stat().st_ino, block.offset): block.nbytes
        for folder in (tmp_path / "ckpt").glob("[a-z]*")
        for content in [manifest.read(folder)]
        for block in content.blocks
        if block.file >= 0
        for file in [folder / manifest.data_file_name(block.file)]
    }
    assert after <= sum(blocks.values()) + (1 << 16)
    assert after < kept, "as long as it had another name, it was left alone"
    _, state = loaded_state(tmp_path, tmp_path / "ckpt", "at-2")
    assert_equal_state(state, expected)
    loaded_state(tmp_path, tmp_path / "ckpt", "at-1")


# -- found by a review -----------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["hint", "directory"])
def test_an_error_after_the_rename_leaves_a_checkpoint_that_loads(tmp_path, monkeypatch, point):
    """It has its name, so its extents are its own, acknowledged or not."""
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt", "one")
        engine.wait_for_checkpoint()
        train(engine, 1)
        expected = full_state(engine)

        def fail(*_arguments, **_options):
            raise StorageError(operation="fsync", path="disk", errno=5)

        with monkeypatch.context() as patch:
            name = "write_hint" if point == "hint" else "durable.sync_folder"
            if point == "hint":
                patch.setattr(folders, name, fail)
                engine.save_checkpoint(tmp_path / "ckpt", "one")
                engine.wait_for_checkpoint()
            else:
                sync = durable.sync_folder

                def sync_folder(path):
                    if path == tmp_path / "ckpt":
                        fail()
                    sync(path)

                patch.setattr(durable, "sync_folder", sync_folder)
                engine.save_checkpoint(tmp_path / "ckpt", "one")
                with pytest.raises(StorageError, match="fsync of disk"):
                    engine.wait_for_checkpoint()
        for number in range(5):
            train(engine, 1)
            engine.save_checkpoint(tmp_path / "ckpt", f"next-{number % 2}")
        engine.wait_for_checkpoint()
    _, state = loaded_state(tmp_path, tmp_path / "ckpt", "one")
    assert_equal_state(state, expected)


def test_a_tag_that_was_taken_by_another_is_no_name_of_the_old(tmp_path):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt", "two")
        engine.wait_for_checkpoint()
        expected = full_state(engine)
        engine.save_checkpoint(tmp_path / "ckpt", "one")
        engine.save_checkpoint(tmp_path / "ckpt", "one", portable=True)
        engine.wait_for_checkpoint()
        (tmp_path / "safe").mkdir()
        (tmp_path / "ckpt" / "two").rename(tmp_path / "safe" / "two")
        for number in range(5):
            train(engine, 1)
            engine.save_checkpoint(tmp_path / "ckpt", f"next-{number % 2}")
        engine.wait_for_checkpoint()
    _, state = loaded_state(tmp_path, tmp_path / "safe", "two")
    assert_equal_state(state, expected)


def test_a_file_that_could_not_be_synced_is_copied_from_then_on(tmp_path, monkeypatch):
    with make_engine(tmp_path) as engine:
        train(engine, 1)
        real, synced = IoEngine.fsync, []

        def fsync(io, file):
            synced.append(file)
            if len(synced) == 2:
                raise StorageError(operation="fsync", path=file.path, errno=5)
            real(io, file)

        monkeypatch.setattr(IoEngine, "fsync", fsync)
        engine.save_checkpoint(tmp_path / "ckpt", "one")
        with pytest.raises(StorageError, match="fsync"):
            engine.wait_for_checkpoint()
        assert engine.wait_for_checkpoint() is None, "nothing is durable"
        path = engine.save_checkpoint(tmp_path / "ckpt", "two")
        assert engine.wait_for_checkpoint() == path
        assert synced.count(synced[1]) == 1, "an fsync that failed is never repeated"
        expected = full_state(engine)
    _, state = loaded_state(tmp_path, tmp_path / "ckpt", "two")
    assert_equal_state(state, expected)


def test_the_newest_of_two_engines_is_the_newest(tmp_path):
    with make_engine(tmp_path) as one, make_engine(tmp_path) as two:
        train(one, 1)
        one.save_checkpoint(tmp_path / "ckpt", "first")
        for number in range(3):
            train(two, 1)
            two.save_checkpoint(tmp_path / "ckpt", f"second-{number}")
        two.wait_for_checkpoint()
        train(one, 4)
        one.save_checkpoint(tmp_path / "ckpt", "newest")
    step, _ = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 5


def test_checkpoints_that_the_user_has_removed_do_not_stop_retention(tmp_path):
    settings = {"directory": tmp_path / "ckpt", "every_steps": 1, "keep_last": 2}
    with make_engine(tmp_path, checkpoint=settings) as engine:
        train(engine, 2)
        engine.wait_for_checkpoint()
        shutil.rmtree(tmp_path / "ckpt" / "step-00000001")
        train(engine, 3)
        engine.wait_for_checkpoint()
        names = sorted(p.name for p in (tmp_path / "ckpt").glob("step-*"))
        assert names == ["step-00000004", "step-00000005"]
        shutil.rmtree(tmp_path / "ckpt")
        train(engine, 2)
        engine.wait_for_checkpoint()


def test_a_step_counts_although_its_checkpoint_cannot_be_saved(tmp_path, monkeypatch):
    settings = {"directory": tmp_path / "ckpt", "every_steps": 1}
    with make_engine(tmp_path, "host", checkpoint=settings) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "free_bytes", lambda _folder: 10_000)
            engine.backward(engine(torch.randn(4, WIDTH)))
            assert engine.step()
        with pytest.raises(DiskFullError):
            engine.step()
        assert engine.global_steps == 1
        assert engine.micro_steps == 1
        train(engine, 1)
        engine.wait_for_checkpoint()
    step, _ = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 2


def test_a_block_of_another_size_is_not_read_in_place(tmp_path):
    with make_engine(tmp_path, "host") as engine:
        train(engine, 1)
        path = engine.save_checkpoint(tmp_path / "ckpt", "one")
    content = manifest.read(path)
    longest = max(content.blocks, key=lambda block: block.nbytes)
    blocks = tuple(
        block._replace(nbytes=longest.nbytes, offset=longest.offset) for block in content.blocks
    )
    forged = dataclasses.replace(content, blocks=blocks)
    (path / manifest.MANIFEST_NAME).write_bytes(manifest.encode(forged))
    with pytest.raises(CheckpointError, match="damaged"):
        loaded_state(tmp_path, tmp_path / "ckpt", "one")


def test_a_link_to_a_directory_waits_for_the_save_there(tmp_path, monkeypatch):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ckpt")
    with make_engine(tmp_path) as engine:
        for step in (1, 2):
            train(engine, 1)
            engine.save_checkpoint(tmp_path / "ckpt", f"at-{step}")
        step, _ = loaded_state(tmp_path, tmp_path / "link")
        assert step == 2


def test_no_descriptor_stays_when_a_lock_cannot_be_taken(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(5, "Input/output error")

    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    for owner, name in ((folders.fcntl, "flock"), (os, "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(StorageError), folders.pending_folder(tmp_path, "tag"):
                pass
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before


class HeldCapture:
    """Holds the saver's thread where it has state to copy still."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        honest = CheckpointWriter._write_copies

        def held(writer):
            self.reached.set()
            assert self.open.wait(60)
            return honest(writer)

        monkeypatch.setattr(CheckpointWriter, "_write_copies", held)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_what_its_parent_saves(tmp_path, monkeypatch):
    """The thread that would end the snapshot is not the child's."""
    capture = HeldCapture(monkeypatch)
    with make_engine(tmp_path, "host") as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        assert capture.reached.wait(60)
        engine.backward(engine(torch.randn(4, WIDTH)))
        value = {"weight": torch.ones(WIDTH)}
        uses = (engine.step, lambda: engine.set_state("layers.1.bias", value), engine._end_saves)
        for use in uses:
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                status = 1
                try:
                    use()
                except EngineStateError as error:
                    status = 0 if "its child" in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, use
        capture.open.set()
        assert engine.step()
        engine.wait_for_checkpoint()
    step, _ = loaded_state(tmp_path, tmp_path / "ckpt")
    assert step == 1


def test_what_is_unfrozen_gets_its_place_when_no_checkpoint_has_host_memory(tmp_path, monkeypatch):
    """If it is refused in the end, the memory that was added for it must be nobody's."""
    gate = Gate(monkeypatch)
    busy = []
    wait_quietly, reserve = Saver.wait_quietly, Promotion._reserve

    def open_and_wait(saver):
        gate.open.set()
        wait_quietly(saver)

    def watched(promotion, *arguments):
        busy.append(engine._saver.is_busy)
        reserve(promotion, *arguments)

    monkeypatch.setattr(Saver, "wait_quietly", open_and_wait)
    monkeypatch.setattr(Promotion, "_reserve", watched)
    with make_engine(tmp_path, "host") as engine:
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "ckpt")
        assert gate.reached.wait(60)
        engine.module.frozen.requires_grad_(True)
        try:
            train(engine, 1)
        finally:
            gate.open.set()
        assert busy == [False]
        engine.wait_for_checkpoint()
