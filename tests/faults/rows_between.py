"""Rows: hooks of the user, evaluation and generation between steps, EMA copies, forked workers."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Blocks, Chain, inputs, loss_of, tokens


@row("dispatch", make=Blocks)
def hooks_of_the_user(run: Run) -> None:
    seen: list[torch.Tensor] = []

    def halve(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 0.5

    first = run.module.blocks[0]
    first.up.weight.register_hook(halve)
    first.down.weight.register_hook(lambda g: seen.append(g.detach().clone()))
    run.module.blocks[1].register_forward_hook(lambda m, a, out: out * 0.5)
    run.module.blocks[1].register_forward_pre_hook(lambda m, a: (a[0] + m.up.weight[0],))
    run.module.blocks[2].register_full_backward_hook(
        lambda m, gi, go: seen.append(m.up.weight.detach().sum() + go[0].sum())
    )
    run.module.blocks[3].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
        run.record("seen", seen)
        seen.clear()


@row("dispatch", make=Chain)
def evaluation_between_steps(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(tokens(step)), step))
        run.module.eval()
        with torch.no_grad():
            run.record("eval", run(tokens(step + 50)))
        with torch.inference_mode():
            run.record("inference", run(tokens(step + 60)))
            run.record("weights", [p.sum() for p in run.module.parameters()])
        run.record("module", run.module(tokens(step + 70)).detach())
        run.module.train()
        with torch.no_grad():
            run.record("part", run.module.layers[1](torch.ones(1, WIDTH)))


@row("forward", "pack", make=Chain)
def evaluation_between_forward_and_backward(run: Run) -> None:
    for step in range(4):
        loss = loss_of(run(tokens(step)), step)
        with torch.no_grad():
            run.record("eval", run(tokens(step + 50)))
        with torch.inference_mode():
            run.record("inference", run(tokens(step + 60)))
        run.train(loss)


@row("forward", make=Chain)
def generation_by_hand(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(tokens(step)), step))
        run.module.eval()
        ids = tokens(step)[:1]
        with torch.no_grad():
            for _ in range(4):
                following = run(ids)[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, following], 1)
        run.record("generated", ids)
        run.module.train()


@row("dispatch", make=Chain)
def head_borrowed_from_the_embedding(run: Run) -> None:
    for step in range(3):
        hidden = run.module.embed(tokens(step))
        for layer in run.module.layers:
            hidden = torch.tanh(layer(hidden))
        logits = F.linear(hidden, run.module.embed.weight)
        similar = F.cosine_similarity(run.module.embed.weight[:4], run.module.head.weight[:4])
        run.train(loss_of(logits, step) + similar.sum())


@row("dispatch", "foreach", make=Blocks)
def average_of_weights(run: Run) -> None:
    average = AveragedModel(run.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    other = AveragedModel(run.module)
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
        average.update_parameters(run.module)
        other.update_parameters(run.module)
        run.evict_all()
        run.record("average", [p.detach() for p in average.parameters()])
        run.record("mean", [p.detach() for p in other.parameters()])
        run.record("loss of the average", average(inputs(step)).detach())


class Features(Dataset[Any]):
    """Items that the model itself computes, in a forked worker."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        with torch.no_grad():
            try:
                features = self.module.blocks[0](inputs(index))
            except Exception as error:
                return {"features": torch.zeros(1), "error": type(error).__mro__[-3].__name__}
        return {"features": features, "error": ""}


@row("forward", make=Blocks)
def forked_worker_with_the_model(run: Run) -> None:
    run.train(loss_of(run(inputs())))
    with torch.no_grad():
        want = [run.module.blocks[0](inputs(index)) for index in range(4)]
    run.evict_all()
    loader = DataLoader(Features(run.module), num_workers=1, batch_size=None)
    for expected, item in zip(want, loader, strict=True):
        if not item["error"]:
            assert torch.equal(item["features"], expected), "garbage in a worker"
        else:
            assert run.engine is not None
    run.train(loss_of(run(inputs(1))))


@row("forward", make=Blocks, runs=("host", "nvme"))
def forked_child_closes_nothing(run: Run) -> None:
    run.train(loss_of(run(inputs())))
    child = os.fork()
    if child == 0:
        try:
            run.offloaded.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for step in range(3):
        run.train(loss_of(run(inputs(step))))


@row("forward", make=Blocks)
def accumulation_by_hand(run: Run) -> None:
    for step in range(3):
        for part in range(3):
            run.backward(loss_of(run(inputs(step * 3 + part))) / 4)
        run.step()


@row("forward", make=Chain)
def same_module_called_in_parts(run: Run) -> None:
    for step in range(4):
        hidden = run.module.embed(tokens(step))
        for index in range(step % 3 + 1):
            hidden = run.module.layers[index](hidden)
        run.train(loss_of(run.module.head(hidden), step))
