"""Saves onto a disk that does not answer, for a while or for ever."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from offload.errors import DeadlineError, StorageError
from offload.state import durable, folders, manifest, stored
from offload.tiers.pins import BackingFile
from tests.state.test_instant import (
    assert_equal_state,
    full_state,
    loaded_state,
    make_engine,
    train,
)

IO = {"deadline_seconds": 0.2}
LONG_SECONDS = 30.0


class Hang:
    """A function that does not answer before `answer` is set; then it may fail."""

    def __init__(self, original: Callable[..., object]) -> None:
        self.original = original
        self.answer = threading.Event()
        self.fails = False
        self.has_ended = threading.Event()

    def __call__(self, *arguments: object, **options: object) -> object:
        assert self.answer.wait(LONG_SECONDS)
        try:
            if self.fails:
                raise StorageError(operation="test", path="here")
            return self.original(*arguments, **options)
        finally:
            self.has_ended.set()

    def end(self) -> None:
        self.answer.set()
        assert self.has_ended.wait(LONG_SECONDS)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object, str], Hang]]:
    made: list[Hang] = []

    def let(module: object, name: str) -> Hang:
        made.append(Hang(getattr(module, name)))
        monkeypatch.setattr(module, name, made[-1])
        return made[-1]

    yield let
    for each in made:
        each.answer.set()


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG_SECONDS
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.001)


def num_pins(engine) -> int:
    return sum(engine._parts.nvme._pins.values())


@pytest.mark.parametrize("fails", [False, True])
def test_a_rename_that_hangs_decides_about_the_extents_when_it_ends(tmp_path, hang, fails):
    root = tmp_path / "ckpt"
    with make_engine(tmp_path, io=IO) as engine:
        train(engine, 2)
        expected = full_state(engine)
        publish = hang(folders, "publish")
        publish.fails = fails
        engine.save_checkpoint(root)
        with pytest.raises(DeadlineError, match=r"rename of .* it hangs") as caught:
            engine.wait_for_checkpoint()
        assert caught.value.__notes__ == [f"while checkpoint {root / 'step-00000002'} was written"]
        assert num_pins(engine) > 0, "it may still get its name"
        train(engine, 3)
        publish.end()
        eventually(lambda: not list(root.glob(".tmp-*")))
        assert (num_pins(engine) == 0) is fails
        train(engine, 3)
        if fails:
            assert list(root.iterdir()) == []
        else:
            with stored.find(root, None) as found:
                assert found.content.values["global_steps"] == 2
        train(engine, 1)
    if not fails:
        step, state = loaded_state(tmp_path, root)
        assert step == 2
        assert_equal_state(state, expected)


def test_training_goes_on_with_its_bits_while_the_disk_hangs(tmp_path, hang):
    def run(save: bool) -> dict:
        folder = tmp_path / str(save)
        folder.mkdir()
        with make_engine(folder, "host", io=IO) as engine:
            train(engine, 2, seed=1)
            if save:
                folder_made = hang(durable, "make_folder")
                with pytest.raises(DeadlineError, match=r"create of .* it hangs"):
                    engine.save_checkpoint(tmp_path / "ckpt")
                assert engine._parts.store.captured.is_set()
                with pytest.raises(DeadlineError):  # at once: it hangs already
                    engine.save_checkpoint(tmp_path / "ckpt")
                folder_made.answer.set()
            train(engine, 2)
            return full_state(engine)

    assert_equal_state(run(save=True), run(save=False))


def test_the_next_save_succeeds_when_the_disk_answers(tmp_path, hang):
    with make_engine(tmp_path, io=IO) as engine:
        train(engine, 1)
        writing = hang(durable, "write_file")
        engine.save_checkpoint(tmp_path / "ckpt")
        with pytest.raises(DeadlineError, match="write of"):
            engine.wait_for_checkpoint()
        writing.end()
        eventually(lambda: not engine._saver._disk.hangs)
        assert num_pins(engine) == 0
        path = engine.save_checkpoint(tmp_path / "ckpt")
        assert engine.wait_for_checkpoint() == path
        assert {each.name for each in path.parent.iterdir()} == {path.name, "LATEST"}


def test_a_load_that_hangs_is_no_damaged_checkpoint(tmp_path, hang):
    with make_engine(tmp_path, "host") as engine:
        for _ in range(2):
            train(engine, 1)
            engine.save_checkpoint(tmp_path / "ckpt")
        engine.wait_for_checkpoint()
        expected = full_state(engine)
    with make_engine(tmp_path, "host", io=IO) as engine:
        reading = hang(manifest, "read")
        with pytest.raises(DeadlineError, match=r"list of .* it hangs"):
            engine.load_checkpoint(tmp_path / "ckpt")
        reading.end()
        engine.load_checkpoint(tmp_path / "ckpt")
        assert engine.global_steps == 2
        assert_equal_state(full_state(engine), expected)


def test_closing_does_not_wait_for_a_disk_that_hangs(tmp_path, hang):
    engine = make_engine(tmp_path, io=IO)
    train(engine, 1)
    publish = hang(folders, "publish")
    engine.save_checkpoint(tmp_path / "ckpt")
    with pytest.raises(DeadlineError):
        engine.close()
    assert not publish.has_ended.is_set()
    publish.end()
    eventually(lambda: not list((tmp_path / "ckpt").glob(".tmp-*")))
    assert (tmp_path / "ckpt" / "step-00000001").is_dir()


def test_a_rename_of_which_the_disk_does_not_tell_keeps_the_extents(tmp_path, monkeypatch):
    root = tmp_path / "ckpt"
    sync, stat = durable.sync_folder, type(root).stat
    with make_engine(tmp_path, io=IO) as engine:
        train(engine, 2)

        def failing_sync(folder):
            if folder == root:
                raise StorageError(operation="fsync", path=folder)
            sync(folder)

        def failing_stat(path, **options):
            if path.parent.name == "step-00000002":
                raise OSError(errno.EIO, "no")
            return stat(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync_folder", failing_sync)
            patch.setattr(type(root), "stat", failing_stat)
            engine.save_checkpoint(root)
            with pytest.raises(StorageError, match="fsync"):
                engine.wait_for_checkpoint()
            assert num_pins(engine) > 0
        train(engine, 4)
        with stored.find(root, None) as found:
            assert found.content.values["global_steps"] == 2


def test_a_link_that_hangs_pins_nothing_for_good(tmp_path, hang):
    with make_engine(tmp_path, io=IO) as engine:
        train(engine, 1)
        link = hang(BackingFile, "link")
        engine.save_checkpoint(tmp_path / "ckpt")
        with pytest.raises(DeadlineError, match="link of"):
            engine.wait_for_checkpoint()
        link.fails = True
        link.end()
        eventually(lambda: not engine._saver._disk.hangs)
        assert num_pins(engine) == 0
