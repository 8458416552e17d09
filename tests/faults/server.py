"""Runs rows, each in a forked child of this warm process: importing torch is paid once.

Reads one JSON object a line from stdin, {"row": name, "break": name or null, "seconds": limit}, and
answers with one on stdout: {"outcome": "passed" | "failed" | "died" | "hung", "detail": text}.
This process has one thread and runs no tensor operation, so that its children may do anything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _child(row_name: str, break_name: str | None, folder: Path) -> int:
    from tests.faults.breaks import BREAKS
    from tests.faults.lab import ROWS, run_row

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("error")
    # torch and Python on what the rows use on purpose; nothing that the engine does.
    for message in (
        ".*use_reentrant.*",
        ".*torch.jit.*",
        ".*os.fork.*",
        ".*Using backward.. with create_graph=True.*",
        ".*deprecated.*",
        ".*lazy modules are a new feature.*",
        ".*TypedStorage.*",
        ".*NumPy array is not writable.*",
        ".*None of the inputs have requires_grad.*",
        ".*grad attribute of a Tensor that is not a leaf.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    try:
        if break_name is not None:
            BREAKS[break_name]()
        run_row(ROWS[row_name], folder)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve(row_name: str, break_name: str | None, seconds: float) -> dict[str, str]:
    folder = Path(tempfile.mkdtemp(prefix="row-", dir=os.environ["ROWS_FOLDER"]))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _child(row_name, break_name, folder)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    status = None
    while status is None:
        done, raw = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        else:
            time.sleep(0.005)
    log = folder / "log"
    detail = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    if status is None:
        outcome = "hung"
    elif status < 0:
        outcome = f"died of signal {-status}"
    else:
        outcome = "failed" if status else "passed"
    return {"outcome": outcome, "detail": detail}


def _load_kernels() -> None:
    """Let numba load its compiled kernels; they are inherited."""
    import numpy as np

    from offload.optim.gradients import accumulate_gradient
    from offload.optim.rules import make_rule

    values, sums = np.zeros(4, np.float32), np.zeros(1, np.float64)
    accumulate_gradient(
        values, values, first=True, target_dtype="fp32", source_dtype="fp32", block_sums=sums
    )
    settings = {"lr": 0.5, "weight_decay": 0.0}
    rule = make_rule("sgd", [settings])
    rule.update(
        precision="fp32",
        weight=values,
        master=None,
        gradient=values,
        state={},
        hyper={**rule.hyper_defaults, **settings},
        step=1,
        gradient_scale=1.0,
    )


def main() -> None:
    """Serve until stdin ends."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    import torch._dynamo
    import transformers  # noqa: F401  what rows and engines import, once

    import tests.faults.all_rows  # noqa: F401

    _load_kernels()
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _serve(asked["row"], asked["break"], asked["seconds"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
