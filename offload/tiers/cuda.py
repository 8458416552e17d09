"""The device tier on a CUDA device. Importable without one.

[Note: streams]

compute  torch's current stream; forward, backward and update kernels
h2d      fetches; a stream of its own, so that weights arrive while kernels run
d2h      departing gradients and state; not the h2d stream, because the two directions have copy
         engines of their own, and a departing gradient would hold up the next weight

    compute --event at start--> copy      what was queued on the buffers before the copy
    copy ----end event--------> compute   make_current_wait

Every copy waits for what the compute stream had queued when it was started. That orders it after
the kernels that last used a re-leased buffer, with no event per lease; a fetch that is started d
buckets early can still run beside the kernels of those d buckets.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import cast

import torch

from offload.errors import DeadlineError, OffloadError, StorageError, UnsupportedPlatformError
from offload.tiers.device import CpuDeviceTier, DeviceTier
from offload.tiers.transfer import DEFAULT_DEADLINE_SECONDS, AsyncIo, LaneTotals, Transfer

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
    ) -> None:
        self.lane = lane
        self.nbytes = buffers[0].numel()
        self.end = end
        self._begin = begin
        self._tier = tier
        self._lock = threading.Lock()
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
            self._buffers = ()
            self._settled = True

    def _storage_error(self, kind: type[StorageError], detail: str) -> StorageError:
        return kind(
            operation="copy",
            path=str(self._tier.device),
            nbytes=self.nbytes,
            what=self.lane,
            detail=detail,
        )


class CudaDeviceTier(DeviceTier):
    """Memory of one CUDA device; see [Note: streams].

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
        super().__init__(torch.device("cuda", index), budget_bytes, host_addressable=False)
        self.deadline_seconds = deadline_seconds
        self._streams = {
            "h2d": torch.cuda.Stream(self.device),  # overlaps fetches with kernels
            "d2h": torch.cuda.Stream(self.device),  # overlaps departures with kernels and fetches
        }
        self._lanes = {"h2d": (0, 0.0), "d2h": (0, 0.0)}
        # Copies that were only ordered (make_current_wait) are counted when they are found done;
        # until then they own their buffers (P18).
        self._in_flight: list[CudaTransfer] = []

    def start_copy_in(self, dst: torch.Tensor, src: torch.Tensor) -> Transfer:
        return self._start_copy(dst, src, "h2d", on_device=dst)

    def start_copy_out(self, dst: torch.Tensor, src: torch.Tensor) -> Transfer:
        return self._start_copy(dst, src, "d2h", on_device=src)

    def make_current_wait(self, transfer: Transfer) -> None:
        if isinstance(transfer, CudaTransfer):
            torch.cuda.current_stream(self.device).wait_event(transfer.end)
        else:
            transfer.wait()

    def lanes(self) -> LaneTotals:
        self._settle_done()
        with self._lock:
            return dict(self._lanes)

    def count_copy(self, lane: str, nbytes: int, seconds: float) -> None:
        """Count a settled copy; a stream runs one at a time, so their seconds add up."""
        with self._lock:
            total_bytes, busy_seconds = self._lanes[lane]
            self._lanes[lane] = (total_bytes + nbytes, busy_seconds + seconds)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _start_copy(
        self, dst: torch.Tensor, src: torch.Tensor, lane: str, *, on_device: torch.Tensor
    ) -> Transfer:
        assert dst.dtype == src.dtype == torch.uint8
        assert dst.numel() == src.numel(), "copy between different sizes"
        stream = self._streams[lane]
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            begin.record(stream)
            dst.copy_(src, non_blocking=True)
            end.record(stream)
        # torch's allocator must not hand the memory to the compute stream while the copy runs.
        on_device.record_stream(stream)
        transfer = CudaTransfer(self, lane, begin, end, (dst, src))
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
