"""Parameters that are unfrozen after `initialize`: they get a place in the training state.

[Note: Promotion]
A frozen parameter has weights and nothing else. When one requires gradients, the next forward that
records gradients, or the next optimizer step, *promotes* it: its bucket becomes a trainable one.

    notice -> plan (DoesNotFitError) -> reserve -> commit

The bucket's gradients and optimizer state get homes as `[placement]` says, beside everything that
has a home already; nothing that lives somewhere moves. Where a budget has no room for them the
overlapped step's room makes way: it is given back, and what is then left is taken anew.

Moments are zero, the step count is 0, and the master is the weight, exactly. Other parameters of
the bucket stay frozen, and have room for their state from then on. Freezing a parameter again takes
nothing away: it gets no gradient, so nothing of it changes, and it goes on where it stood once it
is unfrozen.

Until the commit nothing of the engine has changed but room that was made: an error leaves it as it
was. It comes at every forward then, until the parameter is frozen again or there is room.

With the config's optimizer a parameter joins the group that its name belongs to. An optimizer from
a factory is the user's: as in PyTorch it trains what is in its groups.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from offload.config import available_host_bytes
from offload.engine.build import SCRATCH_OWNER, Parts
from offload.engine.collect import Collection
from offload.engine.optimizer import OffloadOptimizer, configured_group
from offload.engine.planning import plan_module, scratch_bytes, with_overhead
from offload.errors import DoesNotFitError, OffloadError, format_bytes, listed
from offload.optim.generic import GenericRule
from offload.optim.rules import refused_setting
from offload.optim.zeroth_order import ZerothOrderRule
from offload.partition.layout import Bucket
from offload.partition.parameters import ParameterState
from offload.partition.tensor_layout import TensorLayout
from offload.schedule.plan import Plan
from offload.tiers.uninterrupted import uninterrupted

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_TRAINABLE_DTYPES = ("fp32", "bf16", "fp16")
_REMEDY = "freeze with requires_grad_(False), or make room and initialize again"


class Promotion:
    """Notices unfrozen parameters and makes them trainable; see [Note: Promotion].

    `end_saves` waits for whatever has host memory beside training: growth that is undone must not
    have been leased from.
    """

    def __init__(
        self, parts: Parts, optimizer: OffloadOptimizer, end_saves: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._end_saves = end_saves
        self._optimizer = optimizer
        self._frozen = [state for state in parts.parameters if not state.trainable]
        self._owners = {paged.state.index: paged.owner for paged in parts.paged}
        # What requires gradients from the start, and no group has: the user has left it out.
        self._not_to_warn_of = {state.index for state in self._unfrozen()}
        self._staging_room = 0
        self.follow_arena()
        section = parts.config.optimizer
        self._numbers = sorted({configured_group(section, s.names) for s in parts.parameters})

    def follow_arena(self) -> None:
        """What the arena has beside homes is its room for staging."""
        self._staging_room = self._parts.host.budget_bytes - self._home_bytes()

    def check(self) -> list[ParameterState]:
        """Promote what is unfrozen and has a group; return it.

        Raises:
            DoesNotFitError: the budgets have no room; names the parameters.
            OffloadError: they cannot be trained, or there is no room after all.
        """
        unfrozen = self._unfrozen()
        if not unfrozen:
            return []
        if isinstance(self._parts.rule, ZerothOrderRule):
            raise OffloadError(
                f"{_listed(unfrozen)}: unfrozen in forward-only training, which moves what was "
                "trainable at initialize",
                remedy="freeze with requires_grad_(False), or initialize again",
            )
        with _NO_GUARD():
            grouped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        chosen = [state for state in unfrozen if id(state.parameter) in grouped]
        joining: list[ParameterState] = []
        if self._parts.groups_by_name:
            joining = [state for state in unfrozen if id(state.parameter) not in grouped]
        else:
            self._warn_of([state for state in unfrozen if id(state.parameter) not in grouped])
        promoted = sorted([*chosen, *joining], key=lambda state: state.index)
        if promoted:
            self._end_saves()
            self._parts.updates.settle()
            self._promote(promoted, joining)
        return promoted

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a new group that the engine cannot serve.

        Raises:
            OffloadError: a parameter is not the engine's; or a setting is not the update rule's.
        """
        known = {id(state.parameter) for state in self._parts.parameters}
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise OffloadError(
                    f"add_param_group with a parameter of shape {tuple(parameter.shape)} that is "
                    "none of those that the engine was made with",
                    remedy="add modules before offload.initialize",
                )
        refused = refused_setting(self._parts.rule, group)
        if refused is not None:
            raise OffloadError(
                f"add_param_group with {refused}: the optimizer of this engine was made without",
                remedy="use it in a group from the start",
            )

    def _unfrozen(self) -> list[ParameterState]:
        with _NO_GUARD():
            return [s for s in self._frozen if self._owners[s.index].requires_grad]

    def _warn_of(self, states: Sequence[ParameterState]) -> None:
        fresh = [state for state in states if state.index not in self._not_to_warn_of]
        if not fresh:
            return
        self._not_to_warn_of.update(state.index for state in fresh)
        warnings.warn(
            f"{_listed(fresh)}: unfrozen, but no group of the optimizer has it, so it gets "
            "gradients and is not trained; as in PyTorch, call "
            'engine.optimizer.add_param_group({"params": [...]})',
            stacklevel=5,
        )

    def _promote(self, states: Sequence[ParameterState], joining: Sequence[ParameterState]) -> None:
        parts = self._parts
        self._check_dtypes(states)
        joined = self._groups_with(joining)
        collection = _with_trainable(parts.collection, states)
        self._check_settled_layouts(states, joined)
        plan = self._plan(collection, joined)
        if not plan.fits:
            raise _no_room(states, str(plan))
        buckets = _newly_trainable(parts.plan, plan)
        with uninterrupted():
            self._reserve(states, collection, plan, buckets)
            self._commit(states, collection, plan, buckets)
            for group, members in zip(self._optimizer.param_groups, joined, strict=True):
                group["params"] = members["params"]

    def _commit(
        self,
        states: Sequence[ParameterState],
        collection: Collection,
        plan: Plan,
        buckets: Sequence[Bucket],
    ) -> None:
        parts = self._parts
        self._staging_room = max(self._staging_room, plan.staging_bytes)
        # What the overlapped step's room took before may have been more than anything from here on.
        peak = {**plan.peak_bytes, "host": max(plan.peak_bytes["host"], parts.host.peak_bytes)}
        if parts.nvme is not None:
            peak["nvme"] = max(peak["nvme"], parts.nvme.peak_bytes)
        plan = replace(plan, peak_bytes=peak)
        parts.plan, parts.collection = plan, collection
        parts.sites.follow(plan)
        for bucket in buckets:
            parts.gradients.admit(bucket)
            parts.streamed.admit(bucket)
            parts.updates.admit(bucket)
        parts.gradients.resize(plan.landing_bytes)
        for state in states:
            state.trainable = True
            state.edited = True  # what completes the weight follows it at the first update
        self._frozen = [state for state in self._frozen if not state.trainable]

    def _plan(self, collection: Collection, groups: Sequence[dict[str, Any]]) -> Plan:
        """Plan beside what is there.

        The arena's room for staging stays, also where the plan needs a larger one. What the plan
        has no use for is taken off the host's budget, and the plan is made again until it knows of
        all of that.
        """
        parts = self._parts
        stranded, plan = -1, parts.plan
        while (found := self._stranded_bytes(plan)) > stranded:
            stranded = max(found, 0)
            machine = replace(parts.machine, host_bytes=parts.machine.host_bytes - stranded)
            plan = plan_module(
                collection, parts.config, machine, parts.rule, groups, known=parts.plan
            )
        return with_overhead(plan, "host", stranded)

    def _stranded_bytes(self, plan: Plan) -> int:
        """Bytes of the arena that the plan has no use for."""
        free_bytes = self._parts.host.budget_bytes - self._home_bytes()
        return free_bytes - (plan.staging_bytes if self._has_staging_for(plan) else 0)

    def _has_staging_for(self, plan: Plan) -> bool:
        return plan.staging_bytes <= self._staging_room

    def _home_bytes(self) -> int:
        """Bytes of the arena that are leased for good."""
        parts = self._parts
        scratch = 0
        if isinstance(parts.rule, GenericRule):
            scratch = scratch_bytes([c.spec for c in parts.collection.paged], parts.plan.buckets)
        homes_bytes = sum(parts.plan.bytes["host"].values())
        return scratch + homes_bytes + parts.plan.overlap.host_bytes

    def _check_dtypes(self, states: Sequence[ParameterState]) -> None:
        for state in states:
            if self._parts.plan.buckets[state.bucket].dtype not in _TRAINABLE_DTYPES:
                raise OffloadError(
                    f"parameter {state.name} of dtype {state.parameter.dtype} requires gradients",
                    expected="a floating-point dtype of 16 bits or more",
                    remedy="freeze it with requires_grad_(False)",
                )

    def _groups_with(self, joining: Sequence[ParameterState]) -> list[dict[str, Any]]:
        """The optimizer's groups as they are when parameters have joined those of their names."""
        groups = [{**g, "params": list(g["params"])} for g in self._optimizer.param_groups]
        for state in joining:
            number = configured_group(self._parts.config.optimizer, state.names)
            groups[self._numbers.index(number)]["params"].append(state.parameter)
        return groups

    def _check_settled_layouts(
        self, states: Sequence[ParameterState], groups: Sequence[dict[str, Any]]
    ) -> None:
        """A torch optimizer's state has the room that its bucket has for it already, if any."""
        rule = self._parts.rule
        if not isinstance(rule, GenericRule):
            return
        group_of = {id(p): group for group in groups for p in group["params"]}
        for state in states:
            if not self._parts.plan.buckets[state.bucket].trainable:
                continue
            layout = self._parts.store.block(state.bucket, "optimizer").layout
            assert isinstance(layout, TensorLayout)
            shape = (*state.shape, 2) if state.parameter.is_complex() else tuple(state.shape)
            wanted = rule.state_layout(shape, group_of[id(state.parameter)])
            if [(t.key, t.dtype, t.shape) for t in wanted.tensors] != [
                tuple(spec) for spec in layout.keys(state.index)
            ]:
                raise OffloadError(
                    f"the state of parameter {state.name} has no place in its bucket: in its group "
                    f"{rule.name} keeps other tensors than in the group of the bucket's first one",
                    remedy="give parameters that are unfrozen the same kind of group, or "
                    "initialize with them trainable",
                )

    def _reserve(
        self,
        states: Sequence[ParameterState],
        collection: Collection,
        plan: Plan,
        buckets: Sequence[Bucket],
    ) -> None:
        """Take all memory and files; on an error give them back."""
        parts = self._parts
        blocks = [(b, name) for b in buckets for name in ("gradients", "optimizer")]
        on_host = [(b, name) for b, name in blocks if plan.tier(b.index, name) == "host"]
        elsewhere = [block for block in blocks if block not in on_host]
        scratch = 0
        if isinstance(parts.rule, GenericRule):
            before = scratch_bytes([c.spec for c in parts.collection.paged], plan.buckets)
            scratch = scratch_bytes([c.spec for c in collection.paged], plan.buckets) - before
        growth = scratch + sum(plan.layouts[b.index][name].nbytes for b, name in on_host)
        if not self._has_staging_for(plan):
            growth += plan.staging_bytes  # in one piece; what there was stays beside it
        with contextlib.ExitStack() as undo:
            room_bytes = self._make_way(plan, undo)
            self._require_memory(states, plan, growth + room_bytes)
            parts.gradients.resize(min(plan.landing_bytes, parts.plan.landing_bytes))
            held = plan.gradient_bytes - parts.plan.gradient_bytes
            if held or plan.working_bytes != parts.plan.working_bytes:
                undo.callback(parts.pager.make_way, parts.plan.working_bytes)
                parts.pager.make_way(plan.working_bytes)
            if held > 0:
                parts.device.hold(held, "gradients in flight")
                undo.callback(parts.device.unhold, held)
            elif held:
                parts.device.unhold(-held)
                undo.callback(parts.device.hold, -held, "gradients in flight")
            self._add(elsewhere, plan, undo)
            parts.store.reserve_records(spare=parts.machine.staging.spare_extents)
            if growth:
                undo.callback(parts.host.shrink, parts.host.grow(growth))
            if scratch:
                undo.callback(parts.host.lease(scratch, SCRATCH_OWNER).release)
            self._add(on_host, plan, undo)
            self._zero(buckets)
            if plan.overlap != parts.plan.overlap:
                parts.updates.take_room(plan.overlap)
            undo.pop_all()

    def _make_way(self, plan: Plan, undo: contextlib.ExitStack) -> int:
        """Give back the overlapped step's room if the plan has another; the bytes of that one."""
        parts = self._parts
        if plan.overlap == parts.plan.overlap:
            return 0
        while parts.pager.finish_one():
            pass  # a page may come from what is on its way home, which is in the room
        parts.updates.give_back()
        undo.callback(self._restore_room)
        return plan.overlap.host_bytes

    def _restore_room(self) -> None:
        """Take the room again that the plan counts; without it less is overlapped, and no more."""
        with contextlib.suppress(OffloadError):
            self._parts.updates.give_back()  # the new one, as far as it has been taken
            self._parts.updates.take_room(self._parts.plan.overlap)

    def _require_memory(self, states: Sequence[ParameterState], plan: Plan, growth: int) -> None:
        """Refuse what the machine does not have.

        Raises:
            DoesNotFitError: names the parameters.
        """
        parts = self._parts
        needed = growth
        if parts.machine.host_addressable:
            needed += sum(plan.bytes["device"].values()) - sum(parts.plan.bytes["device"].values())
        available = available_host_bytes()
        if needed > available:
            raise _no_room(
                states,
                f"{plan}\n{format_bytes(needed)} more of host memory are needed, of which "
                f"{format_bytes(available)} are available under the machine's and its cgroup's "
                "limits",
            )

    def _add(
        self, blocks: Iterable[tuple[Bucket, str]], plan: Plan, undo: contextlib.ExitStack
    ) -> None:
        store = self._parts.store
        for bucket, name in blocks:
            layout = plan.layouts[bucket.index][name]
            if layout.nbytes:
                store.add(bucket, name, layout, plan.tier(bucket.index, name))
                undo.callback(store.remove, bucket.index, name)

    def _zero(self, buckets: Sequence[Bucket]) -> None:
        """Make optimizer state zero; a record that was never written reads as zeros."""
        store = self._parts.store
        for bucket in buckets:
            if "optimizer" not in store.classes(bucket.index):
                continue
            block = store.block(bucket.index, "optimizer")
            for chunk in bucket.chunks if block.home != "nvme" else ():
                staged = store.stage_or_raise(block, chunk.index)
                staged.tensor.zero_()
                store.start_store(block, chunk.index, staged)
        store.drain()


def _with_trainable(collection: Collection, states: Iterable[ParameterState]) -> Collection:
    promoted = {state.index for state in states}
    paged = [
        replace(c, spec=replace(c.spec, trainable=True)) if index in promoted else c
        for index, c in enumerate(collection.paged)
    ]
    return replace(collection, paged=tuple(paged))


def _newly_trainable(before: Plan, after: Plan) -> list[Bucket]:
    return [
        new
        for old, new in zip(before.buckets, after.buckets, strict=True)
        if new.trainable and not old.trainable
    ]


def _no_room(states: Sequence[ParameterState], table: str) -> DoesNotFitError:
    return DoesNotFitError(
        fact=f"{_listed(states)}: unfrozen, but there is no room for gradients and optimizer "
        f"state; remedy: {_REMEDY}",
        table=table,
    )


def _listed(states: Sequence[ParameterState]) -> str:
    kind = "parameter" if len(states) == 1 else "parameters"
    return f"{kind} {listed([state.name for state in states])}"
