"""Measures this machine once: the lanes, compute, and each disk by block size and queue depth.

[Note: disks by block and depth]
A disk that is fast with many large blocks in flight may be slow with few or small ones. Each path
is measured alone, with as many requests of one block in flight as the depth says. Mixed: every
other block is read, the others are written.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from offload.cli.lanes import Bandwidth, ScratchFile, measure, scratch_file
from offload.config import OffloadConfig
from offload.engine.build import open_io
from offload.engine.planning import device_is_host_memory
from offload.engine.profile import DISK_OPERATIONS, DiskSpeed, MachineProfile
from offload.native import IoEngine, Ticket
from offload.partition.arrays import TORCH_DTYPES
from offload.schedule.cost import SHOWN
from offload.tiers.extents import round_up_to_page
from offload.tiers.host import HostArena

BLOCK_BYTES = (64 << 10, 1 << 20, 8 << 20)
DEPTHS = (1, 4, 16)
_MOST_CELL_BYTES = 64 << 20
_MATMUL_SIDE = 512  # large enough for the rate of large products, and milliseconds on one core
_MATMUL_SIDE_ON_ACCELERATOR = 4096
_FLOPS_A_PRODUCT = 2


def profile_of(
    lanes: Sequence[Bandwidth], flops: float, disks: Sequence[DiskSpeed]
) -> MachineProfile:
    """The profile that the measurements make; lanes count with their median."""
    speeds = {lane.lane: lane.median_bytes_per_second for lane in lanes if lane.lane in SHOWN}
    return MachineProfile({**speeds, "flops": flops}, tuple(disks), time.time())


def sample(config: OffloadConfig, *, size_bytes: int, passes: int) -> MachineProfile:
    """Measure the lanes and compute, in a second or so.

    Raises:
        OffloadError: as `lanes.measure`.
    """
    lanes = list(measure(config, size_bytes=size_bytes, passes=passes))
    return profile_of(lanes, measure_flops(config, passes), ())


def measure_flops(config: OffloadConfig, passes: int) -> float:
    """FLOP/s of a square matrix product in the compute dtype: the median of `passes`."""
    on_cpu = device_is_host_memory(config)
    kind = config.tiers.device.kind
    device = torch.device("cpu" if on_cpu else "cuda" if kind == "auto" else kind)
    side = _MATMUL_SIDE if on_cpu else _MATMUL_SIDE_ON_ACCELERATOR
    dtype = TORCH_DTYPES[config.precision.compute]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + passes):
        started = time.perf_counter()
        left = torch.mm(left, right).clamp_(-1, 1)
        if not on_cpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return _FLOPS_A_PRODUCT * side**3 / statistics.median(seconds[1:])


def measure_disks(config: OffloadConfig, *, size_bytes: int, passes: int) -> Iterator[DiskSpeed]:
    """Yield each path's speed by operation, block size and depth; see the note above.

    Args:
        config: paths and I/O.
        size_bytes: the most that one pass moves.
        passes: timed; the median counts.

    Raises:
        StorageError: a path cannot be used, or an operation failed.
    """
    nbytes = round_up_to_page(min(size_bytes, _MOST_CELL_BYTES))
    cells = [
        (operation, block_bytes, depth)
        for operation in DISK_OPERATIONS
        for block_bytes in BLOCK_BYTES
        for depth in DEPTHS
        if block_bytes * depth <= nbytes
    ]
    for folder in config.tiers.nvme.paths:
        with ExitStack() as stack:
            arena = HostArena(nbytes)
            stack.callback(arena.close)
            io = stack.enter_context(open_io(config))
            arena.register_with(io)
            file = stack.enter_context(scratch_file(io, arena, folder, nbytes))
            _move(io, file, "write", nbytes, 1)  # unwritten extents read as zeros
            for operation, block_bytes, depth in cells:
                speed = _speed(io, file, (operation, block_bytes, depth), passes)
                yield DiskSpeed(str(folder), operation, block_bytes, depth, speed)


def _speed(io: IoEngine, file: ScratchFile, cell: tuple[str, int, int], passes: int) -> float:
    operation, block_bytes, depth = cell
    speeds = []
    for _ in range(passes):
        started = time.perf_counter()
        moved_bytes = _move(io, file, operation, block_bytes, depth)
        speeds.append(moved_bytes / (time.perf_counter() - started))
    return statistics.median(speeds)


def _move(io: IoEngine, file: ScratchFile, operation: str, block_bytes: int, depth: int) -> int:
    """Move the file block by block, `depth` at a time; returns the bytes."""
    flying: deque[Ticket] = deque()
    blocks = file.nbytes // block_bytes
    for index in range(blocks):
        if len(flying) == depth:
            flying.popleft().wait()
        reads = operation == "read" or (operation == "mixed" and index % 2 == 0)
        start = io.start_read if reads else io.start_write
        offset = index * block_bytes
        flying.append(start(file.file, offset, file.address + offset, block_bytes))
    for ticket in flying:
        ticket.wait()
    return blocks * block_bytes
