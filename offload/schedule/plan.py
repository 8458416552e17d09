"""The plan: pure, frozen, made once before anything is allocated.

    specs -> buckets (partition.layout) -> chunk blocks -> placement -> Plan

A plan that does not fit is still a plan: it tells what is missing. The engine calls
`Plan.require_fit()` before it allocates anything, then holds at most `peak_bytes` of each tier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from offload.errors import DoesNotFitError, format_bytes
from offload.partition.layout import (
    MIN_BUCKET_ELEMENTS,
    Bucket,
    ClassLayout,
    FieldSpec,
    ParamSpec,
    pack,
    resolve_bucket_elements,
    slot_elements,
    state_fields,
)
from offload.schedule.cost import LaneSpeeds
from offload.schedule.footprint import NO_OVERLAP, STATE_CLASSES, TIERS, Machine, OverlapRoom
from offload.schedule.forecast import Forecast, StepKind, Workload, forecast_step
from offload.schedule.placement import (
    Placement,
    PlacementChoice,
    Shortfall,
    assign,
    shortfall_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from offload.config import OffloadConfig
    from offload.schedule.footprint import BlockBytes


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A parameter that comes to the device by tiles: ranges of `tile_rows` of its `rows` rows.

    `tile_bytes` are those of a whole tile; the last one may be smaller.
    """

    name: str
    bucket: int
    rows: int
    tile_rows: int
    tile_bytes: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the parameter."""
        return -(-self.rows // self.tile_rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """Home tier of each bucket's state, and what the run takes of each tier.

    Attributes:
        fits: whether every tier's budget is large enough.
        bytes: bytes[tier][state_class]: where the state lives; of activations, the room that the
            host has for those that leave the device.
        peak_bytes: by tier: the most that the engine holds, staging and spare extents included.
        need_bytes: by tier: the least budget with which this placement runs.
        budget_bytes: by tier; 0 for nvme that is not used.
        staging_bytes: the part of the host's peak that is staging.
        working_bytes: device room for paged weights: the capacity of the lookahead.
        gradient_bytes: device room for gradients between production and departure.
        landing_bytes: the part of it for those that are on their way to the host, 0 if they are
            waited for.
        forecast: what one optimizer step is predicted to take.
        placement: the home tiers.
        buckets: in order of their first parameter.
        layouts: by bucket: the `ClassLayout` of each state class.
        shortfalls: what is missing when it does not fit.
        tiled: the parameters that come to the device by tiles.
        update_bytes: device memory of updates on the device, see `UpdateScratch`.
        overlap: room beside all that for the overlapped optimizer step.
    """

    fits: bool
    bytes: dict[str, dict[str, int]]
    peak_bytes: dict[str, int]
    need_bytes: dict[str, int]
    budget_bytes: dict[str, int]
    staging_bytes: int
    working_bytes: int
    gradient_bytes: int
    landing_bytes: int
    forecast: Forecast
    placement: Placement
    buckets: tuple[Bucket, ...]
    layouts: tuple[dict[str, ClassLayout], ...]
    shortfalls: tuple[Shortfall, ...]
    tiled: tuple[TiledWeight, ...] = ()
    update_bytes: int = 0
    overlap: OverlapRoom = NO_OVERLAP

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of one optimizer step."""
        return self.forecast.step_seconds

    @property
    def bottleneck(self) -> str:
        """The lane that is predicted to be busy longest."""
        return self.forecast.bottleneck

    def tier(self, bucket: int, state_class: str) -> str:
        """The home tier of one class of one bucket."""
        return self.placement.tier(bucket, state_class)

    def moving_bytes(self, tier: str) -> int:
        """What the peak of a tier has beside homes: staging, working set, gradients, spares."""
        return self.peak_bytes[tier] - sum(self.bytes[tier].values())

    def require_fit(self) -> None:
        """Does nothing when the plan fits.

        Raises:
            DoesNotFitError: the table tells need, budget and remedy of each tier that is short.
        """
        if not self.fits:
            raise DoesNotFitError(table=str(self))

    def __str__(self) -> str:
        classes: tuple[str, ...] = STATE_CLASSES
        if self.bytes["host"]["activations"]:
            classes = (*classes, "activations")
        columns = (*classes, "moving", "peak", "least", "budget")
        lines = ["tier   " + "".join(f"{name:>12}" for name in columns)]
        for tier in TIERS:
            amounts = [self.bytes[tier][name] for name in classes]
            amounts += [self.moving_bytes(tier), self.peak_bytes[tier]]
            amounts += [self.need_bytes[tier], self.budget_bytes[tier]]
            lines.append(f"{tier:<7}" + "".join(f"{format_bytes(n):>12}" for n in amounts))
        lines.append(
            f"{len(self.buckets)} buckets; host staging {format_bytes(self.staging_bytes)}; "
            f"device room for paged weights {format_bytes(self.working_bytes)}"
        )
        if self.overlap.flow_bytes:
            lines.append(
                f"optimizer step overlapped: {format_bytes(self.overlap.host_bytes)} of the host"
                + f", {self.overlap.held_share:.0%} of its state on nvme twice"
                * (self.overlap.held_share > 0)
            )
        lines += [
            f"tiled: {each.name} in {each.num_tiles} tiles of {format_bytes(each.tile_bytes)}"
            for each in self.tiled
        ]
        if self.update_bytes:
            lines.append(f"device room for updates {format_bytes(self.update_bytes)}")
        lines.append(f"about {self.step_seconds:.3g} s a step, bound by {self.bottleneck}")
        if not self.fits:
            lines += ["does not fit:", shortfall_table(self.shortfalls)]
        return "\n".join(lines)


def plan_buckets(
    specs: Sequence[ParamSpec],
    config: OffloadConfig,
    *,
    machine: Machine,
    moments: Sequence[FieldSpec] | None,
    speeds: LaneSpeeds | None = None,
    workload: Workload | None = None,
) -> Plan:
    """Packs the parameters and plans their state.

    With `auto` bucket elements the buckets are halved while the plan does not fit: working set and
    staging shrink with them.

    Args:
        specs: the parameters, in registration order, in the dtype they compute in.
        config: reads `partition`, `placement`, `training`.
        machine: resolved budgets; `config.tiers` is not read.
        moments: the state of the update rule; None for forward-only training, which keeps weights
            only.
        speeds: measured lane speeds; by default conservative ones.
        workload: what a step computes; by default its transfers and updates only.
    """
    gradient_dtype = resolve_gradient_dtype(config)

    def plan(elements: int) -> Plan:
        buckets = pack(specs, bucket_elements=elements, slot_elements=slot_elements(moments))
        return plan_layouts(
            specs,
            buckets,
            layout_state(buckets, gradient_dtype=gradient_dtype, moments=moments),
            config,
            machine=machine,
            speeds=speeds or LaneSpeeds(),
            workload=workload or Workload(),
        )

    if config.partition.bucket_elements != "auto":
        return plan(config.partition.bucket_elements)
    elements = resolve_bucket_elements(specs, machine.device_bytes)
    planned = plan(elements)
    while not planned.fits and elements > MIN_BUCKET_ELEMENTS:
        elements //= 2
        planned = plan(elements)
    return planned


def extend_plan(
    known: Plan,
    specs: Sequence[ParamSpec],
    config: OffloadConfig,
    *,
    machine: Machine,
    lay_out: Callable[[Bucket], dict[str, ClassLayout]],
) -> Plan:
    """Plans the state that parameters add which are trainable now and were not in `known`.

    Buckets and homes of `known` stay. A bucket with one trainable parameter is a trainable one,
    and has state for all its parameters.

    Args:
        known: a plan of the same parameters.
        specs: the parameters, with what is trainable now.
        config: as of `plan_buckets`.
        machine: budgets for everything, what `known` has placed included.
        lay_out: the layouts of every state class of a trainable bucket.
    """
    buckets, layouts = list(known.buckets), list(known.layouts)
    for index, bucket in enumerate(known.buckets):
        trained = any(specs[slot.param].trainable for slot in bucket.slots)
        if trained and not bucket.trainable:
            buckets[index] = replace(bucket, trainable=True)
            layouts[index] = lay_out(buckets[index])
    return plan_layouts(
        specs,
        tuple(buckets),
        tuple(layouts),
        config,
        machine=machine,
        speeds=LaneSpeeds(),
        workload=Workload(),
        settled=known.placement.tier_of,
    )


def layout_state(
    buckets: Sequence[Bucket], *, gradient_dtype: str, moments: Sequence[FieldSpec] | None
) -> tuple[dict[str, ClassLayout], ...]:
    """Lays out every state class of every bucket; arguments as of `state_fields`."""
    return tuple(
        {
            state_class: ClassLayout(bucket, fields)
            for state_class, fields in state_fields(
                bucket, gradient_dtype=gradient_dtype, moments=moments
            ).items()
        }
        for bucket in buckets
    )


def resolve_gradient_dtype(config: OffloadConfig) -> str:
    """What gradients accumulate in: "compute" or "fp32"; `auto` is fp32 only if they do add up."""
    if config.training.gradient_dtype != "auto":
        return config.training.gradient_dtype
    return "compute" if config.training.gradient_accumulation_steps == 1 else "fp32"


def plan_layouts(
    specs: Sequence[ParamSpec],
    buckets: tuple[Bucket, ...],
    layouts: tuple[dict[str, ClassLayout], ...],
    config: OffloadConfig,
    *,
    machine: Machine,
    speeds: LaneSpeeds,
    workload: Workload,
    settled: Mapping[tuple[int, str], str] | None = None,
) -> Plan:
    """Plans buckets whose state is laid out already; arguments as of `plan_buckets`.

    `settled` are homes that are given.
    """
    blocks: list[BlockBytes] = [
        {state_class: layout.chunk_nbytes for state_class, layout in classes.items()}
        for classes in layouts
    ]
    forward_only = frozenset(
        bucket.index
        for bucket, classes in zip(buckets, layouts, strict=True)
        if bucket.trainable and "gradients" not in classes
    )
    produced_bytes = max((spec.tile_nbytes for spec in specs if spec.trainable), default=0)
    if forward_only:
        produced_bytes = 0
    tiled = _tiled_weights(specs, buckets)
    choice = PlacementChoice(
        weights=config.placement.weights,
        gradients=config.placement.gradients,
        optimizer=config.placement.optimizer,
        off_device=forward_only,
    )
    place = partial(
        assign, blocks, machine, choice, tiled={each.bucket for each in tiled}, settled=settled
    )
    # From an accelerator one gradient is on its way while the next is produced, if there is room.
    landing_bytes = 0 if machine.host_addressable else produced_bytes
    placement = place(gradient_bytes=produced_bytes + landing_bytes)
    if placement.shortfalls and landing_bytes:
        landing_bytes = 0
        placement = place(gradient_bytes=produced_bytes)
    gradient_bytes = produced_bytes + landing_bytes
    taken = placement.footprint
    working_bytes = taken.working_bytes(machine.device_bytes)
    need_bytes = {tier: taken.need_bytes(tier) for tier in TIERS}
    kind = StepKind(
        machine.host_addressable,
        config.training.gradient_accumulation_steps,
        forward_only,
        working_bytes,
    )
    forecast = forecast_step(
        buckets, blocks, placement.tier_of, kind, speeds=speeds, workload=workload
    )
    return Plan(
        fits=not placement.shortfalls,
        bytes={tier: {**homes, "activations": 0} for tier, homes in taken.homes.items()},
        peak_bytes=need_bytes
        | {"device": taken.home_bytes("device") + working_bytes + gradient_bytes},
        need_bytes=need_bytes,
        budget_bytes={tier: machine.budget_bytes(tier) for tier in TIERS},
        staging_bytes=taken.staging_bytes,
        working_bytes=working_bytes,
        gradient_bytes=gradient_bytes,
        landing_bytes=landing_bytes,
        forecast=forecast,
        placement=placement,
        buckets=buckets,
        layouts=layouts,
        shortfalls=placement.shortfalls,
        tiled=tiled,
    )


def _tiled_weights(
    specs: Sequence[ParamSpec], buckets: Sequence[Bucket]
) -> tuple[TiledWeight, ...]:
    found = []
    for bucket in buckets:
        spec = specs[bucket.slots[0].param]
        if spec.tile_numel is not None:
            tile_rows = spec.tile_numel * spec.shape[0] // spec.numel
            found.append(
                TiledWeight(spec.name, bucket.index, spec.shape[0], tile_rows, spec.tile_nbytes)
            )
    return tuple(found)
