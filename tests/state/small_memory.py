"""A process that makes or loads a stack of layers and trains one step; prints what memory it took.

    python small_memory.py HOW FOLDER NVME LAYERS WIDTH DEVICE_MIB HOST_MIB

HOW is `pretrained` (the weights are in FOLDER), `deferred`, or `ordinary`: the model in memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from offload.state.safetensors_stream import SafetensorsWriter

MIB = 1 << 20


class Stack(nn.Module):
    """Layers that add to their input; `layers * width**2` parameters in fp32."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + 0.1 * layer(hidden)
        return hidden


def write_folder(folder: Path, layers: int, width: int) -> None:
    """The weights of a stack, drawn layer by layer, as one safetensors file."""
    names = [f"layers.{index}.weight" for index in range(layers)]
    with SafetensorsWriter(
        folder / "model.safetensors", [(name, torch.float32, (width, width)) for name in names]
    ) as writer:
        for name in names:
            writer.write(name, torch.empty(width, width).uniform_(-0.02, 0.02))
        writer.finish()


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def engine_of(how: str, folder: str, config: Any, layers: int, width: int) -> Any:
    if how == "pretrained":
        return offload.from_pretrained(folder, config, model_class=lambda: Stack(layers, width))
    if how == "deferred":
        with offload.deferred_init():
            module = Stack(layers, width)
        return offload.initialize(module, config)
    return offload.initialize(Stack(layers, width), config)


def train(engine: Any, width: int) -> float:
    """One step; returns its loss."""
    with engine.train():
        loss = engine(torch.ones(4, width)).square().mean()
        engine.backward(loss)
        taken = engine.step()
        assert taken
        return loss.item()


def main(how: str, folder: str, nvme: str, *numbers: str) -> None:
    """Run, and print bytes as JSON."""
    layers, width, device_mib, host_mib = map(int, numbers)
    config = {
        "precision": {"compute": "fp32"},
        "tiers": {
            "device": {"kind": "cpu", "memory": device_mib * MIB},
            "host": {"memory": host_mib * MIB},
            "nvme": {"paths": [nvme]},
        },
        "placement": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
    }
    torch.manual_seed(0)
    train(engine_of("deferred", folder, config, 2, 256), 256)  # compile kernels, load libraries
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    engine = engine_of(how, folder, config, layers, width)
    loaded = status_bytes("VmHWM")
    loss = train(engine, width)
    print(
        json.dumps(
            {
                "loss": loss,
                "weights": 4 * layers * width * width,
                "before": before,
                "loading": loaded - before,
                "training": status_bytes("VmHWM") - before,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
