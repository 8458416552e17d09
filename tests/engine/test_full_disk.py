"""A real disk of 64 MiB that is too small, or fills up while training."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from offload.engine import pressure
from offload.errors import DiskFullError, MemoryPressureError, OffloadError
from tests.oracle import (
    Run,
    assert_identical,
    continue_engine,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
)

STEPS = 4
PLACEMENTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"compute": "bf16"},
    "accumulating": {"training": {"gradient_accumulation_steps": 3}},
    "by itself": {"overlap": {"optimizer": False}},
}


def configured(path: Path, tier: str = "nvme", **sections: Any) -> dict[str, Any]:
    sizes = {"bucket_elements": 1024, "device": 1 << 20, "host": 4 << 20}
    return settings(tier, path, **{**sizes, **sections})


def fill(disk: Path) -> None:
    """Leave not one block."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for nbytes in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(nbytes))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        os.fsync(file.fileno())
    assert free_bytes(disk) == 0


def free_bytes(disk: Path) -> int:
    stat = os.statvfs(disk)
    return stat.f_bavail * stat.f_frsize


def train(engine: Any, before: Callable[[int], None] = lambda step: None) -> Run:
    run = continue_engine(engine, small_loss, steps=0)
    for step in range(STEPS):
        before(step)
        each = continue_engine(engine, small_loss, steps=1)
        run.losses += each.losses
        run.norms += each.norms
        run.state, run.steps = each.state, each.steps
    return run


def test_a_disk_that_is_too_small_is_found_before_step_0(small_disk: Path) -> None:
    free = free_bytes(small_disk)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))  # 32 MiB of weights
    before = [parameter.clone() for parameter in model.parameters()]
    config = configured(small_disk, device=32 << 20, host=64 << 20, bucket_elements=1 << 20)
    config["tiers"]["nvme"]["capacity"] = "1GiB"
    with pytest.raises(OffloadError, match=r"nvme|free are") as caught:
        make_engine(model, config)
    assert "bytes" in str(caught.value)
    assert free_bytes(small_disk) == free
    for parameter, values in zip(model.parameters(), before, strict=True):
        assert parameter.equal(values), "nothing has been moved"


def test_an_allocation_that_the_disk_refuses_is_given_back(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that was seen is gone when it is wanted: somebody else has taken it."""
    free = free_bytes(small_disk)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    config = configured(small_disk, device=32 << 20, host=64 << 20, bucket_elements=1 << 20)
    monkeypatch.setattr("offload.tiers.backing_files.disk_bytes_free", lambda paths: 1 << 40)
    monkeypatch.setattr("offload.tiers.backing_files.check_disk_room", lambda *_: None)
    with pytest.raises(DiskFullError) as caught:
        make_engine(model, config)
    assert caught.value.needed_bytes > free
    assert free_bytes(small_disk) == free


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_disk_that_fills_up_after_initialize_is_not_noticed(
    placement: str, small_disk: Path, tmp_path: Path
) -> None:
    sections = PLACEMENTS[placement]
    (tmp_path / "roomy").mkdir()
    calm = train_engine(
        small_model(), configured(tmp_path / "roomy", **sections), small_loss, steps=STEPS
    )
    with make_engine(small_model(), configured(small_disk, **sections)) as engine:
        fill(small_disk)
        run = train(engine)
        assert engine.plan.bytes["nvme"]["optimizer"] > 0
    assert_identical(run, calm)


def test_activations_that_the_disk_does_not_take_stay_on_the_device(
    small_disk: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "placement": {"activations": "nvme"},
        "activations": {"min_bytes": 1, "host_memory": 32 << 10},
    }
    (tmp_path / "roomy").mkdir()
    calm = train_engine(
        small_model(), configured(tmp_path / "roomy", **sections), small_loss, steps=STEPS
    )
    with make_engine(small_model(), configured(small_disk, **sections)) as engine:
        fill(small_disk)
        with pytest.warns(RuntimeWarning, match="nvme takes no more"):
            run = train(engine)
        assert engine.report().activations.kept_bytes > 0
    assert_identical(run, calm)


def test_what_is_unfrozen_on_a_full_disk_is_refused_and_training_goes_on(
    small_disk: Path, tmp_path: Path
) -> None:
    def partly_frozen() -> nn.Module:
        model = small_model()
        model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
        return model

    def unfreeze(engine: Any, step: int) -> None:
        if step == 2:
            engine.module[0].weight.requires_grad_(True)

    (tmp_path / "roomy").mkdir()
    with make_engine(partly_frozen(), configured(tmp_path / "roomy")) as engine:
        calm = train(engine, lambda step: unfreeze(engine, step))
    with make_engine(partly_frozen(), configured(small_disk)) as engine:
        fill(small_disk)

        def act(step: int) -> None:
            unfreeze(engine, step)
            if step == 2:
                for _ in range(2):
                    with pytest.raises(OffloadError, match=r"no room|free are|of tier nvme"):
                        small_loss(engine, 0)
                (small_disk / "ballast").unlink()

        run = train(engine, act)
    assert_identical(run, calm)


def test_memory_pressure_on_a_full_disk_moves_nothing(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"device": 64 << 10}
    (tmp_path / "roomy").mkdir()
    calm = train_engine(
        small_model(), configured(tmp_path / "roomy", "auto", **sections), small_loss, steps=STEPS
    )
    with make_engine(small_model(), configured(small_disk, "auto", **sections)) as engine:
        fill(small_disk)
        plan = engine.plan
        assert plan.bytes["host"]["optimizer"] > 0

        def act(step: int) -> None:
            if step != 2:
                return
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pressure, "host_room_bytes", lambda: 0)
                patch.setattr(pressure, "free_swap_bytes", lambda: 0)
                engine._pressure._swing_bytes = 1
                engine._pressure._look_seconds = 0.0  # it is time for another look
                with pytest.raises(MemoryPressureError, match=r"cannot shrink|no room"):
                    small_loss(engine, 0)

        run = train(engine, act)
        assert engine.plan is plan
    assert_identical(run, calm)
