"""The lanes of this machine, each measured alone, as training uses them.

[Note: lanes alone]
What is timed are the engine's own update kernels, copies and I/O, with the configuration's
settings, on memory that is leased and registered as the engine's is:

    memory      a copy by one thread, read and written: no lane, but what the others share
    cpu         the update rule over state in host memory; counts weights, gradients and optimizer
                state once, as the lane does in a step
    h2d, d2h    a copy between the host arena and the device
    nvme_write, nvme_read
                all paths at once
    nvme_mixed  one half of each file is read while the other is written; counts both

A pass that is not timed comes first: memory that is touched, kernels that are compiled and files
that are written for the first time are slower.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from offload.config import OffloadConfig, available_host_bytes
from offload.engine.build import open_io
from offload.engine.optimizer import configured_settings
from offload.errors import ConfigError, DiskFullError, StorageError, format_bytes
from offload.native import IoEngine, IoFile, Ticket
from offload.optim.chunk_update import ChunkWork, KernelUpdate, StepSettings
from offload.optim.rules import RULES, UpdateRule, eight_bit_rule, make_rule
from offload.partition.arrays import TORCH_DTYPES
from offload.partition.blocks import BlockStore
from offload.partition.layout import (
    MAX_BUCKET_ELEMENTS,
    REDUCTION_ELEMENTS,
    ParamSpec,
    pack,
    segments,
    slot_elements,
)
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool
from offload.schedule.plan import layout_state, resolve_gradient_dtype
from offload.tiers.cuda import open_device_tier
from offload.tiers.device import DeviceTier
from offload.tiers.extents import round_up_to_page
from offload.tiers.host import HostArena

_BLOCK_MULTIPLE = 4096
_OWNER = "the measurement"
_LARGEST_STATE_BYTES = 16  # of a parameter, its gradient included
_SMALL_NUMBERS = 0x3000  # bits of 5e-10 in bf16, 0.1 in fp16 and, twice, 5e-10 in fp32


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """One measured lane: the best and the median of some passes over `nbytes` bytes."""

    lane: str
    where: str
    nbytes: int
    best_bytes_per_second: float
    median_bytes_per_second: float


def measure(config: OffloadConfig, *, size_bytes: int, passes: int) -> Iterator[Bandwidth]:
    """Yield memory and each lane as it has been measured; see [Note: lanes alone].

    There is no `cpu` lane where no kernel updates, and none of nvme without paths. Closing the
    iterator closes what it has opened.

    Args:
        config: kind of device, paths, I/O, precision and optimizer.
        size_bytes: about what one pass moves.
        passes: timed.

    Raises:
        ConfigError: `size_bytes` is too small for the number of paths, or too large for the memory.
        StorageError: a path cannot be used, or an operation failed.
        UnsupportedPlatformError: there is no such device or I/O backend here.
    """
    folders = config.tiers.nvme.paths
    _check_size(size_bytes, len(folders))
    yield _memory(size_bytes, passes)
    with ExitStack() as stack:
        # Closed in the reverse order: requests have ended when the memory goes that is theirs.
        arena = HostArena(round_up_to_page(size_bytes))
        stack.callback(arena.close)
        io = stack.enter_context(open_io(config))
        device = open_device_tier(config.tiers.device.kind, arena.budget_bytes, io)
        stack.callback(device.close)
        if config.optimizer.name in RULES:
            yield _update(config, device, size_bytes, passes)
        arena.register_with(io)
        if not device.host_addressable:
            arena.page_lock()
        yield from _copies(device, arena, size_bytes, passes)
        if folders:
            yield from _disks(config, io, arena, size_bytes, passes)


def _check_size(size_bytes: int, num_paths: int) -> None:
    if size_bytes < max(num_paths, 1) * 2 * _BLOCK_MULTIPLE:
        where = f"{num_paths} paths" if num_paths else "a measurement"
        raise ConfigError(problems=[f"--size is too small for {where}"])
    needed, available = 2 * size_bytes, available_host_bytes()
    if needed > available:
        raise ConfigError(
            problems=[
                f"--size takes {format_bytes(needed)}, twice itself, of host memory, of which "
                f"{format_bytes(available)} are available: lower it"
            ]
        )


def _memory(size_bytes: int, passes: int) -> Bandwidth:
    source = np.ones(size_bytes, dtype=np.uint8)
    target = np.zeros(size_bytes, dtype=np.uint8)
    copy = partial(np.copyto, target, source)
    return _timed("memory", "copy, one thread, read and written", 2 * size_bytes, passes, copy)


def _update(config: OffloadConfig, device: DeviceTier, size_bytes: int, passes: int) -> Bandwidth:
    """The rule of `[optimizer]` on one parameter whose state is at home on the host."""
    rule = _rule(config)
    numel = max(size_bytes // _LARGEST_STATE_BYTES, REDUCTION_ELEMENTS)
    dtype = config.precision.compute
    spec = ParamSpec("weight", (numel,), numel, dtype, TORCH_DTYPES[dtype].itemsize, trainable=True)
    moments = rule.state_specs
    (bucket,) = pack(
        [spec], bucket_elements=MAX_BUCKET_ELEMENTS, slot_elements=slot_elements(moments)
    )
    (layouts,) = layout_state(
        [bucket], gradient_dtype=resolve_gradient_dtype(config), moments=moments
    )
    held_bytes = sum(round_up_to_page(layout.nbytes) for layout in layouts.values())
    weight = torch.empty(0, dtype=TORCH_DTYPES[dtype])
    state = ParameterState(0, ("weight",), weight, torch.Size([numel]), (1,), numel, 0, 0)
    settings = StepSettings({0: configured_settings(config.optimizer)}, 1.0, 1)
    with HostArena(held_bytes) as arena, ExitStack() as stack:
        pool = ComputePool(torch.get_num_threads())
        stack.callback(pool.close)
        store = BlockStore(
            host=arena, device=device, nvme=None, deadline_seconds=config.io.deadline_seconds
        )
        for state_class, layout in layouts.items():
            store.add(bucket, state_class, layout, "host")
        classes = store.classes(0)
        chunks = [
            ChunkWork(
                bucket,
                chunk.index,
                segments(bucket, chunk),
                {name: store.load(store.block(0, name), chunk.index) for name in classes},
            )
            for chunk in bucket.chunks
        ]
        for work in chunks:
            for staged in work.staged.values():
                staged.tensor.view(torch.int16).fill_(_SMALL_NUMBERS)
        kernel = KernelUpdate([state], store, rule, pool)

        def update() -> None:
            for work in chunks:
                kernel.update(work, settings)

        nbytes = sum(staged.tensor.numel() for work in chunks for staged in work.staged.values())
        where = f"update by {rule.name} in {dtype}, {pool.threads} threads"
        return _timed("cpu", where, nbytes, passes, update)


def _rule(config: OffloadConfig) -> UpdateRule:
    rule = make_rule(config.optimizer.name, [configured_settings(config.optimizer)])
    return eight_bit_rule(rule) if config.optimizer.moments == "8bit" else rule


def _copies(
    device: DeviceTier, arena: HostArena, size_bytes: int, passes: int
) -> Iterator[Bandwidth]:
    host, there = arena.lease(size_bytes, _OWNER), device.lease(size_bytes, _OWNER)
    where = f"host arena and {device.device}"

    def arrive() -> None:
        device.start_copy_in(there.tensor, host.tensor).wait()

    def leave() -> None:
        device.start_copy_out(host.tensor, there.tensor).wait()

    yield _timed("h2d", where, size_bytes, passes, arrive)
    yield _timed("d2h", where, size_bytes, passes, leave)
    there.release()
    host.release()


@dataclass(frozen=True, slots=True)
class ScratchFile:
    """One path's preallocated, unnamed file and its part of the arena."""

    file: IoFile
    address: int
    nbytes: int


def _disks(
    config: OffloadConfig, io: IoEngine, arena: HostArena, size_bytes: int, passes: int
) -> Iterator[Bandwidth]:
    folders = config.tiers.nvme.paths
    seed = 0 if config.io.checksum else None
    share_bytes = size_bytes // len(folders) // (2 * _BLOCK_MULTIPLE) * (2 * _BLOCK_MULTIPLE)
    with ExitStack() as stack:
        disks = [
            stack.enter_context(scratch_file(io, arena, path, share_bytes)) for path in folders
        ]
        where = f"{', '.join(map(str, folders))} ({io.backend})"
        moved_bytes = share_bytes * len(folders)
        half = share_bytes // 2

        def read(disk: ScratchFile, nbytes: int) -> Ticket:
            return io.start_read(disk.file, 0, disk.address, nbytes, checksum_seed=seed)

        def write(disk: ScratchFile, start: int) -> Ticket:
            nbytes = disk.nbytes - start
            address = disk.address + start
            return io.start_write(disk.file, start, address, nbytes, checksum_seed=seed)

        def write_all() -> None:
            _finish([write(disk, 0) for disk in disks])

        def read_all() -> None:
            _finish([read(disk, share_bytes) for disk in disks])

        def mix() -> None:
            _finish([read(disk, half) for disk in disks] + [write(disk, half) for disk in disks])

        # Written first: unwritten extents read as zeros without touching the disk.
        yield _timed("nvme_write", where, moved_bytes, passes, write_all)
        yield _timed("nvme_read", where, moved_bytes, passes, read_all)
        yield _timed("nvme_mixed", where, moved_bytes, passes, mix)


@contextmanager
def scratch_file(
    io: IoEngine, arena: HostArena, folder: Path, nbytes: int
) -> Iterator[ScratchFile]:
    """Open an unnamed file of `nbytes` allocated bytes in `folder`, with memory to match."""
    lease = arena.lease(nbytes, _OWNER)
    noise = torch.frombuffer(bytearray(secrets.token_bytes(_BLOCK_MULTIPLE)), dtype=torch.uint8)
    lease.tensor.view(-1, _BLOCK_MULTIPLE)[:] = noise
    file = _unnamed_file(io, folder)
    try:
        try:
            os.posix_fallocate(file.fd, 0, nbytes)
        except OSError as error:
            free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            raise DiskFullError(
                path=folder, needed_bytes=nbytes, free_bytes=free_bytes, errno=error.errno
            ) from error
        yield ScratchFile(file, lease.address, nbytes)
    finally:
        file.close()


def _unnamed_file(io: IoEngine, folder: Path) -> IoFile:
    try:
        return io.open(str(folder), flags=os.O_RDWR | os.O_TMPFILE)
    except StorageError as unsupported:
        if not folder.is_dir():
            raise
        path = folder / f".offload-bench-{secrets.token_hex(8)}"
        try:
            file = io.open(str(path), flags=os.O_RDWR | os.O_CREAT | os.O_EXCL)
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
    operation()
    speeds = []
    for _ in range(passes):
        start = time.perf_counter()
        operation()
        speeds.append(nbytes / (time.perf_counter() - start))
    speeds.sort()
    return Bandwidth(lane, where, nbytes, speeds[-1], speeds[len(speeds) // 2])
