"""`offload bench`: the bandwidth of memory and disks, measured as training would use them.

Disk figures move whole blocks between preallocated files and shared memory through
`offload.native`, with the configured backend, block size and queue depth. `nvme_mixed` reads one
half of each file while the other is written, and counts both.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from offload.config import OffloadConfig
from offload.errors import ConfigError, DiskFullError, StorageError, format_bytes
from offload.native import IoEngine, IoFile, Ticket

_BLOCK_MULTIPLE = 4096
_DEFAULT_BLOCK_BYTES = 4 << 20
_DEFAULT_QUEUE_DEPTH = 32
_DEFAULT_THREADS = 4


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """One measured lane: the best and the median of some passes over `nbytes` bytes."""

    lane: str
    where: str
    nbytes: int
    best_bytes_per_second: float
    median_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class _Disk:
    """One path's preallocated file and its part of the shared memory."""

    file: IoFile
    address: int
    nbytes: int


def measure(
    config: OffloadConfig, paths: Sequence[str] = (), *, size_bytes: int, passes: int
) -> list[Bandwidth]:
    """Return the bandwidth of memory, and of the configured and the further `paths` together.

    Raises:
        ConfigError: `size_bytes` is too small for the number of paths.
        StorageError: a path cannot be used, or an operation failed.
    """
    folders = [*config.tiers.nvme.paths, *map(Path, paths)]
    results = [_memory(size_bytes, passes)]
    if folders:
        results += _disks(config, folders, size_bytes, passes)
    return results


def render(results: Sequence[Bandwidth], *, as_json: bool) -> None:
    """Print `results` as a table, or as one JSON object."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps({"lanes": [asdict(result) for result in results]}))
        return
    table = Table("lane", "where", "moved", "best", "median", box=None, pad_edge=False)
    for result in results:
        table.add_row(
            result.lane,
            result.where,
            format_bytes(result.nbytes),
            f"{result.best_bytes_per_second / 1e9:.2f} GB/s",
            f"{result.median_bytes_per_second / 1e9:.2f} GB/s",
        )
    Console().print(table)


def _memory(size_bytes: int, passes: int) -> Bandwidth:
    import numpy as np

    source = np.ones(size_bytes, dtype=np.uint8)
    target = np.zeros(size_bytes, dtype=np.uint8)  # touched: first touch is ten times slower
    target[:] = 1

    def copy() -> None:
        np.copyto(target, source)

    return _timed("memory", "copy, one thread, read and written", 2 * size_bytes, passes, copy)


def _disks(
    config: OffloadConfig, folders: Sequence[Path], size_bytes: int, passes: int
) -> Iterator[Bandwidth]:
    share_bytes = size_bytes // len(folders) // (2 * _BLOCK_MULTIPLE) * (2 * _BLOCK_MULTIPLE)
    if share_bytes == 0:
        raise ConfigError(problems=[f"--size is too small for {len(folders)} paths"])
    with ExitStack() as stack:
        engine = stack.enter_context(_engine(config))
        disks = [stack.enter_context(_disk(engine, path, share_bytes)) for path in folders]
        where = f"{', '.join(map(str, folders))} ({engine.backend})"
        moved_bytes = share_bytes * len(folders)

        def write() -> None:
            _finish([engine.start_write(d.file, 0, d.address, d.nbytes) for d in disks])

        def read() -> None:
            _finish([engine.start_read(d.file, 0, d.address, d.nbytes) for d in disks])

        def mixed() -> None:
            half = share_bytes // 2
            _finish(
                [engine.start_read(d.file, 0, d.address, half) for d in disks]
                + [engine.start_write(d.file, half, d.address + half, half) for d in disks]
            )

        write()  # unwritten extents read as zeros without touching the disk
        yield _timed("nvme_write", where, moved_bytes, passes, write)
        yield _timed("nvme_read", where, moved_bytes, passes, read)
        yield _timed("nvme_mixed", where, moved_bytes, passes, mixed)


def _engine(config: OffloadConfig) -> IoEngine:
    io = config.io
    return IoEngine(
        backend=io.backend,
        queue_depth=_DEFAULT_QUEUE_DEPTH if io.queue_depth == "auto" else io.queue_depth,
        threads=_DEFAULT_THREADS if io.threads == "auto" else io.threads,
        block_bytes=_DEFAULT_BLOCK_BYTES if io.block_bytes == "auto" else io.block_bytes,
    )


@contextmanager
def _disk(engine: IoEngine, folder: Path, nbytes: int) -> Iterator[_Disk]:
    """Open an unnamed file of `nbytes` allocated bytes in `folder`, with memory to match."""
    memory = mmap.mmap(-1, nbytes)
    view = (ctypes.c_char * nbytes).from_buffer(memory)
    view.raw = secrets.token_bytes(_BLOCK_MULTIPLE) * (nbytes // _BLOCK_MULTIPLE)
    file = _unnamed_file(engine, folder)
    try:
        try:
            os.posix_fallocate(file.fd, 0, nbytes)
        except OSError as error:
            free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            raise DiskFullError(
                path=folder, needed_bytes=nbytes, free_bytes=free_bytes, errno=error.errno
            ) from error
        yield _Disk(file, ctypes.addressof(view), nbytes)
    finally:
        file.close()
        del view
        memory.close()


def _unnamed_file(engine: IoEngine, folder: Path) -> IoFile:
    try:
        return engine.open(str(folder), flags=os.O_RDWR | os.O_TMPFILE)
    except StorageError as unsupported:
        if not folder.is_dir():
            raise
        path = folder / f".offload-bench-{secrets.token_hex(8)}"
        try:
            file = engine.open(str(path), flags=os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except StorageError as error:
            raise error from unsupported
        path.unlink()
        return file


def _finish(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.wait()


def _timed(
    lane: str, where: str, nbytes: int, passes: int, operation: Callable[[], None]
) -> Bandwidth:
    speeds = []
    for _ in range(passes):
        start = time.perf_counter()
        operation()
        speeds.append(nbytes / (time.perf_counter() - start))
    speeds.sort()
    return Bandwidth(lane, where, nbytes, speeds[-1], speeds[len(speeds) // 2])
