"""From a module and a configuration to an engine's parts: plan first, then memory, then weights.

[Note: Building]
Nothing of the module is touched before the plan fits and every byte of it is reserved:

    collect -> open disks -> plan (DoesNotFitError) -> arena, device, files -> weights move, bucket by bucket

A weight leaves the module's own memory as soon as it has arrived at its home. An error closes what was
opened; parameters that have moved by then are lost with it, so the errors that can be foreseen come first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.config import OffloadConfig, available_host_bytes, HOST_SHARE
from offload.engine.collect import Collection, collect, convert_buffers
from offload.engine.gradients import GradientHome
from offload.engine.guard import GuardedTensor, guard_class_of
from offload.engine.optimizer import OffloadOptimizer, configured_groups
from offload.engine.pager import Pager
from offload.engine.pages import PagedParameter, WeightPage, register
from offload.engine.poison import poison_storage
from offload.errors import DoesNotFitError, UnsupportedPlatformError, format_bytes
from offload.native import IoEngine
from offload.optim.chunk_update import ChunkUpdate, KernelUpdate, OptimizerUpdate
from offload.optim.generic import GenericRule
from offload.optim.rules import UpdateRule, from_torch, make_rule
from offload.optim.split import split_tensor
from offload.optim.streamed import StreamedStep
from offload.partition.arrays import field_tensor, memory_order
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket, ParamSpec, REDUCTION_ELEMENTS, pack, round_up, segments
from offload.partition.layout import resolve_bucket_elements, state_fields
from offload.partition.parameters import ParameterState
from offload.partition.tensor_layout import StateTensorSpec, TensorLayout
from offload.schedule.cost import LaneSpeeds
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import Machine, Staging
from offload.schedule.plan import Plan, Workload, plan_buckets, plan_layouts, resolve_gradient_dtype
from offload.telemetry import LaneMeter
from offload.tiers.cuda import open_device_tier
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore

OptimizerFactory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

# Without an accelerator the device tier is a part of host memory: `auto` shares that out.
_CPU_DEVICE_SHARE = 1 / 3
_CUDA_DEVICE_SHARE = 0.5  # the rest is for activations
_LOOKAHEAD_PAGES = 3
_UPDATE_DEPTH = 3


def available_device_bytes(config: OffloadConfig) -> int:
    """The device budget in bytes: what the configuration says, or a share of what is free now."""
    memory = config.tiers.device.memory
    if memory != "auto":
        return memory
    kind = config.tiers.device.kind
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return int(available_host_bytes() * HOST_SHARE * _CPU_DEVICE_SHARE)
    device = torch.device("cuda" if kind == "auto" else kind)
    return int(torch.cuda.mem_get_info(device)[0] * _CUDA_DEVICE_SHARE)


def available_arena_bytes(config: OffloadConfig) -> int:
    """The host budget in bytes, beside a device tier that is host memory itself."""
    memory = config.tiers.host.memory
    if memory != "auto":
        return memory
    available = int(available_host_bytes() * HOST_SHARE)
    kind = config.tiers.device.kind
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return max(available - available_device_bytes(config), 1)
    return available


def describe_machine(config: OffloadConfig, nvme_bytes: int | None) -> Machine:
    """The budgets as the planner takes them; `nvme_bytes` None: the tier is not used."""
    kind = config.tiers.device.kind
    on_cpu = kind == "cpu" or (kind == "auto" and not torch.cuda.is_available())
    return Machine(
        device_bytes=available_device_bytes(config),
        host_bytes=available_arena_bytes(config),
        nvme_bytes=nvme_bytes,
        host_addressable=on_cpu,
        nvme_mode=config.tiers.nvme.mode,
        staging=Staging(update=_UPDATE_DEPTH if config.overlap.optimizer else 1),
    )


def free_nvme_bytes(config: OffloadConfig) -> int | None:
    """Bytes that the nvme paths offer, without opening them; None when the tier is not used."""
    paths = config.tiers.nvme.paths
    if not paths:
        return None
    free = 0
    for path in paths:
        with contextlib.suppress(OSError):
            stat = os.statvfs(path)
            free += stat.f_bavail * stat.f_frsize
    capacity = config.tiers.nvme.capacity
    return free if capacity == "auto" else min(free, capacity)


@dataclass(slots=True, eq=False)
class Parts:
    """Everything that an engine consists of; `closing` ends it in the right order."""

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
    gradients: GradientHome
    streamed: StreamedStep
    updater: ChunkUpdate
    rule: UpdateRule | GenericRule
    prototype: torch.optim.Optimizer | None
    meter: LaneMeter
    closing: contextlib.ExitStack = field(repr=False)

    @property
    def paged_of(self) -> Mapping[int, PagedParameter]:
        """The paged parameters by parameter index."""
        return {parameter.state.index: parameter for parameter in self.paged}

    @property
    def names(self) -> frozenset[str]:
        """Every name of every paged parameter."""
        return frozenset(name for state in self.parameters for name in state.names)


def open_io(config: OffloadConfig) -> IoEngine:
    """The I/O engine that `[io]` describes."""
    given: dict[str, Any] = {"backend": config.io.backend}
    for name in ("queue_depth", "threads", "block_bytes"):
        value = getattr(config.io, name)
        if value != "auto":
            given[name] = value
    return IoEngine(**given)


def plan_module(
    collection: Collection,
    config: OffloadConfig,
    machine: Machine,
    rule: UpdateRule | GenericRule,
    groups: Sequence[dict[str, Any]],
) -> Plan:
    """Plan the state of collected parameters; what the engine cannot page is taken off the device.

    Raises:
        DoesNotFitError: parameters that must stay on the device exceed its budget.
    """
    specs = [collected.spec for collected in collection.paged]
    left = machine.device_bytes - collection.resident_bytes
    if left <= 0:
        raise DoesNotFitError(
            table=f"parameters that cannot be paged need {format_bytes(collection.resident_bytes)} "
            f"of tier device, whose budget is {format_bytes(machine.device_bytes)}"
        )
    machine = Machine(
        device_bytes=left,
        host_bytes=machine.host_bytes,
        nvme_bytes=machine.nvme_bytes,
        host_addressable=machine.host_addressable,
        nvme_mode=machine.nvme_mode,
        staging=machine.staging,
    )
    if isinstance(rule, UpdateRule):
        return plan_buckets(specs, config, machine=machine, moments=rule.state_fields)
    return _plan_generic(specs, collection, config, machine, rule, groups)


def _plan_generic(
    specs: Sequence[ParamSpec],
    collection: Collection,
    config: OffloadConfig,
    machine: Machine,
    rule: GenericRule,
    groups: Sequence[dict[str, Any]],
) -> Plan:
    elements = config.partition.bucket_elements
    if elements == "auto":
        elements = resolve_bucket_elements(specs, machine.device_bytes)
    largest = max(spec.numel for spec in specs)
    buckets = pack(
        specs,
        bucket_elements=elements,
        chunk_elements=round_up(max(elements, largest) + REDUCTION_ELEMENTS, REDUCTION_ELEMENTS),
    )
    scratch = max((OptimizerUpdate.scratch_bytes(b) for b in buckets if b.trainable), default=0)
    machine = Machine(
        device_bytes=machine.device_bytes,
        host_bytes=max(machine.host_bytes - scratch, 1),
        nvme_bytes=machine.nvme_bytes,
        host_addressable=machine.host_addressable,
        nvme_mode=machine.nvme_mode,
        staging=machine.staging,
    )
    group_of = {id(p): group for group in groups for p in group["params"]}
    layouts = [
        _generic_layouts(bucket, collection, config, rule, group_of) for bucket in buckets
    ]
    return plan_layouts(
        specs,
        buckets,
        tuple(layouts),  # type: ignore[arg-type]  # TensorLayout for the optimizer class
        config,
        machine=machine,
        speeds=LaneSpeeds(),
        workload=Workload(),
    )


def _generic_layouts(
    bucket: Bucket,
    collection: Collection,
    config: OffloadConfig,
    rule: GenericRule,
    group_of: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    from offload.partition.layout import ClassLayout

    fields = state_fields(bucket, gradient_dtype=resolve_gradient_dtype(config), moments=())
    layouts: dict[str, Any] = {
        name: ClassLayout(bucket, specs) for name, specs in fields.items() if name != "optimizer"
    }
    if bucket.trainable:
        tensors = {}
        for slot in bucket.slots:
            parameter = collection.paged[slot.param].parameter
            layout = rule.state_layout(tuple(parameter.shape), group_of[id(parameter)])
            tensors[slot.param] = [StateTensorSpec(t.key, t.dtype, t.shape) for t in layout.tensors]
        layouts["optimizer"] = TensorLayout(bucket, fields["optimizer"], tensors)
    return layouts


def build(
    module: nn.Module, config: OffloadConfig, optimizer: OptimizerFactory | None
) -> Parts:
    """Plan, reserve, and move the module's parameters to their homes.

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
    collection = collect(module, config.precision.compute)
    with contextlib.ExitStack() as closing:
        io = open_io(config)
        closing.callback(io.close)
        nvme = _open_nvme(config, io, closing)
        rule, groups, prototype = _choose_rule(collection, config, optimizer)
        machine = describe_machine(config, None if nvme is None else nvme.bytes_free())
        plan = plan_module(collection, config, machine, rule, groups)
        plan.require_fit()
        return _reserve_and_move(
            module, config, collection, plan, machine, (io, nvme), (rule, prototype), closing
        )


def _open_nvme(
    config: OffloadConfig, io: IoEngine, closing: contextlib.ExitStack
) -> NvmeStore | None:
    section = config.tiers.nvme
    if not section.paths:
        return None
    store = NvmeStore(
        section.paths,
        io,
        capacity_bytes=None if section.capacity == "auto" else section.capacity,
        mode=section.mode,
        deadline_seconds=config.io.deadline_seconds,
        checksum=config.io.checksum,
    )
    closing.callback(store.close)
    return store


def _choose_rule(
    collection: Collection, config: OffloadConfig, optimizer: OptimizerFactory | None
) -> tuple[UpdateRule | GenericRule, list[dict[str, Any]], torch.optim.Optimizer | None]:
    trainable = [c.parameter for c in collection.paged if c.spec.trainable]
    if optimizer is None:
        named = [
            ParameterState(
                index=index,
                names=collected.names,
                parameter=collected.parameter,
                shape=collected.parameter.shape,
                stride=collected.stride,
                numel=collected.spec.numel,
                bucket=0,
                offset=0,
            )
            for index, collected in enumerate(collection.paged)
            if collected.spec.trainable
        ]
        groups, defaults = configured_groups(config.optimizer, named)
        settings = [{**defaults, **group} for group in groups]
        return make_rule(config.optimizer.name, settings), settings, None
    prototype = optimizer(trainable)
    groups = [dict(group) for group in prototype.param_groups]
    return from_torch(prototype) or GenericRule(prototype), groups, prototype


def _reserve_and_move(
    module: nn.Module,
    config: OffloadConfig,
    collection: Collection,
    plan: Plan,
    machine: Machine,
    disks: tuple[IoEngine, NvmeStore | None],
    rules: tuple[UpdateRule | GenericRule, torch.optim.Optimizer | None],
    closing: contextlib.ExitStack,
) -> Parts:
    io, nvme = disks
    rule, prototype = rules
    deadline = config.io.deadline_seconds
    host = HostArena(max(machine.host_bytes, 1 << 16))
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
    store = BlockStore(host=host, device=device, nvme=nvme, deadline_seconds=deadline)
    for bucket in plan.buckets:
        for state_class, layout in plan.layouts[bucket.index].items():
            store.add(bucket, state_class, layout, plan.tier(bucket.index, state_class))
    store.reserve_records(spare=machine.staging.spare_extents)
    meter = LaneMeter()
    pool = ComputePool(torch.get_num_threads())
    closing.callback(pool.close)
    parameters = _parameter_states(collection, plan)
    updater: ChunkUpdate
    if isinstance(rule, GenericRule):
        scratch = max((OptimizerUpdate.scratch_bytes(b) for b in plan.buckets if b.trainable))
        host.lease(scratch, "fp32 copies for the optimizer")
        updater = OptimizerUpdate(parameters, store, rule)
    else:
        updater = KernelUpdate(parameters, store, rule, pool)
    pages, paged, pager = _move_weights(collection, plan, parameters, store, config, machine)
    closing.callback(pager.close)
    convert_buffers(module, config.precision.compute, device.device)
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
        gradients=GradientHome(
            parameters, plan.buckets, store, pool, max_open_chunks=machine.staging.gradients
        ),
        streamed=StreamedStep(
            buckets=plan.buckets,
            parameters=parameters,
            store=store,
            updater=updater,
            depth=machine.staging.update,
            meter=meter,
        ),
        meter=meter,
        updater=updater,
        rule=rule,
        prototype=prototype,
        closing=closing.pop_all(),
    )


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
        _store_bucket(bucket, collection, parameters, store)
        page = WeightPage(store.block(bucket.index, "weights"), pager)
        page.parameters = tuple(
            _page_parameter(parameters[slot.param], collection.paged[slot.param].dtype, page, config)
            for slot in bucket.slots
        )
        paged.extend(page.parameters)
        pages.append(page)
        if not page.is_paged:
            page.point_parameters_at_lease()
    store.drain()
    pager.seal()
    return pages, paged, pager


def _page_parameter(
    state: ParameterState, dtype: torch.dtype, page: WeightPage, config: OffloadConfig
) -> PagedParameter:
    """Replace a parameter's own memory, which is home by now, by poison, and guard it."""
    parameter = state.parameter
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
        state, page, guard_class=guard_class_of(type(parameter)), view_class=GuardedTensor
    )
    register(paged)
    parameter.__class__ = paged.guard_class
    return paged


def _store_bucket(
    bucket: Bucket,
    collection: Collection,
    parameters: Sequence[ParameterState],
    store: BlockStore,
) -> None:
    """Write the initial weights of a bucket, and what completes them to fp32, to their homes."""
    for chunk in bucket.chunks:
        weights = store.block(bucket.index, "weights")
        staged = store.stage_or_raise(weights, chunk.index)
        staged.tensor.zero_()
        completion = _stage_completion(bucket, chunk.index, collection, store)
        for segment in segments(bucket, chunk):
            state = parameters[segment.param]
            flat = memory_order(state.parameter, state)
            values = flat[segment.start_in_param : segment.start_in_param + segment.numel]
            (field_,) = weights.layout.element_fields(chunk.index)
            target = field_tensor(staged.tensor, field_, segment.start_in_chunk, segment.numel)
            if completion is None:
                target.copy_(values.view(target.dtype) if _is_opaque(values, target) else values)
                continue
            place, completing = completion
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


def _stage_completion(
    bucket: Bucket, chunk: int, collection: Collection, store: BlockStore
) -> Any:
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
