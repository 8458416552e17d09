"""Trains with a host cache under a memory limit that is lowered while it runs.

Argument: a JSON object, see `Job`. Prints a digest of all state at the end, and what the reports
say, as JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import offload
from offload.engine.pressure import HostPressure
from offload.tiers.host import HostSegment

WIDTH, LAYERS, BATCH = 512, 32, 512
_MORE_BYTES = 4 << 20  # where the kernel cannot reclaim enough for a limit


@dataclass
class Job:
    """A training, and when its limit falls.

    `group` is the folder of a control group (cgroup v1) that the process is in already; "": no
    limit falls. Before step `at` so many bytes are `left` under it, a part of what a step takes.
    `broken` names what is broken on purpose, see `BREAKS`.
    """

    path: str
    group: str = ""
    at: int = 2
    left: int = 24 << 20
    steps: int = 5
    broken: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def _nothing_shrinks() -> None:
    HostPressure.check = lambda *_: None  # type: ignore[method-assign]


def _memory_stays() -> None:
    give_up = HostSegment.give_up

    def forgets(self: HostSegment, ranges: Any) -> None:
        mapping, self.mapping = self.mapping, _NoAdvice()  # type: ignore[assignment]
        give_up(self, ranges)
        self.mapping = mapping

    HostSegment.give_up = forgets  # type: ignore[method-assign]


class _NoAdvice:
    def madvise(self, *_: int) -> None:
        """Give nothing back."""


def _blocks_are_not_written() -> None:
    from offload.partition.demotion import Demotion

    def write(self: Demotion, blocks: Any) -> None:
        for block in blocks:
            for record in self._records[block]:
                zeros = torch.zeros(record.nbytes, dtype=torch.uint8)
                self._nvme.start_write(record, zeros).wait()

    Demotion.write = write  # type: ignore[method-assign]


BREAKS = {
    "nothing shrinks": _nothing_shrinks,
    "memory is not given back": _memory_stays,
    "blocks are not written": _blocks_are_not_written,
}


def model() -> nn.Module:
    """Equal layers, each a bucket of its own: 32 MiB of fp32 weights."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(LAYERS):
        made += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*made)


def squeeze(group: Path, left_bytes: int) -> None:
    """Leave so much, beside file pages, under the limit, or the least that the kernel takes."""
    while True:
        cached = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.split()[0] in ("total_inactive_file", "total_active_file")
        )
        used = int((group / "memory.usage_in_bytes").read_text())
        try:
            (group / "memory.limit_in_bytes").write_text(str(used - cached + left_bytes))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            left_bytes += _MORE_BYTES
        else:
            return


def main() -> None:
    """Train, and print what became of it."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    if job.broken:
        BREAKS[job.broken]()
    config: dict[str, Any] = {
        "tiers": {
            "device": {"kind": "cpu", "memory": "8MiB"},
            "host": {"memory": "192MiB"},
            "nvme": {"paths": [job.path]},
        },
        "precision": {"compute": "fp32"},
        "partition": {"bucket_elements": WIDTH * (WIDTH + 1)},
        **job.config,
    }
    with (
        warnings.catch_warnings(record=True) as told,
        offload.initialize(model(), config) as engine,
    ):
        warnings.simplefilter("always")
        held_bytes = sum(engine.plan.bytes["host"].values())
        dtype = next(engine.module.parameters()).dtype
        counts = []
        for step in range(job.steps):
            if step == job.at and job.group:
                squeeze(Path(job.group), job.left)
            drawn = torch.Generator().manual_seed(step)
            out = engine(torch.randn(BATCH, WIDTH, generator=drawn).to(dtype))
            engine.backward(out.float().square().mean())
            engine.step()
            counts.append(engine.report().shrinks.count)
        digest = hashlib.sha256()
        for name, tensors in engine.named_state():
            for key, tensor in sorted(tensors.items()):
                digest.update(f"{name} {key}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        outcome = {
            "digest": digest.hexdigest(),
            "held_bytes": held_bytes,
            "budget_bytes": engine.report().tiers["host"].budget_bytes,
            "num_shrinks": sum(counts),
            "warnings": [str(each.message) for each in told],
        }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
