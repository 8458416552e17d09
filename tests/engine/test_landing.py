"""Gradients leave an accelerator while backward goes on: order, room, errors, and what may wait."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.engine import departed
from offload.engine.gradients import GradientHome
from offload.engine.landing import LandingRing
from offload.errors import EngineStateError, StorageError
from offload.native.fault_spec import FaultSpec
from offload.partition.arrays import tensor_bits
from offload.partition.blocks import BlockStore
from offload.tiers.host import HostArena
from offload.tiers.simulated import LaneModel, SimulatedDeviceTier, SimulatedIo
from tests.engine.accelerator import (
    PLACEMENTS,
    assert_same,
    loss_of,
    make_config,
    make_ids,
    make_model,
    train,
    use_accelerator,
)
from tests.threads import run_in_threads

PAGE = 4096


def open_store(host_pages: int = 64, *, seed: int = 0, fault: str | None = None) -> BlockStore:
    """A store over a simulated accelerator, with homes of nothing."""
    lanes = {"d2h": LaneModel(bytes_per_second=1e9, latency_seconds=0.0, jitter_seconds=1e-2)}
    io = SimulatedIo(lanes=lanes, seed=seed, fault=fault)
    device = SimulatedDeviceTier(1 << 20, io, host_addressable=False)
    host = HostArena(host_pages * PAGE)
    return BlockStore(host=host, device=device, nvme=None, deadline_seconds=1.0)


def values_of(number: int, numel: int = 256) -> torch.Tensor:
    return torch.full((numel,), float(number))


def take(ring: LandingRing[int]) -> tuple[int, list[float]]:
    what = ring.oldest
    with ring.taken() as array:
        return what, sorted(set(array.tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_copies_land_in_the_order_of_their_start(seed: int) -> None:
    store = open_store(seed=seed)
    ring: LandingRing[int] = LandingRing(store, depth=4, device_bytes=1 << 20)
    ring.admit(PAGE)
    for number in range(8):
        assert ring.start(values_of(number), number, gives_back=1024, owner="test")
    assert store.host.used_bytes == 4 * PAGE
    assert ring.leaving_bytes == 8 * 1024
    assert [take(ring) for _ in range(8)] == [(n, [float(n)]) for n in range(8)]
    assert (ring.leaving_bytes, store.host.used_bytes) == (0, 0)


def test_a_full_ring_starts_nothing_before_the_oldest_has_landed() -> None:
    store = open_store()
    ring: LandingRing[int] = LandingRing(store, depth=2, device_bytes=1 << 20)
    ring.admit(PAGE)
    assert ring.start(values_of(0, 1024), 0, gives_back=PAGE, owner="test")
    assert ring.start(values_of(1, 1024), 1, gives_back=PAGE, owner="test")
    assert not ring.start(values_of(2, 64), 2, gives_back=256, owner="test")
    assert take(ring) == (0, [0.0])
    assert ring.start(values_of(2, 64), 2, gives_back=256, owner="test")
    assert [take(ring), take(ring)] == [(1, [1.0]), (2, [2.0])]


def test_without_room_for_the_ring_one_copy_is_in_flight() -> None:
    store = open_store(host_pages=2)
    ring: LandingRing[int] = LandingRing(store, depth=4, device_bytes=1 << 20)
    ring.admit(PAGE)
    assert ring.start(values_of(0), 0, gives_back=1024, owner="test")
    assert store.host.used_bytes == PAGE
    assert not ring.start(values_of(1), 1, gives_back=1024, owner="test")
    assert take(ring) == (0, [0.0])
    assert store.host.used_bytes == 0
    held = store.host.lease(2 * PAGE, "others")
    assert not ring.start(values_of(1), 1, gives_back=1024, owner="test")
    held.release()


def test_a_copy_that_fails_gives_its_room_back_and_a_hung_one_keeps_it() -> None:
    store = open_store(fault="op=copy,nth=1,errno=5;op=copy,nth=3,drop=1")
    ring: LandingRing[int] = LandingRing(store, depth=2, device_bytes=1 << 20)
    ring.admit(PAGE)
    assert ring.start(values_of(0), 0, gives_back=1024, owner="test")
    with pytest.raises(StorageError), ring.taken():
        pass
    assert (len(ring), store.host.used_bytes) == (0, 0)
    assert ring.start(values_of(1), 1, gives_back=1024, owner="test")
    assert ring.start(values_of(2), 2, gives_back=1024, owner="test")
    ring.clear()
    assert (len(ring), ring.leaving_bytes) == (0, 0)
    assert store.host.used_bytes == 2 * PAGE, "a copy that never ends may still write there"


# -- in an engine ------------------------------------------------------------------------------


class _Reused(torch.autograd.Function):
    """Doubles; its gradient is a buffer that the next backward overwrites."""

    buffer: torch.Tensor

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if _Reused.buffer.dtype != gradient.dtype:
            _Reused.buffer = _Reused.buffer.to(gradient.dtype)
        return _Reused.buffer.copy_(gradient).mul_(2)


class _Scaled(nn.Module):
    """Layers whose weights get the one buffer as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 64)
        self.scales = nn.ParameterList(torch.rand(64, 64) / 8 for _ in range(5))
        _Reused.buffer = torch.zeros(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for scale in self.scales:
            hidden = hidden + torch.tanh(hidden @ _Reused.apply(scale))
        return hidden


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_gradient_in_a_buffer_of_the_user_is_home_before_the_buffer_changes(
    compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path, PLACEMENTS["host"], compute, 2, model=_Scaled())
    use_accelerator(monkeypatch)
    assert_same(train(tmp_path, PLACEMENTS["host"], compute, 2, model=_Scaled()), expected)
    monkeypatch.setattr(departed, "_is_shared", lambda gradients: False)
    hasty = train(tmp_path, PLACEMENTS["host"], compute, 2, model=_Scaled())
    assert hasty[0] != expected[0]


def test_what_is_put_into_grad_is_home_before_it_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 1)
    model = make_model().requires_grad_(False)
    for parameter in (model.get_parameter("1.bias"), model.get_parameter("4.weight")):
        parameter.requires_grad_(True)  # the larger one makes room for several of the other
    with offload.initialize(model, config) as engine:
        mine = torch.ones(64)
        engine.module[1].bias.grad = mine
        engine.backward(loss_of(engine, make_ids()) * 0.0)
        mine.zero_()
        found = dict(engine.named_state())["1.bias"]["gradient"]
        assert torch.equal(found, torch.ones(64))


def test_gradients_are_on_their_way_while_backward_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_accelerator(monkeypatch)
    in_flight = []
    arrive, start = GradientHome.arrive, LandingRing.start

    def start_within_bounds(
        ring: LandingRing[Any], values: torch.Tensor, what: Any, *, gives_back: int, owner: str
    ) -> bool:
        assert ring.leaving_bytes + gives_back <= ring.device_bytes
        return start(ring, values, what, gives_back=gives_back, owner=owner)

    def watched(home: GradientHome, state: Any, gradient: torch.Tensor) -> None:
        arrive(home, state, gradient)
        assert home._landing is not None
        assert home._landing.leaving_bytes <= home._landing.device_bytes
        in_flight.append(len(home._landing))

    monkeypatch.setattr(GradientHome, "arrive", watched)
    monkeypatch.setattr(LandingRing, "start", start_within_bounds)
    with offload.initialize(
        make_model(), make_config(tmp_path, PLACEMENTS["host"], "fp32", 1)
    ) as engine:
        engine.backward(loss_of(engine, make_ids()))
        assert max(in_flight) > 1
        assert engine._parts.gradients._landing, "backward does not wait for the last ones"
        engine.step()
        assert not engine._parts.gradients._landing


def test_without_device_room_for_two_gradients_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path, PLACEMENTS["host"], "fp32", 2)
    use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 2)
    roomy = offload.plan(make_model(), config)
    largest = 64 * 64 * 4
    assert (roomy.gradient_bytes, roomy.landing_bytes) == (2 * largest, largest)
    memory = roomy.need_bytes["device"] - 1
    tight = {**config["tiers"], "device": {"kind": "cpu", "memory": memory}}
    planned = offload.plan(make_model(), {**config, "tiers": tight})
    assert planned.fits
    assert (planned.gradient_bytes, planned.landing_bytes) == (largest, 0)
    assert_same(train(tmp_path, PLACEMENTS["host"], "fp32", 2, tiers=tight), expected)


@pytest.mark.parametrize("seed", range(3))
def test_threads_in_backward_at_once_are_all_counted(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers add up to the same bits in every order."""
    use_accelerator(monkeypatch, seed=seed)
    config = make_config(tmp_path, PLACEMENTS["nvme"], "fp32", 2)
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    with offload.initialize(layers, config) as engine:

        def run() -> None:
            for layer in engine.module:
                layer(torch.ones(2, 64)).sum().backward()

        for _ in range(2):
            run_in_threads(*[run] * 3)
        state = dict(engine.named_state())
        for name, tensors in state.items():
            assert torch.equal(tensors["gradient"], torch.full_like(tensors["weight"], 12.0)), name


@pytest.mark.parametrize("nth", [1, 19])
@pytest.mark.parametrize("through_engine", [True, False])
def test_a_gradient_that_fails_to_land_stops_the_step(
    through_engine: bool, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path, PLACEMENTS["host"], "fp32", 1)
    opened = use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 1)
    with offload.initialize(make_model(), config) as engine:
        used_bytes = engine.report().tiers["host"].used_bytes
        start, io = opened[0].start_copy_out, opened[0]._io
        assert isinstance(io, SimulatedIo)
        num_started = itertools.count(1)

        def fail_once(dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Any:
            if next(num_started) == nth:
                io._fault = FaultSpec("op=copy,errno=5")
            return start(dst, src, what)

        monkeypatch.setattr(opened[0], "start_copy_out", fail_once)
        losses = []
        loss = loss_of(engine, make_ids())
        if through_engine:
            with pytest.raises(StorageError):
                engine.backward(loss)
                engine.step()
        else:
            with pytest.raises(StorageError):
                loss.backward()
                engine.optimizer.step()
            with pytest.raises(EngineStateError, match="was lost on its way home"):
                engine.optimizer.step()
        engine.optimizer.zero_grad()
        assert engine.report().tiers["host"].used_bytes == used_bytes
        for micro_step in range(len(expected[0])):
            loss = loss_of(engine, make_ids()[micro_step % 4 :])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert_same((losses, dict(engine.named_state())), expected)


def test_closing_waits_for_gradients_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["host"], "fp32", 2)
    with offload.initialize(make_model(), config) as engine:
        engine.backward(loss_of(engine, make_ids()))
        landing = engine._parts.gradients._landing
        assert landing
    assert not landing
    assert all(transfer.done() for transfer in opened[0]._in_flight)


def test_a_missing_wait_for_a_gradient_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_accelerator(monkeypatch)
    expected = train(tmp_path, PLACEMENTS["host"], "fp32", 1)

    @contextlib.contextmanager
    def hasty(ring: LandingRing[Any]) -> Iterator[Any]:
        copy = ring._in_flight[0]
        yield tensor_bits(copy.memory.clone().view(copy.dtype))
        with taken(ring):
            pass

    taken = LandingRing.taken
    monkeypatch.setattr(LandingRing, "taken", hasty)
    found = train(tmp_path, PLACEMENTS["host"], "fp32", 1)
    assert found[0] != expected[0]
