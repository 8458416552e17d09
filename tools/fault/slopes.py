"""Trains 2,000 steps with a checkpoint every 10: memory, files, threads and leases must not grow.

After each checkpoint the resident memory, descriptors, threads and leases of this process are read.
Of the second half a line is fitted by least squares, which may rise by so much:

    RSS                                                   512 bytes a step, or 256 KiB in all
    descriptors, threads, leases of host, device, NVMe    not at all

The engine is the same all the time; every checkpoint replaces the one before it but one.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fault import _slope_teeth, _tiny
from fault.result import Row

STEPS, TEETH_STEPS = 2000, 400
_SAVE_EVERY = 10
_KEPT = 2  # checkpoints
_RSS = "RSS"
_RSS_BYTES_A_STEP, _RSS_BYTES_IN_ALL = 512, 256 << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to work, and the placements."""
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")
    parser.add_argument("--homes", nargs="+", default=["nvme", "host"], help="where the state is")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """See `fault.result`; `--trials` is the number of steps."""
    torch.set_num_threads(1)
    num_steps = options.trials or (TEETH_STEPS if options.teeth else STEPS)
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        folder = Path(name)
        if options.teeth:
            for tooth in _slope_teeth.TEETH:
                with tooth.broken():
                    rows = list(_rows(folder, tooth.home, num_steps))
                (row,) = (row for row in rows if row.name.endswith(tooth.sees))
                row.broken = tooth.name
                yield row
            return
        for home in options.homes:
            yield from _rows(folder, home, num_steps)


def _rows(folder: Path, home: str, num_steps: int) -> Iterator[Row]:
    """A row for everything that must not grow."""
    began = time.perf_counter()
    samples = _train(folder, home, num_steps)
    seconds = time.perf_counter() - began
    for name, values in samples.items():
        half = values[len(values) // 2 :]
        rise = _slope(half) / _SAVE_EVERY
        row = Row(f"state on {home}: {name}", trials=num_steps, seconds=seconds)
        row.remark = f"{rise:+.3g} a step over {len(half)} checkpoints, {half[0]} to {half[-1]}"
        allowed = max(_RSS_BYTES_A_STEP, _RSS_BYTES_IN_ALL / (len(half) * _SAVE_EVERY))
        if rise > (allowed if name == _RSS else 0):
            row.problems.append(row.remark)
        yield row


def _train(folder: Path, home: str, num_steps: int) -> dict[str, list[int]]:
    """What the process held after each checkpoint."""
    root, nvme = folder / "checkpoints", folder / "nvme"
    nvme.mkdir(exist_ok=True)
    samples: dict[str, list[int]] = {}
    with _tiny.engine(_tiny.settings(nvme, home=home)) as engine:
        for number in range(1, num_steps + 1):
            _tiny.step(engine)
            if number % _SAVE_EVERY == 0:
                _tiny.save(engine, root)
                _forget_old(root)
                for name, value in _held(engine).items():
                    samples.setdefault(name, []).append(value)
    shutil.rmtree(root)
    return samples


def _forget_old(root: Path) -> None:
    for folder in sorted(root.glob("step-*"))[:-_KEPT]:
        shutil.rmtree(folder)


def _held(engine: Any) -> dict[str, int]:
    gc.collect()
    _tiny.settle(engine)
    held = {f"{tier}, bytes leased": count for tier, count in _tiny.held(engine).items()}
    return {
        _RSS: _resident_bytes(),
        "descriptors": len(_tiny.open_files()),
        "threads": _tiny.num_threads(),
        **held,
    }


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise KeyError("VmRSS")


def _slope(values: list[int]) -> float:
    """Of the line that fits best, by the place."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((place - middle) ** 2 for place in range(count))
    if not spread:
        return 0.0
    return sum((place - middle) * (value - mean) for place, value in enumerate(values)) / spread
