"""SIGKILL before the n-th call of one system call, by strace.

The signal comes at the entry of the call, which is then not made: killed before call n is killed
after call n - 1. Each thread counts its own calls.
Source: strace(1), "Tampering".
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_ATTACH_SECONDS = 20.0


def available() -> bool:
    """Whether strace is installed."""
    return shutil.which("strace") is not None


@contextlib.contextmanager
def killed_before(call: str, number: int, pid: int) -> Iterator[None]:
    """While entered, `pid` and the threads it starts are killed before their `number`-th `call`.

    Raises:
        SystemExit: strace cannot attach; it says why.
    """
    rule = f"inject={call}:signal=KILL:when={number}"
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", f"trace={call}", "-e", rule]
    tracer = subprocess.Popen(
        [*command, "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + _ATTACH_SECONDS
        while not _all_traced(pid):
            if tracer.poll() is not None or time.monotonic() > deadline:
                tracer.kill()
                _, said = tracer.communicate()
                raise SystemExit(f"error: strace cannot attach to its own child: {said.strip()}")
            time.sleep(0.002)
        yield
    finally:
        tracer.kill()  # asked kindly, it may wait for a dead thread for ever
        tracer.communicate()


def _all_traced(pid: int) -> bool:
    with contextlib.suppress(OSError):
        states = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return bool(states) and not any("TracerPid:\t0\n" in state for state in states)
    return False
