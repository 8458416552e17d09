"""The engine: a module whose training state lives on tiers, behind the interface of the module.

[Note: One step]
    engine(...)        windows and guards bring weights in; the trace is recorded or followed
    engine.backward    autograd; each gradient sets out for home as soon as it is finished
    engine.step        norm, finite check, clipping; then the streamed update, and stale copies go

An optimizer step that an error interrupts is *pending*: its settings are frozen, its gradients
kept. `step()` completes it; until then whatever would change state or need all of it is refused.
A step that can never be completed, because state is damaged, ends with loading a checkpoint.

A backward that fails has brought some gradients home and others not. There is no telling which, so
the gradients of the whole accumulation are forgotten.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.optim.lr_scheduler import LRScheduler

from offload.config import OffloadConfig
from offload.engine.backward import BackwardEngine
from offload.engine.build import Parts
from offload.engine.departed import GradientSlots
from offload.engine.guards.places import Places
from offload.engine.guards.whole_modules import fused_modules, gathered_modules
from offload.engine.guards.windows import (
    FusedWindow,
    GatheredWindow,
    RootWindow,
    Window,
    encoder_windows,
    install,
)
from offload.engine.loss.chunked_head import Handle, chunk_head
from offload.engine.optimizer import Closure, OffloadOptimizer
from offload.engine.paging.pages import come_and_go, forget, paged_by_owner
from offload.engine.pressure import HostPressure
from offload.engine.promotion import Promotion
from offload.engine.report import StepMeter
from offload.engine.state_access import StateAccess
from offload.engine.zeroth_order import Reduce
from offload.errors import (
    BudgetError,
    EngineStateError,
    NonFiniteError,
    OffloadError,
    StorageError,
)
from offload.optim.chunk_update import StepSettings
from offload.optim.clipping import clip_coefficient
from offload.optim.loss_scale import LossScale
from offload.optim.schedulers import adopt_group, make_lr_scheduler
from offload.partition.parameters import ParameterState
from offload.telemetry import StepReport
from offload.tiers.uninterrupted import uninterrupted

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


class Engine(BackwardEngine):
    """A module under the engine. Call it as the module; see [Note: One step].

    Attributes:
        module: the user's module; its parameters are its own objects, their memory comes and goes.
        config: the configuration, frozen.
        optimizer: the parameter groups and `step` as a torch optimizer.
        lr_scheduler: a torch scheduler on it, stepped by `step`.
        loss_scale: the dynamic loss scale of fp16, else None.
        global_steps: optimizer steps taken.
        skipped_steps: steps skipped because a gradient was not finite.
        micro_steps: backward passes counted by `step` since the start.
        grad_norm: L2 norm of all gradients of the last step, before clipping; None before it.
    """

    def __init__(self, parts: Parts, lr_scheduler: SchedulerFactory | None) -> None:
        self._is_void = False
        config = parts.config
        self._parts, self.module = parts, parts.module
        self.config: OffloadConfig = config
        self.global_steps = 0
        self.skipped_steps = 0
        self.micro_steps = 0
        self.grad_norm: float | None = None
        self.loss_scale: LossScale | None = None
        self._open_zeroth_order()
        if config.precision.compute == "fp16" and self._zeroth is None:
            self.loss_scale = LossScale(
                initial=config.precision.initial_loss_scale,
                growth_factor=config.precision.growth_factor,
                backoff_factor=config.precision.backoff_factor,
                growth_interval=config.precision.growth_interval,
            )
        self._state = StateAccess(parts.parameters, parts.plan.buckets, parts.store, parts.pager)
        self._closed = False
        self._pending: StepSettings | None = None
        self._step_is_due = False  # the boundary has been counted, its step has not been taken
        self._in_backward = False
        self._paged_of_index = parts.paged_of
        self._meter = StepMeter(parts)
        self._trainable = [s for s in parts.parameters if s.trainable]
        self._follows_config = lr_scheduler is None
        try:
            self.optimizer = self._make_optimizer()
            self.lr_scheduler = self._make_scheduler(lr_scheduler)
        except BaseException:
            parts.closing.close()
            raise
        self._windows, self._root = self._open_windows()
        self._places = Places(self.module, parts.paged)
        self._handles: list[Handle] = [self._places]
        self._handles += [handle for w in self._windows for handle in install(w)]
        fused = [w for w in self._windows if isinstance(w, FusedWindow)]
        self._handles += [h for w in encoder_windows(self.module, fused) for h in install(w)]
        self._handles += install(self._root)
        self._slots = GradientSlots(
            self._trainable,
            parts.gradients,
            bring_back=self._bring_back,
            check=self._check_gradient,
        )
        if parts.tiles is not None:
            parts.tiles.arriving = self._slots.arriving
        self._promotion = Promotion(parts, self.optimizer, self._end_saves)
        self._pressure = HostPressure(parts, self._promotion, self._end_saves)
        self._handles += chunk_head(self.module, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward; arguments and result are the module's.

        Raises:
            EngineStateError: the engine is closed, or a step is pending.
            BudgetError, StorageError: weights could not be brought in; the engine stays usable.
            DoesNotFitError: a parameter was unfrozen, and there is no room to train it.
        """
        self._check_ready("forward")
        self._places.check()
        with self._meter.computing("forward"):
            try:
                return self.module(*args, **kwargs)
            except BaseException:
                self._unwind()
                raise

    def step(self, closure: Closure | None = None, *, reduce: Reduce | None = None) -> bool:
        """Count a backward; at the boundary take an optimizer step. Returns whether one was taken.

        A step with a non-finite gradient is skipped and changes no state. After a StorageError call
        `step` again: it completes the step, applying nothing twice.

        Forward-only training needs a closure and has no boundaries: see [Note: Forward-only step].

        Args:
            closure: computes the loss of a batch and returns it; forward-only training calls it
                twice, without gradients and with the same random numbers.
            reduce: in forward-only training makes one projected gradient of those of all workers,
                e.g. their mean. Every worker's call must return the same number: with one seed and
                equal weights they then stay equal to the bit. It is called in every step that both
                passes of have run, also with a number that is not finite.

        Raises:
            EngineStateError: forward-only training without a closure, or a closure without it.
            StorageError: state could not be read or written; the step is pending.
            NonFiniteError: an updated weight is not finite. The step has been taken all the same,
                in every placement alike: load a checkpoint, and lower the learning rate.
        """
        self._check_open()
        self._parts.updates.raise_failure()
        self._end_interrupted()
        if self._zeroth is not None:
            self._pressure.check(self.global_steps)
            self.optimizer.step(closure, reduce=reduce)
            return self._end_boundary()
        if closure is not None or reduce is not None:
            raise EngineStateError(
                f"step(closure) with {type(self._parts.rule).__name__}, which uses gradients",
                remedy="call engine.optimizer.step(closure), or set optimizer.name = 'mezo'",
            )
        with uninterrupted():
            if not self._step_is_due:
                self.micro_steps += 1
                if self.micro_steps % self.config.training.gradient_accumulation_steps:
                    return False
                self._step_is_due = True
            try:
                self.optimizer.step()
            except NonFiniteError:
                self._step_is_due = False
                self._clear_gradients()
                raise
            self._step_is_due = False
            self._clear_gradients()
            return self._end_boundary()

    def _end_boundary(self) -> bool:
        taken = not self.optimizer.step_was_skipped
        if taken and self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return taken

    def is_accumulation_boundary(self) -> bool:
        """Whether the next `step` takes an optimizer step."""
        return (self.micro_steps + 1) % self.config.training.gradient_accumulation_steps == 0

    def train(self, mode: bool = True) -> Self:
        """Set the module's training mode; returns the engine."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Set the module's evaluation mode; returns the engine."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """The module's training mode."""
        return self.module.training

    def report(self) -> StepReport:
        """What the last step moved, how long it took, and what bounds it."""
        return self._meter.report(self.global_steps)

    # -- the end -----------------------------------------------------------------------------------

    @uninterrupted()
    def close(self) -> None:
        """Wait for what is in flight, then free every tier. The module is of no use afterwards.

        A second call does nothing.

        Raises:
            StorageError: a write under way has failed; everything is freed all the same.
        """
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._slots.remove()
        # A touch of a parameter stays an error for as long as the module lives.
        for parameter in self._parts.paged:
            weakref.finalize(self.module, forget, parameter)
        with self._parts.closing:
            self._parts.updates.close()
            self._parts.store.drain()

    @property
    def is_closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------

    def _make_optimizer(self) -> OffloadOptimizer:
        return OffloadOptimizer(
            self._parts.groups,
            self._parts.group_defaults,
            take_step=self._take_step,
            forget_gradients=self._zero_grad,
            take_closure=None if self._zeroth is None else self._take_closure,
            admit_group=self._admit_group,
        )

    def _make_scheduler(self, factory: SchedulerFactory | None) -> LRScheduler | None:
        if factory is not None:
            return factory(self.optimizer)
        return make_lr_scheduler(self.config.lr_scheduler, self.optimizer)

    def _open_windows(self) -> tuple[list[Window], RootWindow]:
        by_owner = paged_by_owner(self._parts.paged)
        gathered = gathered_modules(self.module, self.config.guard.gather)
        below = {id(m) for outer in gathered.values() for m in outer.modules()}
        windows: list[Window] = []
        for name, module in self.module.named_modules():
            if id(module) in below:
                continue
            own = come_and_go(module.parameters(recurse=False), by_owner)
            if own:
                windows.append(Window(module, name, own, self._parts.pager))
        for name, module in gathered.items():
            every = come_and_go(module.parameters(), by_owner)
            windows.append(GatheredWindow(module, name, every, self._parts.pager))
        for name, module in fused_modules(self.module).items():
            # Also those whose home is the device: called by itself, the module finds them guarded.
            every = [p for each in module.parameters() for p in by_owner.get(id(each), ())]
            if every and id(module) not in below:
                windows.append(FusedWindow(module, name, every, self._parts.pager))
        resident = [p for p in self._parts.paged if not (p.page.is_paged or p.tiles)]
        return windows, RootWindow(
            self.module,
            resident,
            self._parts.pager,
            self._parts.activations,
            before_run=self._before_run,
        )

    def _before_run(self) -> None:
        """A forward of the whole module begins, of `module` itself or through the engine."""
        if self._pending is not None or self._is_void:
            return
        if self._zeroth is None:
            self._pressure.check(self.global_steps)
        if torch.is_grad_enabled():
            self._admit_unfrozen()

    def _admit_unfrozen(self) -> None:
        """What was frozen and is not any more gets a place; see [Note: Promotion]."""
        promoted = self._promotion.check()
        if promoted:
            self._trainable = [s for s in self._parts.parameters if s.trainable]
            self._slots.admit(promoted)

    def _admit_group(self, group: dict[str, Any]) -> None:
        self._check_ready("add_param_group")
        self._promotion.check_group(group)
        self._admit_unfrozen()
        if self._follows_config and self.lr_scheduler is not None:
            adopt_group(self.lr_scheduler, group)

    def _check_gradient(self, state: ParameterState) -> None:
        """A gradient is finished and about to be taken."""
        self._parts.pager.end_node()
        self._check_has_gradients(f"the gradient of {state.name}")
        if self.loss_scale is not None and not self._in_backward:
            raise EngineStateError(
                f"the fp16 gradient of {state.name} comes from a loss without its scale",
                remedy="call engine.backward(loss) instead of loss.backward()",
            )
        self._notice_zeroed()
        if self._gradients_are_spent and state.gradient_sums is not None:
            self._gradients_are_spent = False
            warnings.warn(
                "gradients are added to those that an optimizer step has used already: call "
                "zero_grad() after it, or engine.step(), which forgets them",
                stacklevel=2,
            )

    def _bring_back(self, state: ParameterState) -> torch.Tensor:
        """A copy of the gradient that is at home, as autograd would have it in `.grad`."""
        self._parts.gradients.flush()
        return self._state.read(state, "gradient").to(
            self._parts.device.device, state.parameter.dtype
        )

    def _set_gradient(self, state: ParameterState, tensor: torch.Tensor) -> None:
        self._check_has_gradients(f"the gradient of {state.name}")
        if not state.trainable:
            raise OffloadError(
                f"gradient of parameter {state.name}", expected="a parameter that is trained"
            )
        if self.loss_scale is not None:
            tensor = tensor.float() * self.loss_scale.scale
        if tuple(tensor.shape) != tuple(state.shape):
            raise OffloadError(
                f"gradient of parameter {state.name} with shape {tuple(tensor.shape)}",
                expected=f"shape {tuple(state.shape)}",
            )
        self._slots.place(state, tensor.to(self._parts.device.device))
        self._parts.gradients.flush()

    def _clear_gradients(self) -> None:
        self._gradients_are_spent = False
        self._parts.updates.drop()
        self._slots.clear()

    def _forget_gradients(self) -> None:
        """The accumulation under way starts again."""
        self._clear_gradients()
        self.micro_steps -= self.micro_steps % self.config.training.gradient_accumulation_steps

    def _zero_grad(self) -> None:
        self._check_ready("zero_grad")
        self._step_is_due = False
        self._forget_gradients()

    def _abandon_step(self) -> None:
        self._pending = None
        self._step_is_due = False
        if self._zeroth is not None:
            self._zeroth.abandon()
        self._parts.updates.abandon()
        self._parts.streamed.abandon()
        self._forget_gradients()

    def _check_may_step(self) -> None:
        self._check_open()
        self._settle_snapshot()
        if self._num_gathered:
            raise EngineStateError(
                "step() inside gathered(), whose parameters must stay as they are",
                remedy="leave the block first",
            )

    def _bump_versions(self) -> None:
        self._forget_stale(self._trainable)

    def _end_pass(self) -> None:
        """Let go of what a forward has left in use."""
        self._unwind()
        self._root.rest()
        self._parts.pager.release_nodes()
        self._release_gathered()
        self._parts.pager.end()

    def _take_step(self) -> bool:
        self._check_may_step()
        if self._pending is None:
            self._pending = self._settings()
            if self._pending is None:
                return False
        try:
            later = self._parts.updates.take(self._pending)
            self._parts.streamed.run(self._pending, later=later)
        except NonFiniteError:
            self._end_step()
            raise
        except (StorageError, BudgetError):
            raise  # nothing is lost: the next call completes the step
        except OffloadError:
            self._is_void = True  # a torch optimizer has failed between two parameters
            raise
        self._end_step()
        return True

    def _end_step(self) -> None:
        self._pending = None
        self._gradients_are_spent = True
        updated = [s for s in self._trainable if s.gradient_sums is not None]
        self._parts.pager.end_raw_access()
        self._forget_stale(updated)
        self._root.rest()
        self.global_steps += 1
        if self.loss_scale is not None:
            self.loss_scale.update(found_nonfinite=False)
        self._meter.end_step()
        # A fetch ahead that fails is tried again, and reported, when the weights are needed.
        with contextlib.suppress(StorageError):
            self._parts.pager.expect((self.module.training, True, *self._root.order))

    def _settings(self) -> StepSettings | None:
        """Freeze what the step applies; None when it is skipped."""
        parts = self._parts
        self._places.check()
        self._admit_unfrozen()
        parts.pager.release_nodes()
        self._release_gathered()
        self._slots.adopt_all()
        parts.gradients.flush()
        parts.pager.end()
        parts.pager.write_edits()
        self.grad_norm = self._norm_of_gradients()
        if not math.isfinite(self.grad_norm):
            self.skipped_steps += 1
            parts.updates.drop()
            if self.loss_scale is not None:
                self.loss_scale.update(found_nonfinite=True)
            self._root.rest()
            parts.pager.end_raw_access()
            return None
        coefficient = clip_coefficient(self.grad_norm, self.config.training.max_grad_norm)
        arrived = {s.index for s in self._trainable if s.gradient_sums is not None}
        hyper = {index: group for index, group in self._hyper().items() if index in arrived}
        return self._step_settings(hyper, coefficient)

    def _step_settings(self, hyper: dict[int, dict[str, Any]], coefficient: float) -> StepSettings:
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        return StepSettings(hyper, coefficient / scale, self.global_steps + 1)

    def _hyper(self) -> dict[int, dict[str, Any]]:
        """The group settings of each trainable parameter, by its index."""
        by_id = {
            id(p): {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        return {
            s.index: by_id[id(s.parameter)] for s in self._trainable if id(s.parameter) in by_id
        }

    def _forget_stale(self, updated: Sequence[ParameterState]) -> None:
        """The homes are newer now: device copies go, and a graph kept across the step is void."""
        pages = {state.bucket: self._parts.pages[state.bucket] for state in updated}
        for page in pages.values():
            if page.is_paged:
                self._parts.pager.drop_stale(page)
        with _NO_GUARD():
            for state in updated:
                self._paged_of_index[state.index].void_saved()

    def _release_gathered(self) -> None:
        for window in self._windows:
            if isinstance(window, GatheredWindow):
                window.release()

    def _end_interrupted(self) -> None:
        """No forward runs in this thread: what one of `module` itself has left open is void."""
        if self._parts.pager.is_in_window or self._root.is_open:
            self._unwind()

    def _unwind(self) -> None:
        for window in self._windows:
            window.unwind()
        self._root.unwind()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise EngineStateError("the engine is closed", remedy="make a new one")

    def _check_open(self) -> None:
        self._check_not_closed()
        if self._is_void:
            raise EngineStateError(
                "the state is void: an error interrupted the loading of a checkpoint, or an "
                "optimizer in the middle of a step; or a signal that came for the third time",
                remedy="load a checkpoint, or close the engine",
            )

    def _check_ready(self, what: str) -> None:
        self._check_open()
        self._parts.updates.raise_failure()
        if self._pending is not None:
            raise EngineStateError(
                f"{what} while optimizer step {self._pending.step} is pending",
                remedy="call step() until it returns: it completes the step; if it cannot, "
                "load a checkpoint",
            )
