"""What gpu_check.py compares the engine with: the same training without it, and with DeepSpeed.

Both train bf16 weights with fp32 masters and AdamW, as the engine does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

LEARNING_RATE = 1e-4


class SkippedError(Exception):
    """The comparison cannot run here; says why."""


def seconds_a_step(step: Callable[[], Any], steps: int, *, on_gpu: bool) -> float:
    """The median of all steps but the first two."""
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def plain_seconds(model: nn.Module, ids: torch.Tensor, steps: int) -> float:
    """A step with weights, masters, moments and gradients all on the device of `ids`."""
    on_gpu = ids.is_cuda
    model.to(ids.device, torch.bfloat16)
    weights = list(model.parameters())
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=on_gpu)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_([*weights], [*masters])

    return seconds_a_step(step, steps, on_gpu=on_gpu)


def deepspeed_seconds(model: nn.Module, ids: torch.Tensor, steps: int) -> float:
    """A step with ZeRO-3, parameters and optimizer state in pinned host memory.

    Raises:
        SkippedError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise SkippedError("deepspeed is not installed; its wheel has to be, to compare with it")
    deepspeed: Any = importlib.import_module("deepspeed")

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29571")
    offload = {"device": "cpu", "pin_memory": True}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": ids.shape[0],
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": offload,
                "offload_param": offload,
                "overlap_comm": True,
            },
        },
    )

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return seconds_a_step(step, steps, on_gpu=ids.is_cuda)


class DriverPeak:
    """The most device memory that the driver says is taken during the block, sampled."""

    def __init__(self, *, on_gpu: bool, period_seconds: float = 0.002) -> None:
        self.peak_bytes = 0
        self._on_gpu = on_gpu
        self._period_seconds = period_seconds
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self._on_gpu:
            torch.zeros(1, device="cuda") @ torch.zeros(1, 1, device="cuda")  # context, libraries
            torch.cuda.synchronize()
            self._free_bytes = torch.cuda.mem_get_info()[0]
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._on_gpu:
            self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(self._period_seconds):
            self.peak_bytes = max(self.peak_bytes, self._free_bytes - torch.cuda.mem_get_info()[0])
