"""Five models in every placement: the same bits everywhere, plain PyTorch's within 1e-6."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

import offload
from offload.native import BACKENDS, IoEngine
from tests.oracle import (
    LockStep,
    Run,
    assert_close,
    assert_identical,
    language_loss,
    make_engine,
    settings,
    train_engine,
    train_plain,
    transformers_model,
    two_buckets_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")

MODELS = ("llama", "gpt2", "bert", "t5", "mixtral")
COMPUTE = ("fp32", "bf16")
CHECKPOINTING = ("off", "reentrant", "not_reentrant")
BUCKET_ELEMENTS = 4096
TOLERANCE = 1e-6

PLACEMENTS = ("host", "auto", *(f"nvme {backend}" for backend in BACKENDS if backend != "auto"))
EVERY = list(itertools.product(MODELS, COMPUTE, PLACEMENTS, (1, 4), CHECKPOINTING))


def _telling() -> list[tuple[Any, ...]]:
    """Few cases that have every pair (model, placement), and every value with both dtypes."""
    cases = []
    for row, model in enumerate(MODELS):
        for column, placement in enumerate(PLACEMENTS):
            turn = row + column
            accumulation = 4 if turn % 3 == 2 else 1
            cases.append(
                (model, COMPUTE[turn % 2], placement, accumulation, CHECKPOINTING[turn % 3])
            )
    return cases


def _config(name: str, compute: str, placement: str, path: Path | None, steps: int) -> Any:
    tier, _, backend = placement.partition(" ")
    model = transformers_model(name)
    options: dict[str, Any] = {
        "compute": compute,
        "bucket_elements": BUCKET_ELEMENTS,
        "training": {"gradient_accumulation_steps": steps},
        "io": {"backend": backend or "auto"},
    }
    if tier != "device":
        itemsize = 2 if compute == "bf16" else 4
        options["device"] = two_buckets_bytes(
            model, itemsize=itemsize, bucket_elements=BUCKET_ELEMENTS
        )
    if tier == "auto":  # room for a part of the state beside the staging that the rest needs
        staging = offload.plan(model, settings("nvme", path, **options)).need_bytes["host"]
        options["host"] = staging + (512 << 10)
    return settings(tier, path, **options)


@functools.cache
def _on_device(model: str, compute: str, steps: int, checkpointing: str) -> Run:
    config = _config(model, compute, "device", None, steps)
    return train_engine(transformers_model(model, checkpointing), config, language_loss)


def _check(case: tuple[Any, ...], path: Path) -> None:
    model, compute, placement, steps, checkpointing = case
    backend = placement.partition(" ")[2]
    if backend and IoEngine.probe()[backend] != "ok":
        pytest.skip(f"{backend}: {IoEngine.probe()[backend]}")
    config = _config(model, compute, placement, path, steps)
    found = train_engine(transformers_model(model, checkpointing), config, language_loss)
    assert_identical(found, _on_device(model, compute, steps, checkpointing))
    for tier, report in found.report.tiers.items():
        assert report.peak_bytes <= min(report.budget_bytes, found.plan.peak_bytes[tier]), tier


@pytest.mark.parametrize("case", _telling(), ids=lambda case: "-".join(map(str, case)))
def test_bits_do_not_depend_on_the_placement(case: tuple[Any, ...], tmp_path: Path) -> None:
    _check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(map(str, case)))
def test_bits_do_not_depend_on_the_placement_in_any_combination(
    case: tuple[Any, ...], tmp_path: Path
) -> None:
    _check(case, tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_auto_placement_uses_every_tier(model: str, tmp_path: Path) -> None:
    """Else the `auto` column of the matrix would not test what it is there for."""
    with make_engine(
        transformers_model(model), _config(model, "fp32", "auto", tmp_path, 1)
    ) as engine:
        homes = {tier: sum(classes.values()) for tier, classes in engine.plan.bytes.items()}
        assert homes["host"] > 0
        assert homes["nvme"] > 0
        assert engine.plan.peak_bytes["device"] > 0


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_fp32_equals_plain_pytorch(model: str, steps: int) -> None:
    checkpointing = "off" if steps == 1 else "not_reentrant"
    plain = train_plain(transformers_model(model, checkpointing), language_loss, accumulation=steps)
    found = _on_device(model, "fp32", steps, checkpointing)
    assert_close(found, plain, tolerance=TOLERANCE)
    for name in [name for name in plain.state if name.endswith("self.key.bias")]:
        del plain.state[name]  # BERT's: its gradient is zero but for rounding, its moments noise
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(found, plain, tolerance=TOLERANCE, key=key)
    for one, other in zip(found.norms, plain.norms, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("model", MODELS)
def test_each_step_equals_plain_pytorch(model: str, compute: str) -> None:
    """Losses and gradients bit for bit, the update within 1e-6; bf16 rounds half up."""
    steps = 2 if compute == "bf16" else 1
    config = _config(model, compute, "device", None, steps)
    with make_engine(transformers_model(model), config) as engine:
        both = LockStep(transformers_model(model), engine)
        for _ in range(10):
            both.step(language_loss, tolerance=TOLERANCE)
