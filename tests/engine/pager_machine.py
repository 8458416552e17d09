"""The pager of a whole engine against a dict of the weights that there should be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from offload.engine import build
from offload.engine.paging.pages import WeightPage
from offload.errors import BudgetError, OffloadError, StorageError
from offload.native.fault_spec import FaultAction
from offload.partition.residency import Residency
from offload.tiers.simulated import RandomFaults, SimulatedIo
from tests.faults.lab import LEARNING_RATE, make_engine

NUM_PAGES = 5
SHAPE = (32, 32)  # a page
HOME, LOADING, THERE = Residency.HOME, Residency.LOADING, Residency.ON_DEVICE
LEGAL = {(HOME, LOADING), (LOADING, THERE), (LOADING, HOME), (THERE, HOME)}
_NO_GUARD = torch._C.DisableTorchFunctionSubclass

T = TypeVar("T")


class PagerMachine(RuleBasedStateMachine):
    """Touches, edits, pins, windows, raw pointers and steps of five weights, of which few fit.

    Whatever has happened, a weight that is touched has the values that the same edits and steps
    give plain tensors, or the touch raises an error that there is a reason for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.expected: list[torch.Tensor] = []
        self.pinned: list[list[WeightPage]] = []
        self.windows: list[list[WeightPage]] = []
        self.raw: dict[int, Any] = {}
        self.mark = 0

    @initialize(
        home=st.sampled_from(["nvme", "nvme", "host"]),
        room=st.integers(2, 3),
        seed=st.integers(0, 999),
        rate=st.sampled_from([0.0, 0.0, 0.05, 0.2]),
    )
    def make(self, home: str, room: int, seed: int, rate: float) -> None:
        rates = {
            ("read", FaultAction("errno", 5)): rate,
            ("write", FaultAction("errno", 28)): rate / 2,
            ("copy", FaultAction("errno", 5)): rate / 4,
            ("read", FaultAction("corrupt", 1)): rate / 4,
        }
        self.faults = RandomFaults(seed, rates)
        self.faults.is_on = False
        io = SimulatedIo(seed=seed, fault=self.faults)
        module = nn.Module()
        generator = torch.Generator().manual_seed(seed)
        values = [
            torch.randint(-9, 9, SHAPE, generator=generator).float() for _ in range(NUM_PAGES)
        ]
        module.weights = nn.ParameterList(nn.Parameter(value.clone()) for value in values)
        self.expected = values
        self.moves = mock.patch.object(WeightPage, "move", _legal(WeightPage.move))
        self.moves.start()
        with mock.patch.object(build, "open_io", return_value=io):
            self.engine = make_engine(module, home, Path(self.folder.name), pages=room)
        self.pager = self.engine._parts.pager
        self.weights = list(module.weights)
        self.faults.is_on = True

    # -- what may happen -------------------------------------------------------------------------

    @rule(index=st.integers(0, NUM_PAGES - 1))
    def touch(self, index: int) -> None:
        with torch.no_grad():
            found = self.tried(lambda: self.weights[index] + 0.0)
        if found is not None:
            assert torch.equal(found, self.expected[index]), f"weight {index}"

    @rule(index=st.integers(0, NUM_PAGES - 1), scale=st.booleans())
    def edit(self, index: int, scale: bool) -> None:
        self.mark += 1

        def change() -> torch.Tensor:
            with torch.no_grad():
                return (
                    self.weights[index].mul_(-1) if scale else self.weights[index].fill_(self.mark)
                )

        if self.tried(change) is not None:
            self.expected[index] = (
                -self.expected[index] if scale else torch.full(SHAPE, float(self.mark))
            )

    @rule(indices=st.lists(st.integers(0, NUM_PAGES - 1), min_size=1, max_size=2, unique=True))
    def pin(self, indices: list[int]) -> None:
        pages = [self.pager.pages[index] for index in indices]
        if self.tried(lambda: (self.pager.pin(pages, "a test"), True)) is not None:
            self.pinned.append(pages)
            self.look(indices)

    @precondition(lambda self: self.pinned)
    @rule(number=st.integers(0, 9))
    def unpin(self, number: int) -> None:
        pages = self.pinned.pop(number % len(self.pinned))
        self.look([page.index for page in pages])
        self.pager.unpin(pages)

    @precondition(lambda self: len(self.windows) < 2)
    @rule(indices=st.lists(st.integers(0, NUM_PAGES - 1), min_size=1, max_size=2, unique=True))
    def open_window(self, indices: list[int]) -> None:
        pages = [self.pager.pages[index] for index in indices]
        if self.tried(lambda: (self.pager.open_window(pages, "a module"), True)) is not None:
            self.windows.append(pages)

    @precondition(lambda self: self.windows)
    @rule()
    def close_window(self) -> None:
        self.tried(lambda: self.pager.close_window(self.windows.pop()))

    @rule(index=st.integers(0, NUM_PAGES - 1))
    def take_raw_pointer(self, index: int) -> None:
        if len(self.raw) < 1 or index in self.raw:
            raw = self.tried(lambda: self.weights[index].detach().numpy())
            if raw is not None:
                assert (raw == self.expected[index].numpy()).all()
                self.raw[index] = raw

    @precondition(lambda self: self.raw)
    @rule()
    def edit_through_raw_pointer(self) -> None:
        self.mark += 1
        for index, raw in self.raw.items():
            raw[:] = self.mark
            self.expected[index] = torch.full(SHAPE, float(self.mark))

    @rule(index=st.integers(0, NUM_PAGES - 1))
    def read_state(self, index: int) -> None:
        found = self.tried(lambda: self.engine.read_state(f"weights.{index}", "weight"))
        if found is not None:
            assert torch.equal(found, self.expected[index]), f"state of weight {index}"

    @rule(index=st.integers(0, NUM_PAGES - 1))
    def set_state(self, index: int) -> None:
        self.mark += 1
        values = torch.full(SHAPE, float(self.mark))
        self.until_done(lambda: self.engine.set_state(f"weights.{index}", {"weight": values}))
        self.expected[index] = values

    @precondition(lambda self: not (self.pinned or self.windows))
    @rule(indices=st.sets(st.integers(0, NUM_PAGES - 1), min_size=1))
    def step(self, indices: set[int]) -> None:
        for index in sorted(indices):

            def backward(index: int = index) -> None:
                self.engine.backward(self.weights[index].sum())
                self.engine.step()

            rate = self.faults
            rate.is_on = False  # what fails in a step is for the simulation
            try:
                backward()
            except BudgetError:
                assert self.raw, "a weight and its gradient have room"
                self.engine.optimizer.zero_grad()
            else:
                self.expected[index] = self.expected[index] - LEARNING_RATE
                self.raw.clear()
            rate.is_on = True

    @rule(order=st.lists(st.integers(0, NUM_PAGES - 1), min_size=1, max_size=6))
    def run(self, order: list[int]) -> None:
        """A run whose trace is known the second time, and then fetches ahead."""
        if self.windows:
            return
        for _ in range(2):
            self.tried(lambda: self.pager.begin((True, tuple(order))))
            for index in order:
                self.open_window([index])
                if self.windows:
                    self.look([index])
                    self.close_window()
            self.pager.end()
            self.tried(lambda: self.pager.expect((True, tuple(order))))

    # -- what the model knows --------------------------------------------------------------------

    def look(self, indices: list[int]) -> None:
        """At what an op would take that no guard sees."""
        for index in indices:
            page = self.pager.pages[index]
            if page.residency is THERE:
                with _NO_GUARD(), torch.no_grad():
                    found = self.weights[index].detach().clone()
                assert torch.equal(found, self.expected[index]), f"page {index}"

    def tried(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except StorageError as error:
            if not self.faults.acted:
                raise AssertionError("nothing has failed") from error
        except BudgetError as error:
            if not (self.pinned or self.windows or self.raw):
                raise AssertionError("nobody holds a page") from error
        return None

    def until_done(self, call: Callable[[], object]) -> None:
        for _ in range(100):
            try:
                call()
                return
            except OffloadError:
                assert self.faults.acted
        raise AssertionError("it never succeeds")

    @invariant()
    def residency_is_what_the_lease_says(self) -> None:
        if not hasattr(self, "pager"):
            return
        device = self.engine._parts.device
        assert device.used_bytes <= device.budget_bytes
        pins = [page for pages in self.pinned for page in pages]
        for page in self.pager.pages:
            assert page.pins == pins.count(page)
            assert page.windows == sum(page in pages for pages in self.windows)
            assert (page.lease is None) == (page.residency is HOME)
            assert page.residency is THERE or not page.pins, f"page {page.index} is pinned"
            with _NO_GUARD():
                is_away = bool(self.weights[page.index].isnan().all())
            assert is_away == (page.residency is not THERE), f"page {page.index}"
        host = self.engine._parts.host
        assert host.used_bytes <= host.budget_bytes

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.faults.is_on = False
        while self.windows:
            self.close_window()
        for pages in self.pinned:
            self.pager.unpin(pages)
        for index, expected in enumerate(self.expected):
            self.until_done(
                lambda index=index: self.engine.read_state(f"weights.{index}", "weight")
            )  # type: ignore[misc]
            found = self.engine.read_state(f"weights.{index}", "weight")
            assert torch.equal(found, expected), f"weight {index} in the end"
        self.engine.close()
        assert self.engine._parts.store.late._kept == []
        self.moves.stop()
        self.folder.cleanup()


def _legal(
    move: Callable[[WeightPage, Residency], None],
) -> Callable[[WeightPage, Residency], None]:
    def watched(page: WeightPage, residency: Residency) -> None:
        assert (page.residency, residency) in LEGAL, f"page {page.index} to {residency}"
        move(page, residency)

    return watched
