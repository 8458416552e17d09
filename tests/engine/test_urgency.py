"""How urgent each movement of a training run is, and that a fault passes what was queued before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import OffloadConfig
from offload.engine import build
from offload.engine.paging.page_in import PageIn
from offload.native import IoEngine
from offload.native.core import BULK_URGENCY
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import ClassLayout, FieldSpec, ParamSpec, pack
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated import LaneModel, SimulatedDeviceTier, SimulatedIo
from offload.tiers.transfer import Urgency, wait_all
from tests.oracle import make_engine, settings, small_loss, small_model

NUM_CHUNKS = 4
CHUNK_BYTES = 65_536 * 4


class RecordingIo(IoEngine):
    """Counts what is started, by what it is and how urgent."""

    def __init__(self) -> None:
        super().__init__(backend="threads", threads=2)
        self.started: Counter[tuple[str, Urgency]] = Counter()

    def start_read(self, *arguments: Any, **options: Any) -> Any:
        self.started["read", class_of(options["urgency"])] += 1
        return super().start_read(*arguments, **options)

    def start_write(self, *arguments: Any, **options: Any) -> Any:
        self.started["write", class_of(options["urgency"])] += 1
        return super().start_write(*arguments, **options)


def class_of(urgency: int) -> Urgency:
    if urgency >= BULK_URGENCY:
        return Urgency.BULK
    return Urgency.PLANNED if urgency >= Urgency.PLANNED else Urgency.DEMAND


@pytest.mark.usefixtures("by_itself")
def test_faults_are_in_demand_fetches_ahead_are_planned_and_state_is_bulk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = RecordingIo()

    def open_io(config: OffloadConfig) -> IoEngine:
        return io

    monkeypatch.setattr(build, "open_io", open_io)
    sections = settings("nvme", tmp_path, bucket_elements=1024, device=1 << 20, host=4 << 20)
    with make_engine(small_model(), sections) as engine:
        by_step = []
        while engine.global_steps < 3:
            io.started.clear()
            engine.backward(small_loss(engine, engine.micro_steps))
            fetched = Counter(io.started)
            io.started.clear()
            engine.step()
            by_step.append((engine.report().faults, fetched, Counter(io.started)))
    first, last = by_step[0], by_step[-1]
    assert first[1]["read", Urgency.DEMAND] > 0  # no trace is known yet
    assert last[1]["read", Urgency.PLANNED] > 0
    assert last[1]["read", Urgency.DEMAND] == 0
    for _, fetched, stepped in by_step:
        assert {kind for kind in fetched if kind[0] == "write"} <= {("write", Urgency.BULK)}
        assert stepped["read", Urgency.BULK] > 0
        assert stepped["write", Urgency.BULK] > 0
        assert stepped["write", Urgency.PLANNED] == stepped["write", Urgency.DEMAND] == 0


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[[SimulatedIo, int], BlockStore]]:
    """A function that makes a store of blocks on NVMe, each of them written, on a virtual clock."""
    stores: list[BlockStore] = []

    def make(io: SimulatedIo, num_blocks: int) -> BlockStore:
        numel = NUM_CHUNKS * CHUNK_BYTES // 4
        (bucket,) = pack([ParamSpec("w", (numel,), numel, "fp32", 4, True)], bucket_elements=65_536)
        host = HostArena((num_blocks + 1) * NUM_CHUNKS * CHUNK_BYTES)
        device = SimulatedDeviceTier(num_blocks * NUM_CHUNKS * CHUNK_BYTES, io)
        nvme = NvmeStore([tmp_path], io)
        store = BlockStore(host=host, device=device, nvme=nvme, deadline_seconds=1e6)
        stores.append(store)
        layout = ClassLayout(bucket, [FieldSpec("weight", "fp32", 4)])
        for index in range(num_blocks):
            store.add(bucket, f"weights {index}", layout, "nvme")
        store.reserve_records(spare=2 * NUM_CHUNKS)
        for block in store.blocks():
            for chunk in range(NUM_CHUNKS):
                staged = store.stage_or_raise(block, chunk)
                staged.tensor.zero_()
                store.start_store(block, chunk, staged)
        store.drain()
        return store

    yield make
    for store in stores:
        assert store.nvme is not None
        for tier in (store.nvme, store.device, store.host):
            tier.close()


def page_in(store: BlockStore, block: Block, urgency: int) -> PageIn:
    lease = store.device.lease(block.layout.nbytes, block.name)
    return PageIn(block, lease, store, depth=NUM_CHUNKS, urgency=urgency)


def steady_io() -> SimulatedIo:
    """One chunk a second is read; copies take no time worth counting."""
    reads = LaneModel(CHUNK_BYTES, 0.0, 0.0, quantum_bytes=CHUNK_BYTES)
    return SimulatedIo(lanes={"nvme_read": reads, "h2d": LaneModel(1e15, 0.0, 0.0)})


def test_a_fault_passes_the_reads_of_state(
    make_store: Callable[[SimulatedIo, int], BlockStore],
) -> None:
    io = steady_io()
    store = make_store(io, 4)
    wanted, *others = store.blocks()
    began = io.clock.now_seconds
    state = [store.start_load(block, chunk) for block in others for chunk in range(NUM_CHUNKS)]
    fault = page_in(store, wanted, Urgency.DEMAND)
    assert fault.start(wait=True)
    fault.finish()
    fault.settle()
    # The chunk that had begun, and its own; in the order of the starts it would be 16 seconds.
    assert io.clock.now_seconds - began == pytest.approx(1.0 + NUM_CHUNKS)
    for staged in state:
        assert staged is not None
        staged.transfer.wait()
        staged.release()


def test_a_fault_on_a_page_whose_fetch_is_queued_raises_all_of_it(
    make_store: Callable[[SimulatedIo, int], BlockStore],
) -> None:
    io = steady_io()
    store = make_store(io, 3)
    began = io.clock.now_seconds
    fetches = [
        page_in(store, block, Urgency.PLANNED + place) for place, block in enumerate(store.blocks())
    ]
    for fetch in fetches:
        assert fetch.start(wait=False)
    fetches[-1].finish()
    assert io.clock.now_seconds - began == pytest.approx(1.0 + NUM_CHUNKS)
    for fetch in fetches:
        fetch.finish()
        fetch.settle()
    assert io.clock.now_seconds - began == pytest.approx(3.0 * NUM_CHUNKS)


def test_a_load_makes_the_write_of_the_same_chunk_as_urgent(
    make_store: Callable[[SimulatedIo, int], BlockStore],
) -> None:
    writes = LaneModel(CHUNK_BYTES, 0.0, 0.0, quantum_bytes=CHUNK_BYTES)
    io = SimulatedIo(lanes={"nvme_write": writes, "nvme_read": LaneModel(1e15, 0.0, 0.0)})
    store = make_store(io, 2)
    block, other = store.blocks()
    assert store.nvme is not None
    began = io.clock.now_seconds
    for chunk in range(NUM_CHUNKS):
        staged = store.stage_or_raise(block, chunk)
        staged.tensor.fill_(chunk)
        store.start_store(block, chunk, staged)
    passed = [
        store.nvme.start_write(
            record, torch.zeros(record.nbytes, dtype=torch.uint8), urgency=Urgency.PLANNED
        )
        for record in other.records[:2]
    ]
    loaded = store.start_load(block, NUM_CHUNKS - 1, urgency=Urgency.DEMAND)
    assert loaded is not None
    loaded.transfer.wait()
    assert torch.equal(loaded.tensor, torch.full_like(loaded.tensor, NUM_CHUNKS - 1))
    assert io.clock.now_seconds - began == pytest.approx(2.0)
    loaded.release()
    wait_all(passed)
    store.drain()
