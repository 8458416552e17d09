"""What cannot work is refused before anything is touched, with an error that says what would."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import (
    ConfigError,
    DiskFullError,
    DoesNotFitError,
    EngineStateError,
    GuardError,
    OffloadError,
    StorageError,
)
from tests.oracle import continue_engine, make_engine, settings, small_loss, small_model


def assert_untouched(model: nn.Module) -> None:
    """The model has its values, its classes and no hooks: it trains as if nothing had been."""
    fresh = small_model()
    for (name, found), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert type(found) is nn.Parameter, name
        assert torch.equal(found, expected), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert small_loss(model, 0).item() == small_loss(fresh, 0).item()


def _large_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))


def test_a_full_disk_is_refused_with_the_bytes(small_disk: Path) -> None:
    free = os.statvfs(small_disk).f_bavail
    model = _large_model()
    before = [p.detach().clone() for p in model.parameters()]
    # 32 MiB of weights; with gradients and moments four times that
    with pytest.raises((DiskFullError, DoesNotFitError)) as caught:
        make_engine(model, settings("nvme", small_disk, bucket_elements=1 << 20))
    assert "MiB" in str(caught.value)
    assert os.statvfs(small_disk).f_bavail == free
    for found, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(found, expected)


def test_a_disk_that_fills_up_behind_our_back_does_not_matter(small_disk: Path) -> None:
    """Everything is allocated before step 0, so nobody can take it away."""
    with make_engine(small_model(), settings("nvme", small_disk)) as engine:
        continue_engine(engine, small_loss, steps=1)
        with (small_disk / "other").open("wb") as file:
            room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            os.posix_fallocate(file.fileno(), 0, room - (1 << 20))
            with pytest.raises(OSError, match="space"):
                os.posix_fallocate(file.fileno(), 0, room * 2)
        continue_engine(engine, small_loss, steps=3)
        assert engine.global_steps == 4


def test_a_read_only_path(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:
        try:
            # Onto itself: O_DIRECT and all else are as on the real disk.
            for options in ("bind", "remount,bind,ro"):
                command = ["mount", "-o", options, str(tmp_path), str(tmp_path)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount here: {error}")
    model = small_model()
    try:
        with pytest.raises(StorageError, match="remedy") as caught:
            make_engine(model, settings("nvme", tmp_path))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", tmp_path], check=True, timeout=60)
    assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert str(tmp_path) in str(caught.value)
    assert_untouched(model)


def test_a_missing_path(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(StorageError, match="absent") as caught:
        make_engine(model, settings("nvme", tmp_path / "absent"))
    assert caught.value.errno == errno.ENOENT
    assert_untouched(model)


def test_a_path_in_memory_works_with_a_warning() -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no /dev/shm here")
    with pytest.warns(RuntimeWarning, match="tmpfs is memory"):
        engine = make_engine(small_model(), settings("nvme", shared))
    with engine:
        continue_engine(engine, small_loss, steps=2)


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
@pytest.mark.parametrize("short", ["device", "host"])
def test_a_budget_that_cannot_hold_the_largest_bucket(
    tier: str, short: str, tmp_path: Path
) -> None:
    if (tier, short) == ("device", "host"):
        return  # nothing of the state is in host memory
    model = small_model()
    config = settings(tier, tmp_path, **{short: 4096})
    with pytest.raises(DoesNotFitError) as caught:
        make_engine(model, config)
    assert short in caught.value.table
    assert "4.00 KiB" in caught.value.table
    assert_untouched(model)
    assert list(tmp_path.iterdir()) == []
    assert not offload.plan(model, config).fits


def test_the_need_that_the_plan_states_is_enough(tmp_path: Path) -> None:
    """The smallest budgets work, and a page less is refused."""
    model = small_model()
    generous = offload.plan(model, settings("nvme", tmp_path))
    need = {tier: generous.need_bytes[tier] for tier in ("device", "host")}
    with make_engine(model, settings("nvme", tmp_path, **need)) as engine:
        continue_engine(engine, small_loss, steps=3)
    for tier in need:
        model = small_model()
        with pytest.raises(DoesNotFitError):
            make_engine(model, settings("nvme", tmp_path, **{**need, tier: need[tier] - 1}))
        assert_untouched(model)


def test_every_mistake_of_a_configuration_is_named_at_once(tmp_path: Path) -> None:
    model = small_model()
    config = settings("host", tmp_path, precision={"compute": "bf15"}, optimzer={"lr": 1.0})
    config["training"] = {"max_grad_norm": -1.0}
    with pytest.raises(ConfigError) as caught:
        make_engine(model, config)
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "bf16" in text
    assert "did you mean" in text or "optimizer" in text
    assert "max_grad_norm" in text
    assert_untouched(model)


def test_a_path_in_the_configuration_that_names_no_module() -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="nonsense"):
        make_engine(model, settings("host", guard={"gather": ["nonsense"]}))
    assert_untouched(model)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(OffloadError, match="meta"):
        make_engine(model, settings("host"))


def test_a_model_without_shapes() -> None:
    with pytest.raises(OffloadError, match="lazy"):
        make_engine(nn.Sequential(nn.LazyLinear(3)), settings("host"))


def test_a_model_without_parameters() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        make_engine(nn.Sequential(nn.GELU()), settings("host"))


Factory = Callable[[Any], Any]


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.LBFGS(p), lambda p: torch.optim.SparseAdam(p)],
    ids=["needs a closure", "cannot step dense gradients"],
)
def test_an_optimizer_that_cannot_work_is_refused(optimizer: Factory) -> None:
    model = small_model()
    with pytest.raises(OffloadError):
        make_engine(model, settings("host"), optimizer=optimizer)
    assert_untouched(model)


def test_parameters_over_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(OffloadError, match=r"0\.weight and 1\.weight"):
        make_engine(model, {"tiers": {"device": {"kind": "cpu", "memory": "1MiB"}}})


def test_a_step_inside_gathered_is_refused(tmp_path: Path) -> None:
    sections = {"tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "4MiB"}}}
    with make_engine(nn.Linear(8, 8), sections) as engine:
        engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
        with engine.gathered(), pytest.raises(EngineStateError, match="gathered"):
            engine.step()
        taken = engine.step()
        assert taken
        assert engine.global_steps == 1


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
@pytest.mark.parametrize("when", ["at rest", "after forward"])
def test_a_conversion_is_refused_at_the_next_use_at_the_latest(
    tier: str, when: str, tmp_path: Path
) -> None:
    """At once, but where the weights wear their plain class until the step: on the device."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with make_engine(model, settings(tier, tmp_path)) as engine:
        loss = engine(torch.ones(2, 8)).sum()
        if when == "at rest":
            engine.backward(loss)
            engine.step()
        if (tier, when) == ("device", "after forward"):
            model.half()
            with pytest.raises(GuardError, match=r"0\.weight was replaced"):
                engine(torch.ones(2, 8))
            with pytest.raises(GuardError, match=r"0\.weight was replaced"):
                engine.step()
        else:
            with pytest.raises(GuardError, match=r"0\.weight cannot become"):
                model.half()
            assert model[0].weight.dtype is torch.float32


def test_an_optimizer_that_fails_midway_leaves_no_state_to_go_on_with() -> None:
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails and self.param_groups[0]["params"][0].ndim == 1:
                raise RuntimeError("out of luck")
            return super().step(closure)

    sections = {"tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "4MiB"}}}
    with make_engine(
        nn.Linear(8, 8), sections, optimizer=lambda params: Fails(params, lr=0.1)
    ) as engine:
        engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
        Fails.fails = True
        with pytest.raises(OffloadError, match="out of luck"):
            engine.step()
        Fails.fails = False
        with pytest.raises(EngineStateError, match="void"):
            engine.step()
