"""Planning for a module: this machine's budgets, the update rule, and the plan of its state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from offload.config import HOST_SHARE, OffloadConfig, available_host_bytes, load_config
from offload.engine.activations.room import reserved_host_bytes, with_activations
from offload.engine.collect import Collected, Collection, collect
from offload.engine.keep_fp32 import kept_in_fp32
from offload.engine.optimizer import configured_groups, configured_settings
from offload.engine.profile import find_profile
from offload.engine.tiling.selection import known_tiles, plan_tiled
from offload.engine.update_site import plan_with_update
from offload.errors import ConfigError, DoesNotFitError, format_bytes
from offload.optim.chunk_update import OptimizerUpdate
from offload.optim.generic import GenericRule
from offload.optim.rules import UpdateRule, eight_bit_rule, from_torch, make_rule
from offload.optim.zeroth_order import ZerothOrderRule
from offload.partition.layout import (
    BLOCK_ALIGNMENT_BYTES,
    REDUCTION_ELEMENTS,
    Bucket,
    ClassLayout,
    ParamSpec,
    pack,
    resolve_bucket_elements,
    round_up,
    state_fields,
)
from offload.partition.tensor_layout import StateTensorSpec, TensorLayout
from offload.schedule.cost import LaneSpeeds
from offload.schedule.footprint import Machine, OverlapRoom, Staging
from offload.schedule.forecast import StepKind, Workload, forecast_step
from offload.schedule.overlap import flow_bytes, overlap_room, room_left, with_overlap
from offload.schedule.plan import (
    Plan,
    extend_plan,
    layout_state,
    plan_buckets,
    plan_layouts,
    resolve_gradient_dtype,
)

OptimizerFactory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
AnyRule = UpdateRule | GenericRule | ZerothOrderRule

# Without an accelerator the device tier is a part of host memory: `auto` shares that out.
_CPU_DEVICE_SHARE = 1 / 3
_CUDA_DEVICE_SHARE = 0.5  # the rest is for activations
_UPDATE_DEPTH = 3
# Perturbed chunks in host memory: one is computed while the other is copied to the device.
PERTURBED_CHUNKS = 2


def plan(
    model_or_path: nn.Module | str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
    *,
    speeds: LaneSpeeds | None = None,
    workload: Workload | None = None,
) -> Plan:
    """Plan the training state of a model; needs no weights and allocates none.

    Args:
        model_or_path: a module, which may be on the meta device, or a Hugging Face directory or
            `config.json`, of which only the configuration is read.
        config: as of `initialize`.
        speeds: of the lanes; by default those that `offload bench` has kept, else conservative
            ones.
        workload: what a step computes; by default its transfers and updates only.

    Returns:
        The plan; `plan.fits` tells whether the budgets suffice, `str(plan)` is a table.

    Raises:
        ConfigError: with every problem at once, or the model's configuration cannot be read.
        OffloadError: a parameter that the engine cannot take; names it.
    """
    loaded = load_config(config)
    module = model_or_path if isinstance(model_or_path, nn.Module) else on_meta(Path(model_or_path))
    kept = kept_in_fp32(module, loaded.precision)
    collection = collect(module, loaded.precision.compute, kept=kept, allow_meta=True)
    rule, groups, *_ = choose_rule(collection, loaded, None)
    machine = describe_machine(loaded, free_nvme_bytes(loaded))
    planned = plan_module(collection, loaded, machine, rule, groups)
    if speeds is None and workload is None:
        return planned
    return with_forecast(planned, loaded, machine, speeds or known_speeds(loaded), workload)


def known_speeds(config: OffloadConfig) -> LaneSpeeds:
    """The lane speeds that `offload bench` has kept for this configuration, else conservative."""
    profile = find_profile(config).profile
    return LaneSpeeds() if profile is None else profile.lane_speeds()


def with_forecast(
    planned: Plan,
    config: OffloadConfig,
    machine: Machine,
    speeds: LaneSpeeds,
    workload: Workload | None = None,
) -> Plan:
    """The plan with a forecast at these speeds, of the step as it is taken: maybe overlapped."""
    blocks = [
        {state_class: layout.chunk_nbytes for state_class, layout in classes.items()}
        for classes in planned.layouts
    ]
    kind = StepKind(
        machine.host_addressable,
        config.training.gradient_accumulation_steps,
        frozenset(
            bucket.index
            for bucket, classes in zip(planned.buckets, planned.layouts, strict=True)
            if bucket.trainable and "gradients" not in classes
        ),
        planned.working_bytes,
        planned.overlap.flow_bytes > 0,
    )
    forecast = forecast_step(
        planned.buckets,
        blocks,
        planned.placement.tier_of,
        kind,
        speeds=speeds,
        workload=workload or Workload(),
    )
    return replace(planned, forecast=forecast)


def on_meta(path: Path) -> nn.Module:
    """The model of a Hugging Face directory or config.json, without memory.

    Raises:
        ConfigError: it names no model that transformers has.
    """
    import transformers

    if not path.exists():
        raise ConfigError(problems=[f"the model {str(path)!r} does not exist: name a local folder"])
    try:
        hf_config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(problems=[f"{path} is no configuration of a model: {error}"]) from error
    names = hf_config.architectures or ()
    model_class: Any = getattr(transformers, next(iter(names), ""), None)
    if model_class is None:
        raise ConfigError(
            problems=[f"{path} names no architecture that transformers has: {', '.join(names)}"]
        )
    with torch.device("meta"):
        module: nn.Module = model_class(hf_config)
    return module


def device_is_host_memory(config: OffloadConfig) -> bool:
    """Whether the device tier is a part of host memory, because there is no accelerator."""
    kind = config.tiers.device.kind
    return kind == "cpu" or (kind == "auto" and not torch.cuda.is_available())


def available_device_bytes(config: OffloadConfig) -> int:
    """The device budget in bytes: what the configuration says, or a share of what is free now."""
    memory = config.tiers.device.memory
    if memory != "auto":
        return memory
    if device_is_host_memory(config):
        return int(available_host_bytes() * HOST_SHARE * _CPU_DEVICE_SHARE)
    kind = config.tiers.device.kind
    device = torch.device("cuda" if kind == "auto" else kind)
    return int(torch.cuda.mem_get_info(device)[0] * _CUDA_DEVICE_SHARE)


def available_arena_bytes(config: OffloadConfig) -> int:
    """The host budget in bytes, beside a device tier that is host memory itself."""
    memory = config.tiers.host.memory
    if memory != "auto":
        return memory
    available = int(available_host_bytes() * HOST_SHARE)
    if device_is_host_memory(config):
        return max(available - available_device_bytes(config), 1)
    return available


def describe_machine(config: OffloadConfig, nvme_bytes: int | None) -> Machine:
    """The budgets as the planner takes them; `nvme_bytes` None: the tier is not used."""
    return Machine(
        device_bytes=available_device_bytes(config),
        host_bytes=available_arena_bytes(config),
        nvme_bytes=nvme_bytes,
        host_addressable=device_is_host_memory(config),
        pinned_versions=config.checkpoint.pinned_versions,
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


def plan_module(
    collection: Collection,
    config: OffloadConfig,
    machine: Machine,
    rule: AnyRule,
    groups: Sequence[dict[str, Any]],
    *,
    known: Plan | None = None,
    keeps_room: bool = True,
) -> Plan:
    """Plan the state of collected parameters; what the engine cannot page is taken off the device.

    `known` is a plan of the same parameters, whose buckets and homes stay: see `extend_plan`. So
    does the overlapped step's room where it fits; without `keeps_room` it is planned anew.

    Raises:
        ConfigError: `tiling.modules` names no module that can be tiled.
        DoesNotFitError: parameters that must stay on the device exceed its budget.
        OffloadError: the optimizer cannot step a parameter.
    """
    left = machine.device_bytes - collection.resident_bytes
    if left <= 0:
        raise DoesNotFitError(
            table=f"parameters that cannot be paged need {format_bytes(collection.resident_bytes)} "
            f"of tier device, whose budget is {format_bytes(machine.device_bytes)}"
        )
    reserved_bytes = reserved_host_bytes(config, machine, known)
    machine = replace(machine, device_bytes=left, host_bytes=machine.host_bytes - reserved_bytes)
    plan_beside = partial(_plan_collection, collection, config, rule=rule, groups=groups)
    if known is not None and keeps_room:
        planned, room = _plan_beside_room(plan_beside, machine, known)
        planned = with_overlap(planned, room, machine)
    else:
        planned = plan_beside(machine=machine, known=known)
        wanted = flow_bytes(planned, machine) if _overlaps(config, rule) and planned.fits else 0
        beside = replace(machine, host_bytes=machine.host_bytes - wanted)
        if wanted and (overlapped := plan_beside(machine=beside, known=known)).fits:
            room = overlap_room(overlapped, machine, wanted)
            planned = with_overlap(overlapped, room, machine)
    planned = with_overhead(planned, "device", collection.resident_bytes)
    planned = with_activations(planned, reserved_bytes, config, machine, grows=known is None)
    return with_forecast(planned, config, machine, known_speeds(config))


def _plan_beside_room(
    plan_beside: Callable[..., Plan], machine: Machine, known: Plan
) -> tuple[Plan, OverlapRoom]:
    """Plan beside the overlapped step's room; where that does not fit, the room is what is left."""
    room = known.overlap
    nvme_bytes = machine.nvme_bytes
    beside = replace(
        machine,
        host_bytes=machine.host_bytes - room.host_bytes,
        nvme_bytes=None if nvme_bytes is None else nvme_bytes - room.held_nvme_bytes,
    )
    planned = plan_beside(machine=beside, known=known)
    if not planned.fits and room.flow_bytes:
        planned = plan_beside(machine=machine, known=known)
        room = room_left(planned, machine)
    return planned, room


def _overlaps(config: OffloadConfig, rule: AnyRule) -> bool:
    """Whether a step may be taken beside the computation: an update can be made and dropped."""
    return config.overlap.optimizer and isinstance(rule, UpdateRule)


def _plan_collection(
    collection: Collection,
    config: OffloadConfig,
    *,
    rule: AnyRule,
    groups: Sequence[dict[str, Any]],
    machine: Machine,
    known: Plan | None,
) -> Plan:
    """Plan on what of the machine is left for paged parameters."""

    def plan_specs(specs: Sequence[ParamSpec], slot_bytes: int) -> Plan:
        beside = replace(
            machine,
            device_bytes=machine.device_bytes - slot_bytes,
            device_held_bytes=collection.resident_bytes + slot_bytes,
        )
        if isinstance(rule, ZerothOrderRule):
            planned = _plan_forward_only(specs, config, beside)
        elif isinstance(rule, GenericRule):
            planned = _plan_generic(specs, collection, config, beside, rule, groups, known)
        else:
            by_kernel = partial(_plan_kernels, specs, config, rule, known)
            planned = plan_with_update(by_kernel, config, beside, rule, known)
        return with_overhead(planned, "device", slot_bytes + planned.update_bytes)

    if known is not None:
        return plan_specs(*known_tiles([c.spec for c in collection.paged], known))
    # Forward-only training perturbs whole pages.
    tileable = collection.tileable if not isinstance(rule, ZerothOrderRule) else ()
    return plan_tiled(collection.paged, tileable, config, plan_specs)


def _plan_kernels(
    specs: Sequence[ParamSpec],
    config: OffloadConfig,
    rule: UpdateRule,
    known: Plan | None,
    machine: Machine,
) -> Plan:
    if known is None:
        return plan_buckets(specs, config, machine=machine, moments=rule.state_specs)
    lay_out = partial(_kernel_layouts, config=config, rule=rule)
    return extend_plan(known, specs, config, machine=machine, lay_out=lay_out)


def _kernel_layouts(
    bucket: Bucket, config: OffloadConfig, rule: UpdateRule
) -> dict[str, ClassLayout]:
    dtype = resolve_gradient_dtype(config)
    return layout_state([bucket], gradient_dtype=dtype, moments=rule.state_specs)[0]


def with_overhead(planned: Plan, tier: str, nbytes: int) -> Plan:
    """Count bytes of a tier that were taken off its budget before planning."""
    peak, need, budget = (
        {**amounts, tier: amounts[tier] + nbytes}
        for amounts in (planned.peak_bytes, planned.need_bytes, planned.budget_bytes)
    )
    return replace(planned, peak_bytes=peak, need_bytes=need, budget_bytes=budget)


def _plan_forward_only(specs: Sequence[ParamSpec], config: OffloadConfig, machine: Machine) -> Plan:
    scratch = 0
    if not machine.host_addressable:
        elements = config.partition.bucket_elements
        if elements == "auto":  # planning may halve it, and chunks shrink with it
            elements = resolve_bucket_elements(specs, machine.device_bytes)
        scratch = perturbed_bytes(pack(specs, bucket_elements=elements))
    machine = replace(machine, host_bytes=machine.host_bytes - scratch)
    planned = plan_buckets(specs, config, machine=machine, moments=None)
    return with_overhead(planned, "host", scratch)


def perturbed_bytes(buckets: Sequence[Bucket]) -> int:
    """Host bytes in which chunks are perturbed for a device that the CPU does not reach."""
    chunks = [
        chunk.numel * bucket.itemsize
        for bucket in buckets
        if bucket.trainable
        for chunk in bucket.chunks
    ]
    return PERTURBED_CHUNKS * round_up(max(chunks, default=0), BLOCK_ALIGNMENT_BYTES)


def _plan_generic(
    specs: Sequence[ParamSpec],
    collection: Collection,
    config: OffloadConfig,
    machine: Machine,
    rule: GenericRule,
    groups: Sequence[dict[str, Any]],
    known: Plan | None,
) -> Plan:
    buckets = _whole_buckets(specs, config, machine) if known is None else known.buckets
    scratch = scratch_bytes(specs, buckets)
    machine = replace(machine, host_bytes=machine.host_bytes - scratch)
    group_of = {id(p): group for group in groups for p in group["params"]}
    lay_out = partial(
        _generic_layouts, collection=collection, config=config, rule=rule, group_of=group_of
    )
    if known is None:
        planned = plan_layouts(
            specs,
            buckets,
            tuple(lay_out(bucket) for bucket in buckets),
            config,
            machine=machine,
            speeds=LaneSpeeds(),
            workload=Workload(),
        )
    else:
        planned = extend_plan(known, specs, config, machine=machine, lay_out=lay_out)
    return with_overhead(planned, "host", scratch)


def _whole_buckets(
    specs: Sequence[ParamSpec], config: OffloadConfig, machine: Machine
) -> tuple[Bucket, ...]:
    """Buckets of one chunk each, because a torch optimizer steps whole parameters."""
    elements = config.partition.bucket_elements
    if elements == "auto":
        elements = resolve_bucket_elements(specs, machine.device_bytes)
    largest = max(spec.numel for spec in specs)
    return pack(
        specs,
        bucket_elements=elements,
        chunk_elements=round_up(max(elements, largest) + REDUCTION_ELEMENTS, REDUCTION_ELEMENTS),
    )


def scratch_bytes(specs: Sequence[ParamSpec], buckets: Sequence[Bucket]) -> int:
    """Host bytes of the fp32 copies that a torch optimizer steps: those of the largest bucket."""
    trained = [b for b in buckets if any(specs[slot.param].trainable for slot in b.slots)]
    largest = max(map(OptimizerUpdate.scratch_bytes, trained), default=0)
    return round_up(largest, BLOCK_ALIGNMENT_BYTES)  # the arena leases pages


def _generic_layouts(
    bucket: Bucket,
    collection: Collection,
    config: OffloadConfig,
    rule: GenericRule,
    group_of: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    fields = state_fields(bucket, gradient_dtype=resolve_gradient_dtype(config), moments=())
    layouts: dict[str, Any] = {
        name: ClassLayout(bucket, specs) for name, specs in fields.items() if name != "optimizer"
    }
    if bucket.trainable:
        tensors = {}
        members = [collection.paged[slot.param].parameter for slot in bucket.slots]
        # A frozen member that gets its own group later finds the state of its neighbours' group.
        (shared, *_) = [group_of[id(member)] for member in members if id(member) in group_of]
        for slot, parameter in zip(bucket.slots, members, strict=True):
            shape = tuple(parameter.shape)
            if parameter.is_complex():
                shape = (*shape, 2)  # see `OptimizerUpdate`
            layout = rule.state_layout(shape, group_of.get(id(parameter), shared))
            tensors[slot.param] = [StateTensorSpec(t.key, t.dtype, t.shape) for t in layout.tensors]
        layouts["optimizer"] = TensorLayout(bucket, fields["optimizer"], tensors)
    return layouts


class ChosenRule(NamedTuple):
    """What updates the parameters.

    Attributes:
        rule: the update rule.
        groups: the parameter groups, with all settings.
        defaults: the settings of a group that is added later.
        by_name: the groups are the config's: a parameter's name says which one takes it.
    """

    rule: AnyRule
    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    by_name: bool


def choose_rule(
    collection: Collection, config: OffloadConfig, optimizer: OptimizerFactory | None
) -> ChosenRule:
    """The update rule and the parameter groups, from the config or from a factory's optimizer.

    Raises:
        ConfigError: the optimizer cannot keep its moments as `[optimizer] moments` says.
        OffloadError: the factory's optimizer cannot be applied to one bucket at a time.
    """
    eight_bit = config.optimizer.moments == "8bit"
    named = [(c.names, _trained(c)) for c in collection.paged]
    if optimizer is None:
        groups = configured_groups(config.optimizer, named)
        rule: AnyRule = (
            _forward_only(config)
            if config.optimizer.name == ZerothOrderRule.name
            else make_rule(config.optimizer.name, groups)
        )
        rule = eight_bit_rule(rule) if eight_bit else rule
        return ChosenRule(rule, groups, configured_settings(config.optimizer), True)
    prototype = optimizer([parameter for _, parameter in named if parameter is not None])
    groups = [dict(group) for group in prototype.param_groups]
    rule = from_torch(prototype) or GenericRule(prototype)
    rule = eight_bit_rule(rule) if eight_bit else rule
    return ChosenRule(rule, groups, dict(prototype.defaults), False)


def _trained(collected: Collected) -> nn.Parameter | None:
    """The parameter, if it is trained; a part of a composite never is."""
    parameter = collected.parameter
    if collected.spec.trainable and isinstance(parameter, nn.Parameter):
        return parameter
    return None


def _forward_only(config: OffloadConfig) -> ZerothOrderRule:
    return ZerothOrderRule(perturbation=config.optimizer.perturbation, seed=config.training.seed)


def without_untrained(collection: Collection, groups: Sequence[dict[str, Any]]) -> Collection:
    """The parameters that no group has count as frozen: no gradient, no optimizer state.

    As with any torch optimizer, what backward leaves in their `.grad` is the user's own.
    """
    known = {id(parameter) for group in groups for parameter in group["params"]}
    paged = [
        replace(c, spec=replace(c.spec, trainable=False)) if id(c.parameter) not in known else c
        for c in collection.paged
    ]
    return replace(collection, paged=tuple(paged))
