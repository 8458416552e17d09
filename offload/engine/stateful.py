"""The part of the engine through which state is read and written, wherever it lives."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.engine.build import Parts
from offload.engine.departed import GradientSlots
from offload.engine.optimizer import OffloadOptimizer
from offload.engine.paging.pages import PagedParameter, paged_by_owner
from offload.engine.replacing import Replacement
from offload.engine.snapshot import Snapshot
from offload.engine.state_access import StateAccess, load_scalar_state, scalar_state
from offload.engine.state_map import StateMap
from offload.errors import OffloadError
from offload.optim.chunk_update import OptimizerUpdate
from offload.optim.loss_scale import LossScale
from offload.optim.rules import scale_field
from offload.partition.parameters import ParameterState
from offload.partition.snapshot import BlockKey, MappedTensor, block_nbytes
from offload.schedule.plan import Plan
from offload.tiers.uninterrupted import num_cuts

_NO_GUARD = torch._C.DisableTorchFunctionSubclass


class StatefulEngine(ABC):
    """What an engine offers of its state: full tensors by parameter name, groups, scalars."""

    module: nn.Module
    optimizer: OffloadOptimizer
    loss_scale: LossScale | None
    _parts: Parts
    _slots: GradientSlots
    _state: StateAccess
    _trainable: list[ParameterState]
    _paged_of_index: Mapping[int, PagedParameter]
    _is_replaced_in_part = False  # the state is neither the old one nor a new one
    _known_cuts = 0
    _num_gathered = 0  # blocks of `gathered` that are open
    _gradients_are_spent = False  # a step has used them, nobody has forgotten them
    micro_steps: int
    _state_map: StateMap | None = None

    @abstractmethod
    def _check_open(self) -> None:
        """Raise EngineStateError on a closed engine, or on one whose state is void."""

    @abstractmethod
    def _check_ready(self, what: str) -> None:
        """`_check_open`, and raise EngineStateError while a step is pending."""

    @abstractmethod
    def _check_not_closed(self) -> None:
        """Raise EngineStateError on a closed engine."""

    @abstractmethod
    def _abandon_step(self) -> None:
        """Forget a pending step and all gradients."""

    @abstractmethod
    def _set_gradient(self, state: ParameterState, tensor: torch.Tensor) -> None:
        """Replace a parameter's gradient."""

    @property
    def plan(self) -> Plan:
        """Where the state lives; another one when parameters were unfrozen or memory ran short."""
        return self._parts.plan

    @contextlib.contextmanager
    def gathered(
        self, names: Sequence[str] | str | None = None, *, writable: bool = False
    ) -> Iterator[None]:
        """Full parameters, present and plain, for the duration of a block; None is all of them.

        Inside, raw pointers, torch.func and tracing work; `step` is refused. Edits are kept if
        `writable`. A page of which views outlive the block stays until the step ends.

        Raises:
            BudgetError: they do not fit the device budget together.
            OffloadError: a name is unknown; or, on exit, a parameter was edited without `writable`.
        """
        self._check_ready("gathered()")
        chosen = [names] if isinstance(names, str) else names
        paged = (
            self._parts.paged
            if chosen is None
            else list(dict.fromkeys(p for name in chosen for p in self._paged_named(name)))
        )
        pages = list(dict.fromkeys(parameter.page for parameter in paged))
        pager = self._parts.pager
        pager.pin(pages, "gathered()")
        fresh = pager.begin_gathered(pages)
        for parameter in paged:
            parameter.wear_plain()
        self._num_gathered += 1
        try:
            yield
        finally:
            self._num_gathered -= 1
            pager.unpin(pages)  # they are kept until `end_gathered`
            escaped = {parameter.page for parameter in paged if parameter.has_escaped}
            for parameter in paged:
                parameter.wear_guard()
            edited = pager.end_gathered(pages, [page for page in fresh if page not in escaped])
        if edited and not writable:
            raise OffloadError(
                f"parameter {edited[0].state.name} was edited inside gathered()",
                remedy="use gathered(writable=True); the edit has been kept",
            )

    def named_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each parameter's name and full state, one parameter at a time; copies on the CPU.

        Keys: "weight" (compute dtype), "master" (fp32) and the optimizer's tensors for trainable
        parameters (moments in fp32, also where they are kept with 8 bits), "gradient" if one has
        arrived (unscaled by the loss scale). A quantized weight comes as its parts, each under a
        name of its own and in its own dtype.
        """
        for state in self._parts.parameters:
            self._check_open()
            yield state.name, self._full_state(state)

    def set_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace parts of a parameter's state; keys as in `named_state`.

        A weight without a master sets the master as well; a master sets the weight. An 8-bit moment
        takes what is next to the values.

        Raises:
            OffloadError: a name is unknown, or a shape is another.
            EngineStateError: the engine is closed, or a step is pending.
        """
        self._check_ready("set_state")
        self._settle_snapshot()
        state = self._state.parameter(name)
        for key, tensor in tensors.items():
            if key == "gradient":
                self._set_gradient(state, tensor)
            elif key == "master" or (key == "weight" and "master" not in tensors):
                self._state.set_master(state, tensor) if state.trainable else (
                    self._state.write(state, "weight", tensor)
                )
            elif key in self._state.eight_bit_moments(state):
                self._state.write_moment(state, key, tensor)
            elif key != "weight":
                self._state.write(state, key, tensor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The module's state dict with full copies on the CPU; buffers included, ties shared."""
        self._check_open()
        copies: dict[str, torch.Tensor] = {}
        known: dict[int, torch.Tensor] = {}
        entries = self.module.state_dict(keep_vars=True)
        paged_names = self._parts.names
        for name, value in entries.items():
            if isinstance(value, nn.Parameter) and name in paged_names:
                state = self._state.parameter(name)
                if state.index not in known:
                    known[state.index] = self._state.read(state, "weight")
                copies[name] = known[state.index]
            else:
                copies[name] = value.detach().cpu().clone() if torch.is_tensor(value) else value
        return copies

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load the module's state dict; masters follow the weights. Returns what torch returns."""
        self._check_ready("load_state_dict")
        result = self.module.load_state_dict(state_dict, strict=strict)
        self._parts.pager.flush()
        return result

    @contextlib.contextmanager
    def replacing_state(self) -> Iterator[None]:
        """For a block that writes every stored field of every parameter, and the counters.

        A pending step, gradients, edits and graphs of the old state are void from the start, and
        nothing of it is read, so that damage to it does not matter. An error in the block leaves
        the state void: only another replacement and `close` are legal then.

        Raises:
            EngineStateError: the engine is closed.
            DeadlineError: a write is still in flight; the state is void.
        """
        self._check_not_closed()
        self._settle_snapshot()
        self._is_void = True
        self._abandon_step()
        self._parts.pager.forget_copies()
        self._parts.store.void()
        with _NO_GUARD():
            for paged in self._parts.paged:
                paged.void_saved()
        self._is_void = False  # for the block to write
        try:
            yield
        except BaseException:
            self._is_void = True
            raise

    def stored_tensors(self) -> list[MappedTensor]:
        """Which bytes of which blocks the stored tensors are; see [Note: State map]."""
        by_parameter = self._current_map().tensors.values()
        return [tensor for tensors in by_parameter for tensor in tensors.values()]

    def block_nbytes(self, key: BlockKey) -> int:
        """Bytes of a chunk block."""
        return block_nbytes(self._parts.store, key)

    def start_replacing(self, key: BlockKey, *, wait: bool) -> Replacement | None:
        """Memory for a block that is replaced as a whole, inside of `replacing_state`.

        None: there is no staging at present, and `wait` is false.

        Raises:
            BudgetError: there is no staging.
        """
        store = self._parts.store
        block = store.block(key.bucket, key.state_class)
        stage = store.stage_or_raise if wait else partial(store.stage, wait=False)
        staged = stage(block, key.chunk)
        return None if staged is None else Replacement(store, block, key.chunk, staged)

    def end_replacing(self) -> None:
        """Every block has been replaced: wait for the writes, and forget what was made of others.

        Raises:
            StorageError: a block could not be written.
        """
        self._parts.store.drain()
        for page in self._parts.pages:
            self._parts.pager.drop_stale(page)
        for state in self._parts.parameters:
            state.edited = False

    def parameter_names(self) -> list[str]:
        """Canonical names in registration order; a tied parameter comes once."""
        return [state.name for state in self._parts.parameters]

    def aliases(self) -> dict[str, str]:
        """The other names of tied parameters, with the canonical name of each."""
        return {n: s.name for s in self._parts.parameters for n in s.names[1:]}

    def composite_names(self) -> list[str]:
        """The module's names of parameters that consist of several tensors: quantized weights."""
        composites = {id(p.owner) for p in self._parts.paged if p.composite is not None}
        return [n for n, p in self.module.named_parameters() if id(p) in composites]

    def state_fields(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every stored field of a parameter; see [Note: State fields]."""
        return self._state.fields(self._state.parameter(name))

    def read_state(self, name: str, field: str) -> torch.Tensor:
        """A copy of one stored field."""
        self._check_open()
        return self._state.read(self._state.parameter(name), field)

    def write_state(self, name: str, field: str, tensor: torch.Tensor) -> None:
        """Replace one stored field as it is; see `set_state` for one that keeps masters in step."""
        self._check_ready("write_state")
        self._settle_snapshot()
        self._state.write(self._state.parameter(name), field, tensor)

    @property
    def _is_void(self) -> bool:
        return self._is_replaced_in_part or self._known_cuts != num_cuts()

    @_is_void.setter
    def _is_void(self, value: bool) -> None:
        self._is_replaced_in_part, self._known_cuts = value, num_cuts()

    def snapshot(self) -> Snapshot:
        """The training state as it is now, while training goes on; see [Note: Snapshot].

        With gradients, if some have arrived that no step has used.

        Raises:
            EngineStateError: the engine is closed, a step is pending, or a gradient was lost.
            StorageError: an edit or a gradient could not be written home.
        """
        self._check_ready("a snapshot")
        self._settle_snapshot()
        parts = self._parts
        parts.pager.write_edits()
        if parts.pager.arrivals is not None:
            parts.pager.arrivals.settle()
        self._slots.adopt_all()
        has_gradients = any(s.gradient_sums is not None for s in parts.parameters)
        with_gradients = has_gradients and not self._gradients_are_spent
        if with_gradients:
            parts.gradients.flush()
        return Snapshot(parts, self._current_map(), self._state, with_gradients=with_gradients)

    def _current_map(self) -> StateMap:
        parts = self._parts
        if self._state_map is None or self._state_map.plan is not parts.plan:
            self._state_map = StateMap(parts.plan, parts.parameters, parts.store, self._state)
        return self._state_map

    def _end_saves(self) -> None:
        """Host memory is about to move: wait until nothing that was begun beside training has it.

        What has failed meanwhile is told later.
        """
        self._settle_snapshot()

    def _settle_snapshot(self) -> None:
        """Homes are about to be overwritten: wait until no snapshot needs them as they are."""
        self._parts.store.captured.wait()

    def write_gradient(self, name: str, tensor: torch.Tensor, sums: torch.Tensor) -> None:
        """Put back a gradient of a snapshot: in the parameter's shape, and its sums (fp64, 1-D).

        Raises:
            OffloadError: the parameter is not trained, or has another shape.
        """
        state = self._state.parameter(name)
        if not state.trainable:
            raise OffloadError(f"gradient of parameter {name}", expected="one that is trained")
        self._state.write_gradient(state, tensor)
        self._parts.gradients.restore(state, sums.numpy().copy())

    def parameter_steps(self) -> list[int]:
        """Updates that each parameter has had, in the order of `parameter_names`."""
        self._parts.pager.flush()  # one that is pending counts when it has been applied
        return [state.steps for state in self._parts.parameters]

    def set_parameter_steps(self, steps: Sequence[int]) -> None:
        """How many updates each parameter has had, in the order of `parameter_names`."""
        for state, count in zip(self._parts.parameters, steps, strict=True):
            state.steps = count

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups without parameters."""
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]

    def optimizer_members(self) -> list[list[str]]:
        """The canonical names of the parameters of each of the optimizer's groups."""
        names = {id(state.parameter): state.name for state in self._parts.parameters}
        return [
            [names[id(p)] for p in group["params"] if id(p) in names]
            for group in self.optimizer.param_groups
        ]

    def load_optimizer_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Undo `optimizer_groups`."""
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(values)

    def scalar_state(self) -> dict[str, Any]:
        """What an arbitrary optimizer keeps that is no tensor; plain values."""
        return scalar_state(self._parts.updater, self._parts.parameters)

    def keeps_scalars(self) -> bool:
        """Whether the optimizer keeps values beside its tensors: ours do not, torch's do."""
        return isinstance(self._parts.updater, OptimizerUpdate)

    def load_scalar_state(self, state: Mapping[str, Any]) -> None:
        """Undo `scalar_state`."""
        load_scalar_state(self._parts.updater, self._parts.parameters, state)

    def update_choice(self) -> dict[str, Any]:
        """Which buckets the device updates; plain values."""
        return self._parts.sites.to_dict()

    def keep_update_choice(self, saved: Mapping[str, Any] | None) -> None:
        """Update where the run with that `update_choice` did, unless the config says where."""
        self._parts.sites.resume(saved, self._parts.plan)

    def _paged_named(self, name: str) -> Sequence[PagedParameter]:
        """What is paged of the parameter of that name."""
        by_owner = paged_by_owner(self._parts.paged)
        for known, parameter in self.module.named_parameters(remove_duplicate=False):
            if known == name and id(parameter) in by_owner:
                return by_owner[id(parameter)]
        return [self._paged_of_index[self._state.parameter(name).index]]

    def _full_state(self, state: ParameterState) -> dict[str, torch.Tensor]:
        self._slots.adopt(state)
        found = {"weight": self._state.read(state, "weight")}
        if state.trainable:
            found["master"] = self._state.master(state)
        eight_bit = self._state.eight_bit_moments(state)
        stored = {"weight", "remainder", "master", *map(scale_field, eight_bit)}
        for name in self._state.fields(state):
            if name in eight_bit:
                found[name] = self._state.read_moment(state, name)
            elif name not in stored:
                found[name] = self._state.read(state, name)
        if state.gradient_sums is not None:
            self._parts.gradients.flush()
            gradient = self._state.read(state, "gradient")
            found["gradient"] = (
                gradient if self.loss_scale is None else gradient.float() / self.loss_scale.scale
            )
        return found
