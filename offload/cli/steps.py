"""One step of training from its micro-batches, whatever the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload.state.session import OffloadEngine

MicroBatch = Mapping[str, torch.Tensor | bool]  # options of the model are no tensors


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


def on_device_of(engine: OffloadEngine, batch: MicroBatch) -> dict[str, torch.Tensor | bool]:
    """The batch where the engine computes."""
    device = next(engine.module.parameters()).device
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def count_targets(batch: MicroBatch) -> int:
    """Tokens that the loss of a batch is of: the first of a sequence is predicted by none."""
    labels = batch["labels"]
    assert isinstance(labels, torch.Tensor)
    return int((labels[:, 1:] >= 0).sum())


def count_tokens(batch: MicroBatch) -> int:
    """Tokens that are read, without what fills sequences up."""
    what = batch.get("attention_mask", torch.ones_like(_ids(batch)))
    assert isinstance(what, torch.Tensor)
    return int(what.sum())


def weighted(batches: Sequence[MicroBatch], module: torch.nn.Module) -> list[MicroBatch]:
    """The micro-batches of a step, so that each target counts the same.

    A model's loss is the mean over its batch's targets, so micro-batches with fewer would count
    more. Models of transformers divide by `num_items_in_batch` instead, if they are told it; of
    others, the step's loss is the mean of the micro-batches' means.
    """
    counts = [count_targets(batch) for batch in batches]
    if len(set(counts)) == 1 or not _takes_num_items(module):
        return list(batches)
    mean = torch.tensor(sum(counts) / len(counts))
    return [{**batch, "num_items_in_batch": mean} for batch in batches]


def _takes_num_items(module: torch.nn.Module) -> bool:
    get_base: Any = getattr(module, "get_base_model", None)
    base: Any = module if get_base is None else get_base()
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    kinds = [each.kind for each in inspect.signature(base.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and hasattr(base, "loss_function")


def _ids(batch: MicroBatch) -> torch.Tensor:
    ids = batch["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids
