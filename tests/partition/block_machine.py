"""Blocks at all homes, and versions that are held, against a dict of what was stored last."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.errors import BudgetError, StorageError
from offload.native.fault_spec import FaultAction
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import (
    UPDATED_CLASSES,
    Bucket,
    Chunk,
    ClassLayout,
    FieldSpec,
    ParamSlot,
)
from offload.partition.shadows import Shadows
from offload.partition.staging import Staged
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated import RandomFaults, SimulatedDeviceTier, SimulatedIo
from offload.tiers.simulated_streams import SimulatedAccelerator

PAGE = 4096
NUM_BUCKETS, NUM_CHUNKS = 2, 2
CLASSES = ("weights", "gradients", "optimizer")
HOMES = ("nvme", "nvme", "host", "device")
STAGING_BYTES = 4 * PAGE
SHARE_BYTES = 9 * PAGE

Key = tuple[int, str, int]
Place = tuple[int, int]  # bucket, chunk
T = TypeVar("T")


def two_chunks(index: int) -> Bucket:
    """A bucket of chunks of one page a class."""
    numel = PAGE // 4
    chunks = tuple(Chunk(number, number * numel, numel) for number in range(NUM_CHUNKS))
    slot = ParamSlot(index, 0, NUM_CHUNKS * numel)
    return Bucket(index, "fp32", 4, True, (slot,), NUM_CHUNKS * numel, chunks)


@dataclass(eq=False)
class Load:
    key: Key
    staged: Staged
    expected: int | None


class BlockMachine(RuleBasedStateMachine):
    """Stores, loads, and held versions of chunks in any order, while requests fail or are late.

    What is loaded is what was stored or committed last, or an error that a fault has caused; in the
    end everything can be read, and all memory and all extents are back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.marks = itertools.count(1)
        self.values: dict[Key, int | None] = {}  # None: nobody knows
        self.loads: list[Load] = []
        self.held: dict[Place, int] = {}
        self.stale: set[Place] = set()  # held for a home that has been written meanwhile

    @initialize(
        homes=st.lists(st.sampled_from(HOMES), min_size=NUM_BUCKETS * 3, max_size=NUM_BUCKETS * 3),
        accelerator=st.booleans(),
        spare=st.integers(1, 3),
        seed=st.integers(0, 999),
        rate=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def make_store(
        self, homes: list[str], accelerator: bool, spare: int, seed: int, rate: float
    ) -> None:
        rates = {
            ("read", FaultAction("errno", 5)): rate,
            ("write", FaultAction("errno", 28)): rate,
            ("copy", FaultAction("errno", 5)): rate / 2,
            ("any", FaultAction("delay", 100_000)): rate / 10,
        }
        self.faults = RandomFaults(seed, rates, most={"delay": 2})
        self.faults.is_on = False
        self.io = SimulatedIo(seed=seed, fault=self.faults)
        self.homes_bytes = homes.count("host") * NUM_CHUNKS * PAGE
        self.host = HostArena(self.homes_bytes + STAGING_BYTES)
        device_bytes = max(1, homes.count("device")) * NUM_CHUNKS * PAGE
        self.device: DeviceTier = (
            SimulatedAccelerator(device_bytes, self.io, seed=seed)
            if accelerator
            else SimulatedDeviceTier(device_bytes, self.io)
        )
        self.nvme = NvmeStore([self.folder.name], self.io)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=self.nvme, deadline_seconds=60
        )
        for index in range(NUM_BUCKETS):
            bucket = two_chunks(index)
            for number, name in enumerate(CLASSES):
                layout = ClassLayout(bucket, [FieldSpec(name, "fp32", 4)])
                self.store.add(bucket, name, layout, homes[index * 3 + number])
        self.store.reserve_records(spare=spare, held_share=1.0)
        self.share = HostShare(self.host, SHARE_BYTES, "what is held", apart=True)
        self.shadows = Shadows(self.store)
        for block in self.store.blocks():
            for chunk in range(NUM_CHUNKS):
                self.put(block, chunk)
        self.store.drain()
        self.faults.is_on = True

    # -- what may happen -------------------------------------------------------------------------

    @rule(number=st.integers(0, 99))
    def store_chunk(self, number: int) -> None:
        block, chunk = self.choose(number)
        if any(load.key == self.key(block, chunk) for load in self.loads):
            return
        self.tried(lambda: self.put(block, chunk))

    @rule(number=st.integers(0, 99))
    def load(self, number: int) -> None:
        block, chunk = self.choose(number)
        staged = self.tried(lambda: self.store.load(block, chunk))
        if staged is not None:
            self.check(Load(self.key(block, chunk), staged, self.values[self.key(block, chunk)]))

    @rule(number=st.integers(0, 99), way=st.sampled_from(["load", "read", "into"]))
    def start_load(self, number: int, way: str) -> None:
        block, chunk = self.choose(number)
        key = self.key(block, chunk)

        def start() -> Staged | None:
            if way == "load":
                return self.store.start_load(block, chunk, wait=False)
            into = torch.empty(PAGE, dtype=torch.uint8) if way == "into" else None
            return self.store.start_read(block, chunk, wait=False, into=into)

        staged = self.tried(start)
        if staged is not None and self.store.in_place(block):
            self.check(Load(key, staged, self.values[key]))
        elif staged is not None:
            self.loads.append(Load(key, staged, self.values[key]))

    @precondition(lambda self: self.loads)
    @rule(number=st.integers(0, 99))
    def end_load(self, number: int) -> None:
        load = self.loads.pop(number % len(self.loads))
        try:
            load.staged.transfer.wait()
        except StorageError:
            assert self.faults.acted
            self.store.late.release([load.staged])
            return
        self.check(load)

    @rule(number=st.integers(0, 99))
    def hold(self, number: int) -> None:
        place = divmod(number % (NUM_BUCKETS * NUM_CHUNKS), NUM_CHUNKS)
        if place in self.held:
            return
        bucket, chunk = place
        blocks = [self.store.block(bucket, name) for name in CLASSES]
        loaded = self.tried(lambda: self.shadows.start_loads(blocks, chunk, self.share.take))
        if loaded is None:
            return
        try:
            for staged in loaded:
                staged.transfer.wait()
        except StorageError:
            assert self.faults.acted
            self.shadows.cancel_loads(blocks, chunk, loaded)
            return
        for block, staged in zip(blocks, loaded, strict=True):
            self.assert_is(staged.tensor, self.values[self.key(block, chunk)], block)
        mark = next(self.marks)
        self.held[place] = mark
        for block, staged in zip(blocks, loaded, strict=True):
            if block.state_class in UPDATED_CLASSES:
                staged.tensor.copy_(self.signed(mark))
                self.tried(lambda b=block, s=staged: self.shadows.hold(b, chunk, s))  # type: ignore[misc]
            else:
                staged.release()

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99))
    def commit_or_drop(self, number: int) -> None:
        place = sorted(self.held)[number % len(self.held)]
        on_device = {load.key for load in self.loads if self.home_of(load.key) == "device"}
        if any((place[0], name, place[1]) in on_device for name in CLASSES):
            return  # who reads a home on the device has ended before it is written
        blocks = [self.store.block(place[0], name) for name in UPDATED_CLASSES]
        is_good = all(self.shadows.is_good(block, place[1]) for block in blocks)
        mark = self.held.pop(place)
        if is_good and place not in self.stale and number % 3:
            for block in blocks:
                self.tried(lambda b=block: self.shadows.commit(b, place[1]))  # type: ignore[misc]
                self.values[self.key(block, place[1])] = mark
        else:
            for block in blocks:
                self.shadows.drop(block, place[1])
        self.stale.discard(place)

    @rule(what=st.sampled_from(["settle_one", "settle_ended", "drain", "retry_failed"]))
    def settle(self, what: str) -> None:
        self.tried(getattr(self.store, what))

    @rule()
    def settle_held(self) -> None:
        self.shadows.settle_ended()

    @precondition(lambda self: not self.held and not self.loads)
    @rule(lot=st.integers(0, 9))
    def void(self, lot: int) -> None:
        """All state is about to be replaced."""
        if lot:
            return
        unsure = set(self.store._failed) | set(self.store._writing)
        if self.tried(lambda: (self.store.void(), True)) is None:
            return
        for key in self.values:
            if self.store.block(*key[:2]).home == "nvme":
                self.values[key] = 0
            elif key in unsure:
                self.values[key] = None

    @rule(seconds=st.floats(0.0, 0.05))
    def compute(self, seconds: float) -> None:
        self.io.clock.advance(seconds)

    @rule()
    def much_later(self) -> None:
        self.io.clock.advance(200.0)
        self.store.late.collect()

    # -- what the model knows --------------------------------------------------------------------

    def put(self, block: Block, chunk: int) -> bool:
        """Store a new version; what the store has taken counts, whatever becomes of its write."""
        staged = self.store.stage_or_raise(block, chunk)
        mark = next(self.marks)
        staged.tensor.copy_(self.signed(mark))
        self.values[self.key(block, chunk)] = mark
        place = (block.bucket.index, chunk)
        if place in self.held and block.state_class in UPDATED_CLASSES:
            self.stale.add(place)
        self.store.start_store(block, chunk, staged)
        return True

    def tried(self, call: Callable[[], T]) -> T | None:
        """What it returns; None after an error that there is a reason for."""
        try:
            return call()
        except StorageError as error:
            if not self.faults.acted:
                raise AssertionError("nothing has failed") from error
        except BudgetError as error:
            if not (self.loads or self.store.late._kept or self.faults.acted):
                raise AssertionError("nobody has the staging") from error
        return None

    def choose(self, number: int) -> tuple[Block, int]:
        blocks = self.store.blocks()
        return blocks[number // NUM_CHUNKS % len(blocks)], number % NUM_CHUNKS

    def home_of(self, key: Key) -> str:
        return self.store.block(*key[:2]).home

    @staticmethod
    def key(block: Block, chunk: int) -> Key:
        return block.bucket.index, block.state_class, chunk

    @staticmethod
    def signed(mark: int) -> torch.Tensor:
        return torch.full((PAGE // 8,), mark, dtype=torch.int64).view(torch.uint8)

    def assert_is(self, tensor: torch.Tensor, expected: int | None, block: Block) -> None:
        found = tensor.view(torch.int64)
        if expected is not None:
            assert bool((found == expected).all()), f"{block.name}: {found[0]}, not {expected}"

    def check(self, load: Load) -> None:
        self.assert_is(load.staged.tensor, load.expected, self.store.block(*load.key[:2]))
        load.staged.release()

    @invariant()
    def budgets_are_kept(self) -> None:
        if hasattr(self, "store"):
            assert self.host.used_bytes <= self.host.budget_bytes
            assert self.share.used_bytes <= self.share.nbytes
            assert self.device.used_bytes <= self.device.budget_bytes

    def teardown(self) -> None:
        if not hasattr(self, "share"):
            return
        self.faults.is_on = False
        while self.loads:
            self.end_load(0)
        for place in list(self.held):
            for name in UPDATED_CLASSES:
                self.shadows.drop(self.store.block(place[0], name), place[1])
        self.io.clock.advance(1000.0)
        for _ in range(3):  # what had failed is told once
            self.tried(self.store.drain)
        self.store.retry_failed()
        self.store.settle_ended()
        for block in self.store.blocks():
            for chunk in range(NUM_CHUNKS):
                key = self.key(block, chunk)
                self.check(Load(key, self.store.load(block, chunk), self.values[key]))
        self.store.late.collect()
        assert self.host.used_bytes == self.homes_bytes + SHARE_BYTES, self.host.owners()
        assert self.share.used_bytes == 0
        current = sum(r.current is not None for b in self.store.blocks() for r in b.records)
        for pool in self.nvme._pools.values():
            assert pool.num_free == pool.num_extents - current, "extents were lost"
        self.nvme.close()
        self.device.close()
        self.share.close()
        self.host.close()
        self.folder.cleanup()
