"""The arrows between streams, on an accelerator that checks what is ordered before what.

Every test of an arrow takes it away once: then there has to be a race.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.engine.paging.page_in import PageIn
from offload.tiers.accelerator import AcceleratorTier
from offload.tiers.simulated_streams import RaceError, SimulatedAccelerator
from tests.engine.accelerator import (
    PLACEMENTS,
    STEPS,
    WatchedOps,
    assert_same,
    loss_of,
    make_config,
    make_ids,
    make_model,
    train,
    use_accelerator,
)

Streams = Callable[[SimulatedAccelerator, int], Any]


def _one(tier: SimulatedAccelerator, micro_step: int) -> Any:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _in_turn(tier: SimulatedAccelerator, micro_step: int) -> Iterator[None]:
    """Each micro-step on a stream of its own, ordered after the one before as a user has to."""
    mine, others = f"side {micro_step % 2}", f"side {(micro_step + 1) % 2}"
    tier.synchronize(mine, after="compute")
    tier.synchronize(mine, after=others)
    with tier.on_stream(mine):
        yield


def watched(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: str,
    streams: Streams,
    *,
    seed: int = 0,
    compute: str = "fp32",
    evaluate: bool = False,
    model: nn.Module | None = None,
    **sections: Any,
) -> Any:
    """Train on a checked accelerator; `train`'s results, and the tier."""
    opened = use_accelerator(monkeypatch, seed=seed)
    ids = make_ids()
    losses = []
    config = make_config(path, PLACEMENTS[placement], compute, 2, **sections)
    with offload.initialize(model or make_model(), config) as engine:
        (tier,) = opened
        with WatchedOps(tier) as ops:
            for micro_step in range(STEPS * 2):
                if micro_step == STEPS:
                    tier.host_waits.clear()
                with streams(tier, micro_step):
                    loss = loss_of(engine, ids[micro_step % 4 :])
                    engine.backward(loss)
                    losses.append(loss.item())
                if evaluate:
                    with torch.no_grad():
                        loss_of(engine, ids)
                engine.step()
        assert ops.num_ops > 10 * STEPS
        waits = dict(tier.host_waits)
        return losses, dict(engine.named_state()), waits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("streams", [_one, _in_turn])
@pytest.mark.parametrize("placement", ["host", "nvme", "mixed"])
def test_every_use_is_ordered(
    placement: str, streams: Streams, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path, PLACEMENTS["host"], "fp32", 2)
    assert_same(watched(tmp_path, monkeypatch, placement, streams, seed=seed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", ["device", "host", "nvme", "mixed"])
def test_every_use_is_ordered_with_other_delays(
    placement: str, compute: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path, PLACEMENTS["host"], compute, 2)
    options = {"seed": seed, "compute": compute, "evaluate": seed % 2 == 0}
    assert_same(watched(tmp_path, monkeypatch, placement, _in_turn, **options), expected)


def test_a1_a_copy_out_waits_for_what_it_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AcceleratorTier,
        "_start_copy",
        lambda tier, dst, src, lane, what: tier._copy(dst, src, lane, what),
    )
    with pytest.raises(RaceError, match="has not made yet: A1"):
        watched(tmp_path, monkeypatch, "host", _one)


def test_a2_an_op_waits_for_the_copy_of_what_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedAccelerator, "make_current_wait", lambda tier, moved: None)
    with pytest.raises(RaceError, match="does not wait for its copy"):
        watched(tmp_path, monkeypatch, "host", _one)


@pytest.mark.parametrize("has_arrow", [True, False])
def test_a3_an_op_waits_for_what_another_stream_has_fetched(
    has_arrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(tier: AcceleratorTier, lease: Any) -> None:
        lease.streams.add(tier._current())

    if not has_arrow:
        monkeypatch.setattr(AcceleratorTier, "enter", enter)
    opened = use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 1)
    with offload.initialize(make_model(), config) as engine, WatchedOps(opened[0]):
        monkeypatch.setattr(opened[0].random, "random", lambda: 0.0)  # nothing is seen to end
        layer, x = engine.module[1], torch.ones(2, 64)
        with opened[0].on_stream("one"):
            expected = layer(x)
        with opened[0].on_stream("two"):
            if has_arrow:
                assert torch.equal(layer(x), expected)
            else:
                with pytest.raises(RaceError, match="A2 or A3"):
                    layer(x)


@contextlib.contextmanager
def _apart(tier: SimulatedAccelerator, micro_step: int) -> Iterator[None]:
    """Training on a stream that waits for no other."""
    with tier.on_stream("side"):
        yield


def test_a4_what_another_stream_uses_is_not_copied_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(tmp_path, monkeypatch, "host", _apart, evaluate=True)
    monkeypatch.setattr(AcceleratorTier, "renew", lambda tier, lease: lease.streams.clear())
    with pytest.raises(RaceError, match="still uses: A1 or A4"):
        watched(tmp_path, monkeypatch, "host", _apart, evaluate=True)


def test_the_host_waits_for_no_fetch_in_the_steady_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of pages of several chunks, whose copies are all queued at once."""

    def waits() -> Any:
        wide = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 4096), nn.Linear(4096, 64))
        tiers = {"device": {"kind": "cpu", "memory": "5MiB"}, "host": {"memory": "32MiB"}}
        return watched(tmp_path, monkeypatch, "host", _one, model=wide, tiers=tiers)[2]

    assert "h2d" not in waits()
    monkeypatch.setattr(PageIn, "_num_staged", property(_num_started))
    assert waits()["h2d"]


def _num_started(page_in: PageIn) -> int:
    """As if chunks at a home on the host took staging, too."""
    return len(page_in._reading) + len(page_in._copying)


@pytest.mark.parametrize("widths", [(64, 64, 64, 64), (64, 200, 32, 120)])
def test_a_step_allocates_no_memory_for_weights(
    widths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where pages differ in size and the slab holds only a few of them."""
    torch.manual_seed(0)
    sizes = [64, *widths, 64]
    layers = [nn.Linear(one, other) for one, other in itertools.pairwise(sizes)]
    model = nn.Sequential(nn.Embedding(64, 64), *layers)
    sections: dict[str, Any] = {"partition": {"bucket_elements": 4096}}
    expected = train(
        tmp_path, PLACEMENTS["host"], "fp32", 1, model=copy.deepcopy(model), **sections
    )
    opened = use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 1, **sections)
    least = offload.plan(model, config).need_bytes["device"]
    tiers = {**config["tiers"], "device": {"kind": "cpu", "memory": least + 4096}}
    reserve, allocate = SimulatedAccelerator.reserve, SimulatedAccelerator._allocate
    allocated: list[int] = []

    def counted(tier: SimulatedAccelerator, nbytes: int) -> torch.Tensor:
        allocated.append(nbytes)
        return allocate(tier, nbytes)

    def reserved(tier: SimulatedAccelerator, nbytes: int) -> None:
        reserve(tier, nbytes)
        monkeypatch.setattr(SimulatedAccelerator, "_allocate", counted)

    monkeypatch.setattr(SimulatedAccelerator, "reserve", reserved)
    found = train(
        tmp_path, PLACEMENTS["host"], "fp32", 1, model=model, **{**sections, "tiers": tiers}
    )
    assert_same(found, expected)
    assert len(opened) == 1
    assert allocated == []
