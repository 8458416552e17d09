"""Host memory runs short while training: the host's budget shrinks, and the run goes on.

[Note: Memory pressure]
Between two steps, at the first forward of a step, the engine looks how much memory can still be
allocated: by the limits of its control groups (cgroup v1 and v2, `memory.high` included) and by
MemAvailable. Less than what a step has been seen to take beside the tiers (its *swing*), and a
margin, is pressure. Then the budget shrinks by what is missing:

    room      the overlapped step's held versions give way first
    homes     then state that `auto` has placed on the host moves to nvme (partition/demotion.py),
              in the order of schedule/demotion.py; what it needs of staging stays
    flow      the overlapped step itself gives way last

What was left goes back to the system at once. Homes that the configuration names stay. The budget
does not grow again.

Where all of that is not enough for the swing, and there is no swap space either, the kernel would
end the next step: MemoryPressureError instead, with the state as it was.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from offload.config import free_swap_bytes, host_room_bytes
from offload.engine.build import Parts
from offload.engine.planning import plan_module
from offload.engine.promotion import Promotion
from offload.errors import (
    BudgetError,
    MemoryPressureError,
    OffloadError,
    StorageError,
    format_bytes,
)
from offload.partition.blocks import Block
from offload.partition.demotion import Demotion
from offload.schedule.demotion import demotion_order, least_demotion, with_homes_on_nvme
from offload.schedule.footprint import STATE_CLASSES
from offload.schedule.placement import Home
from offload.schedule.plan import Plan
from offload.telemetry import ShrinkReport
from offload.tiers.uninterrupted import uninterrupted

MARGIN_BYTES = 64 << 20
_LEAST_SECONDS = 1.0  # between two looks of forwards that belong to no step
_MOST_SHARE = 1 / 50  # of the time that looking may take, however short steps are
_SWING_DECAY = 15 / 16  # a step; what only some steps have taken is forgotten
_LEAST_IS_HELD = "the host holds only staging, and what the configuration places there"


class HostPressure:
    """Shrinks the host's budget of one engine; see [Note: Memory pressure].

    Without an nvme tier, or with `tiers.host.shrink = false`, it does nothing. `end_saves` waits
    for whatever reads homes, or has host memory, beside training.
    """

    def __init__(self, parts: Parts, promotion: Promotion, end_saves: Callable[[], None]) -> None:
        self._end_saves = end_saves
        self._parts = parts
        self._promotion = promotion
        self._is_on = parts.config.tiers.host.shrink and parts.nvme is not None
        self._demotion = Demotion(parts.store, spare=parts.machine.staging.spare_extents)
        self._looked_at: tuple[int, float] = (-1, 0.0)  # step and time of the last look
        self._look_seconds = 0.0  # what it has taken
        self._anonymous_bytes = 0  # of the process, at that look
        self._swing_step = -1
        self._swing_bytes = 0
        self._stuck: tuple[Plan, str] | None = None  # a plan that cannot shrink, and why

    def note_peak(self, step: int) -> None:
        """A backward begins: about the most of a step is allocated now."""
        if self._is_on and step != self._swing_step:
            is_first, self._swing_step = self._swing_step < 0, step
            if is_first:
                return  # it has taken what stays, too
            risen = _anonymous_bytes() - self._anonymous_bytes
            self._swing_bytes = max(risen, int(self._swing_bytes * _SWING_DECAY))

    def check(self, step: int) -> None:
        """Look at the room, once a step, and shrink the budget if it is short.

        Raises:
            MemoryPressureError: the next step would probably be killed; nothing is lost.
            StorageError: what the last step has left pending could not be read or written.
        """
        if not self._is_on or not self._is_due(step) or not self._is_between_steps():
            return
        started = time.monotonic()
        self._anonymous_bytes = _anonymous_bytes()
        room_bytes = host_room_bytes()
        self._looked_at = (step, time.monotonic())
        self._look_seconds = self._looked_at[1] - started
        if room_bytes < self._swing_bytes + MARGIN_BYTES:
            self._relieve(room_bytes)

    def _is_due(self, step: int) -> bool:
        last_step, seconds = self._looked_at
        since = time.monotonic() - seconds
        if since * _MOST_SHARE < self._look_seconds:
            return False
        return step != last_step or since >= _LEAST_SECONDS

    def _is_between_steps(self) -> bool:
        """Nothing is half done: no gradients are at home, and no page is in use."""
        parts = self._parts
        return all(state.gradient_sums is None for state in parts.parameters) and not any(
            page.pins or page.windows for page in parts.pages
        )

    def _relieve(self, room_bytes: int) -> None:
        parts = self._parts
        if not self._is_stuck:
            self._end_saves()
            parts.store.late.collect()
            if parts.store.late:
                return  # a transfer that is late may have any part of the arena
        wanted_bytes = self._swing_bytes + 2 * MARGIN_BYTES
        left_bytes, budget_bytes = room_bytes, parts.host.budget_bytes
        moved: Counter[str] = Counter()
        while left_bytes < wanted_bytes and not self._is_stuck:
            try:
                moved += self._shrink(parts.host.budget_bytes - (wanted_bytes - left_bytes))
            except (BudgetError, StorageError) as error:
                self._stuck = (parts.plan, f"its budget cannot shrink: {error}")
            left_bytes = host_room_bytes()
        given_back_bytes = budget_bytes - parts.host.budget_bytes
        if given_back_bytes:
            self._tell(room_bytes, moved, given_back_bytes)
        if left_bytes + free_swap_bytes() < self._swing_bytes:
            assert self._stuck is not None, "the budget could have shrunk"
            self._looked_at = (-1, 0.0)  # the next call looks again
            raise MemoryPressureError(
                room_bytes=left_bytes, needed_bytes=self._swing_bytes, why=self._stuck[1]
            )

    @property
    def _is_stuck(self) -> bool:
        return self._stuck is not None and self._stuck[0] is self._parts.plan

    def _shrink(self, host_bytes: int) -> Counter[str]:
        """Shrink the budget to this, or as far as it can; the bytes moved of each state class.

        Raises:
            BudgetError, StorageError: it stays as it was.
        """
        parts = self._parts
        order = demotion_order(
            parts.plan,
            [name for name in STATE_CLASSES if getattr(parts.config.placement, name) == "auto"],
            accumulation_steps=parts.config.training.gradient_accumulation_steps,
        )
        found = least_demotion(order, lambda homes: self._plan_without(homes, host_bytes))
        if found is None:
            least_bytes = self._plan_without(order, host_bytes).need_bytes["host"]
            found = order, self._plan_without(order, least_bytes)
        homes, plan = found
        if not plan.fits or plan.peak_bytes["host"] >= parts.host.budget_bytes:
            self._stuck = (
                parts.plan,
                _LEAST_IS_HELD if plan.fits else f"nvme has no room for more:\n{plan}",
            )
            return Counter()
        blocks = [parts.store.block(*home) for home in homes]
        held_bytes = parts.host.budget_bytes
        with parts.pager.lock:
            self._settle()
            self._demotion.reserve(blocks)
            self._demotion.write(blocks)
            with uninterrupted():
                self._commit(blocks, plan)
        if parts.host.budget_bytes >= held_bytes:
            self._stuck = (parts.plan, _LEAST_IS_HELD)
        return self._bytes_of(homes)

    def _plan_without(self, homes: Sequence[Home], host_bytes: int) -> Plan:
        parts = self._parts
        return plan_module(
            parts.collection,
            parts.config,
            replace(parts.machine, host_bytes=max(host_bytes, 1)),
            parts.rule,
            parts.groups,
            known=with_homes_on_nvme(parts.plan, homes),
            keeps_room=False,
        )

    def _settle(self) -> None:
        """Homes are what the last step says, and nothing is in flight in the arena."""
        parts = self._parts
        parts.pager.flush()
        while parts.pager.finish_one():
            pass
        parts.gradients.land()
        if parts.activations is not None:
            parts.activations.settle()

    def _commit(self, blocks: Sequence[Block], plan: Plan) -> None:
        parts = self._parts
        parts.updates.give_back()
        leases = [block.host_lease for block in blocks if block.host_lease is not None]
        parts.host.fit(leases, plan.staging_bytes)
        self._demotion.commit(blocks)
        # Peaks are over the life of the engine.
        peak = {**plan.peak_bytes, "host": max(plan.peak_bytes["host"], parts.host.peak_bytes)}
        parts.plan = replace(plan, peak_bytes=peak)
        parts.machine = replace(parts.machine, host_bytes=plan.budget_bytes["host"])
        parts.sites.follow(plan)
        with contextlib.suppress(OffloadError):  # then less of the step is overlapped, or nothing
            parts.updates.take_room(plan.overlap)
        self._promotion.follow_arena()

    def _bytes_of(self, homes: Sequence[Home]) -> Counter[str]:
        moved: Counter[str] = Counter()
        for bucket, state_class in homes:
            moved[state_class] += self._parts.plan.layouts[bucket][state_class].nbytes
        return moved

    def _tell(self, room_bytes: int, moved: Counter[str], given_back_bytes: int) -> None:
        parts = self._parts
        classes = [f"{format_bytes(moved[name])} of {name}" for name in sorted(moved)]
        what = f"{' and '.join(classes)} moved to nvme" if classes else "less is overlapped"
        last = (
            f"host memory runs short ({format_bytes(room_bytes)} left, of which a step takes "
            f"{format_bytes(self._swing_bytes)}): {what}, {format_bytes(given_back_bytes)} given "
            f"back; the host budget is {format_bytes(parts.plan.budget_bytes['host'])} from now on"
        )
        known = parts.shrinks
        parts.shrinks = ShrinkReport(
            known.count + 1,
            known.moved_bytes + moved.total(),
            known.given_back_bytes + given_back_bytes,
            last,
        )
        warnings.warn(
            f"{last}. Steps take longer, and numbers stay the same; a lower tiers.host.memory, or "
            "a higher limit, avoids it",
            RuntimeWarning,
            stacklevel=2,
        )


def _anonymous_bytes() -> int:
    """Memory of this process that is neither a file's nor shared, as the arena's is."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
