"""The streamed step: every chunk once, in order, whatever fails in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload.errors import NonFiniteError, OffloadError, StorageError
from offload.native import IoEngine
from offload.optim.chunk_update import ChunkUpdate, ChunkWork, StepSettings
from offload.optim.streamed import StreamedStep
from offload.partition.blocks import BlockStore
from offload.partition.layout import ClassLayout, FieldSpec
from offload.partition.parameters import ParameterState
from offload.telemetry import LaneMeter
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore
from tests.optim.one_chunk import one_chunk_buckets

NUMEL = 1024  # each parameter fills a bucket of one chunk of 4096 bytes
NUM_BUCKETS = 6
SETTINGS = StepSettings(hyper={i: {} for i in range(NUM_BUCKETS)}, gradient_scale=1.0, step=7)


class CountingUpdate(ChunkUpdate):
    """Adds one to every byte of weights and optimizer state; notes what was under way."""

    def __init__(self, parameters: list[ParameterState], store: BlockStore) -> None:
        super().__init__(parameters, store)
        self.settings = SETTINGS
        self.order: list[int] = []
        self.staged_bytes: list[int] = []
        self.not_finite: set[int] = set()
        self.fails: set[int] = set()

    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        assert settings is self.settings
        if work.bucket.index in self.fails:
            self.fails.clear()
            raise OffloadError("the optimizer failed")
        self.order.append(work.bucket.index)
        self.staged_bytes.append(self._store.host.used_bytes)
        for state_class in ("weights", "optimizer"):
            work.staged[state_class].tensor.add_(1)
        known = self._parameters[work.bucket.index]
        return known if work.bucket.index in self.not_finite else None


class Setting:
    """A streamed step over six buckets whose state is on NVMe."""

    def __init__(self, path: Path, fault: str | None, *, staged_chunks: int, depth: int) -> None:
        buckets, self.parameters = one_chunk_buckets(NUM_BUCKETS, NUMEL)
        self.io = IoEngine(backend="threads", threads=2, fault=fault)
        self.host = HostArena(staged_chunks * 3 * 4096)
        self.device = CpuDeviceTier(1 << 20, self.io)
        self.nvme = NvmeStore([path], self.io, capacity_bytes=None, deadline_seconds=20)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=self.nvme, deadline_seconds=20
        )
        for bucket in buckets:
            for state_class in ("weights", "gradients", "optimizer"):
                layout = ClassLayout(bucket, [FieldSpec(state_class, "fp32", 4)])
                self.store.add(bucket, state_class, layout, "nvme")
        self.store.reserve_records(spare=3)
        self.updater = CountingUpdate(self.parameters, self.store)
        self.step = StreamedStep(
            buckets=buckets,
            parameters=self.parameters,
            store=self.store,
            updater=self.updater,
            depth=depth,
            meter=LaneMeter(),
        )
        self.write(1)

    def write(self, value: int) -> None:
        for block in self.store.blocks():
            staged = self.store.stage_or_raise(block, 0)
            staged.tensor.fill_(value)
            self.store.start_store(block, 0, staged)
        self.store.drain()

    def values(self, state_class: str) -> list[int]:
        found = []
        for index in range(NUM_BUCKETS):
            staged = self.store.load(self.store.block(index, state_class), 0)
            (value,) = staged.tensor.unique().tolist()
            found.append(value)
            staged.release()
        return found

    def close(self) -> None:
        self.nvme.close()
        self.device.close()
        self.host.close()
        self.io.close()


MakeSetting = Callable[..., Setting]
WRITTEN = 3 * NUM_BUCKETS  # operations of `write`


@pytest.fixture
def make_setting(tmp_path: Path) -> Iterator[MakeSetting]:
    made: list[Setting] = []

    def make(fault: str | None = None, *, staged_chunks: int = 3, depth: int = 3) -> Setting:
        made.append(Setting(tmp_path, fault, staged_chunks=staged_chunks, depth=depth))
        return made[-1]

    yield make
    for setting in made:
        setting.close()


def assert_applied(setting: Setting, times: int = 1) -> None:
    assert setting.values("weights") == [1 + times] * NUM_BUCKETS
    assert setting.values("optimizer") == [1 + times] * NUM_BUCKETS
    assert setting.values("gradients") == [1] * NUM_BUCKETS
    assert [state.steps for state in setting.parameters] == [times] * NUM_BUCKETS
    assert setting.host.used_bytes == 0
    assert not setting.step._updated


@pytest.mark.parametrize(("staged_chunks", "depth"), [(1, 1), (1, 3), (2, 3), (8, 3)])
def test_every_chunk_is_updated_once_in_any_staging(
    staged_chunks: int, depth: int, make_setting: MakeSetting
) -> None:
    setting = make_setting(staged_chunks=staged_chunks, depth=depth)
    setting.step.run(SETTINGS)
    assert setting.updater.order == list(range(NUM_BUCKETS))
    assert_applied(setting)
    setting.step.run(SETTINGS)
    assert_applied(setting, 2)


def test_reads_run_ahead_of_updates(make_setting: MakeSetting) -> None:
    setting = make_setting("op=write,nth=1000,delay=1", staged_chunks=8)
    setting.step.run(SETTINGS)
    assert setting.updater.staged_bytes[0] == 3 * 3 * 4096, "three chunks of three blocks"


def test_chunks_without_a_gradient_are_not_even_read(make_setting: MakeSetting) -> None:
    setting = make_setting()
    read = setting.io.lanes()["nvme_read"][0]
    setting.updater.settings = replace(SETTINGS, hyper={i: {} for i in range(6) if i != 2})
    setting.step.run(setting.updater.settings)
    assert setting.io.lanes()["nvme_read"][0] - read == (NUM_BUCKETS - 1) * 3 * 4096
    assert setting.updater.order == [0, 1, 3, 4, 5]
    assert setting.values("weights") == [2, 2, 1, 2, 2, 2]
    assert [state.steps for state in setting.parameters] == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("nth", range(1, 3 * NUM_BUCKETS + 1))
def test_a_failed_read_is_made_good_by_running_again(nth: int, make_setting: MakeSetting) -> None:
    setting = make_setting(f"op=read,nth={nth},errno=5")
    with pytest.raises(StorageError):
        setting.step.run(SETTINGS)
    assert [state.steps for state in setting.parameters] == [0] * NUM_BUCKETS
    setting.step.run(SETTINGS)
    assert sorted(setting.updater.order) == list(range(NUM_BUCKETS))
    assert_applied(setting)


@pytest.mark.parametrize("staged_chunks", [1, 3])
@pytest.mark.parametrize("nth", range(1, 2 * NUM_BUCKETS + 1))
def test_a_failed_write_is_made_good_by_running_again(
    nth: int, staged_chunks: int, make_setting: MakeSetting
) -> None:
    setting = make_setting(f"op=write,nth={WRITTEN + nth},errno=28", staged_chunks=staged_chunks)
    with pytest.raises(StorageError):
        setting.step.run(SETTINGS)
    setting.step.run(SETTINGS)
    assert sorted(setting.updater.order) == list(range(NUM_BUCKETS))
    assert_applied(setting)


@pytest.mark.parametrize("state_class", ["weights", "optimizer"])
def test_a_write_that_cannot_start_loses_neither_class(
    state_class: str, make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make_setting()
    start_write, failed = setting.nvme.start_write, []

    def refuse_once(record: object, tensor: torch.Tensor) -> object:
        name = record.name  # type: ignore[attr-defined]
        if name.startswith(f"{state_class} of bucket 2") and not failed:
            failed.append(name)
            raise StorageError(operation="write", path="disk", errno=5)
        return start_write(record, tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(setting.nvme, "start_write", refuse_once)
    with pytest.raises(StorageError):
        setting.step.run(SETTINGS)
    setting.step.run(SETTINGS)
    assert_applied(setting)


def test_an_optimizer_that_fails_leaves_its_chunk_as_it_was(make_setting: MakeSetting) -> None:
    setting = make_setting()
    setting.updater.fails = {3}
    with pytest.raises(OffloadError, match="the optimizer failed"):
        setting.step.run(SETTINGS)
    setting.store.drain()
    assert setting.host.used_bytes == 0
    assert setting.values("weights") == [2, 2, 2, 1, 1, 1]
    setting.step.run(SETTINGS)
    assert_applied(setting)


def test_a_weight_that_is_not_finite_is_told_after_the_step(make_setting: MakeSetting) -> None:
    setting = make_setting()
    setting.updater.not_finite = {1, 4}
    with pytest.raises(NonFiniteError, match="step 7 made a weight of parameter p1"):
        setting.step.run(SETTINGS)
    assert_applied(setting)


def test_an_error_in_between_does_not_hide_that(make_setting: MakeSetting) -> None:
    setting = make_setting("op=read,nth=12,errno=5")
    setting.updater.not_finite = {0}
    with pytest.raises(StorageError):
        setting.step.run(SETTINGS)
    with pytest.raises(NonFiniteError, match="p0"):
        setting.step.run(SETTINGS)
    setting.updater.not_finite.clear()
    setting.step.run(SETTINGS)
    assert_applied(setting, 2)
