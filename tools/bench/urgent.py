"""Latency of an urgent read while bulk traffic saturates the disk.

    python3 tools/bench/urgent.py --folder /mnt/nvme

Bulk requests are queued at once (reads, writes, or both in turns), and a little later one read is
started that somebody waits for. Its time is compared with that on an idle disk:

    order        as the engine does it: the read passes the bulk that is queued, and no more than
                 `--held-depth` blocks of that are given to the disk at once
    order, full  the read passes what is queued, but the disk is given `--queue-depth` blocks
    fifo         the read has its turn after the bulk that was queued before

Rounds are interleaved, in a rotating order. The bulk's throughput stands beside the latencies: what
the order costs it. Every read's latency is bounded by its own time and that of the bulk which the
disk has when it comes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from offload.native import IoEngine, IoFile
from offload.native.core import BULK_URGENCY
from offload.native.engine import HELD_DEPTH

MIB = 1 << 20
GB = 1e9
BULKS = ("read", "write", "mixed")
ORDERS = ("order", "order, full", "fifo")


@dataclass(frozen=True)
class Setting:
    """One engine, and how urgent its urgent read is."""

    engine: IoEngine
    urgency: int


@dataclass(frozen=True)
class Files:
    """What is moved: bulk from and to `bulk`, the urgent bytes from `urgent`; touched memory."""

    bulk: Path
    urgent: Path
    bulk_nbytes: int
    urgent_nbytes: int
    request_nbytes: int
    address: int  # of the bulk's memory, then the urgent read's


@dataclass(frozen=True)
class Sample:
    """Seconds of the urgent read, and bytes a second of everything that moved."""

    latency_seconds: float
    bytes_per_second: float


def make_settings(args: argparse.Namespace) -> dict[str, Setting]:
    """The engines by the name of their order."""
    depth = args.queue_depth

    def engine(held_depth: int) -> IoEngine:
        return IoEngine(backend=args.backend, queue_depth=depth, held_depth=held_depth)

    return {
        "order": Setting(engine(args.held_depth), 0),
        "order, full": Setting(engine(depth), 0),
        "fifo": Setting(engine(depth), BULK_URGENCY),
    }


def make_files(args: argparse.Namespace, folder: Path, memory: mmap.mmap) -> Files:
    """Files that were written before, and memory that was touched before."""
    pattern = os.urandom(MIB)
    for at in range(0, len(memory), MIB):
        memory[at : at + MIB] = pattern
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    files = Files(
        folder / "bulk",
        folder / "urgent",
        args.bulk_mib * MIB,
        args.urgent_mib * MIB,
        args.request_mib * MIB,
        address,
    )
    with IoEngine() as engine:
        sizes = ((files.bulk, files.bulk_nbytes), (files.urgent, files.urgent_nbytes))
        for path, nbytes in sizes:
            with engine.open(str(path), flags=os.O_RDWR | os.O_CREAT) as file:
                os.posix_fallocate(file.fd, 0, nbytes)
                engine.start_write(file, 0, address, nbytes).wait()
                engine.fsync(file)
    return files


def run(setting: Setting, files: Files, bulk: str, pause_seconds: float) -> Sample:
    """Queue the bulk ("" = none), start the urgent read after the pause, wait for all."""
    engine = setting.engine
    bulk_file: IoFile
    urgent_file: IoFile
    with (
        engine.open(str(files.bulk), flags=os.O_RDWR) as bulk_file,
        engine.open(str(files.urgent), flags=os.O_RDONLY) as urgent_file,
    ):
        began = time.perf_counter()
        tickets = []
        starts = range(0, files.bulk_nbytes, files.request_nbytes) if bulk else ()
        for index, at in enumerate(starts):
            reading = bulk == "read" or (bulk == "mixed" and index % 2 == 0)
            start = engine.start_read if reading else engine.start_write
            tickets.append(
                start(bulk_file, at, files.address + at, files.request_nbytes, checksum_seed=0)
            )
        time.sleep(pause_seconds)
        asked = time.perf_counter()
        engine.start_read(
            urgent_file,
            0,
            files.address + files.bulk_nbytes,
            files.urgent_nbytes,
            checksum_seed=0,
            urgency=setting.urgency,
        ).wait()
        latency = time.perf_counter() - asked
        for ticket in tickets:
            ticket.wait()
        seconds = time.perf_counter() - began - (0 if bulk else pause_seconds)
    moved = files.urgent_nbytes + (files.bulk_nbytes if bulk else 0)
    return Sample(latency, moved / seconds)


def measure(
    settings: dict[str, Setting], files: Files, rounds: int
) -> dict[tuple[str, str], list[Sample]]:
    """Samples by (order, bulk); the idle disk is ("idle", ""). A warm-up round is not counted."""
    cases = [("idle", ""), *((order, bulk) for bulk in BULKS for order in ORDERS)]
    samples: dict[tuple[str, str], list[Sample]] = {case: [] for case in cases}
    pauses = random.Random(0)
    for number in range(rounds + 1):
        shift = number % len(cases)
        for order, bulk in cases[shift:] + cases[:shift]:
            setting = settings["order" if order == "idle" else order]
            sample = run(setting, files, bulk, pauses.uniform(0.02, 0.06))
            if number > 0:
                samples[order, bulk].append(sample)
    return samples


def report(samples: dict[tuple[str, str], list[Sample]]) -> list[dict[str, object]]:
    """Print the table; return its rows."""
    idle = statistics.median(s.latency_seconds for s in samples["idle", ""])
    rows: list[dict[str, object]] = []
    print(f"{'bulk':8}{'order':14}{'median ms':>10}{'worst ms':>10}{'x idle':>8}{'GB/s':>8}")
    for (order, bulk), runs in samples.items():
        latencies = [s.latency_seconds for s in runs]
        median = statistics.median(latencies)
        row = {
            "bulk": bulk or "none",
            "order": order,
            "median_seconds": median,
            "worst_seconds": max(latencies),
            "times_idle": median / idle,
            "gb_per_second": statistics.median(s.bytes_per_second for s in runs) / GB,
        }
        rows.append(row)
        print(
            f"{row['bulk']:8}{order:14}{median * 1e3:10.1f}{max(latencies) * 1e3:10.1f}"
            f"{median / idle:8.2f}{row['gb_per_second']:8.2f}"
        )
    return rows


def main() -> None:
    """Parse the command line, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bulk-mib", type=int, default=512, help="queued before the urgent read")
    parser.add_argument("--urgent-mib", type=int, default=16)
    parser.add_argument("--request-mib", type=int, default=16, help="of a bulk request")
    parser.add_argument("--queue-depth", type=int, default=16)
    parser.add_argument("--held-depth", type=int, default=HELD_DEPTH)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    memory = mmap.mmap(-1, (args.bulk_mib + args.urgent_mib) * MIB)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="offload-bench-") as name:
        files = make_files(args, Path(name), memory)
        settings = make_settings(args)
        rows = report(measure(settings, files, args.rounds))
        for setting in settings.values():
            setting.engine.close()
    if args.output is not None:
        chosen = {k: v for k, v in vars(args).items() if k not in ("folder", "output")}
        args.output.write_text(json.dumps({"settings": chosen, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
