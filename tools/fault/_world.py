"""Small worlds by seed: a placement with tight budgets, a training on it, and the serial reference.

[Note: worlds] A world is the engine without a module: pager, gradients, overlapped and streamed
step, executor, blocks, shadows and tiers are the real ones, on files in memory, on the virtual
clock of `fault._virtual`. Gradients are drawn instead of computed. `Reference` has the same
arithmetic on plain arrays, one parameter after the other.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from fault._virtual import Scheduler
from offload.engine.build import _store_bucket
from offload.engine.gradients import GradientHome, Part
from offload.engine.landing import LandingRing
from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import WeightPage
from offload.engine.state_access import StateAccess
from offload.native.fault_spec import FaultAction
from offload.optim.chunk_update import KernelUpdate, _follow_edit
from offload.optim.gradients import accumulate_gradient, num_blocks
from offload.optim.overlapped import OverlappedStep
from offload.optim.rules import AdamWRule, LionRule, MomentumSGDRule, SGDRule, UpdateRule
from offload.optim.split import split_tensor
from offload.optim.streamed import StreamedStep
from offload.partition.arrays import TORCH_DTYPES, tensor_bits
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket, ClassLayout, ParamSpec, _bucket, segments, state_fields
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import (
    MIN_WORKING_BUCKETS,
    Machine,
    OverlapRoom,
    Staging,
    footprint,
)
from offload.telemetry import LaneMeter
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated import LaneModel, RandomFaults, SimulatedDeviceTier, SimulatedIo
from offload.tiers.simulated_streams import SimulatedAccelerator

RULES: tuple[type[UpdateRule], ...] = (AdamWRule, AdamWRule, MomentumSGDRule, SGDRule, LionRule)
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
DEADLINE_SECONDS = 60.0
_EIO, _ENOSPC = 5, 28

Arrays = dict[str, np.ndarray[Any, Any]]
State = tuple[Sequence[Arrays], list[int], list[bool]]  # arrays, steps, edited; by parameter


@dataclass(frozen=True, slots=True)
class Weather:
    """What goes wrong in a world.

    `may_hang`: requests that never end; `may_damage`: writes that the disk lies about. Neither can
    be made good by trying again.
    """

    rates: Mapping[tuple[str, FaultAction], float]
    most: Mapping[str, int]
    lanes: Mapping[str, LaneModel]
    may_hang: bool
    may_damage: bool


def draw_weather(drawn: random.Random) -> Weather:
    """Whether requests fail, by how much they are late, and in what order they end."""
    rate = drawn.choice([0.0, 0.0, 0.01, 0.03, 0.1])
    rates: dict[tuple[str, FaultAction], float] = {}
    if rate:
        rates["read", FaultAction("errno", _EIO)] = rate * drawn.choice([0, 1, 1])
        rates["write", FaultAction("errno", drawn.choice([_EIO, _ENOSPC]))] = rate * drawn.choice(
            [0, 1, 1]
        )
        rates["copy", FaultAction("errno", _EIO)] = rate * drawn.choice([0, 0.5, 1])
        rates["read", FaultAction("corrupt", 1)] = rate * drawn.choice([0, 0, 0.3])
    if drawn.random() < 0.15:  # later than the deadline
        rates["any", FaultAction("delay", 100_000)] = 0.02
    lot = drawn.random()
    may_hang, may_damage = lot < 0.08, 0.08 <= lot < 0.14
    if may_hang:
        rates[drawn.choice(["read", "write", "any"]), FaultAction("drop", 1)] = 0.02
    if may_damage:
        lie = drawn.choice([("corrupt", 1), ("lost", 1), ("misdirect", 4096)])
        rates["write", FaultAction(*lie)] = 0.02
    lanes = {}
    for lane in ("nvme_read", "nvme_write", "h2d", "d2h"):
        lanes[lane] = LaneModel(
            bytes_per_second=drawn.choice([1e7, 1e8, 1e9]),
            latency_seconds=drawn.choice([1e-5, 1e-4]),
            jitter_seconds=drawn.choice([0.0, 1e-3, 1e-2, 1e-1]),
            quantum_bytes=drawn.choice([4096, 1 << 20]),
            stalls=drawn.choice([0.0, 0.0, 0.05]),
            stall_seconds=1.0,
        )
    most = {"drop": 1, "delay": 4, "lost": 2, "misdirect": 2}
    return Weather(rates, most, lanes, may_hang, may_damage)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a world is like."""

    seed: int
    precision: str
    rule: UpdateRule
    buckets: tuple[Bucket, ...]
    numels: tuple[int, ...]  # of the parameters
    homes: Mapping[tuple[int, str], str]
    layouts: tuple[dict[str, ClassLayout], ...]
    staging: Staging
    room: OverlapRoom
    accumulation: int
    max_norm: float
    num_steps: int
    spare_pages: int
    threads: int
    has_accelerator: bool
    weather: Weather

    def __str__(self) -> str:
        homes = " ".join(
            "".join(self.homes[b.index, name][0] for name in self.layouts[b.index])
            + f"{len(b.chunks)}"
            for b in self.buckets
        )
        where = "accelerator" if self.has_accelerator else "cpu"
        return (
            f"{self.precision} {self.rule.name} on {where}, homes and chunks {homes}, "
            f"{self.num_steps} steps of {self.accumulation}, clipped at {self.max_norm}, "
            f"flow {self.room.flow_bytes}"
        )


def draw_shape(seed: int) -> Shape:
    """The world of a seed."""
    drawn = random.Random(f"world {seed}")
    precision = drawn.choice(["fp32", "bf16", "bf16", "fp16"])
    rule = drawn.choice(RULES)()
    itemsize = ITEMSIZE[precision]
    chunk_elements = 4096 // itemsize
    numels: list[int] = []
    groups: list[tuple[bool, list[int]]] = []
    for index in range(drawn.randint(1, 4)):
        trainable = index == 0 or drawn.random() < 0.85
        if drawn.random() < 0.5:
            sizes = [drawn.randint(chunk_elements // 2, 3 * chunk_elements)]
        else:
            sizes = [drawn.randint(1, 400) for _ in range(drawn.randint(1, 3))]
        groups.append((trainable, list(range(len(numels), len(numels) + len(sizes)))))
        numels += sizes
    specs = [ParamSpec(f"p{i}", (n,), n, precision, itemsize, True) for i, n in enumerate(numels)]
    buckets, layouts = [], []
    homes: dict[tuple[int, str], str] = {}
    gradient_dtype = drawn.choice(["fp32", "compute"])
    for index, (trainable, members) in enumerate(groups):
        of_bucket = [
            ParamSpec(s.name, s.shape, s.numel, s.dtype, s.itemsize, trainable) for s in specs
        ]
        bucket = _bucket(index, members, of_bucket, chunk_elements, 1)
        fields = state_fields(bucket, gradient_dtype=gradient_dtype, moments=rule.state_specs)
        layouts.append({n: ClassLayout(bucket, of) for n, of in fields.items() if of})
        for name in layouts[-1]:
            homes[index, name] = drawn.choice(["nvme", "nvme", "host", "device"])
        buckets.append(bucket)
    staging = Staging(*(drawn.randint(1, 4) for _ in range(5)))
    largest = max(
        sum(layout.chunk_nbytes[chunk.index] for layout in layouts[bucket.index].values())
        for bucket in buckets
        for chunk in bucket.chunks
    )
    room = OverlapRoom()
    if drawn.random() < 0.75:
        held = drawn.choice([0, 2, 20]) * 4096
        room = OverlapRoom(largest * drawn.randint(1, 4), held, drawn.choice([0.0, 0.5, 1.0]))
    return Shape(
        seed=seed,
        precision=precision,
        rule=rule,
        buckets=tuple(buckets),
        numels=tuple(numels),
        homes=homes,
        layouts=tuple(layouts),
        staging=staging,
        room=room,
        accumulation=drawn.choice([1, 1, 2, 3]),
        max_norm=drawn.choice([0.0, 0.0, 1e-3, 30.0]),
        num_steps=drawn.randint(2, 4),
        spare_pages=drawn.choice([0, 0, 1, 4]),
        threads=drawn.choice([1, 1, 2]),
        has_accelerator=drawn.random() < 0.35,
        weather=draw_weather(drawn),
    )


class World:
    """The parts of an engine; see [Note: worlds]."""

    def __init__(self, shape: Shape, path: str, scheduler: Scheduler) -> None:
        self.shape = shape
        self.clock = scheduler
        weather = shape.weather
        self.faults = RandomFaults(shape.seed, weather.rates, most=weather.most)
        self.faults.is_on = False  # while it is built
        self.io = SimulatedIo(scheduler, lanes=weather.lanes, seed=shape.seed, fault=self.faults)
        self.nvme = NvmeStore(
            [path] * (1 + shape.seed % 2),
            self.io,
            deadline_seconds=DEADLINE_SECONDS,
        )
        self.parameters = _parameters(shape)
        machine = Machine(
            device_bytes=0,
            host_bytes=0,
            nvme_bytes=0,
            host_addressable=not shape.has_accelerator,
            staging=shape.staging,
        )
        blocks = [{n: of.chunk_nbytes for n, of in each.items()} for each in shape.layouts]
        need = footprint(blocks, shape.homes, machine, gradient_bytes=0)
        spare_bytes = shape.spare_pages * 4096
        self.host = HostArena(max(need.need_bytes("host") + spare_bytes, 4096))
        paged = [
            shape.layouts[b.index]["weights"].nbytes
            for b in shape.buckets
            if shape.homes[b.index, "weights"] != "device"
        ]
        self.working_bytes = min(
            sum(paged), sum(sorted(paged)[-MIN_WORKING_BUCKETS:]) + spare_bytes
        )
        device_bytes = max(need.home_bytes("device") + self.working_bytes, 4096)
        self.device: DeviceTier
        if shape.has_accelerator:
            self.device = SimulatedAccelerator(
                device_bytes, self.io, deadline_seconds=DEADLINE_SECONDS, seed=shape.seed
            )
        else:
            self.device = SimulatedDeviceTier(device_bytes, self.io)
        self.store = BlockStore(
            host=self.host, device=self.device, nvme=self.nvme, deadline_seconds=DEADLINE_SECONDS
        )
        for bucket in shape.buckets:
            for name, layout in shape.layouts[bucket.index].items():
                self.store.add(bucket, name, layout, shape.homes[bucket.index, name])
        self.device.reserve(self.working_bytes)
        self.store.reserve_records(
            spare=shape.staging.spare_extents, held_share=shape.room.held_share
        )
        self.pool = ComputePool(shape.threads)
        self.updater = KernelUpdate(self.parameters, self.store, shape.rule, self.pool)
        self.pages: list[WeightPage] = []
        self.pager = Pager(
            self.pages,
            self.store,
            capacity_bytes=self.working_bytes,
            lookahead_depth=shape.seed % 4,
            staging_depth=max(shape.staging.weights // 2, 1),
        )
        initial = InitialValues(shape)
        for bucket in shape.buckets:
            _store_bucket(bucket, self.parameters, self.store, initial)
            self.pages.append(WeightPage(self.store.block(bucket.index, "weights"), self.pager))
        self.store.drain()
        landing: LandingRing[Part] | None = None
        if shape.has_accelerator:
            depth = shape.staging.landing
            landing = LandingRing(self.store, depth=depth, device_bytes=4096 * (1 + shape.seed % 4))
        self.gradients = GradientHome(
            self.parameters,
            shape.buckets,
            self.store,
            self.pool,
            max_open_chunks=shape.staging.gradients,
            landing=landing,
        )
        self.pager.seal()
        self.streamed = StreamedStep(
            buckets=shape.buckets,
            parameters=self.parameters,
            store=self.store,
            updater=self.updater,
            depth=shape.staging.update,
            meter=LaneMeter(),
        )
        self.updates = OverlappedStep(
            self.streamed, shape.buckets, self.parameters, self.store, self.host, shape.room
        )
        self.pager.updates = self.gradients.updates = self.updates
        self.access = StateAccess(self.parameters, shape.buckets, self.store, self.pager)
        self.faults.is_on = True

    def check_nothing_leaked(self) -> None:
        """After a flush: only homes, and the room of the overlapped step, hold anything."""
        self.updates.drop()
        self.clock.advance(1000.0)  # what was late has ended
        self.store.retry_failed()
        self.store.drain()
        while self.pager.finish_one():
            pass
        self.pager.make_way(self.working_bytes)
        self.store.settle_ended()
        store, nvme = self.store, self.nvme
        blocks = store.blocks()
        assert not store._writing, "writes are under way"
        assert not store._failed, "writes have failed"
        homes = sum(b.layout.nbytes for b in blocks if b.host_lease is not None)
        share = self.updates._held.share
        room = 0 if share is None else share.nbytes
        assert self.host.used_bytes == homes + room, f"host memory leaked: {self.host.owners()}"
        assert share is None or not share.used_bytes, "room of the overlapped step leaked"
        on_device = sum(b.layout.nbytes for b in blocks if b.device_lease is not None)
        assert self.device.used_bytes == on_device, f"device memory leaked: {self.device.owners()}"
        current = Counter(
            record.extent_bytes
            for block in blocks
            for record in block.records
            if record.current is not None
        )
        assert not any(record.shadow for block in blocks for record in block.records)
        for nbytes, pool in nvme._pools.items():
            assert not nvme._in_flight[nbytes], "transfers are under way"
            assert pool.num_free == pool.num_extents - current[nbytes], "extents leaked"
        wanted = Counter(
            nbytes for b in blocks for nbytes in b.layout.chunk_nbytes if b.home == "nvme"
        )
        assert all(count >= 0 for count in nvme._num_holdable.values())
        assert nvme._num_holdable.total() <= wanted.total()

    def close(self) -> None:
        """End it in the engine's order."""
        with contextlib.ExitStack() as closing:
            for close in (self.io.close, self.nvme.close, self.device.close, self.host.close):
                closing.callback(close)
            closing.callback(self.pool.close)
            closing.callback(self.pager.close)
            closing.callback(self.gradients.clear)
            closing.callback(self.store.drain)
            closing.callback(self.updates.close)


def _parameters(shape: Shape) -> list[ParameterState]:
    found = []
    places = {slot.param: (b, slot.offset) for b in shape.buckets for slot in b.slots}
    for index, numel in enumerate(shape.numels):
        bucket, offset = places[index]
        found.append(
            ParameterState(
                index=index,
                names=(f"p{index}",),
                parameter=torch.empty(0, dtype=TORCH_DTYPES[shape.precision]),
                shape=torch.Size([numel]),
                stride=(1,),
                numel=numel,
                bucket=bucket.index,
                offset=offset,
                trainable=bucket.trainable,
            )
        )
    return found


class InitialValues:
    """The fp32 values that the parameters of a world begin with."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def read(self, state: ParameterState, start: int, numel: int) -> torch.Tensor:
        """As `InitialWeights.read`."""
        drawn = np.random.default_rng((self._shape.seed, state.index))
        values = torch.from_numpy(drawn.standard_normal(state.numel, dtype=np.float32))
        return values[start : start + numel]


class Reference:
    """The same training on plain arrays: one parameter after the other, nothing overlapped."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._precision = cast("Any", shape.precision)
        self.steps = [0] * len(shape.numels)
        self.edited = [False] * len(shape.numels)
        self.arrays: list[Arrays] = []
        self._gradients: dict[int, np.ndarray[Any, Any]] = {}
        self.sums: dict[int, np.ndarray[Any, Any]] = {}
        initial = InitialValues(shape)
        for state in _parameters(shape):
            values = initial.read(state, 0, state.numel)
            of_state = {"weight": tensor_bits(values.to(TORCH_DTYPES[shape.precision]))}
            if "optimizer" in shape.layouts[state.bucket]:
                if shape.precision == "bf16":
                    high, low = split_tensor(values)
                    of_state = {"weight": tensor_bits(high), "remainder": low.numpy()}
                elif shape.precision == "fp16":
                    of_state["master"] = values.numpy().copy()
                for field in shape.rule.state_fields:
                    of_state[field] = np.zeros(state.numel, np.float32)
            self.arrays.append({name: array.copy() for name, array in of_state.items()})

    def arrive(self, param: int, gradient: torch.Tensor) -> None:
        """Add a gradient, in the pieces in which chunks take it."""
        shape = self._shape
        first = param not in self._gradients
        bucket = next(b for b in shape.buckets if param in {slot.param for slot in b.slots})
        field = shape.layouts[bucket.index]["gradients"].fields[0]
        if first:
            dtype = np.float32 if field.dtype == "fp32" else np.uint16
            self._gradients[param] = np.zeros(shape.numels[param], dtype)
        target, source = self._gradients[param], tensor_bits(gradient)
        sums = np.zeros(num_blocks(shape.numels[param]), np.float64)
        for chunk in bucket.chunks:
            for segment in segments(bucket, chunk):
                if segment.param != param:
                    continue
                piece = slice(segment.start_in_param, segment.start_in_param + segment.numel)
                piece_sums = np.empty(1, np.float64)
                accumulate_gradient(
                    target[piece],
                    source[piece],
                    first=first,
                    target_dtype=cast("Any", field.dtype),
                    source_dtype=self._precision if source.dtype == np.uint16 else "fp32",
                    block_sums=piece_sums,
                )
                sums[:1] += piece_sums
        self.sums[param] = sums

    def step(self, hyper: Mapping[int, Mapping[str, Any]], scale: float) -> None:
        """Update every parameter that has settings."""
        for param, group in sorted(hyper.items()):
            arrays = self.arrays[param]
            master = arrays.get("remainder", arrays.get("master"))
            if self.edited[param] and master is not None:
                _follow_edit(arrays["weight"], master)
            self.edited[param] = False
            self.steps[param] += 1
            self._shape.rule.update(
                precision=self._precision,
                weight=arrays["weight"],
                master=master,
                gradient=self._gradients[param],
                state={name: arrays[name] for name in self._shape.rule.state_fields},
                hyper=group,
                step=self.steps[param],
                gradient_scale=scale,
            )

    def forget_gradients(self) -> None:
        """The step is over, or does not count."""
        self._gradients.clear()
        self.sums.clear()

    def edit(self, param: int, weight: torch.Tensor) -> None:
        """The user sets a weight."""
        self.arrays[param]["weight"] = tensor_bits(weight).copy()
        self.edited[param] = True

    def expected(self, param: int, field: str) -> np.ndarray[Any, Any]:
        """What a field must be, as bits."""
        array = self.arrays[param][field]
        if self.edited[param] and field in ("remainder", "master"):
            array = array.copy()
            _follow_edit(self.arrays[param]["weight"], array)
        return array

    def copy_of_state(self) -> State:
        """What a checkpoint would hold."""
        arrays = [{n: a.copy() for n, a in each.items()} for each in self.arrays]
        return arrays, list(self.steps), list(self.edited)

    def replace_state(self, state: State) -> None:
        """Go back to a copy."""
        arrays, steps, edited = state
        self.arrays = [{n: a.copy() for n, a in each.items()} for each in arrays]
        self.steps, self.edited = list(steps), list(edited)
