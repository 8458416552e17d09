"""The warm process in which rows run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RunInChild = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def run_in_child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunInChild]:
    """`run_in_child(row, break_name=None)` runs one row in a process of its own."""
    environment = {
        **os.environ,
        "ROWS_FOLDER": str(tmp_path_factory.mktemp("rows")),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(row: str, break_name: str | None = None, *, seconds: float = 120.0) -> dict[str, str]:
        asked = {"row": row, "break": break_name, "seconds": seconds}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the warm process has died"
        return json.loads(answer)

    yield run
    server.stdin.close()
    server.wait(timeout=30)
    server.stdout.close()
