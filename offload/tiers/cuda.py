"""The device tier on a CUDA device; see [Note: streams] in accelerator.py. Importable without one.

[Note: host waits]
Only `CudaTransfer.wait` blocks the host. What is copied is ordered by events otherwise, and counted
when a later call finds that its end event has passed.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from typing import cast

import torch

from offload.errors import DeadlineError, OffloadError, StorageError, UnsupportedPlatformError
from offload.tiers.accelerator import AcceleratorTier, Event, Stream
from offload.tiers.device import CpuDeviceTier, DeviceTier
from offload.tiers.transfer import (
    DEFAULT_DEADLINE_SECONDS,
    AsyncIo,
    CopyLane,
    LaneTotals,
    Transfer,
)
from offload.tiers.uninterrupted import UninterruptedLock

_POLL_SECONDS = 50e-6  # an event can be polled or waited for without end; P6 wants a deadline


class CudaTransfer(Transfer):
    """A copy between two events of one stream."""

    def __init__(
        self,
        tier: CudaDeviceTier,
        lane: str,
        begin: torch.cuda.Event,
        end: torch.cuda.Event,
        buffers: tuple[torch.Tensor, torch.Tensor],
        what: str,
    ) -> None:
        self.lane = lane
        self._what = what
        self._queued = time.perf_counter()
        self.nbytes = buffers[0].numel()
        self.end = end
        self._begin = begin
        self._tier = tier
        self._lock = UninterruptedLock()
        self._buffers: tuple[torch.Tensor, ...] = buffers
        self._settled = False
        self._error: OffloadError | None = None

    def done(self) -> bool:
        try:
            return self._settled or self.end.query()
        except RuntimeError:  # the device failed; wait() says how
            return True

    def wait(self, timeout: float | None = None) -> None:
        if not self._settled:
            self._settle(self._tier.deadline_seconds if timeout is None else timeout)
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _settle(self, timeout: float) -> None:
        failure: RuntimeError | None = None
        seconds = 0.0
        try:
            limit = time.monotonic() + timeout
            while not self.end.query():
                if time.monotonic() > limit:
                    raise self._storage_error(
                        DeadlineError, f"not done after {timeout:g} s; it is still in flight"
                    )
                time.sleep(_POLL_SECONDS)
            seconds = self._begin.elapsed_time(self.end) / 1e3
        except RuntimeError as error:
            failure = error
        with self._lock:
            if self._settled:
                return
            if failure is not None:
                self._error = self._storage_error(StorageError, str(failure))
                self._error.__cause__ = failure
            else:
                self._tier.count_copy(self.lane, self.nbytes, seconds)
                self._note_span(seconds)
            self._buffers = ()
            self._settled = True

    def _note_span(self, seconds: float) -> None:
        """The length is the device's own; the end is when the host has found it."""
        timeline = self._tier.timeline
        if timeline.is_on:
            ended = timeline.clock()
            began = max(self._queued, ended - seconds)
            timeline.span(
                self.lane, self._what, began, ended, nbytes=self.nbytes, queued=self._queued
            )

    def _storage_error(self, kind: type[StorageError], detail: str) -> StorageError:
        return kind(
            operation="copy",
            path=str(self._tier.device),
            nbytes=self.nbytes,
            what=self.lane,
            detail=detail,
        )


class CudaDeviceTier(AcceleratorTier):
    """Memory of one CUDA device.

    Raises:
        UnsupportedPlatformError: torch has no such CUDA device.
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: int,
        *,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> None:
        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = cast("int | None", device.index)
        if index is None and num_devices:
            index = torch.cuda.current_device()
        if index is None or index >= num_devices:
            raise UnsupportedPlatformError(
                f"there is no device {device}: torch sees {num_devices} CUDA devices",
                remedy='set tiers.device.kind = "auto" or "cpu"',
            )
        super().__init__(torch.device("cuda", index), budget_bytes)
        self.deadline_seconds = deadline_seconds
        self._streams: dict[CopyLane, torch.cuda.Stream] = {
            "h2d": torch.cuda.Stream(self.device),  # overlaps fetches with kernels
            "d2h": torch.cuda.Stream(self.device),  # overlaps departures with kernels and fetches
        }
        self._quiet = torch.cuda.Stream(self.device)  # of copies that wait for a mark only
        self._lanes = {"h2d": (0, 0.0), "d2h": (0, 0.0)}
        # Copies that were only ordered (make_current_wait) are counted when they are found done;
        # until then they own their buffers (P18).
        self._in_flight: list[CudaTransfer] = []

    def make_current_wait(self, transfer: Transfer) -> None:
        if isinstance(transfer, CudaTransfer):
            self._wait(self._current(), transfer.end)  # A2
        else:
            transfer.wait()

    def lanes(self) -> LaneTotals:
        self._settle_done()
        with self._lock:
            return dict(self._lanes)

    def close(self) -> None:
        """Also wait for copies in flight: the host arena goes next."""
        with self._lock:
            in_flight, self._in_flight = self._in_flight, []
        for transfer in in_flight:
            with contextlib.suppress(StorageError):  # its owner's wait() raises it
                transfer.wait()
        super().close()

    def count_copy(self, lane: str, nbytes: int, seconds: float) -> None:
        """Count a settled copy; a stream runs one at a time, so their seconds add up."""
        with self._lock:
            total_bytes, busy_seconds = self._lanes[lane]
            self._lanes[lane] = (total_bytes + nbytes, busy_seconds + seconds)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _current(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def _lane_stream(self, lane: CopyLane) -> Stream:
        return self._streams[lane]

    def _beside(self) -> AbstractContextManager[object]:
        # Also the device of the thread: a new one's is number 0.
        return torch.cuda.stream(self._quiet)

    def _record(self, stream: Stream) -> Event:
        return cast("torch.cuda.Stream", stream).record_event()

    def _wait(self, stream: Stream, event: Event) -> None:
        cast("torch.cuda.Stream", stream).wait_event(cast("torch.cuda.Event", event))

    def _copy(self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane, what: str) -> Transfer:
        stream = self._streams[lane]
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record(stream)
            dst.copy_(src, non_blocking=True)
            end.record(stream)
        # torch's allocator must not hand the memory to the compute stream while the copy runs.
        (dst if lane == "h2d" else src).record_stream(stream)
        transfer = CudaTransfer(self, lane, begin, end, (dst, src), what)
        self._settle_done()
        with self._lock:
            self._in_flight.append(transfer)
        return transfer

    def _settle_done(self) -> None:
        with self._lock:
            done = [transfer for transfer in self._in_flight if transfer.done()]
            self._in_flight = [each for each in self._in_flight if each not in done]
        for transfer in done:
            with contextlib.suppress(StorageError):  # its owner's wait() raises it
                transfer.wait()


def open_device_tier(
    kind: str,
    budget_bytes: int,
    io_engine: AsyncIo,
    *,
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
) -> DeviceTier:
    """Open the device tier that `kind` names: "auto", "cpu", "cuda" or "cuda:N".

    "auto" is CUDA where torch has it, else the CPU. `budget_bytes` is the hard budget.

    Raises:
        UnsupportedPlatformError: there is no such device.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return CpuDeviceTier(budget_bytes, io_engine, deadline_seconds=deadline_seconds)
    return CudaDeviceTier(torch.device(kind), budget_bytes, deadline_seconds=deadline_seconds)
