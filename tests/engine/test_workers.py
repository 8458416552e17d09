"""Forward-only training by two processes that exchange one number a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.engine.test_forward_only import plain_mezo
from tests.oracle import small_loss, small_model

STEPS = 10

WORKER = """
import sys
import torch
import torch.distributed as dist
from tests.engine.test_forward_only import mezo
from tests.oracle import make_engine, small_loss, small_model

rank, folder, steps = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
exchanged = 0

def mean(projected):
    global exchanged
    number = torch.tensor([projected], dtype=torch.float64)
    dist.all_reduce(number)
    exchanged += number.numel()
    return number.item() / 2

config = mezo("nvme", f"{folder}/{rank}") if rank else mezo("host", bucket_elements=1 << 16)
with make_engine(small_model(), config) as engine:
    for step in range(steps):
        taken = engine.step(lambda: small_loss(engine, 2 * step + rank), reduce=mean)
        assert taken
    assert exchanged == steps
    torch.save((engine.state_dict(), engine.step_loss), f"{folder}/state{rank}")
dist.destroy_process_group()
"""


def test_workers_with_different_data_and_placements_stay_equal(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    workers = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        command = [sys.executable, "-c", WORKER, str(rank), str(tmp_path), str(STEPS)]
        workers.append(
            subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
                cwd=root,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:  # one that waits for the other would wait for ever
        for worker in workers:
            worker.kill()
            worker.wait(timeout=30)
    assert [worker.returncode for worker in workers] == [0, 0], errors

    plain = [plain_mezo(small_model()) for _ in range(2)]
    for step in range(STEPS):
        projected = [
            one.project(lambda one=one, batch=2 * step + rank: small_loss(one.module, batch))
            for rank, one in enumerate(plain)
        ]
        for one in plain:
            one.update((projected[0] + projected[1]) / 2)
    states = []
    for rank in range(2):
        state, loss = torch.load(tmp_path / f"state{rank}", weights_only=True)
        states.append(state)
        assert loss == plain[rank].losses[-1]
    assert plain[0].losses != plain[1].losses
    for name, weight in plain[0].state().items():
        assert torch.equal(states[0][name], weight), name
        assert torch.equal(states[1][name], weight), name
