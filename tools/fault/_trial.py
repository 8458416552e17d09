"""One seed of the simulation: a training in a small world, compared with the serial reference.

[Note: trials] What raises is tried again, as a user would: a forward from its start, a backward
with all of its accumulation, a step with its own settings. A disk that is only bad gets better
after a while, and then the training has to end with the bits of the reference. Where a request
hangs it may end with a typed error that says so; state that the disk has damaged is replaced, as by
a checkpoint, and training goes on.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from fault._snapshots import SimulatedSnapshot
from fault._virtual import Scheduler
from fault._world import Reference, Shape, World, draw_shape
from offload.errors import ChecksumError, DeadlineError, OffloadError, StorageError
from offload.optim.chunk_update import StepSettings
from offload.optim.clipping import clip_coefficient, global_norm, square_sum
from offload.partition.arrays import TORCH_DTYPES, tensor_bits
from offload.partition.layout import Bucket
from offload.tiers.simulated_streams import SimulatedAccelerator

KEY = (True, True)
_BETTER_AFTER = 25  # errors: then the disk is well
_MOST_ERRORS = 300
_HOPELESS_AFTER = 12  # errors of a kind that nothing makes good

T = TypeVar("T")


class _EndedError(Exception):
    """The training cannot go on, and a typed error has said why."""


class _DamagedError(Exception):
    """State is damaged, and a typed error has said so."""


@dataclass
class Outcome:
    """How a seed went; `problem` says what must not be, and is empty if all is well."""

    seed: int
    problem: str = ""
    errors: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    ended: str = ""  # the typed error that it ended with
    is_replaced: bool = False  # damaged state was replaced
    committed: int = 0
    dropped: int = 0
    snapshots: int = 0
    turns: int = 0
    virtual_seconds: float = 0.0


def run_trial(seed: int, path: str) -> Outcome:
    """Run one seed; with `fault._virtual.installed`."""
    outcome = Outcome(seed)
    shape = draw_shape(seed)
    scheduler = Scheduler(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            world = World(shape, path, scheduler)
            try:
                _Training(world, outcome).run()
            finally:
                world.faults.is_on = False
                outcome.committed = world.updates.committed
                outcome.dropped = world.updates.dropped
                has_hung = outcome.ended or world.faults.count("drop")
                with contextlib.suppress(OffloadError) if has_hung else contextlib.nullcontext():
                    world.close()
        if scheduler.failures:
            raise scheduler.failures[0]
    except (Exception, AssertionError) as error:  # noqa: BLE001 - whatever it is, it must not be
        outcome.problem = f"seed {seed}: {type(error).__name__}: {error} ({shape})"
        error.__traceback__ = None
    finally:
        outcome.turns = scheduler.num_turns
        outcome.virtual_seconds = scheduler.now_seconds
        scheduler.close()
    return outcome


class _Training:
    """Takes the steps of a world, and looks at everything that it reads."""

    def __init__(self, world: World, outcome: Outcome) -> None:
        self.world = world
        self.shape: Shape = world.shape
        self.outcome = outcome
        self.reference = Reference(world.shape)
        self.drawn = random.Random(f"training {self.shape.seed}")
        self.global_steps = 0
        self.num_errors = 0
        self.snapshot: SimulatedSnapshot | None = None
        self.trainable = [s for s in world.parameters if s.trainable]

    def run(self) -> None:
        """All steps, then everything is compared, and nothing may have leaked."""
        try:
            for step in range(self.shape.num_steps):
                self.take_step_or_replace_state(step)
                self.look_at_snapshot()
                if self.drawn.random() < 0.15:
                    self.between_steps(self.edit_a_weight)
                if self.drawn.random() < 0.25:
                    self.between_steps(self.compare)
            self.between_steps(self.compare)
            if self.drawn.random() < 0.3:
                self.between_steps(self.world.updates.give_back)
            self.between_steps(self.world.pager.flush)
            if self.snapshot is not None:
                self.end_snapshot(self.snapshot)
        except _EndedError as error:
            self.outcome.ended = str(error)
            return
        finally:
            if self.snapshot is not None:
                self.snapshot.end()
        self.world.faults.is_on = False
        if not self.world.faults.count("drop"):
            self.world.check_nothing_leaked()
            self.compare()

    # -- snapshots -------------------------------------------------------------------------------

    def look_at_snapshot(self) -> None:
        """Between two steps: take one, or look at the one that was taken some steps ago."""
        if self.snapshot is None and self.drawn.random() < 0.3:
            self.between_steps(self.world.pager.write_edits)
            self.snapshot = SimulatedSnapshot(self.world, self.reference.copy_of_state())
        elif self.snapshot is not None and self.drawn.random() < 0.5:
            self.end_snapshot(self.snapshot)

    def end_snapshot(self, snapshot: SimulatedSnapshot) -> None:
        snapshot.end()
        self.outcome.snapshots += snapshot.is_whole
        try:
            if self.shape.weather.may_damage:
                with contextlib.suppress(StorageError):  # it has no other version
                    snapshot.compare()
            else:
                self.tried(snapshot.compare)
        finally:
            snapshot.release()
            self.snapshot = None

    def settle_snapshot(self) -> None:
        """Homes are about to be overwritten."""
        self.world.store.captured.wait()

    # -- a step ----------------------------------------------------------------------------------

    def take_step_or_replace_state(self, step: int) -> None:
        checkpoint = self.reference.copy_of_state(), self.global_steps
        while True:
            try:
                self.take_step(step)
            except _DamagedError:
                state, self.global_steps = checkpoint
                self.world.faults.is_on = False
                self.reference.replace_state(state)
                self.reference.forget_gradients()
                self.replace_state()
            else:
                return

    def between_steps(self, call: Callable[[], object]) -> None:
        """Call it until it does not raise; damaged state is replaced."""
        while True:
            try:
                self.tried(call)
            except _DamagedError:
                self.world.faults.is_on = False
                self.replace_state()
            else:
                return

    def replace_state(self) -> None:
        """As a checkpoint is loaded: nothing of the old state is read."""
        world = self.world
        self.settle_snapshot()
        self.outcome.is_replaced = True
        world.updates.abandon()
        world.streamed.abandon()
        world.gradients.clear()
        world.pager.forget_copies()
        world.store.void()
        for state in world.parameters:
            for name, array in self.reference.arrays[state.index].items():
                values = torch.from_numpy(array.copy())
                dtype, shape = world.access.fields(state)[name]
                world.access.write(state, name, values.view(dtype).view(shape))
            state.steps = self.reference.steps[state.index]
            state.edited = self.reference.edited[state.index]
        for page in world.pages:
            if page.is_paged:
                world.pager.drop_stale(page)

    def take_step(self, step: int) -> None:
        lr = self.drawn.choice([1e-3, 1e-2])
        expected = {s.index: {"lr": lr} for s in self.trainable}
        gradients = self.draw_gradients(step)
        while True:
            try:
                for micro in range(self.shape.accumulation):
                    self.forward()
                    self.backward(step, micro, gradients[micro], expected)
                settings = self.settings(expected)
            except OffloadError as error:
                self.note(error)
                self.world.updates.drop()
                self.world.gradients.clear()
                self.world.pager.release_nodes()
                continue
            break
        for arrived in gradients:
            for param, gradient in arrived:
                self.reference.arrive(param, gradient)
        self.compare_norm()
        if settings is not None:
            self.tried(lambda: self.apply(settings))
            self.reference.step(settings.hyper, settings.gradient_scale)
            self.end_step(settings)
        self.reference.forget_gradients()
        self.world.updates.drop()
        self.world.gradients.clear()

    def draw_gradients(self, step: int) -> list[list[tuple[int, torch.Tensor]]]:
        """Of each micro-batch, the gradients in the order in which they arrive."""
        found = []
        skipped = {s.index for s in self.trainable if self.drawn.random() < 0.1}
        bad = self.drawn.random() < 0.08
        for micro in range(self.shape.accumulation):
            arrived = []
            for bucket in reversed(self.shape.buckets):
                for slot in reversed(bucket.slots):
                    if not bucket.trainable or slot.param in skipped:
                        continue
                    times = 2 if self.drawn.random() < 0.02 else 1
                    for time in range(times):
                        numbers = np.random.default_rng(
                            (self.shape.seed, step, micro, slot.param, time)
                        )
                        values = torch.from_numpy(
                            numbers.standard_normal(slot.numel, dtype=np.float32)
                        )
                        if bad and micro == self.shape.accumulation - 1:
                            values[slot.numel // 2] = math.inf
                            bad = False
                        arrived.append((slot.param, values.to(TORCH_DTYPES[self.shape.precision])))
            found.append(arrived)
        return found

    def forward(self) -> None:
        pager = self.world.pager
        pager.begin(KEY)
        for bucket in self.shape.buckets:
            if self.drawn.random() < 0.1:
                continue
            pages = [self.world.pages[bucket.index]]
            pager.open_window(pages, "a module")
            try:
                self.check_page(bucket)
                self.compute()
            finally:
                pager.close_window(pages)

    def backward(
        self,
        step: int,
        micro: int,
        gradients: list[tuple[int, torch.Tensor]],
        expected: dict[int, dict[str, float]],
    ) -> None:
        world = self.world
        del step
        if micro == self.shape.accumulation - 1:
            world.gradients.land()
            world.updates.expect(StepSettings(expected, 1.0, self.global_steps + 1), arrivals=1)
        used: set[int] = set()
        for param, gradient in gradients:
            state = world.parameters[param]
            if state.bucket not in used:
                used.add(state.bucket)
                page = world.pages[state.bucket]
                world.pager.pin((page,), "the backward of an op")
                try:
                    self.check_page(self.shape.buckets[state.bucket])
                    self.compute()
                finally:
                    world.pager.unpin((page,))
            if isinstance(world.device, SimulatedAccelerator):
                world.device.make(gradient)
            world.gradients.arrive(state, gradient)
        world.pager.release_nodes()
        world.gradients.collect()

    def settings(self, expected: dict[int, dict[str, float]]) -> StepSettings | None:
        """As `Engine._settings`: None when the step is skipped."""
        world = self.world
        self.settle_snapshot()
        world.gradients.flush()
        if isinstance(world.device, SimulatedAccelerator):
            for page in world.pages:  # the last ops before the step, which nobody waits for
                if not page.is_paged and not world.pager.is_pending(page):
                    world.device.use(page.held_lease.tensor)
        world.pager.end()
        world.pager.write_edits()
        norm = self.norm()
        if not math.isfinite(norm):
            world.updates.drop()
            world.pager.end_raw_access()
            return None
        if self.drawn.random() < 0.15:  # a scheduler has changed it meanwhile
            expected = {param: {"lr": 2e-3} for param in expected}
        arrived = {s.index for s in self.trainable if s.gradient_sums is not None}
        hyper = {param: group for param, group in expected.items() if param in arrived}
        coefficient = clip_coefficient(norm, self.shape.max_norm)
        return StepSettings(hyper, coefficient, self.global_steps + 1)

    def norm(self) -> float:
        sums = [s.gradient_sums for s in self.trainable if s.gradient_sums is not None]
        return global_norm(square_sum(each.tolist()) for each in sums)

    def compare_norm(self) -> None:
        expected = global_norm(
            square_sum(sums.tolist()) for _, sums in sorted(self.reference.sums.items())
        )
        found = self.norm()
        same = found == expected or (math.isnan(found) and math.isnan(expected))
        assert same, f"the norm is {found}, not {expected}"

    def apply(self, settings: StepSettings) -> None:
        later = self.world.updates.take(settings)
        self.world.streamed.run(settings, later=later)

    def end_step(self, settings: StepSettings) -> None:
        world = self.world
        world.pager.end_raw_access()
        for index in {world.parameters[param].bucket for param in settings.hyper}:
            if world.pages[index].is_paged:
                self.tried(lambda index=index: world.pager.drop_stale(world.pages[index]))  # type: ignore[misc]
        self.global_steps += 1
        self.outcome.steps += 1
        with contextlib.suppress(StorageError):
            world.pager.expect(KEY)

    def compute(self) -> None:
        """What takes time, and waits for nothing."""
        if self.drawn.random() < 0.7:
            self.world.clock.advance(self.drawn.expovariate(100.0))

    # -- looking ---------------------------------------------------------------------------------

    def check_page(self, bucket: Bucket) -> None:
        """The weights that a module would compute with."""
        world = self.world
        lease = world.pages[bucket.index].held_lease
        if isinstance(world.device, SimulatedAccelerator):
            world.device.use(lease.tensor)
        for slot in bucket.slots:
            start = slot.offset * bucket.itemsize
            found = lease.tensor[start : start + slot.numel * bucket.itemsize].numpy()
            expected = self.reference.arrays[slot.param]["weight"].view(np.uint8)
            assert np.array_equal(found, expected), f"p{slot.param} on the device is not its weight"
        assert world.device.used_bytes <= world.device.budget_bytes
        assert world.host.used_bytes <= world.host.budget_bytes

    def compare(self) -> None:
        """Every field of every parameter, bit by bit, and the step counts."""
        for state in self.world.parameters:
            for name in self.reference.arrays[state.index]:
                found = tensor_bits(self.world.access.read(state, name))
                expected = self.reference.expected(state.index, name)
                same = np.array_equal(found.view(np.uint8), expected.view(np.uint8))
                assert same, f"{name} of {state.name} differs after step {self.global_steps}"
            steps = self.reference.steps[state.index]
            assert state.steps == steps, f"{state.name} counts {state.steps} steps, not {steps}"

    # -- between steps ---------------------------------------------------------------------------

    def edit_a_weight(self) -> None:
        self.settle_snapshot()
        state = self.drawn.choice(self.world.parameters)
        numbers = np.random.default_rng((self.shape.seed, self.global_steps, 7))
        values = torch.from_numpy(numbers.standard_normal(state.numel, dtype=np.float32))
        weight = values.to(TORCH_DTYPES[self.shape.precision])
        self.tried(lambda: self.world.access.write(state, "weight", weight))
        state.edited = True
        self.reference.edit(state.index, weight)

    def tried(self, call: Callable[[], T]) -> T:
        """Call it until it does not raise."""
        while True:
            try:
                return call()
            except OffloadError as error:
                self.note(error)

    def note(self, error: OffloadError) -> None:
        """An error: it must be typed, and there must be a reason for it."""
        faults = self.world.faults
        self.num_errors += 1
        self.outcome.errors[type(error).__name__] += 1
        if not faults.acted:
            raise error
        if isinstance(error, DeadlineError):
            assert faults.count("drop") or faults.count("delay"), "nothing was late"
            assert error.operation, error
            assert error.what or error.path, f"which one was late? {error}"
        elif isinstance(error, ChecksumError):
            assert faults.count("corrupt") or self.shape.weather.may_damage, error
        elif not isinstance(error, StorageError):
            is_late = faults.count("drop") or faults.count("delay")
            assert is_late, f"nothing has memory for long, but {type(error).__name__}: {error}"
        self.world.clock.advance(10.0)  # so long a user needs to try again
        if faults.count("drop") and self.num_errors >= _HOPELESS_AFTER:
            raise _EndedError(str(error))
        if self.shape.weather.may_damage and self.num_errors == _HOPELESS_AFTER:
            raise _DamagedError from error
        if self.num_errors >= _BETTER_AFTER:
            faults.is_on = False
        assert self.num_errors < _MOST_ERRORS, f"{error}, although nothing fails any more"
