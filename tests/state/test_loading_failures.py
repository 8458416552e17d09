"""Streaming load on disks and files that fail: an error, and nothing is left open or taken."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import offload
from offload.errors import DiskFullError, DoesNotFitError, StorageError
from offload.native import IoEngine
from offload.schedule.executor import ComputePool
from offload.state import pretrained
from offload.state.deferred import DeferredWeights
from offload.state.safetensors_stream import SafetensorsReader
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore
from tests.oracle import settings

TIERS = (IoEngine, ComputePool, DeviceTier, HostArena, NvmeStore)


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(4)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a `network`."""
    torch.manual_seed(2)
    made = tmp_path / "model"
    made.mkdir()
    save_file(network().state_dict(), made / "model.safetensors")
    return made


@pytest.fixture(autouse=True)
def of_others() -> Iterator[None]:
    """What tests before these have left open is theirs."""
    _of_others.extend(open_tiers())
    yield
    _of_others.clear()


_of_others: list[Any] = []


def open_tiers() -> list[Any]:
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), TIERS)
        and not found._closed
        and not any(found is other for other in _of_others)
    ]


def entries(folder: str) -> int:
    return len(list(Path(folder).iterdir()))


@pytest.fixture
def cut_before_the_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cut the file to a length when its header has been checked and nothing has moved."""

    def cut_to(nbytes: int) -> None:
        def initialize(*args: Any, **kwargs: Any) -> Any:
            os.truncate(folder / "model.safetensors", nbytes)
            return offload.initialize(*args, **kwargs)

        monkeypatch.setattr(pretrained, "initialize", initialize)

    return cut_to


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
def test_a_file_that_is_cut_after_it_was_checked(
    tier: str,
    folder: Path,
    tmp_path: Path,
    cut_before_the_move: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    config = settings(tier, disk, bucket_elements=20_000)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    offload.from_pretrained(folder, config, model_class=network).close()
    assert not open_tiers()
    gc.collect()
    before = entries("/proc/self/fd"), entries("/proc/self/task")
    cut_before_the_move(len(whole) - 1000)
    # The error is kept, and with it everything that its frames refer to.
    with pytest.raises(StorageError, match="short: the file ends 1000 bytes early") as caught:
        offload.from_pretrained(folder, config, model_class=network)
    assert str(path) in str(caught.value)
    assert caught.value.what == "3.weight"
    assert not open_tiers()
    assert (entries("/proc/self/fd"), entries("/proc/self/task")) == before
    assert not list(disk.iterdir())
    monkeypatch.undo()
    path.write_bytes(whole)
    with offload.from_pretrained(folder, config, model_class=network) as engine:
        assert len(list(engine.named_state())) == 4


def test_a_disk_without_room_is_refused_before_anything_moves(
    small_disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    seen = SafetensorsReader.read_range

    def read_range(self: SafetensorsReader, name: str, start: int, numel: int) -> torch.Tensor:
        reads.append(name)
        return seen(self, name, start, numel)

    monkeypatch.setattr(SafetensorsReader, "read_range", read_range)
    config = settings("nvme", small_disk)
    offload.from_pretrained(folder, config, model_class=network).close()
    assert reads
    reads.clear()
    with (small_disk / "other").open("wb") as file:
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        os.posix_fallocate(file.fileno(), 0, room - (1 << 20))
        free = os.statvfs(small_disk).f_bavail
        with pytest.raises((DiskFullError, DoesNotFitError)) as caught:
            offload.from_pretrained(folder, config, model_class=network)
        assert "MiB" in str(caught.value)
        assert not reads
        assert not open_tiers()
        assert os.statvfs(small_disk).f_bavail == free
    (small_disk / "other").unlink()
    with offload.from_pretrained(folder, config, model_class=network) as engine:
        assert len(list(engine.named_state())) == 4


def test_room_that_is_taken_between_plan_and_reservation(
    small_disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has seen enough room; another program takes it before files are allocated."""
    reads: list[int] = []
    bytes_free = NvmeStore.bytes_free

    def rival(self: NvmeStore) -> int:
        seen = bytes_free(self)
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        with (small_disk / "other").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - (1 << 20))
        return seen

    monkeypatch.setattr(NvmeStore, "bytes_free", rival)
    monkeypatch.setattr(DeferredWeights, "read", lambda *_: reads.append(1))
    with pytest.raises(DiskFullError, match="MiB"):
        offload.from_pretrained(folder, settings("nvme", small_disk), model_class=network)
    assert not reads
    assert not open_tiers()
    assert {path.name for path in small_disk.iterdir()} <= {"other", "lost+found"}
    (small_disk / "other").unlink()
    monkeypatch.undo()
    with offload.from_pretrained(
        folder, settings("nvme", small_disk), model_class=network
    ) as engine:
        assert len(list(engine.named_state())) == 4
