"""The NVMe store against a dict, on a virtual clock, with failing writes."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.errors import StorageError
from offload.native.fault_spec import FaultSpec
from offload.tiers.nvme import NvmeStore
from offload.tiers.records import Record
from offload.tiers.simulated import SimulatedIo
from offload.tiers.transfer import Transfer

SIZES = (4096, 4096, 4096, 6000, 6000)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.version = 0
        self.committed: dict[str, torch.Tensor] = {}
        self.writes: dict[Transfer, tuple[Record, torch.Tensor, bool]] = {}
        self.reads: dict[Transfer, tuple[torch.Tensor, torch.Tensor]] = {}

    def open(self, mode: str, spare: int, num_paths: int, seed: int) -> None:
        self.io = SimulatedIo(seed=seed)
        paths = [self.folder.name] * num_paths
        self.store = NvmeStore(paths, self.io, mode=mode)  # type: ignore[arg-type]
        sizes = [(f"record {index}", nbytes) for index, nbytes in enumerate(SIZES)]
        self.records = self.store.reserve(sizes, spare=spare)

    @precondition(lambda self: not hasattr(self, "store"))
    @rule(
        mode=st.sampled_from(["roll_forward", "atomic"]),
        spare=st.integers(1, 3),
        num_paths=st.integers(1, 2),
        seed=st.integers(0, 99),
    )
    def make_store(self, mode: str, spare: int, num_paths: int, seed: int) -> None:
        self.open(mode, spare, num_paths, seed)

    @precondition(lambda self: hasattr(self, "store"))
    @rule(index=st.integers(0, len(SIZES) - 1), fails=st.booleans())
    def start_write(self, index: int, fails: bool) -> None:
        record = self.records[index]
        self.version += 1
        data = torch.full((record.nbytes,), self.version % 251, dtype=torch.uint8)
        self.io._fault = FaultSpec("op=write,errno=5" if fails else "")
        transfer = self.store.start_write(record, data)
        self.settle_in_model()  # the store may have settled others to get an extent
        self.writes[transfer] = (record, data, fails)

    @precondition(lambda self: hasattr(self, "store"))
    @rule(index=st.integers(0, len(SIZES) - 1))
    def start_read(self, index: int) -> None:
        record = self.records[index]
        if record.name in self.committed:
            buffer = torch.empty(record.nbytes, dtype=torch.uint8)
            transfer = self.store.start_read(record, buffer)
            self.reads[transfer] = (buffer, self.committed[record.name])

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def wait_for_write(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(list(self.writes)))
        if self.writes[transfer][2]:
            with pytest.raises(StorageError):
                transfer.wait()
        else:
            transfer.wait()
        self.settle_in_model()

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def wait_for_read(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(list(self.reads)))
        buffer, expected = self.reads.pop(transfer)
        transfer.wait()
        assert torch.equal(buffer, expected)

    @precondition(lambda self: hasattr(self, "store"))
    @rule(seconds=st.floats(0.0, 0.05))
    def compute(self, seconds: float) -> None:
        self.io.clock.advance(seconds)

    def settle_in_model(self) -> None:
        for transfer, (record, data, fails) in list(self.writes.items()):
            if transfer._ticket is None:  # type: ignore[attr-defined]
                del self.writes[transfer]
                if not fails:
                    self.committed[record.name] = data

    @invariant()
    def extents_are_disjoint_and_all_accounted_for(self) -> None:
        if not hasattr(self, "store"):
            return
        current = [record.current for record in self.records if record.current]
        assert len(set(current)) == len(current)
        for nbytes, pool in self.store._pools.items():
            num_current = sum(1 for extent in current if extent.nbytes == nbytes)
            num_written = sum(
                1 for record, *_ in self.writes.values() if record.extent_bytes == nbytes
            )
            num_retired = len(pool._retired)
            assert pool.num_free == pool.num_extents - num_current - num_written - num_retired

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for transfer in list(self.reads):
                buffer, expected = self.reads.pop(transfer)
                transfer.wait()
                assert torch.equal(buffer, expected)
            for transfer in list(self.writes):
                try:
                    transfer.wait()
                except StorageError:
                    assert self.writes[transfer][2]
            self.settle_in_model()
            for record in self.records:
                if record.name in self.committed:
                    buffer = torch.empty(record.nbytes, dtype=torch.uint8)
                    self.store.start_read(record, buffer).wait()
                    assert torch.equal(buffer, self.committed[record.name])
            self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreMachine = StoreMachine.TestCase
