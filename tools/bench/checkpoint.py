"""Checkpoints: what a save at every step costs training, and how fast saving and loading are.

    python tools/bench/checkpoint.py --path DIR [--hidden 1536 --layers 8] [--rounds 5]

pause     all state on NVMe, a checkpoint at every step on the same file system, the newest kept.
          Steps with and without take turns; from the end of a step to the end of the next.
save      the same state in memory to a portable checkpoint, until it is synced, beside
          torch.save, safetensors and torch.distributed.checkpoint of the same tensors (synced, too)
          and beside as many bytes written to a new file with O_DIRECT and synced, and nothing else.
load      back into memory that is in use already, of files that are not in the page cache.

Sides take turns in each round; medians. `nvme` is the portable save of state that is on NVMe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _disk import MixedDisk
from _process import MIB, make_parser, print_table
from _training import LlamaShape, settle, tiers, train_step

import offload

SIDES = ("offload", "offload from nvme", "torch.save", "safetensors", "dcp")
RAW = "O_DIRECT alone"
State = dict[str, torch.Tensor]


def make_engine(options: argparse.Namespace, home: str, **sections: Any) -> offload.OffloadEngine:
    """An engine with all state on one tier, and steps behind it."""
    shape = LlamaShape(options.hidden, options.layers, 4 * options.hidden, options.vocabulary)
    room = options.host * MIB
    config = {
        "tiers": tiers(options.path, options.device * MIB, room),
        "placement": {"weights": home, "gradients": home, "optimizer": home},
        **sections,
    }
    return offload.initialize(shape.make(dtype=torch.bfloat16, checkpoint=True), config)


# -- the pause of training -------------------------------------------------------------------------


def measure_pause(options: argparse.Namespace) -> dict[str, Any]:
    """Step times with and without a checkpoint at every step, and what the call itself takes."""
    shape = LlamaShape(options.hidden, options.layers, 4 * options.hidden, options.vocabulary)
    ids = shape.ids(1, options.tokens, 1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    calls: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as folder,
        make_engine(options, "nvme", checkpoint={"keep_last": 1}) as engine,
    ):

        def step(*, saves: bool) -> float:
            started = time.perf_counter()
            train_step(engine, ids)
            if saves:
                called = time.perf_counter()
                engine.save_checkpoint(folder)
                calls.append(time.perf_counter() - called)
            return time.perf_counter() - started

        for saves in (False, True, True):
            step(saves=saves)  # kernels, the trace, room for later versions
        for _ in range(options.rounds):
            for saves in (False, True):
                step(saves=saves)  # what flows in at one end flows out at the other
                seconds[saves].append(
                    statistics.mean(step(saves=saves) for _ in range(options.steps))
                )
            engine.wait_for_checkpoint()
        settle(engine)
        state_bytes = sum(engine.plan.bytes["nvme"].values())
    without, with_saves = (statistics.median(seconds[saves]) for saves in (False, True))
    return {
        "state_bytes": state_bytes,
        "step_seconds": without,
        "step_with_checkpoint_seconds": with_saves,
        "call_seconds": statistics.median(calls),
        "pause_share": with_saves / without - 1,
    }


# -- the speed of saving and loading ---------------------------------------------------------------


def full_state(engine: offload.OffloadEngine) -> State:
    """Every stored tensor, in memory."""
    return {
        f"{field}.{name}": engine.read_state(name, field)
        for name in engine.parameter_names()
        for field in engine.state_fields(name)
    }


def sync(path: Path) -> None:
    """Make a file, or the files of a folder, durable."""
    for each in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(path: Path) -> None:
    """Let the next read come from the disk."""
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            descriptor = os.open(each, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Sides:
    """What saves and loads the same state, by the name of the side."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        settings = {"asynchronous": False, "portable": True}
        self.engines = {
            "offload": make_engine(options, "host", checkpoint=settings),
            "offload from nvme": make_engine(options, "nvme", checkpoint=settings),
        }
        self.state = full_state(self.engines["offload"])
        self.nbytes = sum(t.numel() * t.element_size() for t in self.state.values())

    def save(self, side: str) -> None:
        """Save, until it is synced."""
        path = self.folder / side
        if side in self.engines:
            self.engines[side].save_checkpoint(path, "tag")
            return
        if side == "torch.save":
            torch.save(self.state, path)
        elif side == "safetensors":
            from safetensors.torch import save_file

            save_file(self.state, path)
        else:
            from torch.distributed.checkpoint import state_dict_saver

            state_dict_saver.save(self.state, checkpoint_id=path, no_dist=True)
        sync(path)

    def load(self, side: str) -> None:
        """Load into memory that is there: the engine's, or tensors that have been touched."""
        path = self.folder / side
        if side in self.engines:
            engine = self.engines[side]
            engine.global_steps = engine.micro_steps = engine.skipped_steps = 0  # as a new one
            engine.load_checkpoint(path, "tag")
            return
        if side == "dcp":
            from torch.distributed.checkpoint import state_dict_loader

            state_dict_loader.load(self.state, checkpoint_id=path, no_dist=True)
            return
        if side == "torch.save":
            found = torch.load(path, weights_only=True)
        else:
            from safetensors.torch import load_file

            found = load_file(path)
        for name, tensor in found.items():
            self.state[name].copy_(tensor)

    def remove(self, side: str) -> None:
        """Remove what a side has saved."""
        path = self.folder / side
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines.values():
            engine.close()


def raw_save(disk: MixedDisk, path: Path) -> None:
    """Write as many bytes to a new file with O_DIRECT and many requests in flight, and sync."""
    disk.write_new(path)
    path.unlink()


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_speed(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of saving and of loading, by side."""
    seconds: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}}
    with (
        tempfile.TemporaryDirectory(dir=options.path, prefix="bench-") as folder,
        contextlib.closing(Sides(options, Path(folder))) as sides,
        MixedDisk(options.path, sides.nbytes) as disk,
    ):
        for number in range(options.rounds + 1):
            for side in (*SIDES, RAW):
                if side == RAW:
                    save = timed(partial(raw_save, disk, Path(folder) / RAW))
                    load = disk.seconds(sides.nbytes, 0)
                else:
                    save = timed(partial(sides.save, side))
                    forget(Path(folder) / side)
                    load = timed(partial(sides.load, side))
                    sides.remove(side)
                if number:  # the first round warms up
                    seconds["save"].setdefault(side, []).append(save)
                    seconds["load"].setdefault(side, []).append(load)
        medians = {
            kind: {side: statistics.median(values) for side, values in by_side.items()}
            for kind, by_side in seconds.items()
        }
        return {**medians, "nbytes": {"state": sides.nbytes}}


def main() -> None:
    """Measure what is asked for; print tables and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="in a row, with or without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=int, default=256, help="device budget in MiB")
    parser.add_argument("--host", type=int, default=8192, help="host budget in MiB")
    parser.add_argument("--path", default=tempfile.gettempdir())
    parser.add_argument("--only", choices=("pause", "speed"))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.only != "speed":
        pause = found["pause"] = measure_pause(options)
        print(
            f"state on NVMe {pause['state_bytes'] / 1e9:.2f} GB, a checkpoint at every step: "
            f"{pause['step_seconds']:.3f} s a step without, "
            f"{pause['step_with_checkpoint_seconds']:.3f} s with, pause "
            f"{100 * pause['pause_share']:.1f} %; the call {1e3 * pause['call_seconds']:.1f} ms"
        )
    if options.only != "pause":
        speed = found["speed"] = measure_speed(options)
        nbytes = speed["nbytes"]["state"]
        print(f"\nstate of {nbytes / 1e9:.2f} GB; seconds, GB/s, and offload's speed over each")
        rows = []
        for side in (*SIDES, RAW):
            cells = []
            for kind in ("save", "load"):
                value, ours = speed[kind][side], speed[kind]["offload"]
                cells += [f"{value:.2f}", f"{nbytes / value / 1e9:.2f}", f"{value / ours:.2f}"]
            rows.append([side, *cells])
        print_table(["side", "save s", "GB/s", "ratio", "load s", "GB/s", "ratio"], rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
