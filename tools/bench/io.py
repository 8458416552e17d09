"""Throughput and CPU time of each I/O backend against plain thread pools, on one disk.

    python3 tools/bench/io.py --folder /mnt/nvme --output io.json

Every contender moves the same bytes between the same files (O_DIRECT, preallocated, written before)
and the same kind of memory (anonymous, MAP_SHARED, touched before). The engine's backends compute
and return checksums; the plain pools do not, but for the one named so. Rounds are interleaved: each
contender runs once per round and mode, in a rotating order; medians are reported. CPU seconds are
those of the process (user and system); work of the kernel's own threads is in nobody's account.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from offload.native import IoEngine, IoFile, crc32c
from offload.native.engine import Backend

MODES = ("read", "write", "mixed")
MIB = 1 << 20
GB = 1e9
CREATE = os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Workload:
    """What is moved: `nbytes` in requests of `request_bytes`; mixed = every second one a read."""

    source: Path
    target: Path
    nbytes: int
    request_bytes: int
    memory: mmap.mmap
    address: int


@dataclass(frozen=True)
class Sample:
    """One run: wall-clock and CPU seconds."""

    seconds: float
    cpu_seconds: float


Contender = Callable[[Workload, str], Sample]


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def is_read(mode: str, index: int) -> bool:
    """Whether the request `index` of a mode reads."""
    return mode == "read" or (mode == "mixed" and index % 2 == 0)


def make_engine_contender(engine: IoEngine, *, registered: bool, checksum: bool) -> Contender:
    """The engine: all requests are started at once and waited for in order."""
    seed = 0 if checksum else None

    def run(work: Workload, mode: str) -> Sample:
        if registered:
            engine.register(work.address, work.nbytes)
        source: IoFile
        target: IoFile
        with (
            engine.open(str(work.source), flags=os.O_RDONLY) as source,
            engine.open(str(work.target), flags=os.O_RDWR) as target,
        ):
            cpu, began = cpu_seconds(), time.perf_counter()
            tickets = []
            for index, at in enumerate(range(0, work.nbytes, work.request_bytes)):
                reading = is_read(mode, index)
                start = engine.start_read if reading else engine.start_write
                file = source if reading else target
                tickets.append(
                    start(file, at, work.address + at, work.request_bytes, checksum_seed=seed)
                )
            for ticket in tickets:
                ticket.wait()
            sample = Sample(time.perf_counter() - began, cpu_seconds() - cpu)
        engine.unregister(work.address)
        return sample

    return run


def make_python_contender(block_bytes: int, num_threads: int, *, checksum: bool) -> Contender:
    """A plain pool of Python threads: os.preadv and os.pwritev, one block at a time."""

    def run(work: Workload, mode: str) -> Sample:
        source = os.open(work.source, os.O_RDONLY | os.O_DIRECT)
        target = os.open(work.target, os.O_RDWR | os.O_DIRECT)
        blocks = iter(list(enumerate(range(0, work.nbytes, block_bytes))))
        view = memoryview(work.memory)

        def move() -> None:
            for index, at in blocks:  # a list's iterator is safe under the GIL
                part = view[at : at + block_bytes]
                reading = is_read(mode, index)
                if checksum and not reading:
                    crc32c(work.address + at, block_bytes)
                call, fd = (os.preadv, source) if reading else (os.pwritev, target)
                if call(fd, [part], at) != block_bytes:
                    raise RuntimeError("short transfer")
                if checksum and reading:
                    crc32c(work.address + at, block_bytes)

        threads = [threading.Thread(target=move) for _ in range(num_threads)]
        cpu, began = cpu_seconds(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sample = Sample(time.perf_counter() - began, cpu_seconds() - cpu)
        view.release()
        os.close(source)
        os.close(target)
        return sample

    return run


def make_c_contender(pool: ctypes.CDLL, block_bytes: int, num_threads: int) -> Contender:
    """A plain pool of C threads (plain_pool.c), on the same memory as all."""

    def run(work: Workload, mode: str) -> Sample:
        source = os.open(work.source, os.O_RDONLY | os.O_DIRECT)
        target = os.open(work.target, os.O_RDWR | os.O_DIRECT)
        cpu, began = cpu_seconds(), time.perf_counter()
        num_failed = pool.plain_pool(
            mode[0].encode(), source, target, work.address, work.nbytes, block_bytes, num_threads
        )
        sample = Sample(time.perf_counter() - began, cpu_seconds() - cpu)
        os.close(source)
        os.close(target)
        if num_failed:
            raise RuntimeError(f"{num_failed} blocks failed")
        return sample

    return run


def build_plain_pool(folder: Path) -> ctypes.CDLL | None:
    """Compile and load plain_pool.c; None without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        print("no C compiler: no plain C pool", file=sys.stderr)
        return None
    built = folder / "plain_pool.so"
    source = Path(__file__).with_name("plain_pool.c")
    command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    pool = ctypes.CDLL(str(built))
    numbers = (ctypes.c_char, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    pool.plain_pool.argtypes = (*numbers, ctypes.c_long, ctypes.c_long, ctypes.c_int)
    return pool


def make_contenders(args: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """All contenders by name. Those that start with "plain" are what the engine is measured by."""
    contenders: dict[str, Contender] = {}
    probed = IoEngine.probe()
    for backend in get_args(Backend):
        if probed.get(backend) != "ok":
            continue
        engine = IoEngine(
            backend=backend,
            queue_depth=args.queue_depth,
            held_depth=args.held_depth,
            block_bytes=args.block_mib * MIB,
            threads=args.threads,
        )
        contenders[backend] = make_engine_contender(engine, registered=False, checksum=True)
        contenders[f"{backend}, no checksum"] = make_engine_contender(
            engine, registered=False, checksum=False
        )
        if backend == "io_uring":
            for name, checksum in (("", True), (", no checksum", False)):
                contenders[f"io_uring, fixed buffers{name}"] = make_engine_contender(
                    engine, registered=True, checksum=checksum
                )
    for mib in (4, 8, 16):
        contenders[f"plain Python pool, {mib} MiB"] = make_python_contender(
            mib * MIB, args.threads, checksum=False
        )
    contenders["plain Python pool, 4 MiB, checksum"] = make_python_contender(
        4 * MIB, args.threads, checksum=True
    )
    pool = build_plain_pool(folder)
    if pool is not None:
        for mib in (4, 8):
            contenders[f"plain C pool, {mib} MiB"] = make_c_contender(pool, mib * MIB, args.threads)
    return contenders


def make_workload(args: argparse.Namespace, folder: Path) -> Workload:
    """Files that were written before and memory that was touched before."""
    nbytes = args.mib * MIB
    memory = mmap.mmap(-1, nbytes)
    pattern = os.urandom(MIB)
    for at in range(0, nbytes, MIB):
        memory[at : at + MIB] = pattern
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    work = Workload(
        folder / "source", folder / "target", nbytes, args.request_mib * MIB, memory, address
    )
    with IoEngine(backend="threads") as engine:
        for path in (work.source, work.target):
            with engine.open(str(path), flags=CREATE) as file:
                os.posix_fallocate(file.fd, 0, nbytes)
                engine.start_write(file, 0, address, nbytes).wait()
                engine.fsync(file)
    return work


def measure(
    contenders: dict[str, Contender], work: Workload, rounds: int
) -> dict[str, dict[str, list[Sample]]]:
    """Samples by contender and mode; one warm-up round is not counted."""
    samples: dict[str, dict[str, list[Sample]]] = {
        name: {mode: [] for mode in MODES} for name in contenders
    }
    names = list(contenders)
    for number in range(rounds + 1):
        order = names[number % len(names) :] + names[: number % len(names)]
        for mode in MODES:
            for name in order:
                sample = contenders[name](work, mode)
                if number > 0:
                    samples[name][mode].append(sample)
    return samples


def summarize(samples: dict[str, dict[str, list[Sample]]], nbytes: int) -> list[dict[str, Any]]:
    """One row per contender: medians of GB/s and of CPU seconds per GB."""
    return [
        {"contender": name}
        | {
            mode: {
                "gb_per_second": statistics.median(nbytes / GB / s.seconds for s in runs),
                "cpu_seconds_per_gb": statistics.median(s.cpu_seconds / nbytes * GB for s in runs),
                "slowest_gb_per_second": min(nbytes / GB / s.seconds for s in runs),
                "fastest_gb_per_second": max(nbytes / GB / s.seconds for s in runs),
            }
            for mode, runs in by_mode.items()
        }
        for name, by_mode in samples.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """GB/s and CPU seconds per GB of each mode."""
    print(f"{'':36}" + "".join(f"{mode:>22}" for mode in MODES))
    print(f"{'':36}" + f"{'GB/s':>12}{'CPU s/GB':>10}" * len(MODES))
    for row in rows:
        cells = "".join(
            f"{row[mode]['gb_per_second']:12.2f}{row[mode]['cpu_seconds_per_gb']:10.3f}"
            for mode in MODES
        )
        print(f"{row['contender']:36}{cells}")


def main() -> None:
    """Parse the command line, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--mib", type=int, default=1024, help="moved in each run")
    parser.add_argument("--request-mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--queue-depth", type=int, default=16)
    parser.add_argument("--held-depth", type=int, default=4)
    parser.add_argument("--block-mib", type=int, default=8)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--only", default="", help="contenders whose name contains this; | = or")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="offload-bench-") as name:
        folder = Path(name)
        contenders = make_contenders(args, folder)
        wanted = args.only.split("|")
        contenders = {k: v for k, v in contenders.items() if any(part in k for part in wanted)}
        work = make_workload(args, folder)
        samples = measure(contenders, work, args.rounds)
    rows = summarize(samples, work.nbytes)
    print_table(rows)
    settings = {k: v for k, v in vars(args).items() if k not in ("folder", "output")}
    if args.output is not None:
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
