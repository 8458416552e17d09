"""Held versions: current when committed, forgotten when dropped, and never half of either."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.errors import StorageError
from offload.native import IoEngine
from offload.partition.blocks import BlockStore
from offload.partition.layout import ClassLayout, FieldSpec, ParamSpec, pack
from offload.partition.shadows import Shadows
from offload.partition.staging import Staged
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.nvme import NvmeStore

CHUNK_BYTES = 65_536 * 4
NUM_CHUNKS = 3
CLASSES = ("weights", "gradients", "optimizer")


class Setting:
    """One bucket of three chunks: gradients at theirs, what is updated at `home`."""

    def __init__(
        self,
        path: Path,
        home: str,
        *,
        gradients: str = "host",
        fault: str | None = None,
        held_share: float = 1.0,
    ) -> None:
        numel = NUM_CHUNKS * 65_536
        spec = ParamSpec("w", (numel,), numel, "fp32", 4, True)
        (self.bucket,) = pack([spec], bucket_elements=65_536)
        self.io = IoEngine(backend="threads", threads=2, fault=fault)
        self.host = HostArena(32 * CHUNK_BYTES)
        self.device = CpuDeviceTier(16 * CHUNK_BYTES, self.io)
        self.nvme = NvmeStore([path], self.io, capacity_bytes=None, deadline_seconds=20)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=self.nvme, deadline_seconds=20
        )
        for state_class in CLASSES:
            layout = ClassLayout(self.bucket, [FieldSpec(state_class, "fp32", 4)])
            tier = gradients if state_class == "gradients" else home
            self.store.add(self.bucket, state_class, layout, tier)
        self.store.reserve_records(spare=2, held_share=held_share)
        self.share = HostShare(self.host, 9 * CHUNK_BYTES, "the test")
        self.shadows = Shadows(self.store)
        self.blocks = [self.store.block(0, state_class) for state_class in CLASSES]
        self.updated = [block for block in self.blocks if block.state_class != "gradients"]
        for chunk in range(NUM_CHUNKS):
            self.write(chunk, 1)
        self.store.drain()

    def write(self, chunk: int, value: int) -> None:
        for block in self.blocks:
            staged = self.store.stage_or_raise(block, chunk)
            staged.tensor.fill_(value)
            self.store.start_store(block, chunk, staged)

    def value(self, chunk: int) -> int:
        found = set()
        for block in self.updated:
            staged = self.store.load(block, chunk)
            found |= {int(staged.tensor.min()), int(staged.tensor.max())}
            staged.release()
        (value,) = found
        return value

    def load(self, chunk: int) -> list[Staged] | None:
        loaded = self.shadows.start_loads(self.blocks, chunk, self.share.take)
        for staged in loaded or ():
            staged.transfer.wait(20)
        return loaded

    def hold(self, chunk: int, loaded: list[Staged], value: int) -> None:
        for block, staged in zip(self.blocks, loaded, strict=True):
            if block in self.updated:
                staged.tensor.fill_(value)
                self.shadows.hold(block, chunk, staged)
            else:
                staged.release()

    def commit(self, chunk: int) -> None:
        for block in self.updated:
            self.shadows.commit(block, chunk)

    def drop(self, chunk: int) -> None:
        for block in self.updated:
            self.shadows.drop(block, chunk)

    def close(self) -> None:
        for chunk in range(NUM_CHUNKS):
            self.drop(chunk)
        self.store.drain()
        assert not self.share.used_bytes, "a piece of the share was not given back"
        self.nvme.close()
        self.device.close()
        self.share.close()
        self.host.close()
        self.io.close()


class HeldVersions(RuleBasedStateMachine):
    """Loads, holds, commits and drops of three chunks in any order, against a dictionary."""

    path: Path
    home: str

    def __init__(self) -> None:
        super().__init__()
        self.setting = Setting(self.path, self.home)
        self.current = dict.fromkeys(range(NUM_CHUNKS), 1)
        self.held: dict[int, int] = {}
        self.last = 1

    @rule(chunk=st.integers(0, NUM_CHUNKS - 1))
    def hold(self, chunk: int) -> None:
        if chunk in self.held:
            return
        self.setting.store.drain()  # a chunk that is being written is not loaded
        loaded = self.setting.load(chunk)
        assert loaded is not None
        self.last = self.last % 200 + 1
        self.setting.hold(chunk, loaded, self.last)
        self.held[chunk] = self.last

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.held)))
        self.setting.commit(chunk)
        self.current[chunk] = self.held.pop(chunk)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.held)))
        self.setting.drop(chunk)
        del self.held[chunk]

    @rule()
    def settle(self) -> None:
        self.setting.shadows.settle_ended()

    @rule(chunk=st.integers(0, NUM_CHUNKS - 1))
    def load_and_cancel(self, chunk: int) -> None:
        if chunk not in self.held:
            self.setting.store.drain()
            loaded = self.setting.load(chunk)
            assert loaded is not None
            self.setting.shadows.cancel_loads(self.setting.blocks, chunk, loaded)

    @invariant()
    def homes_say_what_was_committed(self) -> None:
        for chunk, value in self.current.items():
            assert self.setting.value(chunk) == value

    def teardown(self) -> None:
        self.setting.close()


@pytest.mark.parametrize("home", ["nvme", "host", "device"])
def test_held_versions_of_any_home(home: str, tmp_path: Path) -> None:
    machine = type("Machine", (HeldVersions,), {"path": tmp_path, "home": home})
    case = machine.TestCase()
    case.settings = settings(max_examples=8, stateful_step_count=10, deadline=None)
    case.runTest()


def test_no_more_is_held_than_there_are_shadows(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "nvme", held_share=0.7)  # of three: two
    for chunk in range(2):
        loaded = setting.load(chunk)
        assert loaded is not None
        setting.hold(chunk, loaded, 7)
    used = setting.share.used_bytes
    assert setting.load(2) is None
    assert setting.share.used_bytes == used, "what was staged before there was no room is back"
    setting.drop(0)
    loaded = setting.load(2)
    assert loaded is not None
    setting.hold(2, loaded, 9)
    setting.commit(2)
    setting.commit(1)
    setting.store.drain()
    assert [setting.value(chunk) for chunk in range(NUM_CHUNKS)] == [1, 7, 9]
    setting.close()


def test_a_held_write_that_fails_is_not_good_and_costs_nothing(tmp_path: Path) -> None:
    written = 2 * NUM_CHUNKS
    setting = Setting(tmp_path, "nvme", fault=f"op=write,nth={written + 1},errno=5")
    loaded = setting.load(0)
    assert loaded is not None
    setting.hold(0, loaded, 7)
    while setting.share.used_bytes:
        setting.shadows.settle_ended()
    assert not all(setting.shadows.is_good(block, 0) for block in setting.updated)
    setting.drop(0)
    assert setting.value(0) == 1
    loaded = setting.load(0)  # its shadows are free again
    assert loaded is not None
    setting.hold(0, loaded, 8)
    setting.commit(0)
    setting.store.drain()
    assert setting.value(0) == 8
    setting.close()


def test_a_write_that_fails_after_its_commit_is_repeated(tmp_path: Path) -> None:
    written = 2 * NUM_CHUNKS
    setting = Setting(tmp_path, "nvme", fault=f"op=write,nth={written + 1},errno=5")
    loaded = setting.load(0)
    assert loaded is not None
    setting.hold(0, loaded, 7)
    setting.commit(0)  # whether the write has failed by now is not known
    with pytest.raises(StorageError):
        setting.store.drain()
    setting.store.retry_failed()
    assert setting.value(0) == 7
    setting.close()


def test_a_chunk_that_was_written_meanwhile_can_only_be_dropped(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "nvme", fault="op=write,nth=7,count=2,delay=300")
    loaded = setting.load(0)
    assert loaded is not None
    setting.write(0, 5)  # an edit goes home, slowly
    setting.hold(0, loaded, 7)
    assert not any(setting.shadows.is_good(block, 0) for block in setting.updated)
    setting.drop(0)
    setting.store.drain()
    assert setting.value(0) == 5
    setting.close()


def bytes_read(setting: Setting) -> int:
    return setting.io.lanes()["nvme_read"][0]


def test_weights_are_taken_from_their_page_while_it_is_there(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "nvme")
    weights = setting.blocks[0]
    page = setting.device.lease(weights.layout.nbytes, weights.name)
    page.tensor.fill_(3)
    for chunk in range(NUM_CHUNKS):  # of a page every chunk is told apart
        page.tensor[chunk * CHUNK_BYTES] = 100 + chunk
    setting.store.offer_copy(weights, page)
    before = bytes_read(setting)
    loaded = setting.load(1)
    assert loaded is not None
    taken = dict(zip(CLASSES, loaded, strict=True))
    assert taken["weights"].tensor[0] == 101
    assert set(taken["weights"].tensor[1:].tolist()) == {3}
    assert taken["weights"].tensor.data_ptr() != page.tensor[CHUNK_BYTES:].data_ptr()
    assert set(taken["optimizer"].tensor.tolist()) == {1}
    assert bytes_read(setting) - before == CHUNK_BYTES, "the optimizer's"
    setting.hold(1, loaded, 7)
    assert page.tensor[CHUNK_BYTES] == 101, "what is held is not in the page"
    setting.drop(1)

    setting.store.withdraw_copy(weights)
    loaded = setting.load(1)
    assert loaded is not None
    assert set(loaded[0].tensor.tolist()) == {1}, "the page has gone, and its memory is another's"
    setting.shadows.cancel_loads(setting.blocks, 1, loaded)
    page.release()
    setting.close()


def test_a_page_that_leaves_before_it_is_copied_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, "nvme")
    weights = setting.blocks[0]
    page = setting.device.lease(weights.layout.nbytes, weights.name)
    page.tensor.fill_(3)
    setting.store.offer_copy(weights, page)
    start_loads = setting.store.start_loads

    def leave(*args: object, **kwargs: object) -> object:
        setting.store.withdraw_copy(weights)
        page.tensor.fill_(9)
        return start_loads(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(setting.store, "start_loads", leave)
    loaded = setting.load(0)
    assert loaded is not None
    assert set(loaded[0].tensor.tolist()) == {1}
    setting.shadows.cancel_loads(setting.blocks, 0, loaded)
    page.release()
    setting.close()


def test_a_gradient_on_its_way_home_is_not_read_from_there(tmp_path: Path) -> None:
    writes = 3 * NUM_CHUNKS
    setting = Setting(
        tmp_path, "nvme", gradients="nvme", fault=f"op=write,nth={writes + 1},delay=300"
    )
    gradients = setting.blocks[1]
    staged = setting.store.stage_or_raise(gradients, 0)
    staged.tensor.fill_(6)
    setting.store.start_store(gradients, 0, staged)
    before = bytes_read(setting)
    loaded = setting.load(0)
    assert loaded is not None
    assert set(loaded[1].tensor.tolist()) == {6}
    assert bytes_read(setting) - before == len(setting.updated) * CHUNK_BYTES
    setting.store.drain()  # gives the memory of the write back, and somebody else takes it
    other = setting.store.stage_or_raise(gradients, 1)
    other.tensor.fill_(9)
    assert set(loaded[1].tensor.tolist()) == {6}
    other.release()
    setting.shadows.cancel_loads(setting.blocks, 0, loaded)
    setting.close()


def test_a_failed_write_is_repeated_before_there_is_a_next_version(tmp_path: Path) -> None:
    """Though the page on the device has what could not be written: else it would come after it."""
    written = 2 * NUM_CHUNKS
    setting = Setting(tmp_path, "nvme", fault=f"op=write,nth={written + 1},errno=5")
    weights = setting.blocks[0]
    loaded = setting.load(0)
    assert loaded is not None
    setting.hold(0, loaded, 7)
    setting.commit(0)
    page = setting.device.lease(weights.layout.nbytes, weights.name)
    page.tensor.fill_(7)
    setting.store.offer_copy(weights, page)
    with pytest.raises(StorageError):
        setting.store.drain()

    loaded = setting.load(0)
    assert loaded is not None
    setting.hold(0, loaded, 8)
    setting.commit(0)
    setting.store.retry_failed()
    setting.store.drain()
    assert setting.value(0) == 8
    page.release()
    setting.close()


def test_what_is_committed_after_all_was_void_is_read(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "nvme")
    setting.store.void()
    loaded = setting.load(0)
    assert loaded is not None
    assert set(loaded[0].tensor.tolist()) == {0}
    setting.hold(0, loaded, 7)
    while setting.share.used_bytes:
        setting.shadows.settle_ended()
    setting.commit(0)
    assert [setting.value(chunk) for chunk in range(NUM_CHUNKS)] == [7, 0, 0]
    setting.close()
