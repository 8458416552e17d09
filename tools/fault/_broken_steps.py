"""Builds that are broken on purpose, for the teeth of `simulate`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from offload.engine.gradients import GradientHome
from offload.errors import OffloadError
from offload.optim.held import LoadingChunk
from offload.optim.overlapped import OverlappedStep
from offload.optim.streamed import StreamedStep
from offload.optim.turns import Turns
from offload.partition.blocks import BlockStore
from offload.partition.late import LateTransfers
from offload.partition.shadows import Shadows
from offload.schedule.executor import _Batch, _PumpWork
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated_streams import SimulatedAccelerator
from offload.tiers.transfer import TicketTransfer

Break = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def _patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def break_function(owner: Any, name: str, make: Callable[[Any], Any]) -> Break:
    """`make` gets the function as it is, and returns the broken one."""
    return lambda: _patched(owner, name, make(vars(owner)[name]))


def flip_at_once(start_write: Any) -> Any:
    def broken(store: NvmeStore, record: Any, tensor: Any, **kwargs: Any) -> Any:
        transfer = start_write(store, record, tensor, **kwargs)
        with store._lock:
            store._flip(record, transfer.extent, 0)
        return transfer

    return broken


def forget_failed_write(finish: Any) -> Any:
    def broken(store: BlockStore, key: Any) -> None:
        try:
            finish(store, key)
        except OffloadError:
            staged = store._failed.pop(key, None)
            if staged is not None:
                staged.release()
            raise

    return broken


def _forget_what_was_updated(run: Any) -> Any:
    def broken(step: StreamedStep, settings: Any, **kwargs: Any) -> None:
        step._updated.clear()
        run(step, settings, **kwargs)

    return broken


def _write_late_memory_again(_: Any) -> Any:
    def broken(late: LateTransfers, transfers: Any, give_back: Any) -> None:
        del late, transfers
        give_back()

    return broken


def _end_without_a_word(finish: Any) -> Any:
    def broken(batch: Any, index: int, *, error: BaseException | None) -> None:
        if error is None and batch._pending == 1 and len(batch._calls) > 1:
            batch._pending = 0
        else:
            finish(batch, index, error=error)

    return broken


def _stop_without_waking(_: Any) -> Any:
    def broken(work: _PumpWork) -> None:
        work._closed = True

    return broken


def _wait_for_ever(settle: Any) -> Any:
    def broken(transfer: TicketTransfer, ticket: Any, timeout: float) -> None:
        del timeout
        settle(transfer, ticket, math.inf)

    return broken


def _read_one_gradient(stage: Any) -> Any:
    def broken(home: GradientHome, block: Any, key: Any) -> Any:
        home._written.discard(key)
        return stage(home, block, key)

    return broken


def _nothing(_: Any) -> Any:
    return lambda *_: []


def _always(_: Any) -> Any:
    return lambda *_: True


def never(_: Any) -> Any:
    return lambda *_args, **_kwargs: None


def _nothing_to_wait_for(_: Any) -> Any:
    return property(lambda _: [])


def _without_checksums(init: Any) -> Any:
    def broken(store: NvmeStore, *args: Any, **kwargs: Any) -> None:
        init(store, *args, **{**kwargs, "checksum": False})

    return broken


def _mark_too_early(_: Any) -> Any:
    @contextlib.contextmanager
    def broken(turns: Turns, *, marks: bool = False) -> Iterator[None]:
        del marks
        with turns._entrance, turns._working():
            yield

    return broken


def pin_nothing(pin: Any) -> Any:
    def broken(store: NvmeStore, record: Any) -> Any:
        made = pin(store, record)
        if made is not None:
            store._pools[made.extent.nbytes].end_read(made.extent)
        return made

    return broken


def _drop_nothing(_: Any) -> Any:
    def broken(shadows: Shadows, block: Any, chunk: int) -> None:
        shadows._held.pop(shadows._key(block, chunk), None)

    return broken


BREAKS: dict[str, Break] = {
    "a version is current before its write has settled": break_function(
        NvmeStore, "start_write", flip_at_once
    ),
    "a failed write is dropped, not repeated": break_function(
        BlockStore, "_finish", forget_failed_write
    ),
    "an update is applied twice after a retry": break_function(
        StreamedStep, "run", _forget_what_was_updated
    ),
    "an update does not wait for its reads": break_function(
        LoadingChunk, "transfers", _nothing_to_wait_for
    ),
    "a chunk is read while it is written": break_function(BlockStore, "_settle", never),
    "a held version counts whatever the step applies": break_function(
        OverlappedStep, "_is_as_expected", _always
    ),
    "a home on the device counts before it is written": break_function(
        OverlappedStep, "_updated_on_device", _nothing
    ),
    "a dropped version keeps its extent and its memory": break_function(
        Shadows, "drop", _drop_nothing
    ),
    "what a snapshot has pinned is written again": break_function(NvmeStore, "pin", pin_nothing),
    "memory of a late transfer is given to others": break_function(
        LateTransfers, "keep", _write_late_memory_again
    ),
    "a gradient that was written home is not read again": break_function(
        GradientHome, "_stage", _read_one_gradient
    ),
    "the pool does not say that its calls have ended": break_function(
        _Batch, "_finish", _end_without_a_word
    ),
    "the pump is not woken when it is closed": break_function(
        _PumpWork, "stop", _stop_without_waking
    ),
    "a wait has no deadline": break_function(TicketTransfer, "_settle", _wait_for_ever),
    "checksums are not looked at": break_function(NvmeStore, "__init__", _without_checksums),
    "copies beside the computation do not wait for it": break_function(
        Turns, "caller", _mark_too_early
    ),
    "what is computed does not wait for its copy": break_function(
        SimulatedAccelerator, "make_current_wait", never
    ),
}
