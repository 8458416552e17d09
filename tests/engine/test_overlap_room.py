"""The overlapped step's room makes way for state that is unfrozen; the bits stay."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.config import OffloadConfig
from offload.engine import build, planning, promotion
from offload.errors import BudgetError, DoesNotFitError, OffloadError
from offload.native import IoEngine
from offload.tiers import backing_files
from tests.engine.accelerator import use_accelerator
from tests.oracle import Run, assert_identical, make_engine, settings, small_loss, small_model

STEPS = 6
ROOMY = 1 << 20
PLACEMENTS = {
    "optimizer on nvme": {"weights": "host", "gradients": "host", "optimizer": "nvme"},
    "weights on nvme": {"weights": "nvme", "gradients": "host", "optimizer": "host"},
}
UNFROZEN = {1: ("4", "5"), 3: ("0",)}  # layers by step
# Bytes in which chunks still flow, fewer than the room has before.
LEFT = {"optimizer on nvme": 48 << 10, "weights on nvme": 28 << 10}


def unfreeze(model: nn.Module, *prefixes: str) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(True)


def partly_frozen() -> nn.Module:
    """Only one layer and its norm train."""
    model = small_model().requires_grad_(False)
    unfreeze(model, "7", "8")
    return model


def configured(path: Path, host: int, placement: str, *, overlaps: bool = True) -> dict[str, Any]:
    config = settings(
        "nvme",
        path,
        compute="bf16",
        device=1 << 20,
        host=host,
        bucket_elements=1024,
        overlap={"optimizer": overlaps},
    )
    return {**config, "placement": PLACEMENTS[placement]}


def train(engine: Any, *, steps: int = STEPS) -> Run:
    """Train on; layers are unfrozen before the second and the fourth step.

    An evaluation right before that is cut off leaves pages on their way: from the room, where what
    they are to have is still being written from there.
    """
    run = Run()
    for index in range(engine.global_steps, engine.global_steps + steps):
        if index in UNFROZEN:
            cut = engine.module[2].register_forward_hook(_cut_off)
            with torch.no_grad(), pytest.raises(InterruptedError):
                small_loss(engine, index)
            cut.remove()
            unfreeze(engine.module, *UNFROZEN[index])
        else:
            with torch.no_grad():
                small_loss(engine, index)
        loss = small_loss(engine, index)
        engine.backward(loss)
        taken = engine.step()
        assert taken
        run.losses.append(loss.item())
        run.norms.append(engine.grad_norm)
    run.state = {name: dict(state) for name, state in engine.named_state()}
    run.steps = engine.parameter_steps()
    return run


def _cut_off(*_: Any) -> None:
    raise InterruptedError


def needed(path: Path, placement: str) -> int:
    """The least host budget for all that is trained in the end, with the step taken by itself."""
    with make_engine(partly_frozen(), configured(path, ROOMY, placement)) as engine:
        train(engine)
        assert engine.plan.overlap.flow_bytes, "with room enough it stays"
        need: int = engine.plan.need_bytes["host"]
    return need


def assert_within_budgets(engine: Any, host: int) -> None:
    for name, tier in engine.report().tiers.items():
        assert tier.peak_bytes <= engine.plan.peak_bytes[name] <= tier.budget_bytes
    assert engine.report().tiers["host"].budget_bytes == host
    assert engine._parts.host.budget_bytes <= host
    plan = engine.plan
    used = plan.need_bytes["nvme"] + plan.overlap.held_nvme_bytes
    assert engine._parts.nvme.used_bytes == used


@pytest.mark.parametrize("left", ["nothing", "a part"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_room_makes_way_for_what_is_unfrozen(placement: str, left: str, tmp_path: Path) -> None:
    host = needed(tmp_path, placement) + (LEFT[placement] if left == "a part" else 0)
    with make_engine(
        partly_frozen(), configured(tmp_path, host, placement, overlaps=False)
    ) as engine:
        expected = train(engine)
        assert not engine.plan.overlap.flow_bytes
    with make_engine(partly_frozen(), configured(tmp_path, host, placement)) as engine:
        before = engine.plan.overlap
        assert before.flow_bytes, "nothing is overlapped"
        found = train(engine)
        after = engine.plan.overlap
        assert (after.flow_bytes > 0) == (left == "a part")
        assert after.host_bytes < before.host_bytes
        assert (after.held_nvme_bytes > 0) == (left == "a part")
        assert_within_budgets(engine, host)
        found_later = train(engine, steps=2)
    assert torch.equal(torch.tensor(found.losses), torch.tensor(expected.losses))
    assert_identical(found, expected)
    assert found_later.losses[-1] != found.losses[-1]


def test_wherever_it_fits_with_the_step_taken_by_itself_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets around the one from which on it fits; there the room has to make way."""
    overlapped: list[tuple[bool, bool]] = []  # at the start and in the end

    def outcome(host: int) -> list[float] | None:
        config = configured(tmp_path, host, "optimizer on nvme")
        with make_engine(partly_frozen(), config) as engine:
            at_start = engine.plan.overlap.flow_bytes > 0
            try:
                return train(engine).losses
            except DoesNotFitError:
                return None
            finally:
                overlapped.append((at_start, engine.plan.overlap.flow_bytes > 0))

    need = needed(tmp_path, "optimizer on nvme")
    budgets = [need - (4 << 10), *range(need, need + (64 << 10), 12 << 10)]
    found = [outcome(host) for host in budgets]
    assert [losses is None for losses in found] == [True, *[False] * (len(budgets) - 1)]
    assert set(overlapped[1:]) == {(True, False), (True, True)}
    monkeypatch.setattr(planning, "flow_bytes", lambda *_: 0)
    assert found == [outcome(host) for host in budgets]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_beside_an_accelerator(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on the host are read in copies, which the room has to lend as well."""
    use_accelerator(monkeypatch)
    host = needed(tmp_path, placement)
    with make_engine(
        partly_frozen(), configured(tmp_path, host, placement, overlaps=False)
    ) as engine:
        expected = train(engine)
    with make_engine(partly_frozen(), configured(tmp_path, host, placement)) as engine:
        before = engine.plan.overlap.host_bytes
        found = train(engine)
        assert engine.plan.overlap.host_bytes < before
        assert_within_budgets(engine, host)
    assert_identical(found, expected)


@pytest.mark.parametrize("delay", [0, 8])
def test_while_writes_are_late(delay: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = "weights on nvme"
    host = needed(tmp_path, placement)
    with make_engine(
        partly_frozen(), configured(tmp_path, host, placement, overlaps=False)
    ) as engine:
        expected = train(engine)

    def open_io(config: OffloadConfig) -> IoEngine:
        del config
        fault = f"op=write,nth=1,count=1000000,delay={delay}"
        return IoEngine(backend="threads", threads=3, fault=fault)

    monkeypatch.setattr(build, "open_io", open_io)
    with make_engine(partly_frozen(), configured(tmp_path, host, placement)) as engine:
        assert engine.plan.overlap.flow_bytes, "nothing is overlapped"
        found = train(engine)
        assert not engine.plan.overlap.host_bytes
    assert_identical(found, expected)


@pytest.mark.parametrize("left", [0, 20 << 10])
def test_extents_for_held_versions_make_way(left: int, tmp_path: Path) -> None:
    config = configured(tmp_path, ROOMY, "optimizer on nvme")
    with make_engine(partly_frozen(), config) as engine:
        expected = train(engine)
        need = engine.plan.need_bytes["nvme"]
    capacity = need + left
    config["tiers"]["nvme"]["capacity"] = capacity
    with make_engine(partly_frozen(), config) as engine:
        before = engine.plan.overlap
        assert before.held_nvme_bytes
        found = train(engine)
        after, store = engine.plan.overlap, engine._parts.nvme
        assert after.held_share < before.held_share
        assert after.held_nvme_bytes < before.held_nvme_bytes
        assert after.flow_bytes
        assert store.used_bytes == need + after.held_nvme_bytes
        assert store.used_bytes <= store.peak_bytes <= engine.plan.peak_bytes["nvme"] <= capacity
        given = before.held_nvme_bytes - after.held_nvme_bytes
        assert _blocks_bytes(store) - store.used_bytes < given
        train(engine, steps=2)
    assert_identical(found, expected)


def _blocks_bytes(store: Any) -> int:
    """What the disks have given to the files."""
    return sum(os.fstat(file.io.fd).st_blocks * 512 for file in store._files)


def test_extents_stay_where_a_file_system_gives_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    config = configured(tmp_path, ROOMY, "optimizer on nvme")
    with make_engine(partly_frozen(), config) as engine:
        expected = train(engine)
        need = engine.plan.need_bytes["nvme"]
    config["tiers"]["nvme"]["capacity"] = need
    monkeypatch.setattr(backing_files, "give_back_range", refuse)
    with make_engine(partly_frozen(), config) as engine:
        first = train(engine, steps=3)
        plan, used = engine.plan, engine._parts.nvme.used_bytes
        with pytest.raises(BudgetError, match="the extents of records and their shadows"):
            train(engine, steps=1)
        assert engine.plan is plan
        assert engine._parts.nvme.used_bytes == used == plan.peak_bytes["nvme"]
        engine.module[0].weight.requires_grad_(False)
        index = engine.global_steps
        engine.backward(small_loss(engine, index))
        assert engine.step()
    assert first.losses == expected.losses[:3]


def refuse_files(engine: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    reserve = engine._parts.nvme.reserve

    def refuse(sizes: Any, **options: Any) -> None:
        if sizes:
            raise OffloadError("no room on this disk")
        reserve(sizes, **options)

    monkeypatch.setattr(engine._parts.nvme, "reserve", refuse)
    return "no room on this disk"


def refuse_extents(engine: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Those for held versions in the new room; there are some for the old one."""
    reserve = engine._parts.nvme.reserve
    refused: list[bool] = []

    def refuse(sizes: Any, **options: Any) -> Any:
        if not sizes:
            refused.append(len(refused) % 2 == 0)
            if refused[-1]:
                raise OffloadError("this disk is full")
        return reserve(sizes, **options)

    monkeypatch.setattr(engine._parts.nvme, "reserve", refuse)
    return "this disk is full"


def refuse_memory(engine: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(promotion, "available_host_bytes", lambda: 0)
    return "are available under the machine's"


def refuse_homes(engine: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The arena has grown by then."""

    def refuse(*_: Any) -> None:
        raise OffloadError("no zeros today")

    monkeypatch.setattr(engine._promotion, "_zero", refuse)
    return "no zeros today"


def keep_a_piece(engine: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """As a write that hangs does."""
    piece = engine._parts.updates._held.share.take(1)
    monkeypatch.setattr(engine, "_kept", piece, raising=False)
    return "4096 bytes of the overlapped optimizer step cannot be given back"


@pytest.mark.parametrize(
    "trouble", [refuse_files, refuse_extents, refuse_memory, refuse_homes, keep_a_piece]
)
def test_an_error_leaves_the_room_as_it_was(
    trouble: Callable[[Any, pytest.MonkeyPatch], str], tmp_path: Path
) -> None:
    placement = "optimizer on nvme"
    host = needed(tmp_path, placement)
    with make_engine(partly_frozen(), configured(tmp_path, host, placement)) as engine:
        expected = train(engine)
    with make_engine(partly_frozen(), configured(tmp_path, host, placement)) as engine:
        first = train(engine, steps=1)
        arena, updates, plan = engine._parts.host, engine._parts.updates, engine.plan
        disks = engine._parts.nvme

        def held() -> tuple[Any, ...]:
            room = updates._held.share.nbytes, disks._num_holdable.total()
            return arena.budget_bytes, arena.used_bytes, arena.owners(), room

        before = held()
        with pytest.MonkeyPatch.context() as broken:
            message = trouble(engine, broken)
            for _ in range(2):
                with pytest.raises(OffloadError, match=message):
                    train(engine, steps=1)
            if trouble is keep_a_piece:
                engine._kept.release()
        assert engine.plan is plan
        assert held() == before
        for name, parameter in engine.module.named_parameters():
            parameter.requires_grad_(name.startswith(("7", "8")))
        overlapped = list(updates._buckets)
        assert overlapped
        rest = train(engine, steps=STEPS - 1)
    rest.losses, rest.norms = first.losses + rest.losses, first.norms + rest.norms
    assert_identical(rest, expected)
