"""A program: lives of a training run that saves with a peer; `peers.py` starts and kills them.

    python _peer_life.py PEER       PEER is one of `TRAINERS`

It reads a job in JSON from each line of its standard input, forks a life that does it, and writes
its reports to standard output: `pid`, `loaded` or `fresh`, `unloadable`, `stepped`, `saving`,
`saved`; and `dead` when it has ended. Runs in the peer's own environment: standard library and
torch only.

A life looks for the newest checkpoint as its peer names it, and where that cannot be loaded for the
next older one. Whether the state is that of one step is seen by the losses of the next steps: the
second one depends on the optimizer's moments, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

_VOCABULARY = 64
_LR = 1e-2


class Trainer(Protocol):
    """A model with its optimizer, and how it is saved."""

    def step(self, number: int) -> float:
        """Take step `number`; return its loss."""

    def save(self, folder: Path, tag: str, number: int) -> None:
        """Return when the peer says that it is saved."""

    def tags(self, folder: Path) -> list[str]:
        """What may be loaded, the first choice first."""

    def load(self, folder: Path, tag: str) -> int:
        """Return the number of the step that was loaded; raises whatever the peer raises."""


def make_model() -> nn.Module:
    """1.2 million parameters: what DeepSpeed swaps must be at least a MiB."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Embedding(_VOCABULARY, 512),
        nn.Linear(512, 2048),
        nn.ReLU(),
        nn.Linear(2048, _VOCABULARY),
    )


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], number: int) -> torch.Tensor:
    """The loss on the batch of a step."""
    tokens = (torch.arange(24) * (number + 1) + number) % _VOCABULARY
    return nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))


def newest_first(folder: Path) -> list[str]:
    """Folders, `step-10` before `step-9`."""
    found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda name: (len(name), name), reverse=True)


class Dcp:
    """torch.distributed.checkpoint: `save` of a state dict, synchronously, in one process."""

    def __init__(self, scratch: Path) -> None:  # noqa: ARG002 - others keep state on disk
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LR, foreach=False)

    def step(self, number: int) -> float:
        loss = loss_of(self.model, number)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _state(self, number: int) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "number": torch.tensor(number)}

    def save(self, folder: Path, tag: str, number: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._state(number), checkpoint_id=folder / tag)

    def tags(self, folder: Path) -> list[str]:
        return newest_first(folder)

    def load(self, folder: Path, tag: str) -> int:
        from torch.distributed.checkpoint.state_dict import set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        state = self._state(0)
        load(state, checkpoint_id=folder / tag)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return int(state["number"])


class DeepSpeed:
    """DeepSpeed ZeRO-3 in bf16, optimizer state in host memory: `engine.save_checkpoint`."""

    device = "cpu"

    def __init__(self, scratch: Path) -> None:
        import deepspeed  # type: ignore[import-not-found,unused-ignore]

        shutil.rmtree(scratch, ignore_errors=True)  # what a killed life has left there
        scratch.mkdir()
        deepspeed.init_distributed(
            dist_backend="gloo",
            init_method=f"file://{scratch / 'rendezvous'}",
            rank=0,
            world_size=1,
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": self.device, "nvme_path": str(scratch)},
            },
            "optimizer": {"type": "AdamW", "params": {"lr": _LR, "weight_decay": 0.0}},
        }
        self.engine, *_ = deepspeed.initialize(model=make_model(), config=settings)

    def step(self, number: int) -> float:
        loss = loss_of(self.engine, number)
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def save(self, folder: Path, tag: str, number: int) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"number": number})

    def tags(self, folder: Path) -> list[str]:
        latest = folder / "latest"
        named = [latest.read_text().strip()] if latest.exists() else []
        return named + [tag for tag in newest_first(folder) if tag not in named]

    def load(self, folder: Path, tag: str) -> int:
        path, state = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError("load_checkpoint finds nothing")
        return int(state["number"])


class DeepSpeedNvme(DeepSpeed):
    """The same with optimizer state on NVMe."""

    device = "nvme"


TRAINERS: dict[str, Callable[[Path], Trainer]] = {
    "dcp": Dcp,
    "deepspeed": DeepSpeed,
    "deepspeed-nvme": DeepSpeedNvme,
}


def live(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Load, then train and save until it is killed or `num_steps` are taken."""
    torch.set_num_threads(1)
    folder = Path(job["checkpoints"])
    make = TRAINERS[job["peer"]]
    trainer = make(Path(job["scratch"]))
    number = 0
    for tag in trainer.tags(folder):
        try:
            number = trainer.load(folder, tag)
        except BaseException as error:  # noqa: BLE001 - DCP's errors are no Exceptions
            report(
                {"kind": "unloadable", "tag": tag, "text": f"{type(error).__name__}: {error}"[:300]}
            )
            continue
        report({"kind": "loaded", "step": number})
        break
    else:
        report({"kind": "fresh"})
    for number in range(number + 1, job["num_steps"] + 1):  # noqa: B020
        report({"kind": "stepped", "step": number, "loss": trainer.step(number)})
        if job["saves"]:
            report({"kind": "saving", "step": number})
            trainer.save(folder, job["tag"] or f"step-{number}", number)
            report({"kind": "saved", "step": number})
    report({"kind": "end"})


def warm_up(peer: str) -> None:
    """Import, build and load what every life needs; leaves one thread."""
    torch.set_num_threads(1)
    plain = Dcp(Path())
    plain.step(1)
    plain._state(1)
    if peer.startswith("deepspeed"):
        # DeepSpeed asks ninja at every load whether to compile again, and a fresh Python for the
        # model of the CPU, which takes a second each.
        import cpuinfo  # type: ignore[import-not-found,unused-ignore]
        from deepspeed.ops.op_builder import (  # type: ignore[import-not-found,unused-ignore]
            AsyncIOBuilder,
            CPUAdamBuilder,
            ShareMemCommBuilder,
        )

        found = cpuinfo.get_cpu_info()
        cpuinfo.get_cpu_info = lambda: found
        for builder in (AsyncIOBuilder, CPUAdamBuilder, ShareMemCommBuilder):
            module = builder().load()
            builder.load = lambda _self, verbose=True, module=module: module  # noqa: ARG005


def main() -> None:
    """Serve jobs until standard input ends."""
    warnings.simplefilter("ignore")
    output = os.dup(1)
    os.dup2(2, 1)  # what a peer prints is no report

    def report(content: dict[str, Any]) -> None:
        os.write(output, json.dumps(content).encode() + b"\n")

    warm_up(sys.argv[1])
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                live(json.loads(line) | {"peer": sys.argv[1]}, report)
                status = 0
            except BaseException as error:  # noqa: BLE001 - a life without its disk
                report({"kind": "error", "text": f"{type(error).__name__}: {error}"[:300]})
            finally:
                os._exit(status)
        report({"kind": "pid", "pid": pid})
        os.waitpid(pid, 0)
        report({"kind": "dead"})


if __name__ == "__main__":
    main()
