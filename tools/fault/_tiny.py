"""A training so small that a trial takes a tenth of a second, its bits, and what it holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from offload.state.stored import StoredCheckpoint
from offload.tiers.extents import round_up_to_page

MIB = 1 << 20
VOCABULARY = 64
_WIDTH = 32
_CLASSES = ("weights", "gradients", "optimizer")


def model() -> nn.Module:
    """Linear layers, norms and dropout behind an embedding; about 8,500 parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Embedding(VOCABULARY, _WIDTH)]
    for _ in range(3):
        layers += [nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, VOCABULARY))


def loss(engine: Any, index: int) -> torch.Tensor:
    """The loss of micro-batch `index`, its dropout included: the same on every call."""
    drawn = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, VOCABULARY, (4, 8), generator=drawn)
    torch.manual_seed(index)
    logits = engine(tokens).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten())


def settings(folder: Path, *, home: str = "nvme", **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all state at home on one tier; `sections` extend it."""
    config: dict[str, Any] = {
        "tiers": {
            "device": {"kind": "cpu", "memory": MIB},
            "host": {"memory": 4 * MIB},
            "nvme": {"paths": [str(folder)]},
        },
        "placement": dict.fromkeys(_CLASSES, home),
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "partition": {"bucket_elements": 2048},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def engine(config: Mapping[str, Any]) -> Any:
    """A new engine of the tiny model."""
    return offload.initialize(model(), config)


def step(engine: Any) -> float:
    """Take one step of one micro-batch; its loss."""
    value = loss(engine, engine.micro_steps)
    engine.backward(value)
    engine.step()
    return value.item()


def save(
    engine: Any, folder: Path, tag: str | None = None, *, portable: bool | None = None
) -> None:
    """Save a checkpoint; it is durable when this returns."""
    engine.save_checkpoint(folder, tag, portable=portable)
    engine.wait_for_checkpoint()


def fingerprint(engine: Any) -> str:
    """A hash over every name and every bit of the training state, and the counters."""
    found = hashlib.sha256()
    for name, tensors in engine.named_state():
        for field, tensor in sorted(tensors.items()):
            found.update(f"{name} {field} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_bytes_of(tensor))
    found.update(f"{engine.global_steps} {engine.micro_steps} {engine.parameter_steps()}".encode())
    return found.hexdigest()


def fingerprint_of_checkpoint(checkpoint: StoredCheckpoint) -> str:
    """A hash over every name and every bit of an open checkpoint, and its plain values."""
    found = hashlib.sha256()
    for record in sorted(checkpoint.records(), key=lambda each: (each.kind, each.name, each.field)):
        found.update(f"{record.kind} {record.name} {record.field}".encode())
        found.update(_bytes_of(checkpoint.read(record)))
    found.update(json.dumps(checkpoint.content.values, sort_keys=True).encode())
    return found.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def open_files() -> list[str]:
    """What this process's descriptors name; a deleted or nameless file without its number."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            names.append(str(entry.readlink()).split("#")[0])
    return sorted(names)


def num_threads() -> int:
    """Threads of this process, whoever started them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def settle(engine: Any) -> None:
    """Write what is on its way home, also what could not be written and is kept."""
    engine._parts.store.retry_failed()
    engine._parts.store.drain()


def held(engine: Any) -> dict[str, int]:
    """Bytes leased of each tier; of the device without the pages that happen to be there."""
    parts = engine._parts
    pages = sum(round_up_to_page(page.nbytes) for page in parts.pages if page.lease is not None)
    return {
        "host": parts.host.used_bytes,
        "device, but for pages": parts.device.used_bytes - pages,
        "nvme": 0 if parts.nvme is None else parts.nvme.used_bytes,
    }
