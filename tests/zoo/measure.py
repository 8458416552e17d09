"""One row in plain PyTorch and in every placement, and what there is to compare.

Every run evaluates, trains, and evaluates again. Losses are compared, the weights, masters and
moments after the last step, and the buffers. Between placements all of it must be the same bits.
Against plain PyTorch, what comes before the first update must be the same bits as well; after it,
rounding in the update makes weights differ in their last bits, so there `TOLERANCE` holds.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from tests.oracle import (
    LockStep,
    Run,
    assert_identical,
    continue_engine,
    make_engine,
    relative_difference,
    settings,
    train_plain,
    two_buckets_bytes,
)
from tests.zoo.row import Row
from tests.zoo.torch_modules import First, Framed, Through

STEPS = 5
TOLERANCE = 1e-6
PLACEMENTS = ("device", "host", "nvme", "harshest")
_EVALUATIONS = (900, 901)  # micro-batches that no step trains on


@dataclass(slots=True)
class Trained:
    """What one run of a row leaves behind.

    Attributes:
        run: losses and state.
        evaluations: the losses before the first and after the last step, in evaluation mode.
        buffers: by name, after the last step.
    """

    run: Run
    evaluations: list[float]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the comparisons have found.

    Attributes:
        class_names: what is trained.
        num_parameters: elements of all parameters.
        placements: those whose losses and state are the same bits, with all of it at home where
            the placement says.
        loss_difference: the largest relative one of a loss, from plain PyTorch.
        weight_difference: the largest norm-relative one of a weight, master or buffer.
        faults: demand fetches in the last step of the harshest placement.
        device_bytes: the budget there.
        peak_bytes: the most that was held of it.
        weight_bytes: what all weights would need on the device.
    """

    class_names: str
    num_parameters: int
    placements: tuple[str, ...]
    loss_difference: float
    weight_difference: float
    faults: int
    device_bytes: int
    peak_bytes: int
    weight_bytes: int


def measure(row: Row, folder: Path) -> Measured:
    """Run a row in fp32 and compare everything.

    Raises:
        AssertionError: placements differ, or plain PyTorch by more than `TOLERANCE`.
    """
    with _allowed_warnings(row):
        plain = _train_plain(row)
        runs = _train_everywhere(row, folder, "fp32")
        first, harshest = runs["device"], runs["harshest"]
        loss = _loss_difference(first, plain, row)
        weight = _step_difference(row) if row.per_step else _weight_difference(first, plain)
        module = row.make()
    report = harshest.run.report
    device = report.tiers["device"]
    return Measured(
        class_names=_class_names(module),
        num_parameters=sum(p.numel() for p in module.parameters()),
        placements=tuple(name for name, found in runs.items() if _is_at(_tier(name), found.run)),
        loss_difference=loss,
        weight_difference=weight,
        faults=report.faults,
        device_bytes=device.budget_bytes,
        peak_bytes=device.peak_bytes,
        weight_bytes=_weight_bytes(harshest),
    )


def compare_placements(row: Row, folder: Path, compute: str) -> None:
    """Run a row in every placement and compare the bits; every loss must be finite.

    Raises:
        AssertionError: they differ.
    """
    with _allowed_warnings(row):
        runs = _train_everywhere(row, folder, compute)
    assert all(map(math.isfinite, runs["device"].run.losses))


def train_harshest(row: Row, folder: Path, compute: str) -> None:
    """Run a row in the harshest placement only.

    Raises:
        BudgetError: an op needs more than `row.pages` buckets.
    """
    with _allowed_warnings(row):
        _train_engine(row, "harshest", folder, compute)


def _train_everywhere(row: Row, folder: Path, compute: str) -> dict[str, Trained]:
    """The runs by placement, when all are found to be the same."""
    runs: dict[str, Trained] = {}
    for placement in PLACEMENTS:
        place = folder / placement
        place.mkdir()
        runs[placement] = found = _train_engine(row, placement, place, compute)
        _check_budgets(found.run)
        _assert_same(found, runs["device"])
    return runs


def _tier(placement: str) -> str:
    return "nvme" if placement == "harshest" else placement


def _is_at(tier: str, run: Run) -> bool:
    """Whether the tier is the home of all state, and no other is of any."""
    classes = ("weights", "gradients", "optimizer")
    homes = {home for home, found in run.plan.bytes.items() if any(found[c] for c in classes)}
    return homes == {tier}


def _class_names(module: nn.Module) -> str:
    """The class of a module, or those of the layers that a row's frame and wrappers hold."""
    if isinstance(module, Framed):
        return _class_names(module.core)
    if isinstance(module, (First, Through, nn.Sequential)):
        return ", ".join(dict.fromkeys(_class_names(child) for child in module.children()))
    return type(module).__name__


def _weight_bytes(found: Trained) -> int:
    return sum(layouts["weights"].nbytes for layouts in found.run.plan.layouts)


@contextlib.contextmanager
def _allowed_warnings(row: Row) -> Iterator[None]:
    with warnings.catch_warnings():
        for pattern in row.warnings:
            warnings.filterwarnings("ignore", message=pattern)
        yield


def _config(row: Row, placement: str, folder: Path, compute: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"optimizer": row.optimizer} if row.optimizer else {}
    sections["bucket_elements"] = row.bucket_elements
    if placement == "harshest":
        # An op of many buckets has more of them that are not full, and so as many bytes in bf16.
        itemsize = 2 if compute == "bf16" and row.pages == 2 else 4
        model = row.make()
        sections["device"] = two_buckets_bytes(
            model,
            itemsize=itemsize,
            bucket_elements=row.bucket_elements,
            buckets=row.pages,
        )
        roomy = settings("nvme", folder, compute=compute, **sections)
        sections["host"] = offload.plan(model, roomy).need_bytes["host"]
    return settings(_tier(placement), folder, compute=compute, **sections)


def _train_engine(row: Row, placement: str, folder: Path, compute: str) -> Trained:
    with make_engine(row.make(), _config(row, placement, folder, compute)) as engine:
        before = _evaluate(engine, row, 0)
        run = continue_engine(engine, row.loss, steps=STEPS)
        report = engine.report()
        after = _evaluate(engine, row, 1)
        run.report, run.plan = engine.report(), engine.plan
        assert run.report.faults == report.faults
        return Trained(run, [before, after], _buffers(engine.module))


def _train_plain(row: Row) -> Trained:
    model = row.make()
    before = _evaluate(model, row, 0)
    run = train_plain(model, row.loss, steps=STEPS, optimizer=row.plain_optimizer)
    after = _evaluate(model, row, 1)
    return Trained(run, [before, after], _buffers(model))


def _evaluate(model: Any, row: Row, number: int) -> float:
    model.eval()
    with torch.no_grad():
        loss = row.loss(model, _EVALUATIONS[number]).item()
    model.train()
    return loss


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _assert_same(found: Trained, expected: Trained) -> None:
    assert found.evaluations == expected.evaluations
    assert_identical(found.run, expected.run)
    for name, buffer in expected.buffers.items():
        assert torch.equal(found.buffers[name], buffer), name


def _check_budgets(run: Run) -> None:
    for tier, report in run.report.tiers.items():
        limit = min(report.budget_bytes, run.plan.peak_bytes[tier])
        assert report.peak_bytes <= limit, (tier, report.peak_bytes, limit)


def _loss_difference(found: Trained, plain: Trained, row: Row) -> float:
    """The largest relative one."""
    same = found.evaluations[0] == plain.evaluations[0]
    assert same or not row.same_kernels, "evaluation of the same weights"
    assert found.run.losses[0] == plain.run.losses[0], "first loss of the same weights"
    pairs = zip(
        [*found.run.losses, *found.evaluations],
        [*plain.run.losses, *plain.evaluations],
        strict=True,
    )
    return largest({pair: abs(pair[0] - pair[1]) / abs(pair[1]) for pair in pairs})


def _weight_difference(found: Trained, plain: Trained) -> float:
    """The largest of a weight, a master or a buffer after the last step."""
    pairs = {
        (name, key): (found.run.state[name][key], state["weight"])
        for name, state in plain.run.state.items()
        for key in ("weight", "master")
        if key in found.run.state[name]
    } | {(name, "buffer"): (found.buffers[name], buffer) for name, buffer in plain.buffers.items()}
    return largest({place: relative_difference(*pair) for place, pair in pairs.items()})


def largest(differences: Mapping[Any, float]) -> float:
    """The largest difference, each of which is a number and within `TOLERANCE`."""
    for place, difference in differences.items():
        assert difference <= TOLERANCE, (place, difference)  # `max` would pass over a NaN
    return max(differences.values())


def _step_difference(row: Row) -> float:
    """The largest of a master or a moment after a step that both sides take from the same state.

    Losses and gradients are the same bits in every step; `LockStep` asserts that, and buffers too.
    """
    config = _config(row, "device", Path(), "fp32")
    with make_engine(row.make(), config) as engine:
        model = row.make()
        both = LockStep(model, engine)
        difference = max(both.step(row.loss, tolerance=TOLERANCE) for _ in range(STEPS))
        for name, buffer in model.named_buffers():
            assert torch.equal(engine.module.get_buffer(name), buffer), name
    return difference
