from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.errors import CheckpointError, DiskFullError, StorageError
from offload.native import IoEngine
from offload.state import durable, folders, manifest
from offload.state.checkpoint import load_checkpoint
from tests.state.saving import save_checkpoint


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_state(engine) -> dict[str, torch.Tensor]:
    state = {
        f"{name}.{field}": engine.read_state(name, field)
        for name in engine.parameter_names()
        for field in engine.state_fields(name)
    }
    return state | {name: b.clone() for name, b in engine.module.named_buffers()}


def assert_same_state(first, second) -> None:
    one, two = full_state(first), full_state(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert first.parameter_steps() == second.parameter_steps()
    assert first.global_steps == second.global_steps


def draws() -> tuple[float, float, float, float]:
    return (
        torch.rand(1).item(),
        torch.randn(1).item(),
        random.random() + random.gauss(0, 1),
        float(np.random.standard_normal()),  # noqa: NPY002,
    )


def test_resume_is_bit_exact_with_every_generator(tmp_path, small_engine, small_loss):
    engine = small_engine(scheduled=True)
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    for _ in range(3):
        engine.train(small_loss)
        draws()  # leaves half-used Gaussian pairs in the generators
    client_state = {"epoch": 2, "position": (3, 4.5), "names": {1: "one", "$x": None}}
    saved = save_checkpoint(engine, tmp_path, client_state=client_state)
    assert saved == tmp_path / "step-00000003"
    expected = [engine.train(small_loss) for _ in range(3)]
    drawn = draws()

    resumed = small_engine(seed=99, scheduled=True)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert load_checkpoint(resumed, tmp_path) == client_state
    assert [resumed.train(small_loss) for _ in range(3)] == expected
    assert draws() == drawn
    assert_same_state(engine, resumed)
    assert resumed.optimizer_groups() == engine.optimizer_groups()
    assert resumed.lr_scheduler.state_dict() == engine.lr_scheduler.state_dict()


def test_nothing_in_a_checkpoint_is_pickled_and_all_is_private(tmp_path, small_engine, small_loss):
    engine = small_engine()
    engine.train(small_loss)
    saved = save_checkpoint(engine, tmp_path / "new" / "folder")
    names = names_in(saved)
    assert names == ["data-00000.bin", "manifest.json"]
    assert all((saved / name).stat().st_mode & 0o777 == 0o600 for name in names)
    assert saved.stat().st_mode & 0o777 == 0o700
    assert names_in(saved.parent) == ["LATEST", "step-00000001"]
    body = json.loads((saved / "manifest.json").read_bytes())["body"]
    assert body["values"]["global_steps"] == 1


def test_newest_wins_whatever_the_step_and_a_tag_chooses(tmp_path, small_engine, small_loss):
    engine = small_engine()
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path, "z-first", {"n": 1})
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path, "a-second", {"n": 2})
    engine.global_steps = 0
    save_checkpoint(engine, tmp_path, "m-third", {"n": 3})
    assert (tmp_path / "LATEST").read_text() == "m-third\n"
    (tmp_path / "LATEST").write_text("z-first\n")
    assert load_checkpoint(small_engine(), tmp_path) == {"n": 3}
    assert load_checkpoint(small_engine(), tmp_path, "z-first") == {"n": 1}
    with pytest.raises(CheckpointError, match="no undamaged checkpoint 'other'"):
        load_checkpoint(small_engine(), tmp_path, "other")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint in"):
        load_checkpoint(small_engine(), tmp_path / "elsewhere")


def test_same_tag_is_replaced(tmp_path, small_engine, small_loss):
    engine = small_engine()
    save_checkpoint(engine, tmp_path, "best", {"n": 1})
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path, "best", {"n": 2})
    assert names_in(tmp_path) == ["LATEST", "best"]
    assert load_checkpoint(small_engine(), tmp_path, "best") == {"n": 2}


@pytest.mark.parametrize("point", ["pending", "aside"])
def test_killed_while_replacing_a_tag_one_of_both_stands(
    tmp_path, small_engine, small_loss, monkeypatch, point
):
    """An exception at each rename of `publish`; the clean-up that a kill would skip is off."""
    engine = small_engine()
    save_checkpoint(engine, tmp_path, "best", {"n": 1})
    renames: list[str] = []
    real_rename = Path.rename

    def killed_rename(self: Path, target: Path) -> Path:
        if target.parent == tmp_path and target.name != "LATEST":
            renames.append(target.name)
            if len(renames) == {"pending": 1, "aside": 2}[point]:
                raise KeyboardInterrupt
        return real_rename(self, target)

    engine.train(small_loss)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_rename)
        patch.setattr(shutil, "rmtree", lambda *_a, **_k: None)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(engine, tmp_path, "best", {"n": 2})
    assert load_checkpoint(small_engine(), tmp_path) == {"n": 1}
    assert load_checkpoint(small_engine(), tmp_path, "best") == {"n": 1}
    save_checkpoint(engine, tmp_path, "best", {"n": 3})
    assert names_in(tmp_path) == ["LATEST", "best"], "what the kill left is swept"


def test_a_save_in_progress_is_neither_loaded_nor_swept(tmp_path, small_engine):
    engine = small_engine()
    save_checkpoint(engine, tmp_path, "one")
    with folders.pending_folder(tmp_path, "two") as pending:
        save_checkpoint(engine, tmp_path, "three", {"n": 3})
        assert pending.exists()
        shutil.copy(tmp_path / "one" / "manifest.json", pending)
        assert load_checkpoint(small_engine(), tmp_path) == {"n": 3}
    assert not pending.exists()
    pending.mkdir()
    save_checkpoint(engine, tmp_path, "four")
    assert not pending.exists()


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["data-00000.bin", "manifest.json"])
def test_every_flipped_bit_is_found_and_the_older_checkpoint_used(
    tmp_path, small_engine, small_loss, name
):
    engine = small_engine()
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path, "good", {"n": 1})
    saved = save_checkpoint(engine, tmp_path, "bad", {"n": 2})
    target = small_engine(seed=1)
    target.train(small_loss)
    before = full_state(target)
    nbits = 8 * (saved / name).stat().st_size
    generator = random.Random(0)
    for bit in [0, nbits - 1] + [generator.randrange(nbits) for _ in range(120)]:
        flip(saved / name, bit)
        with pytest.raises(CheckpointError, match=str(saved)):
            load_checkpoint(target, tmp_path, "bad")
        flip(saved / name, bit)
    assert all(torch.equal(value, before[key]) for key, value in full_state(target).items())
    assert load_checkpoint(target, tmp_path, "bad") == {"n": 2}, "unharmed it loads"
    flip(saved / name, nbits // 2)
    with pytest.warns(RuntimeWarning, match="passed over a damaged checkpoint"):
        assert load_checkpoint(target, tmp_path) == {"n": 1}


def test_a_damaged_tensor_is_named(tmp_path, small_engine):
    saved = save_checkpoint(small_engine(), tmp_path)
    path = saved / "data-00000.bin"
    content = manifest.read(saved)
    record = content.find("parameter", "norm.weight", "exp_avg")
    flip(path, 8 * content.blocks[record.pieces[0].block].offset + 3)
    with pytest.raises(CheckpointError, match=r"data-00000.*exp_avg of 'norm.weight'"):
        load_checkpoint(small_engine(), tmp_path, "step-00000000")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"data-00000.*the file has"):
        load_checkpoint(small_engine(), tmp_path, "step-00000000")
    path.unlink()
    with pytest.raises(StorageError, match="data-00000"):
        load_checkpoint(small_engine(), tmp_path, "step-00000000")


def forge(saved: Path, change) -> None:
    body = json.loads((saved / "manifest.json").read_bytes())["body"]
    change(body)
    text = json.dumps(body).encode()
    checksum = manifest._checksum(text)
    (saved / "manifest.json").write_bytes(b'{"crc32c":"%08x",\n"body":' % checksum + text + b"}\n")


KIND, NAME, FIELD, DTYPE, SHAPE, STRIDE, PIECES = range(7)


def of_tensor(position, value):
    def change(body):
        body["tensors"][0][position] = value

    return change


def of_block(position, value):
    def change(body):
        body["blocks"][0][position] = value

    return change


FORGERIES = {
    "block index out of range": of_tensor(PIECES, [[10_000, 0, 364]]),
    "piece behind the end of its block": of_tensor(PIECES, [[0, 4096, 364]]),
    "negative piece": of_tensor(PIECES, [[0, -4, 364]]),
    "negative shape": of_tensor(SHAPE, [-1]),
    "huge shape": of_tensor(SHAPE, [1 << 62]),
    "shape is not the bytes": of_tensor(SHAPE, [13, 8]),
    "stride reaches outside": of_tensor(STRIDE, [1 << 40, 1]),
    "stride of another length": of_tensor(STRIDE, [1]),
    "other dtype": of_tensor(DTYPE, "torch.int32"),
    "dtype is a function": of_tensor(DTYPE, "torch.load"),
    "name is a path": of_tensor(NAME, "../../etc/passwd"),
    "unknown kind": of_tensor(KIND, "code"),
    "tensor of more fields": lambda b: b["tensors"][0].append("/etc/passwd"),
    "tensor listed twice": lambda b: b["tensors"].append(b["tensors"][0]),
    "file index out of range": of_block(0, 7),
    "block behind the end of its file": of_block(1, 1 << 40),
    "block of text": of_block(1, "0"),
    "block of more fields": lambda b: b["blocks"][0].append(1),
    "tag is a path": lambda b: b.update(tag="../x"),
    "unknown field": lambda b: b.update(more=1),
    "missing field": lambda b: b.pop("files"),
    "version of tomorrow": lambda b: b.update(format_version=manifest.FORMAT_VERSION + 1),
    "sequence is text": lambda b: b.update(sequence="9"),
    "values is a list": lambda b: b.update(values=[]),
    "length of a file is text": lambda b: b.update(files=["9"]),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_manifests_are_refused(tmp_path, small_engine, change):
    saved = save_checkpoint(small_engine(), tmp_path)
    forge(saved, lambda body: None)
    load_checkpoint(small_engine(), tmp_path, saved.name)
    forge(saved, change)
    with pytest.raises(CheckpointError):
        load_checkpoint(small_engine(), tmp_path, saved.name)


@pytest.mark.parametrize("tag", ["", ".", "..", "../x", "a/b", "/x", ".old-x", "LATEST", "a" * 129])
def test_tags_that_are_no_names_are_refused(tmp_path, small_engine, tag):
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
            call(small_engine(), tmp_path, tag)
    assert names_in(tmp_path) == []


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path, small_engine):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        save_checkpoint(small_engine(), tmp_path, "mine")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "thesis.txt"]


@pytest.mark.parametrize("value", [torch.tensor(1), object(), {1, 2}, np.float64(2), b"x"])
def test_client_state_that_is_not_plain_is_refused_before_anything_is_written(
    tmp_path, small_engine, value
):
    with pytest.raises(CheckpointError, match=r"client_state\['a'\]\[0\] is a"):
        save_checkpoint(small_engine(), tmp_path, client_state={"a": [value]})
    assert names_in(tmp_path) == []


def test_another_model_is_refused_and_left_alone(tmp_path, small_engine, in_memory_engine):
    save_checkpoint(small_engine(), tmp_path)
    other = in_memory_engine(torch.nn.Linear(2, 3))
    before = full_state(other)
    with pytest.raises(CheckpointError, match="another kind of engine") as caught:
        load_checkpoint(other, tmp_path)
    assert "exp_avg of 'bias' is missing" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in full_state(other).items())
    with pytest.raises(CheckpointError, match="only the engine has a lr_scheduler"):
        load_checkpoint(small_engine(scheduled=True), tmp_path)


def test_other_placement_is_silent_and_another_learning_rate_is_told(tmp_path, small_engine):
    save_checkpoint(small_engine(), tmp_path)
    load_checkpoint(small_engine(config={"tiers": {"host": {"memory": "1GiB"}}}), tmp_path)
    with pytest.warns(RuntimeWarning, match=r"optimizer.lr: 0.0001 then, 0.5 now"):
        load_checkpoint(small_engine(config={"optimizer": {"lr": 0.5}}), tmp_path)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, small_engine, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda _folder: 10_000)
    with pytest.raises(DiskFullError, match="free are 10000 bytes"):
        save_checkpoint(small_engine(), tmp_path)
    assert names_in(tmp_path) == []


def test_order_of_syncs_and_renames(tmp_path, small_engine, monkeypatch):
    """Data, manifest, folder, rename, parent: each synced before what refers to it."""
    log = []

    def note(name, real):
        def call(*args):
            path = args[0]
            if isinstance(path, int):
                path = Path(f"/proc/self/fd/{path}").readlink()
            log.append((name, re.sub(r"\.?(-\d+\.\w+)?\.tmp-\d+.*|-.*", "", Path(path).name)))
            return real(*args)

        return call

    real_sync = IoEngine.fsync

    def note_data(self, file):
        log.append(("sync", Path(file.path).name.removesuffix("-00000.bin")))
        real_sync(self, file)

    monkeypatch.setattr(IoEngine, "fsync", note_data)
    monkeypatch.setattr(os, "fsync", note("sync", os.fsync))
    monkeypatch.setattr(Path, "rename", note("rename", Path.rename))
    (tmp_path / "base").mkdir()
    save_checkpoint(small_engine(), tmp_path / "base" / "run", "tag")
    assert [f"{kind} {name}" for kind, name in log] == [
        "sync base",
        "sync data",
        "sync .manifest.json", "rename .manifest.json", "sync .tmp",
        "rename .tmp", "sync run",
        "rename LATEST",
    ]  # fmt: skip


class WithExtraState(torch.nn.Linear):
    counts = (0,)

    def get_extra_state(self):
        return {"counts": self.counts}

    def set_extra_state(self, state):
        self.counts = state["counts"]


def test_extra_state_of_modules_is_kept(tmp_path, in_memory_engine):
    engine = in_memory_engine(torch.nn.Sequential(WithExtraState(2, 2)))
    engine.module[0].counts = (1, 2)
    save_checkpoint(engine, tmp_path)
    other = in_memory_engine(torch.nn.Sequential(WithExtraState(2, 2)))
    load_checkpoint(other, tmp_path)
    assert other.module[0].counts == (1, 2)
    other.module[0].counts = torch.ones(1)
    with pytest.raises(CheckpointError, match="extra state of '0'"):
        save_checkpoint(other, tmp_path)
