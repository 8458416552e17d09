"""Activations off the device: what autograd saves in forward waits on host or NVMe for backward.

[Note: Activations]
The saved-tensor hooks of the root window (saved.py) offer every tensor that is not a page. A large
one is copied to the *share*, a fixed part of the host budget, and from there to NVMe if that is its
home or the share runs full. What is packed in its place is a `SavedActivation`; whatever becomes of
the graph, the bytes are given back when the last of these dies.

  deduplication  one tensor saved by several ops moves once
  forwarding     a tensor that is wanted while it is on its way out is not read back
  prefetch       backward wants the tensors in the opposite order: while one is used, those that
                 were saved before it are read
  eviction       for the same reason the tensor saved first leaves the share first

The copy is taken when the tensor is saved. A tensor that is changed in place afterwards is an
error in backward, as in plain PyTorch. Where the share and the disks have no room, a tensor stays
on the device: nothing fails, one warning tells.

[Note: Finalizers]
A packed object may die anywhere, also in a thread that holds the store's lock. So its finalizer
only adds the copy to a queue, which the next call of the store empties.
"""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from offload.engine.activations.copies import ActivationCopy, CopiesAt, Lanes, Place
from offload.engine.activations.views import View, view_of
from offload.engine.guards.saved_version import SavedVersion, version_of
from offload.engine.guards.transforms import active_transform
from offload.errors import DeadlineError, EngineStateError, OffloadError, format_bytes
from offload.telemetry import ActivationReport
from offload.tiers.extents import round_up_to_page
from offload.tiers.host_share import HostPiece, HostShare
from offload.tiers.memory import HeapTrimmer
from offload.tiers.uninterrupted import UninterruptedLock

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_MOST_RECENT = 4
# Device memory that is held only because its copy to the host has not ended: more is waited for.
_MOST_LEAVING_BYTES = 128 << 20
_TRIM_BYTES = 32 << 20  # where the device is host memory, whose heap would keep what has left it


class SharedCopy:
    """One copy and the tensors saved as it: it lives as long as the last of their packed objects.

    Attributes:
        copy: the bytes.
        storage: the storage they were saved from; while it is referred to, its address is its own.
        num_saves, num_uses: how often it was packed and unpacked.
    """

    __slots__ = ("__weakref__", "copy", "num_saves", "num_uses", "storage")

    def __init__(self, copy: ActivationCopy, storage: torch.UntypedStorage) -> None:
        self.copy = copy
        self.storage = StorageWeakRef(storage)
        self.num_saves = 0
        self.num_uses = 0


class Kept:
    """A tensor that stays on the device with `auto`, for as long as one of its saves lives."""

    __slots__ = ("__weakref__", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = StorageWeakRef(storage)


class SavedOnDevice(NamedTuple):
    """What is packed of a tensor that stays, and is counted."""

    kept: Kept
    tensor: torch.Tensor
    version: SavedVersion

    def unpack(self) -> torch.Tensor:
        """The tensor, detached.

        Raises:
            RuntimeError: it has been changed in place since.
        """
        self.version.check(f"a tensor of shape {list(self.tensor.size())}")
        return self.tensor


class SavedActivation(NamedTuple):
    """What is packed in place of a tensor that has left the device."""

    store: ActivationStore
    shared: SharedCopy
    view: View
    version: SavedVersion

    def unpack(self) -> torch.Tensor:
        """The tensor as it was saved: same values, shape, strides and device.

        Raises:
            RuntimeError: the tensor that was saved has been changed in place since.
            EngineStateError: the engine is closed.
            StorageError: it could not be read back; names it.
        """
        self.version.check(f"a tensor of shape {list(self.view.size)}")
        return self.store.unpack(self.shared, self.view)


class ActivationStore:
    """The saved tensors of one engine that are not on the device. Thread-safe.

    Args:
        lanes: what moves bytes.
        share: the host memory to use.
        writes_early: the home is nvme: every tensor is written as soon as the host has it. Else
            only what the share has no room for.
        min_bytes: smaller tensors stay on the device.
        device_bytes: bytes of larger tensors that stay there too.
        prefetch_depth: how many tensors are read ahead in backward.

    Attributes:
        stall_seconds: how long ops and backward have waited for transfers since the start.
    """

    def __init__(
        self,
        lanes: Lanes,
        share: HostShare,
        *,
        writes_early: bool,
        min_bytes: int,
        device_bytes: int,
        prefetch_depth: int,
    ) -> None:
        self.stall_seconds = 0.0
        self._lanes = lanes
        self._share = share
        self._writes_early = writes_early
        self._min_bytes = min_bytes
        self._device_bytes = device_bytes
        self._prefetch_depth = prefetch_depth
        self._lock = UninterruptedLock(reentrant=True)
        self._closed = False
        self._num_copies = 0
        self._counts: Counter[str] = Counter()
        self._trimmer = HeapTrimmer(_TRIM_BYTES) if lanes.device.host_addressable else None
        self._own_storages: frozenset[int] = frozenset()
        self._known: weakref.WeakValueDictionary[tuple[object, ...], SharedCopy | Kept]
        self._known = weakref.WeakValueDictionary()
        self._at: CopiesAt = {place: {} for place in Place}
        self._alive: dict[int, ActivationCopy] = {}  # all of these, by number
        self._numbers: list[int] = []  # the same, ascending
        self._dead: deque[ActivationCopy] = deque()  # see [Note: Finalizers]
        self._draining: list[ActivationCopy] = []  # dead, with transfers in flight
        self._left_bytes: deque[int] = deque()  # of dead `Kept`, as `_dead`
        self._device_used_bytes = 0
        self._seen_bytes = 0  # of this forward, whether they leave or stay
        self._expected_bytes = 0  # of a forward: as many as the one before had
        self._recent: deque[weakref.ref[SharedCopy]] = deque()
        self._warned: set[str] = set()

    # -- saving and using --------------------------------------------------------------------------

    def begin(self, module: nn.Module) -> None:
        """A forward of `module` starts: its own tensors stay where they are."""
        with _NO_GUARD():
            own = (*module.buffers(), *module.parameters())
            own_storages = frozenset(_storages(own))
        with self._lock:
            self._own_storages = own_storages
            self._expected_bytes = self._seen_bytes or self._expected_bytes
            self._seen_bytes = 0
            self._collect()

    def pack(self, tensor: torch.Tensor) -> SavedActivation | SavedOnDevice | None:
        """Let a tensor that autograd saves leave the device; None: it stays, and is not counted.

        Raises:
            DeadlineError: a transfer that has to end first did not.
        """
        with _NO_GUARD(), torch.no_grad():
            if not self._may_leave(tensor):
                return None
            view = view_of(tensor)
            if view is None:
                return None
            storage = tensor.untyped_storage()
            place = tensor.data_ptr(), view.nbytes
            lies = () if view.is_dense else (view.dtype, view.size, view.stride)
            with self._lock:
                self._collect()
                key = (storage._cdata, tensor._version, *place, *lies)
                known = self._known.get(key)
                if known is not None:
                    self._counts["deduplicated_bytes"] += (
                        isinstance(known, SharedCopy) * view.nbytes
                    )
                else:
                    self._seen_bytes += view.nbytes
                    known = self._keep(storage, view) or self._move_out(tensor, view)
                    if known is None:
                        return None
                    self._known[key] = known
                if isinstance(known, Kept):
                    return SavedOnDevice(known, tensor.detach(), version_of(tensor))
                known.num_saves += 1
                return SavedActivation(self, known, view, version_of(tensor))

    def unpack(self, shared: SharedCopy, view: View) -> torch.Tensor:
        """The tensor over a copy, on the device; see `SavedActivation.unpack`."""
        with _NO_GUARD(), torch.no_grad(), self._lock:
            if self._closed:
                raise EngineStateError(
                    "backward through a graph whose activations were on the tiers of an engine "
                    "that is closed",
                    remedy="run backward before close()",
                )
            self._collect()
            copy = shared.copy
            with self._waiting():
                bytes_ = self._arrive(copy)
            shared.num_uses += 1
            if shared.num_uses < shared.num_saves:
                self._keep_for_others(shared)
            elif copy.place is not Place.RETURNED:
                copy.arrived = None
            self._prefetch(copy.number)
            return view.tensor_over(bytes_)

    def collect(self) -> None:
        """Give back what belonged to graphs that are gone."""
        with self._lock:
            self._collect()

    def settle(self) -> None:
        """Wait for everything in flight, so that what belonged to dead graphs is all given back.

        Raises:
            DeadlineError: a transfer did not end.
        """
        with self._lock:
            self._collect()
            for copy in self._alive.values():
                self._settle(copy)
            for copy in self._draining:
                copy.drain()
            self._collect()

    def close(self) -> None:
        """Wait for what is in flight and give the host share back; graphs are void."""
        with self._lock:
            self._closed = True
            self._collect()
            held = (*self._alive.values(), *self._draining)
            for copy in held:
                with contextlib.suppress(OffloadError):  # the files and the arena go next
                    copy.drain()
                    copy.release()
            self._alive.clear()
            self._numbers.clear()
            self._draining.clear()
            if not self._share.used_bytes:
                self._share.close()

    def report(self) -> ActivationReport:
        """What has been saved off the device since the start; see `ActivationReport`."""
        records = self._lanes.records
        with self._lock:
            return ActivationReport(
                **self._counts,
                host_peak_bytes=self._share.peak_bytes,
                nvme_peak_bytes=0 if records is None else records.peak_bytes,
            )

    # -- out ---------------------------------------------------------------------------------------

    def _may_leave(self, tensor: torch.Tensor) -> bool:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return False
        if tensor.numel() * tensor.dtype.itemsize < self._min_bytes:
            return False
        if tensor.device != self._lanes.device.device or tensor.is_inference():
            return False
        if tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg():
            return False
        if active_transform() is not None:
            return False
        return tensor.untyped_storage()._cdata not in self._own_storages

    def _keep(self, storage: torch.UntypedStorage, view: View) -> Kept | None:
        """Keep a tensor on the device if there is room for it, and for what comes after it.

        What is saved last is wanted first: so if a forward saves more than there is room for, the
        room is for its end.
        """
        if self._seen_bytes <= self._expected_bytes - self._device_bytes:
            return None
        if self._device_used_bytes + view.nbytes > self._device_bytes:
            return None
        self._device_used_bytes += view.nbytes
        self._counts["kept_bytes"] += view.nbytes
        kept = Kept(storage)
        weakref.finalize(kept, self._left_bytes.append, view.nbytes).atexit = False
        return kept

    def _move_out(self, tensor: torch.Tensor, view: View) -> SharedCopy | None:
        with self._waiting():
            leaving = list(self._at[Place.LEAVING].values())
            excess = sum(copy.nbytes for copy in leaving) + view.nbytes - _MOST_LEAVING_BYTES
            for copy in leaving:
                if excess <= 0:
                    break
                self._settle(copy)
                excess -= copy.nbytes
            piece = self._room(view.nbytes)
        if piece is None:
            self._counts["kept_bytes"] += view.nbytes
            self._warn_of_room(view.nbytes)
            return None
        number, self._num_copies = self._num_copies, self._num_copies + 1
        copy = ActivationCopy(number, view, tensor, piece, self._lanes, self._at)
        self._alive[number] = copy
        self._numbers.append(number)
        self._counts["moved_bytes"] += view.nbytes
        shared = SharedCopy(copy, tensor.untyped_storage())
        weakref.finalize(shared, self._dead.append, copy).atexit = False
        self._advance()
        return shared

    def _advance(self) -> None:
        """Settle what has ended, and start the writes that are due; waits for nothing."""
        for place in (Place.LEAVING, Place.WRITING):
            for copy in list(self._at[place].values()):
                if not copy.done:
                    break
                self._settle(copy)
        if self._writes_early:
            for copy in list(self._at[Place.ON_HOST].values()):
                if not copy.is_stuck and not self._start_write(copy):
                    return

    def _start_write(self, copy: ActivationCopy) -> bool:
        """Start to write a copy from the host to nvme; False: nvme takes no more."""
        records = self._lanes.records
        record = None if records is None else records.take(round_up_to_page(copy.nbytes), copy.name)
        if record is None:
            return False
        assert records is not None
        try:
            copy.start_write(record)
        except OffloadError as error:
            records.give_back(record)
            copy.is_stuck = True
            self._warn_of_write(error)
            return False
        return True

    def _settle(self, copy: ActivationCopy) -> None:
        """End what is in flight of a copy. One that could not be written stays on the host."""
        is_read, is_leaving = copy.place is Place.READING, copy.place is Place.LEAVING
        try:
            copy.settle()
            if is_leaving:
                self._count_heap(copy.nbytes)
        except DeadlineError:
            raise
        except OffloadError as error:
            if not is_read:  # that is read again when it is wanted
                self._warn_of_write(error)

    # -- room in the share -------------------------------------------------------------------------

    def _room(self, nbytes: int, *, before: int | None = None) -> HostPiece | None:
        """A piece of the share, after making room for it; None: there is no way.

        For a read ahead, `before` is the number of the copy to read: only what was saved earlier
        makes room for it, and nothing is waited for.
        """
        if round_up_to_page(nbytes) > self._share.nbytes:
            return None
        while (piece := self._share.take(nbytes)) is None:
            if not self._make_room(before):
                return None
        return piece

    def _make_room(self, before: int | None) -> bool:
        """One step towards more room; False: there is none."""
        victim = self._oldest(Place.ON_BOTH, before)
        if victim is not None and not victim.is_busy:
            victim.drop_host()
            return True
        if before is not None:
            return False
        if self._dead or self._draining:
            self._collect()
            if self._draining:
                self._draining[0].drain()
                self._collect()
            return True
        if victim is not None:
            victim.settle_arrivals()
            return True
        return self._lanes.records is not None and self._make_room_on_nvme()

    def _make_room_on_nvme(self) -> bool:
        """Write what was saved first, or wait for what is under way."""
        if not self._at[Place.WRITING]:
            for copy in sorted(self._at[Place.ON_HOST].values(), key=lambda c: c.number):
                if not copy.is_stuck and self._start_write(copy):
                    return True
        for place in (Place.WRITING, Place.LEAVING, Place.READING):
            pending = self._oldest(place)
            if pending is not None:
                self._settle(pending)
                return True
        return False

    def _oldest(self, place: Place, before: int | None = None) -> ActivationCopy | None:
        """The copy that was saved first: backward, which goes the other way, wants it last."""
        copies = self._at[place]
        number = min(copies, default=None)
        if number is None or (before is not None and number >= before):
            return None
        return copies[number]

    def _must_have_room(self, copy: ActivationCopy) -> HostPiece:
        """A piece to read a copy into; if nothing else helps, others return to the device."""
        while (piece := self._room(copy.nbytes)) is None:
            returning = self._oldest(Place.ON_HOST)
            assert returning is not None, "what is on nvme has been in the share before"
            self._counts["kept_bytes"] += returning.nbytes
            returning.return_to_device()
        return piece

    # -- back --------------------------------------------------------------------------------------

    def _arrive(self, copy: ActivationCopy) -> torch.Tensor:
        """The bytes of a copy on the device."""
        if copy.arrived is None:
            if copy.place in (Place.LEAVING, Place.WRITING):
                self._counts["forwarded_bytes"] += copy.nbytes
            if copy.place is Place.ON_NVME:
                self._start_read(copy, self._must_have_room(copy))
            if copy.place is Place.READING:
                copy.settle()
            self._count_heap(copy.nbytes)
        return copy.make_arrived()

    @staticmethod
    def _start_read(copy: ActivationCopy, piece: HostPiece) -> None:
        try:
            copy.start_read(piece)
        except BaseException:
            piece.release()
            raise

    def _count_heap(self, nbytes: int) -> None:
        if self._trimmer is not None:
            self._trimmer.count(nbytes)

    def _prefetch(self, number: int) -> None:
        """Start to bring back what was saved before copy `number`, the latest first."""
        end = bisect_left(self._numbers, number)
        for index in range(end - 1, max(end - 1 - self._prefetch_depth, -1), -1):
            copy = self._alive[self._numbers[index]]
            if copy.place is Place.ON_NVME:
                piece = self._room(copy.nbytes, before=copy.number)
                if piece is None:
                    return
                try:
                    self._start_read(copy, piece)
                except OffloadError:  # whoever wants it will see
                    return
            self._prefetch_to_device(copy)

    def _prefetch_to_device(self, copy: ActivationCopy) -> None:
        """Start the copy to an accelerator of bytes that the host has."""
        if self._lanes.device.host_addressable or copy.arrived is not None:
            return
        if copy.place is Place.READING and copy.done:
            with contextlib.suppress(OffloadError):  # it is on nvme then, and read again
                copy.settle()
        if copy.place in (Place.ON_HOST, Place.WRITING, Place.ON_BOTH):
            copy.start_arrival()

    def _keep_for_others(self, shared: SharedCopy) -> None:
        """Keep what has arrived for the other ops that have saved it, while it is recent."""
        if all(known() is not shared for known in self._recent):
            self._recent.append(weakref.ref(shared))
        if len(self._recent) > _MOST_RECENT:
            left = self._recent.popleft()()
            if left is not None and left.copy.place is not Place.RETURNED:
                left.copy.arrived = None

    # -- the end of a copy -------------------------------------------------------------------------

    def _collect(self) -> None:
        while self._left_bytes:
            self._device_used_bytes -= self._left_bytes.popleft()
        while self._dead:
            copy = self._dead.popleft()
            if self._alive.pop(copy.number, None) is not None:
                del self._numbers[bisect_left(self._numbers, copy.number)]
                copy.leave()
                self._draining.append(copy)
        for copy in tuple(self._draining):
            if not copy.is_busy:  # asked once: the answer may change at any time
                self._draining.remove(copy)
                copy.release()

    # -- what the user is told ---------------------------------------------------------------------

    def _warn_of_room(self, nbytes: int) -> None:
        records = self._lanes.records
        if records is None:
            disk = "tiers.nvme.paths is not set, which would take the rest"
        elif records.refusal is not None:
            disk = f"nvme takes no more ({records.refusal})"
        else:
            disk = "it is larger than that share"
        self._warn(
            "room",
            f"a saved tensor of {format_bytes(nbytes)} stays on the device: activations.host_memory"
            f" has {format_bytes(self._share.nbytes)}, of which "
            f"{format_bytes(self._share.used_bytes)} are in use, and {disk}",
        )

    def _warn_of_write(self, error: OffloadError) -> None:
        self._warn("write", f"a saved tensor stays in host memory, because of an error: {error}")

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += self._lanes.device.timeline.waited("saved tensors", started)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    for tensor in tensors:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # no storage: sparse, ...
            yield tensor.untyped_storage()._cdata
