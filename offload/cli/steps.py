"""One step of training from its micro-batches, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offload.state.session import OffloadEngine

MicroBatch = Mapping[str, torch.Tensor]


def take_step(
    engine: OffloadEngine, micro_batches: Sequence[MicroBatch]
) -> tuple[list[float], bool]:
    """Return the losses of the micro-batches, and whether a step was taken with them.

    The model returns something with a `loss`. Forward-only training takes one micro-batch.
    """
    placed = [on_device_of(engine, each) for each in micro_batches]
    if engine.config.optimizer.name == "mezo":
        (batch,) = placed
        taken = engine.step(lambda: engine(**batch).loss)
        assert engine.step_loss is not None
        return [engine.step_loss], taken
    losses = engine.accumulate(placed)
    return [loss.item() for loss in losses], engine.step()


def on_device_of(engine: OffloadEngine, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The batch where the engine computes."""
    device = next(engine.module.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
