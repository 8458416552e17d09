"""Chunks on a simulated device: slots, what is kept after an error, and what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offload.errors import BudgetError, OffloadError, StorageError
from offload.native import IoEngine
from offload.optim.chunk_update import ChunkWork, KernelUpdate, StepSettings
from offload.optim.device_rules import device_rule, rows_bytes
from offload.optim.device_update import DeviceUpdate
from offload.optim.rules import make_rule
from offload.partition.blocks import BlockStore
from offload.partition.layout import ClassLayout, FieldSpec, segments
from offload.partition.staging import Staged, release_all
from offload.schedule.executor import ComputePool
from offload.schedule.update_site import NUM_SLOTS, UpdateScratch, update_scratch
from offload.tiers.host import HostArena
from offload.tiers.simulated import SimulatedDeviceTier, SimulatedIo
from offload.tiers.transfer import CompletedTransfer
from tests.optim.one_chunk import one_chunk_buckets

NUMEL = 1024
NUM_BUCKETS = 5
FIELDS = {
    "weights": [FieldSpec("weight", "fp32", 4)],
    "gradients": [FieldSpec("gradient", "fp32", 4)],
    "optimizer": [FieldSpec("exp_avg", "fp32", 4), FieldSpec("exp_avg_sq", "fp32", 4)],
}


def settings(step: int, lr: float = 0.1) -> StepSettings:
    return StepSettings({i: {"lr": lr} for i in range(NUM_BUCKETS)}, 1.0, step)


class Setting:
    """Buckets of one chunk; weights and gradients on the host, moments at `home`."""

    def __init__(self, fault: str | None = None, home: str = "host") -> None:
        self.buckets, self.parameters = one_chunk_buckets(NUM_BUCKETS, NUMEL)
        self.io = IoEngine(backend="threads", threads=1)
        self.host = HostArena(1 << 20)
        self.device = SimulatedDeviceTier(1 << 20, SimulatedIo(fault=fault), host_addressable=False)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=None, deadline_seconds=20.0
        )
        blocks = []
        for bucket in self.buckets:
            layouts = {name: ClassLayout(bucket, fields) for name, fields in FIELDS.items()}
            blocks.append({name: layout.chunk_nbytes for name, layout in layouts.items()})
            for name, layout in layouts.items():
                self.store.add(bucket, name, layout, home if name == "optimizer" else "host")
        self.scratch = update_scratch(self.buckets, blocks, rows_bytes)
        self.pool = ComputePool(1)
        rule = make_rule("adamw")
        self.kernel = KernelUpdate(self.parameters, self.store, rule, self.pool)
        ops = device_rule(rule)
        assert ops is not None
        self.ops = ops
        self.before = self.device.used_bytes
        self.updater = self.make_updater(self.scratch)
        self.updater.on_device = frozenset(range(NUM_BUCKETS))
        self.fill()

    def make_updater(self, scratch: UpdateScratch) -> DeviceUpdate:
        return DeviceUpdate(self.parameters, self.store, self.ops, self.kernel, scratch)

    def fill(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        for block in self.store.blocks():
            lease = block.host_lease or block.device_lease
            assert lease is not None
            lease.tensor.view(torch.float32).uniform_(0.1, 1.0, generator=drawn)

    def values(self, bucket: int) -> list[torch.Tensor]:
        found = []
        for name in FIELDS:
            block = self.store.block(bucket, name)
            lease = block.host_lease or block.device_lease
            assert lease is not None
            found.append(lease.tensor.clone())
        return found

    def work(self, index: int, classes: list[str] | None = None) -> ChunkWork:
        bucket = self.buckets[index]
        names = self.updater.staged_classes(bucket) if classes is None else classes
        staged = {name: self.store.load(self.store.block(index, name), 0) for name in names}
        return ChunkWork(bucket, 0, segments(bucket, bucket.chunks[0]), staged)

    def close(self) -> None:
        self.pool.close()
        self.device.close()
        self.host.close()
        self.io.close()


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


@pytest.fixture
def split() -> Iterator[Setting]:
    made = Setting(home="device")
    yield made
    made.close()


def by_kernel(setting: Setting, index: int, applied: StepSettings) -> list[torch.Tensor]:
    """What the kernel makes of a bucket that is as `fill` leaves it."""
    setting.fill()
    classes = list(FIELDS)
    staged = {}
    for name, value in zip(classes, setting.values(index), strict=True):
        staged[name] = Staged(value, CompletedTransfer("cpu"), None)
    bucket = setting.buckets[index]
    work = ChunkWork(bucket, 0, segments(bucket, bucket.chunks[0]), staged)
    assert setting.kernel.update(work, applied) is None
    setting.fill()
    return [each.tensor for each in staged.values()]


def assert_values(setting: Setting, index: int, expected: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, setting.values(index), expected))


def test_chunks_are_under_way_together_and_finish_in_order(setting: Setting) -> None:
    applied = settings(1)
    expected = [by_kernel(setting, index, applied) for index in range(NUM_SLOTS)]
    works = [setting.work(index) for index in range(NUM_SLOTS)]
    for work in works:
        setting.updater.start(work, applied)
    arriving = works[-1].staged["weights"].tensor
    assert (arriving == 0xFF).all(), "on its way until `finish`"
    for work in works:
        assert setting.updater.finish(work) is None
    for index in range(NUM_SLOTS):
        assert_values(setting, index, expected[index])


def test_more_chunks_than_slots_are_an_error_that_changes_nothing(setting: Setting) -> None:
    applied = settings(1)
    works = [setting.work(index) for index in range(NUM_SLOTS + 1)]
    before = setting.values(NUM_SLOTS)
    for work in works[:-1]:
        setting.updater.start(work, applied)
    with pytest.raises(OffloadError, match="no slot for an update on the device is free"):
        setting.updater.start(works[-1], applied)
    assert_values(setting, NUM_SLOTS, before)
    setting.updater.finish(works[0])
    assert setting.updater.update(works[-1], applied) is None


def test_results_that_could_not_go_home_go_there_the_next_time(split: Setting) -> None:
    """The moments are at home on the device, where the failed step has updated them."""
    applied = settings(1)
    expected = by_kernel(split, 0, applied)
    work = split.work(0)
    assert sorted(work.staged) == ["gradients", "weights"]
    split.updater.start(work, applied)
    work.staged["weights"].transfer.wait()
    work.staged["weights"].tensor.fill_(0xFF)
    again = split.work(0)
    assert split.updater.update(again, applied) is None
    assert_values(split, 0, expected)


def test_results_of_other_settings_are_forgotten(setting: Setting) -> None:
    """An update made ahead of its step, and dropped because the step applies something else."""
    expected, applied = by_kernel(setting, 0, settings(1, lr=0.2)), settings(1, lr=0.2)
    bucket = setting.buckets[0]
    copies = {
        name: Staged(value, CompletedTransfer("cpu"), None)
        for name, value in zip(FIELDS, setting.values(0), strict=True)
    }
    early = ChunkWork(bucket, 0, segments(bucket, bucket.chunks[0]), copies)
    setting.updater.start(early, settings(1, lr=0.1))
    release_all(list(early.staged.values()), 20.0)
    assert setting.updater.update(setting.work(0), applied) is None
    assert_values(setting, 0, expected)
    for _ in range(2 * NUM_SLOTS):  # and its slot is free
        setting.updater.update(setting.work(1), settings(2))


def test_a_copy_that_fails_leaves_the_chunk_as_it_was() -> None:
    setting = Setting("op=copy,nth=2,errno=5")
    before = setting.values(0)
    work = setting.work(0)
    with pytest.raises(StorageError):
        setting.updater.update(work, settings(1))
    assert_values(setting, 0, before)
    expected = by_kernel(setting, 0, settings(1))
    assert setting.updater.update(setting.work(0), settings(1)) is None
    assert_values(setting, 0, expected)
    setting.close()


def test_a_device_that_fails_is_an_error_that_is_not_retried(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(setting.ops), "update", fail)
    with pytest.raises(OffloadError, match="the update of bucket 0 on cpu failed: no memory") as e:
        setting.updater.update(setting.work(0), settings(1))
    assert not isinstance(e.value, StorageError)


def test_state_that_lives_on_the_device_may_come_staged_all_the_same(split: Setting) -> None:
    """As `measure_speeds` and updates ahead of their step have it: the home stays as it is."""
    applied = settings(1)
    expected = by_kernel(split, 0, applied)
    moments = split.values(0)[2]
    work = split.work(0, list(FIELDS))
    assert split.updater.update(work, applied) is None
    assert torch.equal(work.staged["optimizer"].tensor, expected[2])
    assert torch.equal(split.values(0)[2], moments)
    work.release()


def test_a_bucket_of_the_cpu_takes_the_kernel(setting: Setting) -> None:
    setting.updater.on_device = frozenset({1})
    expected = by_kernel(setting, 0, settings(1))
    moved = setting.device.lanes()["h2d"][0]
    assert setting.updater.update(setting.work(0), settings(1)) is None
    assert_values(setting, 0, expected)
    assert setting.device.lanes()["h2d"][0] == moved


def test_scratch_that_does_not_fit_is_refused_and_leaves_nothing(setting: Setting) -> None:
    setting.updater.close()
    assert setting.device.used_bytes == setting.before
    too_large = UpdateScratch(1 << 20, 4096, NUMEL, rows_bytes(NUMEL))
    with pytest.raises(BudgetError, match="update on the device"):
        setting.make_updater(too_large)
    assert setting.device.used_bytes == setting.before
