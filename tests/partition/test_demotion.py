"""Blocks move from the host to NVMe: reserved, written, then committed, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.errors import BudgetError, OffloadError, StorageError
from offload.native import IoEngine
from offload.partition.blocks import BlockStore
from offload.partition.demotion import Demotion
from offload.partition.layout import ClassLayout, ParamSpec, pack, state_fields
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore

CLASSES = ("weights", "gradients")


class Setting:
    """A store whose blocks are on the host, filled with numbers of their own."""

    def __init__(
        self, path: Path, *, fault: str | None = None, capacity_bytes: int | None = None
    ) -> None:
        self.io = IoEngine(backend="threads", threads=2, fault=fault)
        self.host = HostArena(16 << 20)
        self.device = CpuDeviceTier(1 << 20, self.io)
        self.nvme = NvmeStore([path], self.io, capacity_bytes=capacity_bytes)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=self.nvme, deadline_seconds=20
        )
        numel = 3 * 65_536  # of three chunks
        specs = [ParamSpec(f"p{n}", (numel,), numel, "fp32", 4, True) for n in range(3)]
        for bucket in pack(specs, bucket_elements=65_536):
            fields = state_fields(bucket, gradient_dtype="fp32", moments=())
            for name in CLASSES:
                self.store.add(bucket, name, ClassLayout(bucket, fields[name]), "host")
        self.blocks = self.store.blocks()
        for number, block in enumerate(self.blocks):
            for chunk in range(len(block.layout.chunk_nbytes)):
                self.store.home(block, chunk).fill_(16 * number + chunk)

    def close(self) -> None:
        self.nvme.close()
        self.device.close()
        self.host.close()
        self.io.close()

    def check(self) -> None:
        """Every block reads as it was filled."""
        for number, block in enumerate(self.blocks):
            for chunk in range(len(block.layout.chunk_nbytes)):
                staged = self.store.load(block, chunk)
                assert staged.tensor.unique().tolist() == [16 * number + chunk]
                staged.release()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    opened: list[Setting] = []

    def make(**arguments: Any) -> Setting:
        opened.append(Setting(tmp_path, **arguments))
        return opened[-1]

    yield make
    for setting in opened:
        setting.close()


def commit(setting: Setting, demotion: Demotion, chosen: list[Any]) -> None:
    for block in chosen:
        block.host_lease.release()
    demotion.commit(chosen)


def test_blocks_read_the_same_from_nvme(made: Any) -> None:
    setting = made()
    demotion = Demotion(setting.store, spare=2)
    chosen = [setting.blocks[1], setting.blocks[4]]
    used = setting.host.used_bytes
    demotion.reserve(chosen)
    demotion.write(chosen)
    assert {block.home for block in setting.blocks} == {"host"}
    setting.check()
    commit(setting, demotion, chosen)
    assert [block.home for block in setting.blocks].count("nvme") == 2
    assert setting.host.used_bytes < used
    assert all(block.host_lease is None for block in chosen)
    setting.check()
    for block in chosen:  # and are written as any other
        staged = setting.store.stage_or_raise(block, 0)
        staged.tensor.fill_(16 * setting.blocks.index(block))
        setting.store.start_store(block, 0, staged)
    setting.store.drain()
    setting.check()


def test_a_capacity_that_is_too_small_changes_nothing(made: Any) -> None:
    setting = made(capacity_bytes=4096)
    demotion = Demotion(setting.store, spare=2)
    with pytest.raises(BudgetError):
        demotion.reserve(setting.blocks)
    assert setting.nvme.used_bytes == 0
    setting.check()


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_a_failed_write_is_told_and_what_is_reserved_serves_again(made: Any, nth: int) -> None:
    setting = made(fault=f"op=write,nth={nth},errno=5")
    demotion = Demotion(setting.store, spare=2)
    chosen = list(setting.blocks[:3])
    demotion.reserve(chosen)
    used = setting.nvme.used_bytes
    with pytest.raises(StorageError, match="EIO"):
        demotion.write(chosen)
    assert {block.home for block in setting.blocks} == {"host"}
    setting.check()
    demotion.reserve(chosen)
    assert setting.nvme.used_bytes == used
    demotion.write(chosen)
    commit(setting, demotion, chosen)
    setting.check()


def test_without_a_disk_there_is_no_way(tmp_path: Path, made: Any) -> None:
    setting = made()
    setting.store.nvme = None
    with pytest.raises(OffloadError, match=r"tiers\.nvme\.paths"):
        Demotion(setting.store, spare=1).reserve(setting.blocks)


def test_a_home_on_the_device_does_not_move(made: Any) -> None:
    setting = made()
    block = setting.blocks[0]
    block.home = "device"
    with pytest.raises(AssertionError):
        setting.store.move_to_nvme(block, [])
    assert torch.is_tensor(block.host_lease.tensor)
