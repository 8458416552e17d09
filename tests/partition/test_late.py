"""Memory of transfers that are later than their deadline: nobody's until they end, then free."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.errors import DeadlineError
from offload.partition.blocks import BlockStore
from offload.partition.layout import ClassLayout, FieldSpec, ParamSpec, pack
from offload.partition.shadows import Shadows
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated import SimulatedIo

NBYTES = 4096
CLASSES = ("weights", "gradients", "optimizer")
LATE = "delay=100000"  # milliseconds; the deadline is 60 s


class Setting:
    """One bucket of one chunk on NVMe, on a virtual clock; every class holds ones."""

    def __init__(self, path: Path, fault: str) -> None:
        (bucket,) = pack([ParamSpec("w", (1024,), 1024, "fp32", 4, True)], bucket_elements=1024)
        self.io = SimulatedIo(fault=fault)
        self.host = HostArena(16 * NBYTES)
        nvme = NvmeStore([path], self.io)
        device = CpuDeviceTier(NBYTES, self.io)
        self.store = BlockStore(host=self.host, device=device, nvme=nvme, deadline_seconds=60)
        for name in CLASSES:
            self.store.add(bucket, name, ClassLayout(bucket, [FieldSpec(name, "fp32", 4)]), "nvme")
        self.store.reserve_records(spare=2, held_share=1.0)
        self.blocks = [self.store.block(0, name) for name in CLASSES]
        for block in self.blocks:
            staged = self.store.stage_or_raise(block, 0)
            staged.tensor.fill_(1)
            self.store.start_store(block, 0, staged)
        self.store.drain()


def test_staging_of_a_late_read_comes_back_when_it_has_ended(tmp_path: Path) -> None:
    setting = Setting(tmp_path, f"op=read,nth=1,{LATE}")
    with pytest.raises(DeadlineError, match="weights of bucket 0, chunk 0"):
        setting.store.load(setting.blocks[0], 0)
    again = setting.store.load(setting.blocks[0], 0)
    assert set(again.tensor.tolist()) == {1}
    again.release()
    assert setting.host.used_bytes == NBYTES, "the late read still writes there"
    setting.io.clock.advance(100)
    setting.store.settle_ended()
    assert setting.host.used_bytes == 0


def test_a_late_held_write_has_its_memory_and_its_extent_until_it_ends(tmp_path: Path) -> None:
    setting = Setting(tmp_path, f"op=write,nth={len(CLASSES) + 1},{LATE}")
    share = HostShare(setting.host, 8 * NBYTES, "the test")
    shadows = Shadows(setting.store)
    for attempt in range(2):
        loaded = shadows.start_loads(setting.blocks, 0, share.take)
        assert loaded is not None, attempt
        for block, staged in zip(setting.blocks, loaded, strict=True):
            staged.transfer.wait()
            if block.state_class == "gradients":
                staged.release()
            else:
                staged.tensor.fill_(7)
                shadows.hold(block, 0, staged)
        if attempt == 0:
            for block in setting.blocks:
                shadows.drop(block, 0)
            assert share.used_bytes == NBYTES
            assert shadows.start_loads(setting.blocks, 0, share.take) is None
            setting.io.clock.advance(100)
            setting.store.settle_ended()
            assert share.used_bytes == 0
    for block in setting.blocks:
        if block.state_class != "gradients":
            shadows.commit(block, 0)
            assert set(setting.store.load(block, 0).tensor.tolist()) == {7}
