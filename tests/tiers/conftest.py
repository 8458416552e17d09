"""Fixtures of the tier tests: an I/O engine, an arena, and small disks on loop devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import offload
from offload.native import IoEngine
from offload.tiers.host import HostArena


@pytest.fixture
def io() -> Iterator[IoEngine]:
    backend = (
        "auto" if any(v == "ok" for k, v in IoEngine.probe().items() if k != "python") else "python"
    )
    with IoEngine(backend=backend, threads=2) as engine:
        yield engine


@pytest.fixture
def arena() -> Iterator[HostArena]:
    with HostArena(8 << 20) as arena:
        yield arena


RunScript = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run_script() -> Iterator[RunScript]:
    """Return a function that starts a Python script with this offload; kills it at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        root = str(Path(offload.__file__).parents[1])
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore::DeprecationWarning",
                "-c",
                script,
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=60)
