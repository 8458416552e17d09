"""Trains with a host cache under a memory limit that is lowered while it runs; a program.

    squeezed.py GROUP SHRINKS PATH

GROUP is the folder of a control group (cgroup v1) that the process is in already, or "-": no limit
is lowered. Prints a digest of all state, and what the last report says, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import offload

WIDTH, LAYERS, BATCH, STEPS = 512, 32, 512, 5
SQUEEZED_AT = 2
LEFT_BYTES = 24 << 20  # a step takes more than twice that beside the tiers


def model() -> nn.Module:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(LAYERS):
        made += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*made)


def squeeze(group: Path) -> None:
    """Leave so much, and file pages, under the limit."""
    cached = sum(
        int(line.split()[1])
        for line in (group / "memory.stat").read_text().splitlines()
        if line.split()[0] in ("total_inactive_file", "total_active_file")
    )
    used = int((group / "memory.usage_in_bytes").read_text())
    (group / "memory.limit_in_bytes").write_text(str(used - cached + LEFT_BYTES))


def main() -> None:
    group, shrinks, path = sys.argv[1:]
    torch.set_num_threads(1)
    config = {
        "tiers": {
            "device": {"kind": "cpu", "memory": "8MiB"},
            "host": {"memory": "192MiB", "shrink": shrinks == "yes"},
            "nvme": {"paths": [path]},
        },
        "precision": {"compute": "fp32"},
        "partition": {"bucket_elements": WIDTH * (WIDTH + 1)},
    }
    with (
        warnings.catch_warnings(record=True) as told,
        offload.initialize(model(), config) as engine,
    ):
        warnings.simplefilter("always")
        held = engine.plan.bytes["host"]
        for step in range(STEPS):
            if step == SQUEEZED_AT and group != "-":
                squeeze(Path(group))
            drawn = torch.Generator().manual_seed(step)
            loss = engine(torch.randn(BATCH, WIDTH, generator=drawn)).square().mean()
            engine.backward(loss)
            engine.step()
        digest = hashlib.sha256()
        for name, tensors in engine.named_state():
            for key, tensor in sorted(tensors.items()):
                digest.update(f"{name} {key}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        outcome = {
            "digest": digest.hexdigest(),
            "held_bytes": sum(held.values()),
            "budget_bytes": engine.report().tiers["host"].budget_bytes,
            "warnings": [str(each.message) for each in told],
        }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
