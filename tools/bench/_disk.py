"""The I/O of a step alone: as many bytes read and written as the step moves, and no compute."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from _process import MIB

from offload.native import IoEngine, IoFile, Ticket

REQUEST_BYTES = 8 * MIB
NUM_BUFFERS = 16


class MixedDisk:
    """A file as large as the state, read and written through an I/O engine as a step does it.

    O_DIRECT, registered buffers and checksums, as the engine has them. Reads and writes are in
    flight together, in the proportion of their bytes; each walks over the file and begins again.
    Nothing that is read is used: it is the time of the disk, not of a step.
    """

    def __init__(self, path: str | None, state_bytes: int, backend: str = "auto") -> None:
        self._num_requests = max(2, -(-state_bytes // REQUEST_BYTES))
        self._memory = mmap.mmap(-1, NUM_BUFFERS * REQUEST_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ctypes.memset(self._address, 0x5A, NUM_BUFFERS * REQUEST_BYTES)
        self._engine = IoEngine(backend=backend)  # type: ignore[arg-type]
        self._engine.register(self._address, NUM_BUFFERS * REQUEST_BYTES)
        self._folder = tempfile.TemporaryDirectory(dir=path, prefix="bench-")
        self._file: IoFile = self._engine.open(
            os.path.join(self._folder.name, "mixed"), flags=os.O_RDWR | os.O_CREAT
        )
        os.posix_fallocate(self._file.fd, 0, self._num_requests * REQUEST_BYTES)
        self._read_at, self._write_at = 0, self._num_requests // 2
        # What was never written reads as zeros without touching the disk.
        self.seconds(0, self._num_requests * REQUEST_BYTES)

    def write_new(self, path: Path) -> None:
        """Write as many bytes as the file has to a new one, which is allocated first, and sync."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with self._engine.open(str(path), flags=flags) as file:
            os.posix_fallocate(file.fd, 0, self._num_requests * REQUEST_BYTES)
            flying: deque[Ticket] = deque()
            for number in range(self._num_requests):
                if len(flying) == NUM_BUFFERS:
                    flying.popleft().wait()
                address = self._address + number % NUM_BUFFERS * REQUEST_BYTES
                offset = number * REQUEST_BYTES
                flying.append(
                    self._engine.start_write(file, offset, address, REQUEST_BYTES, checksum_seed=0)
                )
            while flying:
                flying.popleft().wait()
            self._engine.fsync(file)

    def seconds(self, read_bytes: int, written_bytes: int) -> float:
        """The time that these bytes take, to the last byte."""
        flying: deque[Ticket] = deque()
        done = {True: 0, False: 0}
        wanted = {True: read_bytes, False: written_bytes}
        total, index = read_bytes + written_bytes, 0
        started = time.perf_counter()
        while sum(done.values()) < total:
            # The side that is behind goes next, so that both end together.
            behind = {side: done[side] / wanted[side] for side in wanted if wanted[side]}
            reading = min(behind, key=behind.__getitem__)
            if len(flying) == NUM_BUFFERS:
                flying.popleft().wait()
            nbytes = min(REQUEST_BYTES, wanted[reading] - done[reading])
            nbytes = max(4096, nbytes // 4096 * 4096)
            flying.append(self._start(reading, index, nbytes))
            done[reading] += nbytes
            index = (index + 1) % NUM_BUFFERS
        while flying:
            flying.popleft().wait()
        return time.perf_counter() - started

    def _start(self, reading: bool, index: int, nbytes: int) -> Ticket:
        address = self._address + index * REQUEST_BYTES
        if reading:
            at = self._read_at = (self._read_at + 1) % self._num_requests
            start = self._engine.start_read
        else:
            at = self._write_at = (self._write_at + 1) % self._num_requests
            start = self._engine.start_write
        return start(self._file, at * REQUEST_BYTES, address, nbytes, checksum_seed=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._engine.unregister(self._address)
        self._engine.close()
        self._folder.cleanup()
