"""Killed anywhere, there is the old checkpoint or the new, never a mix."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.state.checkpoint import load_checkpoint
from tests.state.saving import save_checkpoint

KILLS = 20


def fill(engine, value: int) -> None:
    for name in engine.parameter_names():
        for field, (dtype, shape) in engine.state_fields(name).items():
            engine.write_state(name, field, torch.full(shape, value, dtype=dtype))
    engine.global_steps = value


def save_until_killed(engine, folder: Path, first: int, tag: str | None) -> None:
    torch.set_num_threads(1)
    number = first
    while True:
        fill(engine, number)
        save_checkpoint(engine, folder, tag, client_state={"number": number})
        # What was acknowledged must never be lost: tell the parent, who outlives this process.
        (folder.parent / "acknowledged").write_text(str(number))
        number += 1


@pytest.mark.parametrize("tag", ["best", None], ids=["one tag", "a tag a step"])
def test_kill_at_random_times(tmp_path, in_memory_engine, tag):
    engine = in_memory_engine(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)))
    folder = tmp_path / "ckpt"
    generator = random.Random(0)
    newest = 0
    save_checkpoint(engine, tmp_path / "first")
    started = time.perf_counter()
    save_checkpoint(engine, tmp_path / "first")
    save_seconds = time.perf_counter() - started
    told = tmp_path / "acknowledged"
    told.write_text("0")
    for kill in range(KILLS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of the test process
            child = os.fork()
        if child == 0:
            try:
                save_until_killed(engine, folder, newest + 1, tag)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while kill % 2 and int(told.read_text() or 0) <= newest and time.monotonic() < deadline:
            time.sleep(0.001)  # every second kill comes after a save of its process
        time.sleep(generator.uniform(0, 2 * save_seconds))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        acknowledged = int(told.read_text() or 0)
        published = [
            path for path in folder.glob("*/manifest.json") if path.parent.name[:5] != ".tmp-"
        ]
        if acknowledged == 0 and not published:
            continue  # killed before the first save of all stood
        number = load_checkpoint(engine, folder)["number"]
        assert number >= acknowledged
        assert number >= newest
        newest = number
        for name in engine.parameter_names():
            for field in engine.state_fields(name):
                assert (engine.read_state(name, field) == number).all(), "of one save alone"
    assert newest >= KILLS / 2 - 1, "the kills were so early that nothing was tested"
    save_checkpoint(engine, folder, "last")
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [], "what the killed saves left is swept"
