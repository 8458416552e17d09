"""Forward-only training: perturbed copies on the device, true weights at home.

[Note: Forward-only step]
The arithmetic is in optim/zeroth_order.py. A step runs the closure twice; the weights stream
through the device in both passes, and what arrives there is a perturbed copy of the home:

                 home                                    device
    pass +       update of the step before, stored       w + eps z
    between      the rest of that update                 (copies dropped)
    pass -       read only                               w - eps z
    after        the update of this step is *pending*    (copies dropped)

So a step reads the weights twice and writes them once. The home is never perturbed, and a perturbed
copy never goes home: a parameter that the closure edits is an error.

A pending update has its settings frozen. It is applied to a chunk when that comes in, once: the
streamed step notes which chunks have it. A fault therefore always finds true weights. Whatever
reads or writes homes past the pager comes after `Pager.flush`, which applies what is left.

An error in a pass ends the step: the copies are dropped, torch's random state is as before the
step, the update of the step before stays pending as far as it is not applied.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from offload.engine.planning import PERTURBED_CHUNKS, perturbed_bytes
from offload.errors import GuardError, NonFiniteError, OffloadError, StorageError, listed
from offload.optim.chunk_update import ChunkWork, StepSettings
from offload.optim.zeroth_order import ZerothOrderUpdate
from offload.partition.blocks import Block
from offload.partition.residency import Residency
from offload.partition.staging import Staged
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.tiers.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from offload.engine.build import Parts
    from offload.engine.paging.pages import WeightPage

Reduce = Callable[[float], float]


class ZerothOrder:
    """The two passes of a step, and the update that is pending after it."""

    def __init__(self, parts: Parts, updater: ZerothOrderUpdate, end_pass: Callable[[], None]):
        """Take over what arrives on the device.

        `end_pass` lets go of everything that a forward may have left in use.
        """
        self._store = parts.store
        self._pager = parts.pager
        self._streamed = parts.streamed
        self._updater = updater
        self._meter = parts.meter
        self._module = parts.module
        self._end_pass = end_pass
        self._pages = [page for page in parts.pages if page.block.bucket.trainable]
        self._step = 0
        # Of the noise in copies on the device, by parameter; None: they are true copies.
        self._scales: Mapping[int, float] | None = None
        self._pending: StepSettings | None = None
        device = parts.device
        self._random = _RandomState(device.device)
        self._ring = None if device.host_addressable else _Ring(parts)
        parts.pager.arrivals = self

    def project(
        self,
        closure: Callable[[], Any],
        step: int,
        reduce: Reduce | None,
        moving: Iterable[int],
    ) -> tuple[float, float]:
        """Run both passes; the projected gradient, and the mean of the two losses.

        Args:
            closure: returns the loss.
            step: number of the step, by which its noise is drawn.
            reduce: what the workers make of their projected gradients together.
            moving: the parameters to perturb, by index.

        Raises:
            GuardError: the closure has edited a parameter; the edit is lost.
            StorageError: weights could not be read, or the update of the step before not stored.
            NonFiniteError: the step before has made a weight infinite or NaN.
        """
        eps = self._updater.rule.perturbation
        self._pager.write_edits()
        self._pager.end_raw_access()
        self._random.capture()
        try:
            above = self._run(closure, step, dict.fromkeys(moving, eps))
            self.settle()
            self._random.restore()
            below = self._run(closure, step, dict.fromkeys(moving, -eps))
        except BaseException:
            self._random.restore()
            raise
        projected = (above - below) / (2 * eps)
        return reduce(projected) if reduce is not None else projected, (above + below) / 2

    def defer(self, settings: StepSettings) -> None:
        """The update of the step that has run is pending from here on."""
        assert self._pending is None, "the update of the step before has been applied"
        self._pager.write_edits()
        self._pager.end_raw_access()
        self._pending = settings
        self._drop_copies()

    def abandon(self) -> None:
        """Forget the pending update: the weights are about to be replaced."""
        self._pending = None

    # -- what the pager asks, see `Arrivals` -------------------------------------------------------

    def land(
        self, block: Block, chunk: int, staged: Staged, target: torch.Tensor
    ) -> tuple[Transfer, Staged]:
        """See `Arrivals.land`: update the home if that is pending, copy, perturb the copy."""
        bucket = block.bucket
        if bucket.trainable and self._pending is not None:
            work = self._streamed.work_left(bucket, bucket.chunks[chunk], self._pending)
            if work is not None:
                return self._update_and_land(block, work, staged, target, self._pending)
        perturbed = bucket.trainable and self._scales is not None
        try:
            copy = self._copy(block, chunk, staged, target)
        except BaseException:
            staged.release()
            raise
        if not perturbed:
            return copy, staged
        staged.release()
        return copy, Staged(target, copy, None)

    def settle(self) -> None:
        """See `Arrivals.settle`: apply the pending update to the chunks that do not have it.

        Raises:
            StorageError: homes could not be read or written; call again for the rest.
            NonFiniteError: the update has been applied, and a weight is infinite or NaN.
        """
        if self._pending is None:
            return
        try:
            self._streamed.run(self._pending)
        except NonFiniteError:
            self._pending = None
            raise
        self._pending = None

    def check_edit(self, page: WeightPage) -> None:
        """See `Arrivals.check_edit`."""
        if self._scales is not None and page.block.bucket.trainable:
            raise _edited(page)

    # -- inside ------------------------------------------------------------------------------------

    def _run(self, closure: Callable[[], Any], step: int, scales: Mapping[int, float]) -> float:
        self._step = step
        self._scales = scales
        self._drop_copies()
        try:
            # A fetch ahead that fails is tried again, and reported, when the weights are needed.
            with contextlib.suppress(StorageError):
                self._pager.expect((self._module.training, False))
            with torch.no_grad():
                loss = _number(closure())
        except BaseException:
            self._end_perturbation()
            raise
        edited = self._end_perturbation()
        if edited is not None:
            raise _edited(edited)
        return loss

    def _end_perturbation(self) -> WeightPage | None:
        """Drop the perturbed copies; a page whose parameters were edited meanwhile, if any."""
        self._end_pass()
        torch.clear_autocast_cache()  # casts of perturbed weights
        edited = None
        for page in self._pages:
            if page.residency is Residency.ON_DEVICE and page.note_edits():
                edited = edited or page
                for parameter in page.parameters:
                    parameter.home_is_stale = parameter.state.edited = False
        self._pager.end_raw_access()
        self._scales = None
        self._drop_copies()
        return edited

    def _drop_copies(self) -> None:
        for page in self._pages:
            with contextlib.suppress(OffloadError):  # of a fetch under way: the page is at home
                self._pager.drop_stale(page)

    def _update_and_land(
        self,
        block: Block,
        work: ChunkWork,
        staged: Staged,
        target: torch.Tensor,
        settings: StepSettings,
    ) -> tuple[Transfer, Staged]:
        work.staged["weights"] = staged
        copy: Transfer | None = None
        try:
            with uninterrupted():
                try:
                    self._streamed.update_staged(work, settings)
                except BaseException:
                    staged.release()
                    raise
                try:
                    copy = self._copy(block, work.chunk, staged, target)
                    if self._scales is None:
                        copy.wait(self._store.deadline_seconds)  # before the store owns the buffer
                finally:  # whatever became of the copy: the update is not applied again
                    self._store.start_store(block, work.chunk, staged)
        except BaseException:
            if copy is not None:
                copy.wait(self._store.deadline_seconds)  # nobody else knows of it
            raise
        return copy, Staged(target, copy, None)

    def _copy(self, block: Block, chunk: int, staged: Staged, target: torch.Tensor) -> Transfer:
        """Start the copy to the device. A perturbed one does not read `staged` any more."""
        if self._scales is None or not block.bucket.trainable:
            return self._store.device.start_copy_in(target, staged.tensor, block.name)
        ring = self._ring
        place = target if ring is None else ring.take(target.numel(), self._store.deadline_seconds)
        with self._meter.busy("cpu", target.numel(), what=block.name):
            self._updater.perturb(
                block.bucket, chunk, staged.tensor, place, step=self._step, scales=self._scales
            )
        if ring is None:
            return CompletedTransfer("h2d")
        return ring.put(self._store.device.start_copy_in(target, place, block.name))


class _Ring:
    """Host memory in which chunks are perturbed for a device that the CPU does not reach."""

    def __init__(self, parts: Parts) -> None:
        nbytes = perturbed_bytes(parts.plan.buckets) // PERTURBED_CHUNKS
        self._places = [
            parts.host.lease(nbytes, "perturbed weights").tensor for _ in range(PERTURBED_CHUNKS)
        ]
        self._copies: list[Transfer | None] = [None] * PERTURBED_CHUNKS
        self._next = 0

    def take(self, nbytes: int, deadline_seconds: float) -> torch.Tensor:
        """A place whose last copy has ended."""
        self._next = (self._next + 1) % PERTURBED_CHUNKS
        copy, self._copies[self._next] = self._copies[self._next], None
        if copy is not None:
            copy.wait(deadline_seconds)
        return self._places[self._next][:nbytes]

    def put(self, copy: Transfer) -> Transfer:
        """The place taken last belongs to this copy until it has ended."""
        self._copies[self._next] = copy
        return copy


class _RandomState:
    """Torch's random state, so that both passes draw the same numbers."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._states: Sequence[torch.Tensor] = ()

    def capture(self) -> None:
        """Remember the state."""
        self._states = [torch.get_rng_state()]
        if self._cuda is not None:
            self._states.append(torch.cuda.get_rng_state(self._cuda))

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._states[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._states[1], self._cuda)


def _number(loss: Any) -> float:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return float(loss.item())
    if isinstance(loss, numbers.Real):
        return float(loss)
    shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
    raise OffloadError(
        f"the closure returned a {type(loss).__name__}{shape}",
        expected="the loss: a tensor with one element, or a number",
    )


def _edited(page: WeightPage) -> GuardError:
    names = listed([parameter.state.name for parameter in page.parameters], most=4)
    return GuardError(
        f"a parameter among {names} was edited inside the closure of a forward-only step, where "
        "parameters are perturbed copies; the edit is lost",
        remedy="edit parameters between steps",
    )
