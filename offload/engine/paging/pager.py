"""The pager: which pages are on the device, who keeps them there, and which one goes next.

[Note: Paging]
  fault      a page that is touched while absent is brought in, and the toucher waits for it.
  pin        an op or an autograd node uses the page at this moment; it is never evicted.
  window     a module whose forward is running says that it will use the page; it is evicted only if
             nothing else can be, and only by the thread whose windows are the only ones open.
  plan       says at each event of the trace what to evict and what to fetch. It is followed as far
             as reality allows: an eviction of a pinned page and a fetch that finds no room are left
             out.

Without a plan, or after the run has left its trace, only faults move pages, and the page that goes
is the one whose next use in the trace is farthest away, or else the one used longest ago.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import torch

from offload.engine.paging.node_pins import NodePins
from offload.engine.paging.page_in import Arrivals, PageIn
from offload.engine.paging.pages import PagedParameter, WeightPage, names_of
from offload.engine.paging.runs import RunKey, Runs
from offload.engine.paging.turns import turn
from offload.errors import BudgetError, EngineStateError, OffloadError
from offload.optim.overlapped import OverlappedStep
from offload.partition.blocks import BlockStore
from offload.partition.residency import Residency
from offload.schedule.lookahead import Actions
from offload.schedule.trace import CLOSE, OPEN, EventKind
from offload.tiers.device import DeviceLease
from offload.tiers.transfer import Urgency
from offload.tiers.uninterrupted import UninterruptedLock

_TILED_REMEDY = (
    "; only nn.functional.linear and embedding take a tiled parameter by tiles, and only the "
    "parameter itself, no view of it"
)


class Pager:
    """Moves the weight pages of one engine between their homes and the device. Thread-safe.

    Attributes:
        pages: by bucket.
        faults: demand fetches since the engine was made.
        stall_seconds: how long touches have waited for transfers since then.
        arrivals: takes part in what arrives on the device; None for plain copies.
        updates: makes homes new while the module runs; None: homes are new between steps.
        lock: who holds it keeps every page where it is.
    """

    def __init__(
        self,
        pages: Sequence[WeightPage],
        store: BlockStore,
        *,
        capacity_bytes: int,
        lookahead_depth: int,
        staging_depth: int,
    ) -> None:
        self.pages = pages
        self.faults, self.stall_seconds = 0, 0.0
        self._store, self._timeline = store, store.device.timeline
        self._staging_depth = staging_depth
        self.lock = UninterruptedLock(reentrant=True)
        self._clock = 0
        self._present: dict[WeightPage, None] = {}  # the paged ones that hold a lease, in order
        self._loading: dict[WeightPage, PageIn] = {}  # those of them that are on their way
        self._draining: list[PageIn] = []
        self._refreshing: dict[WeightPage, PageIn] = {}  # or what an error has left of it
        self._wanted: deque[WeightPage] = deque()  # planned fetches that found no room yet
        self._node_pins = NodePins(self.unpin, self.lock)
        self._window_threads: dict[int, int] = {}
        self._runs = Runs(capacity_bytes=capacity_bytes, lookahead_depth=lookahead_depth)
        self.arrivals: Arrivals | None = None
        self.updates: OverlappedStep | None = None
        self._closed = False

    @property
    def device(self) -> torch.device:
        """Where the parameters say they are."""
        return self._store.device.device

    def __repr__(self) -> str:
        with self.lock:
            return " ".join(map(repr, self.pages))

    def seal(self) -> None:
        """All pages are there."""
        self._runs.seal(
            {page.index: page.nbytes for page in self.pages},
            frozenset(page.index for page in self.pages if page.is_tiled or not page.is_paged),
        )

    # -- pins and windows ------------------------------------------------------------------------

    def pin(self, pages: Sequence[WeightPage], user: str) -> None:
        """Bring the pages to the device and keep them there until `unpin`.

        Raises:
            BudgetError: the pinned pages exceed the device budget; names `user` and the bytes.
            StorageError: a read failed; nothing is pinned.
        """
        with self.lock:
            if self._closed:
                raise EngineStateError(f"{user} on parameters of an engine that is closed")
            self._node_pins.enter_node()
            for page in pages:
                page.pins += 1
            try:
                for page in pages:
                    self._use(page, pages, user)
            except BaseException:
                self.unpin(pages)
                raise

    def unpin(self, pages: Sequence[WeightPage]) -> None:
        """Take one pin off each page."""
        with self.lock:
            for page in pages:
                assert page.pins > 0, f"bucket {page.index}: unpinned more often than pinned"
                page.pins -= 1

    def pin_for_node(self, page: WeightPage) -> None:
        """Pin a page for the autograd node that runs in this thread, until that node has ended."""
        with self.lock:
            self.pin((page,), "the backward of an op")
            self._node_pins.add(page)

    def end_node(self) -> None:
        """An autograd node has ended, because this thread has gone on to the next."""
        with self.lock:
            self._node_pins.enter_node()

    def release_nodes(self) -> None:
        """No backward is running: whatever a failed one has left pinned is free."""
        with self.lock:
            self._node_pins.release_all()

    def open_window(self, pages: Sequence[WeightPage], user: str) -> None:
        """A module that uses the pages starts its forward: follow the plan and bring them in.

        Raises as `pin`; the window is not open then.
        """
        thread = turn()
        with self.lock:
            self._node_pins.enter_node()
            opened = 0
            try:
                for page in pages:
                    page.windows += 1
                    opened += 1
                    self._use(page, (page,), user, closes=False)
            except BaseException:
                for page in pages[:opened]:
                    page.windows -= 1
                raise
            self._window_threads[thread] = self._window_threads.get(thread, 0) + 1

    def close_window(self, pages: Sequence[WeightPage]) -> None:
        """The forward has ended."""
        thread = turn()
        with self.lock:
            for page in pages:
                page.windows -= 1
                self._event(CLOSE, page)
            self._window_threads[thread] -= 1
            if not self._window_threads[thread]:
                del self._window_threads[thread]

    @property
    def is_in_window(self) -> bool:
        """Whether windows that this thread has opened are open."""
        with self.lock:
            return turn() in self._window_threads

    def is_pending(self, page: WeightPage) -> bool:
        """Whether a touch of the page has to make its weights first."""
        return self.updates is not None and self.updates.is_pending(page.index)

    def keep_until_step(self, page: WeightPage) -> None:
        """A raw pointer to a page that is on the device has been given away: it stays."""
        with self.lock:
            page.kept = True
            for parameter in page.parameters:
                if parameter.raw_checksum is None:
                    parameter.raw_checksum = parameter.checksum()

    # -- traces ----------------------------------------------------------------------------------

    def begin(self, key: RunKey) -> None:
        """A run of the module starts; see [Note: Runs]."""
        with self.lock:
            if torch._C._current_graph_task_id() == -1:
                self._node_pins.release_thread()
            if self._window_threads:
                return  # a run inside another, or beside it in another thread: one trace for both
            actions = self._runs.begin(key)
            if actions is not None:
                self._start_run(actions)

    def expect(self, key: RunKey) -> None:
        """A run of this key comes next: fetch ahead what it uses first."""
        with self.lock:
            if not self._window_threads:
                self._start_run(self._runs.expect(key))

    def end(self) -> None:
        """The run is over."""
        with self.lock:
            if not self._window_threads:
                self._runs.end()

    def _event(self, kind: EventKind, page: WeightPage) -> None:
        """Record an event, and do what the plan says at it."""
        if not page.is_paged or page.is_tiled:
            return
        self._act(self._runs.event(kind, page.index))

    def _start_run(self, actions: Actions) -> None:
        """Start what a run fetches first. Its plan counts on an otherwise empty device."""
        self._wanted.clear()
        if actions.fetch:
            for page in list(self._present):
                if page.index not in actions.fetch and not (page.pins or page.windows or page.kept):
                    self._evict(page)
        self._act(actions)

    def _act(self, actions: Actions) -> None:
        for bucket in actions.evict:
            page = self.pages[bucket]
            if page in self._present and not (page.pins or page.windows or page.kept):
                self._evict(page)
        for bucket in actions.fetch:
            page = self.pages[bucket]
            if page.residency is Residency.HOME and not self._start(page, wait=False):
                self._wanted.append(page)

    # -- movements -------------------------------------------------------------------------------

    def _use(
        self, page: WeightPage, together: Sequence[WeightPage], user: str, *, closes: bool = True
    ) -> None:
        """Record the use and make sure that the page is on the device."""
        self._clock += 1
        page.last_use = self._clock
        was_pending = self.is_pending(page)
        if self.updates is not None:
            self.updates.apply(page.index)
            self.updates.advance()
        if not page.is_paged:
            return
        was_absent = page.residency is Residency.HOME and not was_pending
        self._event(OPEN, page)
        if closes:
            self._event(CLOSE, page)
        self._advance()
        if page.residency is Residency.ON_DEVICE:
            self._store.device.enter(page.held_lease)
            return
        if was_absent and page.residency is Residency.HOME:
            self.faults += 1
            self._timeline.fault(page.block.name)
        if page in self._wanted:
            self._wanted.remove(page)
        beside = False
        while page.residency is Residency.HOME and not self._start(page, wait=True, beside=beside):
            beside = self._make_room(page, together, user)
        self._bind(page)

    def _start(self, page: WeightPage, *, wait: bool, beside: bool = False) -> bool:
        """Start to bring a page in; False, and nothing changed, if device or staging has no room.
        With `wait`, writes under way are waited for if that frees staging; for `beside` see
        `DeviceTier.try_lease`. Without it, a page whose update is pending stays where it is.
        """
        if not wait and self.is_pending(page):
            return False
        lease = self._store.device.try_lease(page.nbytes, page.block.name, beside=beside)
        if lease is None:
            return False
        page_in = self._page_in(page, lease, in_demand=wait)
        try:
            started = page_in.start(wait=wait)
        except BaseException:
            page_in.give_back()
            raise
        if not started:
            lease.release()
            return False
        page.move(Residency.LOADING)
        page.lease = lease
        self._present[page] = None
        self._loading[page] = page_in
        return True

    def _page_in(self, page: WeightPage, lease: DeviceLease, *, in_demand: bool) -> PageIn:
        depth, arrivals = self._staging_depth, self.arrivals
        urgency = Urgency.DEMAND if in_demand else Urgency.PLANNED + self._runs.next_use(page.index)
        return PageIn(
            page.block, lease, self._store, depth=depth, urgency=urgency, arrivals=arrivals
        )

    def _bind(self, page: WeightPage) -> None:
        """Wait for the page and let its parameters use it."""
        page_in = self._loading.pop(page)
        started = self._timeline.clock()
        try:
            page_in.finish()
        except BaseException:
            page.move(Residency.HOME)
            del self._present[page]
            page_in.give_back()
            page.lease = None
            raise
        finally:
            self.stall_seconds += self._timeline.waited(page.block.name, started)
        if not page_in.advance():
            self._draining.append(page_in)
        page.move(Residency.ON_DEVICE)
        self._store.device.enter(page.held_lease)
        page.point_parameters_at_lease()
        self._store.offer_copy(page.block, page.held_lease)

    def _evict(self, page: WeightPage) -> None:
        """Drop the device copy; the home copy is made as new first."""
        if page.residency is Residency.LOADING:
            self._bind(page)
        self.write_back(page)
        self._drop(page)

    def _drop(self, page: WeightPage) -> None:
        page.move(Residency.HOME)
        del self._present[page]
        self._store.withdraw_copy(page.block)
        page.point_parameters_away()
        for parameter in page.parameters:
            if parameter.plain_depth:
                parameter.wear(parameter.guard_class)
        self._release_lease(page)

    def _release_lease(self, page: WeightPage) -> None:
        failed = self._refreshing.pop(page, None)
        if failed is None:
            page.held_lease.release()
        else:
            failed.give_back()
        page.lease = None

    def _advance(self) -> None:
        """Collect what has ended, and start planned fetches that found no room before."""
        for page_in in self._loading.values():
            page_in.advance()
        self._draining = [page_in for page_in in self._draining if not page_in.advance()]
        while self._wanted:
            page = self._wanted[0]
            if page.residency is Residency.HOME and not self._start(page, wait=False):
                return
            self._wanted.popleft()

    def _make_room(self, page: WeightPage, together: Sequence[WeightPage], user: str) -> bool:
        """Evict one page, or wait for one transfer, so that `page` may find room.

        Returns whether only the pieces that are free are too short for it.

        Raises:
            BudgetError: everything on the device is in use.
        """
        device = self._store.device
        has_room = device.has_room(page.nbytes)
        victim = None if has_room else self._victim()
        if victim is not None:
            self._evict(victim)
            return False
        if self.finish_one():
            return False
        if device.used_bytes + page.nbytes <= device.budget_bytes and not has_room:
            return True
        if has_room:
            raise self._store.no_staging([page.block], 0)
        raise BudgetError(
            tier="device",
            requested_bytes=sum(each.nbytes for each in together),
            free_bytes=device.budget_bytes - device.used_bytes,
            budget_bytes=device.budget_bytes,
            owner=f"{user}, which uses {names_of(together)}",
            remedy="raise tiers.device.memory: one operation needs all its parameters at once"
            + (_TILED_REMEDY if any(each.is_tiled for each in together) else ""),
        )

    def finish_one(self) -> bool:
        """Wait for one page that is under way, so that its staging is free; False: there is none.

        Raises StorageError if a read failed.
        """
        with self.lock:
            loading = next(iter(self._loading), None)
            if loading is not None:
                self._bind(loading)
            elif self._draining:
                self._draining.pop(0).settle()
            else:
                return False
            return True

    def _victim(self) -> WeightPage | None:
        """The page to evict: unused, best next use farthest away; None if there is none."""
        free = [page for page in self._present if not (page.pins or page.kept or page.windows)]
        if not free and set(self._window_threads) <= {turn()}:
            free = [
                page
                for page in self._present
                if not (page.pins or page.kept or any(p.has_plain_views for p in page.parameters))
            ]
        return max(
            free,
            key=lambda page: (self._runs.next_use(page.index), -page.last_use),
            default=None,
        )

    # -- edits and steps -------------------------------------------------------------------------

    def write_back(self, page: WeightPage) -> None:
        """Make the home copy of a page that is on the device as new as the device copy.

        Raises StorageError if the write could not be started (the device copy is kept), and
        GuardError if the page holds perturbed copies.
        """
        if not page.note_edits() or not page.is_paged:
            return
        if self.arrivals is not None:
            self.arrivals.check_edit(page)
        block, store = page.block, self._store
        for chunk, nbytes in enumerate(block.layout.chunk_nbytes):
            start = block.layout.chunk_offset_bytes[chunk]
            staged = store.stage_or_raise(block, chunk)
            source = page.held_lease.tensor[start : start + nbytes]
            store.device.start_copy_out(staged.tensor, source).wait(store.deadline_seconds)
            store.start_store(block, chunk, staged)
        for parameter in page.parameters:
            parameter.home_is_stale = False

    def flush(self) -> None:
        """Make homes ready to be read: `write_edits`, which says what it raises, and the rest."""
        with self.lock:
            self.write_edits()
            for pending in (self.arrivals, self.updates):
                if pending is not None:
                    pending.settle()
            self._store.drain()

    def write_edits(self) -> None:
        """Write every edit home and forget prefetches under way; pages have no staging then.

        Raises StorageError if a write failed; the device copies are kept.
        """
        with self.lock:
            for page in self.pages:
                if page.residency is Residency.LOADING:
                    self._bind(page)
                if page.residency is Residency.ON_DEVICE:
                    self.write_back(page)
            while self.finish_one():
                pass  # who reads homes wants the staging of what is still being copied from it

    def begin_tiles(self, page: WeightPage, user: str) -> None:
        """An op is about to read the home of a tiled page: make it as new as any copy.

        Raises EngineStateError of a closed engine; StorageError if an edit cannot be written home.
        """
        with self.lock:
            if self._closed:
                raise EngineStateError(f"{user} on parameters of an engine that is closed")
            self._node_pins.enter_node()
            if self.updates is not None:
                self.updates.apply(page.index)
            if page.residency is Residency.ON_DEVICE:
                self.write_back(page)

    def drop_stale(self, page: WeightPage) -> None:
        """The home copy of a page has become newer: forget the device copy.

        A page that is pinned or kept because of a raw pointer is brought up to date in place.
        """
        with self.lock:
            if page.residency is Residency.LOADING:
                with contextlib.suppress(OffloadError):  # then the page is at home
                    self._bind(page)
            if page in self._present and not (page.pins or page.kept):
                self._drop(page)
            elif page in self._present:
                if self.updates is not None:
                    self.updates.apply(page.index)
                self._refresh(page)
            for parameter in page.parameters:
                if parameter.raw_checksum is not None:
                    parameter.raw_checksum = parameter.checksum()

    def _refresh(self, page: WeightPage) -> None:
        self._store.withdraw_copy(page.block)
        self._store.device.renew(page.held_lease)
        self._refreshing[page] = self._page_in(page, page.held_lease, in_demand=True)
        self._refreshing[page].finish()
        refreshed = self._refreshing.pop(page)
        self._store.device.enter(page.held_lease)
        self._store.offer_copy(page.block, page.held_lease)
        if not refreshed.advance():
            self._draining.append(refreshed)

    def make_way(self, capacity_bytes: int) -> None:
        """Leave the device, as far as nobody holds a page there, and count on another room on it.

        For homes that come there between two runs. Plans are made anew from what is recorded next.
        Raises StorageError if an edit could not be written home; its page is still there.
        """
        with self.lock:
            self._wanted.clear()
            for page in list(self._present):
                if not (page.pins or page.windows or page.kept):
                    self._evict(page)
            self._store.device.reserve(capacity_bytes)
            if not self._window_threads:
                self._runs.resize(capacity_bytes)

    def forget_copies(self) -> None:
        """All homes are about to be replaced: drop the copies on the device, with their edits.

        A pinned page stays; `drop_stale` brings it up to date when its home is. Raw pointers that
        were given away are void.
        """
        self.end_raw_access()
        with self.lock:
            for page in self.pages:
                if page.residency is Residency.LOADING:
                    with contextlib.suppress(OffloadError):  # then the page is at home
                        self._bind(page)
                for parameter in page.parameters:
                    parameter.home_is_stale = parameter.state.edited = False
                if page in self._present and not page.pins:
                    self._drop(page)

    def begin_gathered(self, pages: Sequence[WeightPage]) -> list[WeightPage]:
        """Raw pointers to pinned pages are given away; the pages to which none was out before."""
        with self.lock:
            fresh = [page for page in pages if not page.kept]
            for page in pages:
                page.note_edits()
                self.keep_until_step(page)
            return fresh

    def end_gathered(
        self, pages: Sequence[WeightPage], fresh: Sequence[WeightPage]
    ) -> list[PagedParameter]:
        """Raw pointers to the fresh pages are void; the parameters edited while they were out."""
        with self.lock:
            edited = []
            for page in pages:
                before = [parameter.state.edited for parameter in page.parameters]
                for parameter in page.parameters:
                    parameter.state.edited = False
                page.note_edits()
                for parameter, was in zip(page.parameters, before, strict=True):
                    if parameter.state.edited:
                        edited.append(parameter)
                    parameter.state.edited = parameter.state.edited or was
                if page in fresh:
                    self._end_raw_access(page)
            return edited

    def end_raw_access(self) -> None:
        """A step has ended: raw pointers that were given away are void."""
        with self.lock:
            for page in self.pages:
                self._end_raw_access(page)

    @staticmethod
    def _end_raw_access(page: WeightPage) -> None:
        page.kept = False
        for parameter in page.parameters:
            parameter.raw_checksum = None

    def close(self) -> None:
        """Take every parameter off the device, after what is under way. Touches fail now."""
        with self.lock:
            self._closed = True
            self._node_pins.release_all()
            for page in self.pages:
                if page.residency is Residency.LOADING:
                    with contextlib.suppress(OffloadError):  # then the page is at home
                        self._bind(page)
                if page.residency is Residency.ON_DEVICE:
                    page.point_parameters_away()
                    for parameter in page.parameters:
                        parameter.wear(parameter.guard_class)
            for page_in in self._draining:
                page_in.settle()
