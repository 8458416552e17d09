"""From a module and a configuration to an engine's parts: plan first, then memory, then weights.

[Note: Building]
Nothing of the module is touched before the plan fits and every byte of it is reserved:

    collect -> open disks -> plan (DoesNotFitError) -> arena, device, files -> weights move

Weights move bucket by bucket, and leave the module's own memory as soon as they have arrived. An
error closes what was opened; parameters that have moved by then are lost with it, so the errors
that can be foreseen come first.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.config import CheckpointSection, OffloadConfig, available_host_bytes
from offload.engine.activations.room import open_activations
from offload.engine.activations.store import ActivationStore
from offload.engine.collect import Collected, Collection, collect, convert_buffers
from offload.engine.gradients import GradientHome, Part
from offload.engine.guards.composite import settle_composites
from offload.engine.guards.guard import GuardedTensor, guard_class_of
from offload.engine.initial import InitialWeights, OwnMemory
from offload.engine.keep_fp32 import kept_in_fp32
from offload.engine.landing import LandingRing
from offload.engine.loss.chunked_head import find_head
from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import PagedParameter, WeightPage, register
from offload.engine.paging.poison import poison_storage
from offload.engine.planning import (
    AnyRule,
    ChosenRule,
    OptimizerFactory,
    choose_rule,
    describe_machine,
    plan_module,
    scratch_bytes,
    without_untrained,
)
from offload.engine.tiling.tiles import TileSlots, open_tiles
from offload.engine.update_site import UpdateSites, all_on_cpu, open_update
from offload.errors import ConfigError, DoesNotFitError, UnsupportedPlatformError, format_bytes
from offload.native import IoEngine
from offload.native.engine import HELD_DEPTH
from offload.optim.chunk_update import ChunkUpdate, OptimizerUpdate
from offload.optim.generic import GenericRule
from offload.optim.overlapped import OverlappedStep
from offload.optim.split import split_tensor
from offload.optim.streamed import StreamedStep
from offload.optim.zeroth_order import ZerothOrderRule, ZerothOrderUpdate
from offload.partition.arrays import field_tensor
from offload.partition.blocks import BlockStore
from offload.partition.layout import UPDATED_CLASSES, Bucket, segments
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import Machine
from offload.schedule.plan import Plan
from offload.telemetry import LaneMeter, RetryLog, ShrinkReport
from offload.tiers.cuda import open_device_tier
from offload.tiers.device import DeviceTier
from offload.tiers.extents import PAGE_BYTES
from offload.tiers.host import HostArena
from offload.tiers.memory import trim_heap
from offload.tiers.nvme import NvmeStore
from offload.tiers.retrying import RetryingIo
from offload.tiers.run_folder import disk_of
from offload.tiers.transfer import AsyncIo
from offload.timeline import Timeline

_LOOKAHEAD_PAGES = 3
SCRATCH_OWNER = "fp32 copies for the optimizer"


@dataclass(slots=True, eq=False)
class Parts:
    """Everything that an engine consists of; `closing` ends it in the right order.

    `shrinks` are those of the host's budget since the start.
    """

    config: OffloadConfig
    module: nn.Module
    plan: Plan
    io: IoEngine
    nvme: NvmeStore | None
    host: HostArena
    device: DeviceTier
    store: BlockStore
    pool: ComputePool
    parameters: list[ParameterState]
    pages: list[WeightPage]
    paged: list[PagedParameter]
    pager: Pager
    activations: ActivationStore | None
    gradients: GradientHome
    streamed: StreamedStep
    updates: OverlappedStep
    updater: ChunkUpdate
    sites: UpdateSites
    rule: AnyRule
    groups: list[dict[str, Any]]
    group_defaults: dict[str, Any]
    groups_by_name: bool
    collection: Collection
    machine: Machine
    meter: LaneMeter
    tiles: TileSlots | None
    closing: contextlib.ExitStack = field(repr=False)
    shrinks: ShrinkReport = field(
        default_factory=ShrinkReport
    )  # of the host's budget, since the start

    @property
    def paged_of(self) -> Mapping[int, PagedParameter]:
        """The paged parameters by parameter index."""
        return {parameter.state.index: parameter for parameter in self.paged}

    @property
    def names(self) -> frozenset[str]:
        """Every name of every paged parameter."""
        return frozenset(name for state in self.parameters for name in state.names)


def open_io(config: OffloadConfig) -> IoEngine:
    """The I/O engine that `[io]` describes; as much is in flight as keeps every disk busy."""
    num_disks = max(1, len(config.tiers.nvme.paths))
    given: dict[str, Any] = {"backend": config.io.backend, "held_depth": num_disks * HELD_DEPTH}
    for name in ("queue_depth", "threads", "block_bytes"):
        value = getattr(config.io, name)
        if value != "auto":
            given[name] = value
    return IoEngine(**given)


def build(
    module: nn.Module,
    config: OffloadConfig,
    optimizer: OptimizerFactory | None,
    source: InitialWeights | None = None,
) -> Parts:
    """Plan, reserve, and move the module's parameters to their homes.

    Their values come from `source`; None: from the parameters themselves.

    Raises:
        ConfigError, DoesNotFitError, StorageError, OffloadError: see `initialize`.
    """
    if not hasattr(torch.UntypedStorage, "_swap_data_ptr_") or not hasattr(
        torch._C, "_construct_storage_from_data_pointer"
    ):
        raise UnsupportedPlatformError(
            f"torch {torch.__version__} cannot swap the memory of a storage",
            expected="torch 2.11 to 2.13",
        )
    _check_paths(module, config)
    kept = kept_in_fp32(module, config.precision)
    collection = collect(module, config.precision.compute, kept=kept)
    with contextlib.ExitStack() as closing:
        io = open_io(config)
        closing.callback(io.close, config.io.deadline_seconds)
        retries = RetryLog()
        nvme = _open_nvme(config, RetryingIo(io, retries=config.io.retries, log=retries), closing)
        chosen = choose_rule(collection, config, optimizer)
        collection = without_untrained(collection, chosen.groups)
        machine = describe_machine(config, None if nvme is None else nvme.bytes_free())
        plan = plan_module(collection, config, machine, chosen.rule, chosen.groups)
        plan.require_fit()
        _require_memory(plan, machine)
        return _reserve_and_move(
            module,
            config,
            collection,
            plan,
            machine,
            (io, nvme, retries),
            chosen,
            source or OwnMemory(),
            closing,
        )


def _check_paths(module: nn.Module, config: OffloadConfig) -> None:
    modules = dict(module.named_modules())
    problems = [
        f"guard.gather: the model has no module {path!r}"
        for path in config.guard.gather
        if path not in modules
    ]
    if problems:
        raise ConfigError(problems=problems)
    if config.training.loss_chunk_tokens:
        find_head(module, config)


def _require_memory(plan: Plan, machine: Machine) -> None:
    """Refuse budgets that the machine does not have, before anything is allocated.

    Raises:
        DoesNotFitError: the plan's peak exceeds the host memory that is available now.
    """
    needed = plan.peak_bytes["host"]
    if machine.host_addressable:
        needed += plan.peak_bytes["device"]
    available = available_host_bytes()
    if needed > available:
        raise DoesNotFitError(
            fact=f"the plan holds up to {format_bytes(needed)} of host memory, of which "
            f"{format_bytes(available)} are available under the machine's and its cgroup's limits",
            table=f"{plan}\nlower tiers.host.memory and tiers.device.memory, and name "
            "tiers.nvme.paths to take the rest",
        )


def _open_nvme(
    config: OffloadConfig, io: AsyncIo, closing: contextlib.ExitStack
) -> NvmeStore | None:
    section = config.tiers.nvme
    if not section.paths:
        return None
    store = NvmeStore(
        section.paths,
        io,
        capacity_bytes=None if section.capacity == "auto" else section.capacity,
        deadline_seconds=config.io.deadline_seconds,
        checksum=config.io.checksum,
    )
    closing.callback(store.close)
    return store


def _reserve_and_move(
    module: nn.Module,
    config: OffloadConfig,
    collection: Collection,
    plan: Plan,
    machine: Machine,
    disks: tuple[IoEngine, NvmeStore | None, RetryLog],
    chosen: ChosenRule,
    source: InitialWeights,
    closing: contextlib.ExitStack,
) -> Parts:
    io, nvme, retries = disks
    rule = chosen.rule
    deadline = config.io.deadline_seconds
    # No larger than the plan: an arena is locked in memory where there is an accelerator.
    # The overlapped step's room comes in a segment of its own, for it may have to make way.
    host = HostArena(max(plan.peak_bytes["host"] - plan.overlap.host_bytes, PAGE_BYTES))
    closing.callback(host.close)
    host.register_with(io)
    device = open_device_tier(
        config.tiers.device.kind, machine.device_bytes, io, deadline_seconds=deadline
    )
    closing.callback(device.close)
    if not device.host_addressable:
        host.page_lock()
    if collection.resident_bytes:
        device.hold(collection.resident_bytes, "parameters that cannot be paged")
    if plan.gradient_bytes:
        device.hold(plan.gradient_bytes, "gradients in flight")
    store = BlockStore(
        host=host,
        device=device,
        nvme=nvme,
        deadline_seconds=deadline,
        names=[collected.names[0] for collected in collection.paged],
    )
    for bucket in plan.buckets:
        for state_class, layout in plan.layouts[bucket.index].items():
            store.add(bucket, state_class, layout, plan.tier(bucket.index, state_class))
    device.reserve(plan.working_bytes)
    _reserve_records(store, plan, machine, config.checkpoint)
    meter = LaneMeter(timeline=_open_timeline(device, nvme))
    pool = ComputePool(torch.get_num_threads())
    closing.callback(pool.close)
    parameters = _parameter_states(collection, plan)
    updater: ChunkUpdate
    sites = all_on_cpu(config, plan, device.host_addressable, rule)
    if isinstance(rule, GenericRule):
        scratch = scratch_bytes([c.spec for c in collection.paged], plan.buckets)
        if scratch:
            host.lease(scratch, SCRATCH_OWNER)
        updater = OptimizerUpdate(parameters, store, rule)
    elif isinstance(rule, ZerothOrderRule):
        updater = ZerothOrderUpdate(parameters, store, rule, pool)
    else:
        updater, sites = open_update(config, plan, parameters, store, rule, pool)
        closing.callback(sites.close)
    pages, paged, pager = _move_weights(
        collection, plan, parameters, store, config, machine, source
    )
    closing.callback(pager.close)
    settle_composites(collection.composites, module, device.device)
    trim_heap()
    gradients = GradientHome(
        parameters,
        plan.buckets,
        store,
        pool,
        max_open_chunks=machine.staging.gradients,
        landing=_open_landing(plan, machine, store),
    )
    closing.callback(gradients.clear)
    tiles = open_tiles(plan.tiled, pager, store, prefetch=config.overlap.prefetch)
    pager.seal()
    convert_buffers(module, config.precision.compute, device.device, kept=collection.kept)
    streamed = StreamedStep(
        buckets=plan.buckets,
        parameters=parameters,
        store=store,
        updater=updater,
        depth=machine.staging.update,
        meter=meter,
    )
    updates = OverlappedStep(streamed, plan.buckets, parameters, store, host, plan.overlap, retries)
    closing.callback(updates.close)
    pager.updates = gradients.updates = updates
    activations = open_activations(config, plan, host, device, nvme)
    if activations is not None:
        closing.callback(activations.close)
    return Parts(
        config=config,
        module=module,
        plan=plan,
        io=io,
        nvme=nvme,
        host=host,
        device=device,
        store=store,
        pool=pool,
        parameters=parameters,
        pages=pages,
        paged=paged,
        pager=pager,
        gradients=gradients,
        activations=activations,
        streamed=streamed,
        updates=updates,
        meter=meter,
        tiles=tiles,
        updater=updater,
        sites=sites,
        rule=rule,
        groups=chosen.groups,
        group_defaults=chosen.defaults,
        groups_by_name=chosen.by_name,
        collection=collection,
        machine=machine,
        closing=closing.pop_all(),
    )


def _open_timeline(device: DeviceTier, nvme: NvmeStore | None) -> Timeline:
    """One timeline for all transfers of an engine."""
    timeline = Timeline()
    device.timeline = timeline
    if nvme is not None:
        nvme.timeline = timeline
    return timeline


def _reserve_records(
    store: BlockStore, plan: Plan, machine: Machine, settings: CheckpointSection
) -> None:
    """Allocate all files before step 0, with room for the checkpoints that are planned."""
    store.reserve_records(spare=machine.staging.spare_extents, held_share=plan.overlap.held_share)
    directory = settings.directory
    if store.nvme is None or directory is None or not settings.pinned_versions:
        return
    device = disk_of(directory)
    counts: Counter[int] = Counter()
    for block in store.blocks():
        if block.bucket.trainable and block.state_class in UPDATED_CLASSES:
            for record in block.records:
                if store.nvme.device_of(record) == device:
                    counts[record.nbytes] += settings.pinned_versions
    store.nvme.reserve_beside_pins(counts)


def _open_landing(plan: Plan, machine: Machine, store: BlockStore) -> LandingRing[Part] | None:
    """What gradients that leave an accelerator land in; None where the CPU reaches them."""
    if store.device.host_addressable:
        return None
    depth = machine.staging.landing
    return LandingRing(store, depth=depth, device_bytes=plan.landing_bytes)


def _parameter_states(collection: Collection, plan: Plan) -> list[ParameterState]:
    places = {
        slot.param: (bucket.index, slot.offset) for bucket in plan.buckets for slot in bucket.slots
    }
    return [
        ParameterState(
            index=index,
            names=collected.names,
            parameter=collected.parameter,
            shape=collected.parameter.shape,
            stride=collected.stride,
            numel=collected.spec.numel,
            bucket=places[index][0],
            offset=places[index][1],
            trainable=collected.spec.trainable,
        )
        for index, collected in enumerate(collection.paged)
    ]


def _move_weights(
    collection: Collection,
    plan: Plan,
    parameters: Sequence[ParameterState],
    store: BlockStore,
    config: OffloadConfig,
    machine: Machine,
    source: InitialWeights,
) -> tuple[list[WeightPage], list[PagedParameter], Pager]:
    pages: list[WeightPage] = []
    depth = config.overlap.prefetch_depth
    lookahead = _LOOKAHEAD_PAGES if depth == "auto" else depth
    pager = Pager(
        pages,
        store,
        capacity_bytes=plan.working_bytes,
        lookahead_depth=lookahead if config.overlap.prefetch else 0,
        staging_depth=max(machine.staging.weights // 2, 1),
    )
    paged: list[PagedParameter] = []
    for bucket in plan.buckets:
        _store_bucket(bucket, parameters, store, source)
        page = WeightPage(store.block(bucket.index, "weights"), pager)
        page.parameters = tuple(
            _page_parameter(parameters[slot.param], collection.paged[slot.param], page, config)
            for slot in bucket.slots
        )
        paged.extend(page.parameters)
        pages.append(page)
        if not page.is_paged:
            page.point_parameters_at_lease()
    store.drain()
    return pages, paged, pager


def _page_parameter(
    state: ParameterState, collected: Collected, page: WeightPage, config: OffloadConfig
) -> PagedParameter:
    """Replace a parameter's own memory, which is home by now, by poison, and guard it."""
    parameter = state.parameter
    dtype = collected.dtype
    bytes_ = state.numel * page.block.bucket.itemsize
    device = page.holder.device
    memory = poison_storage(bytes_, device, enabled=config.guard.poison)
    with torch.no_grad():
        away = torch.empty(0, dtype=dtype, device=device)
        if memory.nbytes() or not bytes_:
            away.set_(memory, 0, state.shape, state.stride)
        else:
            away = torch.empty_strided(state.shape, state.stride, dtype=dtype, device=device)
            away.untyped_storage().resize_(0)
        parameter.grad = None
        parameter.data = away
    paged = PagedParameter(
        state,
        page,
        guard_class=guard_class_of(type(parameter)),
        view_class=GuardedTensor,
        composite=collected.composite,
    )
    register(paged)
    paged.wear(paged.guard_class)
    return paged


def _store_bucket(
    bucket: Bucket,
    parameters: Sequence[ParameterState],
    store: BlockStore,
    source: InitialWeights,
) -> None:
    """Write the initial weights of a bucket, and what completes them to fp32, to their homes."""
    for chunk in bucket.chunks:
        weights = store.block(bucket.index, "weights")
        # The larger one first: while nothing is held, all staging can be waited for, in one piece.
        completion = _stage_completion(bucket, chunk.index, store)
        staged = store.stage_or_raise(weights, chunk.index)
        staged.tensor.zero_()
        for segment in segments(bucket, chunk):
            state = parameters[segment.param]
            values = source.read(state, segment.start_in_param, segment.numel)
            (field_,) = weights.layout.element_fields(chunk.index)
            target = field_tensor(staged.tensor, field_, segment.start_in_chunk, segment.numel)
            if completion is None:
                target.copy_(values.view(target.dtype) if _is_opaque(values, target) else values)
                continue
            place, completing = completion
            if completing.name == "remainder" and values.dtype is target.dtype:
                target.copy_(values)  # nothing remains, and the staged remainder is zero
                continue
            rest = field_tensor(place.tensor, completing, segment.start_in_chunk, segment.numel)
            exact = values.to(device="cpu", dtype=torch.float32)
            if completing.name == "remainder":
                high, low = split_tensor(exact)
                target.copy_(high)
                rest.copy_(low)
            else:
                target.copy_(exact)
                rest.copy_(exact)
        store.start_store(weights, chunk.index, staged)
        if completion is not None:
            store.start_store(store.block(bucket.index, "optimizer"), chunk.index, completion[0])


def _is_opaque(values: torch.Tensor, target: torch.Tensor) -> bool:
    return not target.is_floating_point() and values.dtype != target.dtype


def _stage_completion(bucket: Bucket, chunk: int, store: BlockStore) -> Any:
    """The optimizer chunk zeroed in staging with its completing field, if it has to be written."""
    if not bucket.trainable or "optimizer" not in store.classes(bucket.index):
        return None
    block = store.block(bucket.index, "optimizer")
    fields = {field_.name: field_ for field_ in block.layout.element_fields(chunk)}
    completing = fields.get("remainder") or fields.get("master")
    if block.home == "nvme" and completing is None:
        return None  # a record that was never written reads as zeros
    staged = store.stage_or_raise(block, chunk)
    staged.tensor.zero_()
    if completing is None:
        store.start_store(block, chunk, staged)
        return None
    return staged, completing
