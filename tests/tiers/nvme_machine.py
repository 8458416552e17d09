"""The NVMe store against a dict, on a virtual clock, while reads and writes fail, lie and hang."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.errors import (
    BudgetError,
    ChecksumError,
    DeadlineError,
    EngineStateError,
    OffloadError,
    StorageError,
)
from offload.native.fault_spec import FaultSpec
from offload.tiers.extents import Extent, round_up_to_page
from offload.tiers.nvme import NvmeStore
from offload.tiers.pins import Pin
from offload.tiers.records import Record
from offload.tiers.simulated import LaneModel, SimulatedIo
from offload.tiers.store_transfer import StoreTransfer
from offload.tiers.transfer import Urgency

SIZES = (4096, 4096, 4096, 6000, 6000)
# Small quanta, so that an urgent request passes between two of another.
LANES = {
    lane: LaneModel(jitter_seconds=2e-2, quantum_bytes=2048)
    for lane in ("nvme_read", "nvme_write", "h2d", "d2h")
}
WELL = ""
FAILS = "errno=5"
HANGS = "drop=1"
LIES = ("corrupt=1", "lost=1", "misdirect=4096")  # reported as done
FAULTS = (WELL, WELL, WELL, WELL, WELL, FAILS, FAILS, "delay=3000", HANGS, *LIES)
URGENCIES = (int(Urgency.DEMAND), Urgency.PLANNED + 3, int(Urgency.BULK))


@dataclass(eq=False)
class Write:
    record: Record
    data: torch.Tensor
    fault: str
    held: bool = False  # it does not commit


@dataclass(eq=False)
class Read:
    record: Record
    buffer: torch.Tensor
    expected: Version
    fault: str


@dataclass(eq=False)
class Version:
    data: torch.Tensor
    damaged: bool = False  # the disk has lied


def failure_of(transfer: StoreTransfer) -> StorageError | None:
    try:
        transfer.wait()
    except StorageError as error:
        return error
    return None


class StoreMachine(RuleBasedStateMachine):
    """Writes, held writes and reads of a few records in any order.

    What is read is what was committed last when the read began, or an error that says what is
    wrong; extents are neither lost nor anybody else's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.num_versions = 0
        self.committed: dict[Record, Version] = {}
        self.writes: dict[StoreTransfer, Write] = {}
        self.reads: dict[StoreTransfer, Read] = {}
        # Shadows by record: taken, being written, or holding a version.
        self.taken: set[Record] = set()
        self.holding: dict[Record, StoreTransfer] = {}
        self.held: dict[Record, Version | None] = {}  # None: its write has failed
        self.stale: set[Record] = set()  # held for a version that has been passed over
        self.pins: dict[Pin, Version] = {}
        self.may_be_anywhere = False  # a write went to another place than it should

    @initialize(
        spare=st.integers(0, 3),
        num_held=st.integers(0, 3),
        num_paths=st.integers(1, 3),
        room=st.integers(0, 5),
        faults=st.sampled_from([(WELL,), FAULTS[:8], FAULTS[:-1], FAULTS]),
        seed=st.integers(0, 999),
    )
    def make_store(
        self,
        spare: int,
        num_held: int,
        num_paths: int,
        room: int,
        faults: tuple[str, ...],
        seed: int,
    ) -> None:
        self.io = SimulatedIo(seed=seed, lanes=LANES)
        paths = [self.folder.name] * num_paths
        self.store = NvmeStore(paths, self.io)
        sizes = [(f"record {index}", nbytes) for index, nbytes in enumerate(SIZES)]
        held = dict.fromkeys(SIZES, num_held)
        self.records = self.store.reserve(sizes, spare=spare, held=held)
        self.store.capacity_bytes = self.store.used_bytes + room * 4096
        self.spare = spare
        self.faults = faults

    # -- what may happen -------------------------------------------------------------------------

    @rule(index=st.integers(0, 99), lot=st.integers(0, 99), urgency=st.sampled_from(URGENCIES))
    def start_write(self, index: int, lot: int, urgency: int) -> None:
        record = self.records[index % len(self.records)]
        data = self.new_data(record)
        with self.fault("write", lot) as fault:
            try:
                transfer = self.store.start_write(record, data, urgency=urgency)
            except BudgetError:
                pool = self.store._pools[record.extent_bytes]
                assert self.pins, "what has all extents?"
                assert not pool.num_free
                self.learn()
                return
            except EngineStateError:
                pool = self.store._pools[record.extent_bytes]
                assert not self.spare, "a shadow extent was reserved, and there is none"
                assert not pool.num_free
                assert not self.store._in_flight[record.extent_bytes]
                self.learn()
                return
            except DeadlineError:
                assert record.extent_bytes in {hung.extent_bytes for hung in self.hung()}
                self.learn()
                return
        self.learn()  # the store may have settled others to get an extent
        assert isinstance(transfer, StoreTransfer)
        if record in self.taken or record in self.holding or record in self.held:
            self.stale.add(record)
        self.writes[transfer] = Write(record, data, fault)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), lot=st.integers(0, 99), urgency=st.sampled_from(URGENCIES))
    def start_read(self, data: st.DataObject, lot: int, urgency: int) -> None:
        record = data.draw(st.sampled_from(self.written()))
        buffer = torch.empty(record.nbytes, dtype=torch.uint8)
        with self.fault("read", lot) as fault:
            transfer = self.store.start_read(record, buffer, urgency=urgency)
        assert isinstance(transfer, StoreTransfer)
        self.reads[transfer] = Read(record, buffer, self.committed[record], fault)

    @rule(index=st.integers(0, 99))
    def read_what_was_never_written(self, index: int) -> None:
        record = self.records[index % len(self.records)]
        if record not in self.committed:
            buffer = torch.empty(record.nbytes, dtype=torch.uint8)
            try:
                self.store.start_read(record, buffer)
            except EngineStateError:
                return
            raise AssertionError(f"{record!r} can be read")

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def wait_for_write(self, data: st.DataObject) -> None:
        self.wait_write(data.draw(st.sampled_from(list(self.writes))))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def wait_for_read(self, data: st.DataObject) -> None:
        self.wait_read(data.draw(st.sampled_from(list(self.reads))))

    @precondition(lambda self: self.reads or self.writes)
    @rule(data=st.data(), urgency=st.sampled_from(URGENCIES))
    def expedite(self, data: st.DataObject, urgency: int) -> None:
        data.draw(st.sampled_from([*self.reads, *self.writes])).expedite(urgency)

    @rule(seconds=st.floats(0.0, 0.05))
    def compute(self, seconds: float) -> None:
        self.io.clock.advance(seconds)

    @rule(index=st.integers(0, 99))
    def vacate(self, index: int) -> None:
        record = self.records[index % len(self.records)]
        if record.pending is None:
            self.store.vacate(record)
            self.committed.pop(record, None)

    # -- pins ------------------------------------------------------------------------------------

    @precondition(lambda self: self.committed and len(self.pins) < 6)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.written()))
        pin = self.store.pin(record)
        assert pin is not None
        assert pin.extent == record.current
        self.pins[pin] = self.committed[record]

    @rule(index=st.integers(0, 99))
    def pin_what_was_never_written(self, index: int) -> None:
        record = self.records[index % len(self.records)]
        if record not in self.committed:
            assert self.store.pin(record) is None

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), lot=st.integers(0, 99))
    def read_pinned(self, data: st.DataObject, lot: int) -> None:
        """Whatever was written since: what was pinned is what it was."""
        pin = data.draw(st.sampled_from(list(self.pins)))
        buffer = torch.empty(pin.record.nbytes, dtype=torch.uint8)
        with self.fault("read", lot) as fault:
            transfer = self.store.start_read_pinned(pin, buffer)
        assert isinstance(transfer, StoreTransfer)
        self.reads[transfer] = Read(pin.record, buffer, self.pins[pin], fault)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = data.draw(st.sampled_from(list(self.pins)))
        reads = [t for t, read in self.reads.items() if read.expected is self.pins[pin]]
        if not reads:  # a version stays pinned until its transfers have settled
            self.store.unpin(pin)
            del self.pins[pin]

    @rule(nbytes=st.sampled_from(sorted(set(SIZES))), count=st.integers(1, 2))
    def reserve_beside_pins(self, nbytes: int, count: int) -> None:
        if len(self.pins) > 2:
            self.expect_room(lambda: self.store.reserve_beside_pins({nbytes: count}))

    # -- held versions ---------------------------------------------------------------------------

    @rule(index=st.integers(0, 99), lot=st.integers(0, 99), writes=st.booleans())
    def take_shadow(self, index: int, lot: int, writes: bool) -> None:
        have_none = [r for r in self.records if r.shadow is None and r not in self.holding]
        if not have_none:
            return
        record = have_none[index % len(have_none)]
        num_free = self.store._pools[record.extent_bytes].num_free
        can = bool(
            record.pending is None and self.store._num_holdable[record.extent_bytes] and num_free
        )
        assert self.store.take_shadow(record) is can
        if can:
            self.taken.add(record)
            if writes:
                self.start_held(record, lot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), lot=st.integers(0, 99))
    def start_held_write(self, data: st.DataObject, lot: int) -> None:
        self.start_held(
            data.draw(st.sampled_from([r for r in self.records if r in self.taken])), lot
        )

    def start_held(self, record: Record, lot: int) -> None:
        version = self.new_data(record)
        with self.fault("write", lot) as fault:
            transfer = self.store.start_held_write(record, version)
        if transfer is None:
            assert record.pending is not None
            return
        assert isinstance(transfer, StoreTransfer)
        self.taken.remove(record)
        self.stale.discard(record)  # it is the version after the one that there is now
        self.writes[transfer] = Write(record, version, fault, held=True)
        self.holding[record] = transfer

    @precondition(lambda self: self.holding or self.held)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        good = [r for r in self.records if self.held.get(r) or r in self.holding]
        good = [r for r in good if r not in self.stale]
        if not good:
            return
        record = data.draw(st.sampled_from(good))
        self.store.commit(record)
        transfer = self.holding.pop(record, None)
        if transfer is not None:
            self.writes[transfer].held = False
            return
        version = self.held.pop(record)
        assert version is not None
        self.committed[record] = version

    @precondition(lambda self: self.taken or self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        dropped = [r for r in self.records if r in self.taken or r in self.held]
        record = data.draw(st.sampled_from(dropped))
        self.store.drop_shadow(record)
        self.taken.discard(record)
        self.held.pop(record, None)
        self.stale.discard(record)

    @precondition(lambda self: self.store._num_holdable.total() and not self.has_shadows())
    @rule()
    def give_back_held(self) -> None:
        before = self.store.used_bytes
        self.store.give_back_held()
        assert self.store.used_bytes <= before

    @precondition(lambda self: self.store._num_holdable.total() < 2)
    @rule(nbytes=st.sampled_from(sorted(set(SIZES))), count=st.integers(1, 3))
    def reserve_held(self, nbytes: int, count: int) -> None:
        self.expect_room(lambda: self.store.reserve_held({nbytes: count}))

    @precondition(lambda self: len(self.records) < 12)
    @rule(sizes=st.lists(st.sampled_from([4096, 6000, 9000]), min_size=1, max_size=3))
    def reserve(self, sizes: list[int]) -> None:
        named = [(f"record {len(self.records) + i}", nbytes) for i, nbytes in enumerate(sizes)]
        made: list[Record] = []
        self.expect_room(lambda: made.extend(self.store.reserve(named, spare=self.spare)))
        self.records += made

    # -- what the model knows --------------------------------------------------------------------

    def new_data(self, record: Record) -> torch.Tensor:
        self.num_versions += 1
        words = torch.full((record.nbytes // 8 + 1,), self.num_versions, dtype=torch.int64)
        return words.view(torch.uint8)[: record.nbytes].clone()

    def has_shadows(self) -> bool:
        return bool(self.taken or self.holding or self.held)

    def written(self) -> list[Record]:
        return [record for record in self.records if record in self.committed]

    def hung(self) -> list[Record]:
        requests = [*self.writes.values(), *self.reads.values()]
        return [each.record for each in requests if each.fault == HANGS]

    @contextlib.contextmanager
    def fault(self, operation: str, lot: int) -> Iterator[str]:
        """What becomes of the request that is started in the block; one at most hangs."""
        fault = self.faults[lot % len(self.faults)]
        if fault == HANGS and self.hung():
            fault = WELL
        self.io._fault = FaultSpec(f"op={operation},{fault}" if fault else "")
        if operation == "write" and fault.startswith("misdirect"):
            self.may_be_anywhere = True
        yield fault
        self.io._fault = FaultSpec("")

    def expect_room(self, reserve: Callable[[], object]) -> None:
        before = self.store.used_bytes
        try:
            reserve()
        except BudgetError as error:
            needed = error.requested_bytes
        else:
            return
        assert needed > self.store.capacity_bytes - before
        assert self.store.used_bytes == before

    def wait_read(self, transfer: StoreTransfer) -> None:
        read = self.reads.pop(transfer)
        error = failure_of(transfer)
        if error is None:
            assert torch.equal(read.buffer, read.expected.data)
            # The same byte flipped twice is well.
            if not (read.expected.damaged and read.fault in LIES):
                assert read.fault not in (FAILS, *LIES)
                assert not read.expected.damaged, "nobody has seen that the disk has lied"
            return
        assert error.what == read.record.name
        if isinstance(error, DeadlineError):
            assert read.fault == HANGS
            self.reads[transfer] = read
        elif isinstance(error, ChecksumError):
            assert read.expected.damaged or self.may_be_anywhere or read.fault in LIES, error
        else:
            assert read.fault in (FAILS, LIES[-1]), error  # the file may end there

    def wait_write(self, transfer: StoreTransfer) -> None:
        write = self.writes[transfer]
        error = failure_of(transfer)
        if error is None:
            assert write.fault not in (FAILS, HANGS)
        else:
            assert error.what == write.record.name
            assert write.fault == (HANGS if isinstance(error, DeadlineError) else FAILS), error
        self.learn()

    def learn(self) -> None:
        """Take over what has settled, as far as the store has looked at it."""
        for transfer, write in list(self.writes.items()):
            if transfer._ticket is not None:
                continue
            del self.writes[transfer]
            version = None
            if write.fault != FAILS:
                version = Version(write.data, damaged=write.fault in LIES)
            if write.held:
                del self.holding[write.record]
                self.held[write.record] = version
            elif version is not None:
                self.committed[write.record] = version

    @invariant()
    def every_extent_has_one_use(self) -> None:
        if not hasattr(self, "store"):
            return
        uses: dict[Extent, str] = {}

        def use(extent: Extent | None, what: str) -> None:
            if extent is not None:
                assert extent not in uses, f"{extent}: {what}, and {uses[extent]}"
                uses[extent] = what

        for record in self.records:
            use(record.current, f"the current one of {record.name}")
            use(record.shadow, f"the shadow of {record.name}")
        for transfer, write in self.writes.items():
            if not write.held:
                use(transfer.extent, f"what {write.record.name} is written to")
        for pool in self.store._pools.values():
            for extent in pool._is_free:
                use(extent, "free")
            for extent in pool._retired:
                use(extent, "retired")
            of_class = {extent for extent in uses if extent.nbytes == pool.nbytes}
            assert of_class == set(pool._home), "extents were lost"

    @invariant()
    def what_is_pinned_is_nobody_elses(self) -> None:
        for pin in self.pins:
            pool = self.store._pools[pin.extent.nbytes]
            assert pin.extent not in pool._is_free, "a pinned extent can be written"
            assert all(transfer.extent != pin.extent for transfer in self.writes)
            assert all(record.shadow != pin.extent for record in self.records)

    @invariant()
    def capacity_is_kept(self) -> None:
        if not hasattr(self, "store"):
            return
        store = self.store
        total = sum(pool.nbytes * pool.num_extents for pool in store._pools.values())
        assert store.used_bytes == total <= max(store.capacity_bytes, store.used_bytes)
        assert store.used_bytes <= store.peak_bytes <= store.capacity_bytes
        for record in self.records:
            assert (record.current is not None) == (record in self.committed)
            assert record.extent_bytes == round_up_to_page(record.nbytes)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for read in list(self.reads):
                self.wait_read(read)
            for write in list(self.writes):
                self.wait_write(write)
            for pin, version in self.pins.items():
                buffer = torch.empty(pin.record.nbytes, dtype=torch.uint8)
                transfer = self.store.start_read_pinned(pin, buffer)
                assert isinstance(transfer, StoreTransfer)
                self.reads[transfer] = Read(pin.record, buffer, version, WELL)
                self.wait_read(transfer)
                self.store.unpin(pin)
            assert not self.store._pins.total()
            if not self.reads:
                retired = [pool.num_retired for pool in self.store._pools.values()]
                assert not any(retired), "what was pinned does not come back"
            for record in self.written():
                buffer = torch.empty(record.nbytes, dtype=torch.uint8)
                transfer = self.store.start_read(record, buffer)
                assert isinstance(transfer, StoreTransfer)
                self.reads[transfer] = Read(record, buffer, self.committed[record], WELL)
                self.wait_read(transfer)
            with contextlib.suppress(*([OffloadError] if self.reads or self.writes else [])):
                self.store.close()
        self.folder.cleanup()
