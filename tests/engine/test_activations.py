"""Activations off the device: same bits, moved once, given back, and never an error for want of
room.
"""

from __future__ import annotations

import errno
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.config import OffloadConfig
from offload.engine import build
from offload.engine.activations import store as activations_module
from offload.engine.activations.copies import ActivationCopy, Place
from offload.engine.activations.store import ActivationStore
from offload.engine.activations.views import View, view_of
from offload.errors import (
    ChecksumError,
    ConfigError,
    DoesNotFitError,
    EngineStateError,
    StorageError,
)
from offload.native import IoEngine
from offload.telemetry import ActivationReport
from offload.tiers.simulated import SimulatedIo
from tests.oracle import (
    Run,
    assert_identical,
    continue_engine,
    language_loss,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
    transformers_model,
)
from tests.threads import run_in_threads

STEPS = 3


def with_activations(
    tier: str, path: Path, activations: str, *, minimum: int = 64, **sections: Any
) -> dict[str, Any]:
    """Settings with state in `tier`; keys of the section `activations` come as `sections`."""
    own = sections.pop("share", {})
    config = settings(tier, path, placement={"activations": activations}, **sections)
    if activations != "device":
        config["activations"] = {"min_bytes": minimum, **own}
    return config


# -- views -----------------------------------------------------------------------------------------


def base(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


DENSE = {
    "whole": lambda: base(6, 8),
    "transposed": lambda: base(6, 8).t(),
    "part": lambda: base(6, 8)[2:5],
    "misaligned": lambda: base(100)[3:],
    "permuted": lambda: base(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: base(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "integers": lambda: torch.arange(12).view(3, 4),
    "mask": lambda: base(5, 7) > 0,
    "complex": lambda: torch.complex(base(4), base(4)),
    "expanded": lambda: base(4, 1, 5).expand(4, 3, 5),
    "scalar": lambda: base(1)[0],
}
GAPPED = {
    "slice of a fused projection": lambda: base(4, 24)[:, 8:16],
    "every other": lambda: base(20)[::2],
    "slice, transposed": lambda: base(4, 24)[:, 8:16].t(),
    "slice, expanded": lambda: base(4, 1, 24)[..., 8:16].expand(4, 3, 8),
    "diagonal": lambda: base(5, 5).diagonal(),
}


@pytest.mark.parametrize("kind", [*DENSE, *GAPPED])
def test_a_view_comes_back_as_it_lay(kind: str) -> None:
    tensor = (DENSE | GAPPED)[kind]()
    view = view_of(tensor)
    assert view is not None
    assert view.is_dense == (kind in DENSE)
    saved = view.bytes_of(tensor)
    assert saved.numel() == view.nbytes
    repeats = 3 if "expanded" in kind else 1
    assert view.nbytes == tensor.nbytes // repeats
    memory = view.new_bytes(tensor.device)
    memory.copy_(saved)
    back = view.tensor_over(memory)
    assert torch.equal(back, tensor)
    assert back.dtype == tensor.dtype
    assert back.stride() == tensor.stride()
    assert back.data_ptr() % 64 == tensor.data_ptr() % 64
    assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        base(20).as_strided((5, 4), (2, 1)),
        base(20).unfold(0, 6, 2),
        base(9).as_strided((3, 3), (1, 1)),
    ],
)
def test_overlapping_elements_stay(tensor: torch.Tensor) -> None:
    assert view_of(tensor) is None


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
@pytest.mark.parametrize("name", ["llama", "llama reentrant", "llama not_reentrant", "gpt2", "t5"])
def test_activations_on_any_tier_give_the_same_bits(name: str, tier: str, tmp_path: Path) -> None:
    def run(activations: str, **share: Any) -> Run:
        config = with_activations(tier, tmp_path, activations, share=share)
        model = transformers_model(*name.split())
        return train_engine(model, config, language_loss, steps=STEPS)

    expected = run("device")
    assert expected.report.activations == ActivationReport()
    for activations in ("host", "nvme"):
        found = run(activations)
        assert_identical(found, expected)
        moved = found.report.activations.moved_bytes
        assert moved > 10_000
        lanes = found.report.lanes
        base_lanes = expected.report.lanes
        assert lanes["d2h"].bytes - base_lanes["d2h"].bytes == moved
        written = lanes["nvme_write"].bytes - base_lanes["nvme_write"].bytes
        assert written == 0 or activations == "nvme"
    tight = run("nvme", host_memory="36KiB")
    assert_identical(tight, expected)
    assert tight.report.activations.host_peak_bytes <= 36 << 10
    assert tight.report.activations.nvme_peak_bytes > 0
    spilled = run("host", host_memory="36KiB")
    assert_identical(spilled, expected)
    assert spilled.report.activations.nvme_peak_bytes > 0


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_and_accumulation(compute: str, tmp_path: Path) -> None:
    training = {"training": {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}}
    runs = [
        train_engine(
            small_model(),
            with_activations("host", tmp_path, activations, compute=compute, **training),
            small_loss,
            steps=STEPS,
        )
        for activations in ("device", "nvme")
    ]
    assert_identical(runs[1], runs[0])
    assert runs[1].report.activations.moved_bytes > 0


def test_prefetch_changes_no_number(tmp_path: Path) -> None:
    def run(**overlap: Any) -> Run:
        config = with_activations(
            "host", tmp_path, "nvme", share={"host_memory": "16KiB"}, overlap=overlap
        )
        return train_engine(small_model(), config, small_loss, steps=STEPS)

    without = run(prefetch=False)
    for depth in (1, 20):
        assert_identical(run(prefetch_depth=depth), without)


# -- one tensor, many uses -------------------------------------------------------------------------


class Projections(nn.Module):
    """One input saved by three ops as two shapes, and slices of one output saved by two more."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(32, 96)
        self.other = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2.0
        q, k, v = self.fused(x.view(-1, 32)).chunk(3, dim=-1)
        return (q * k).sigmoid() * v + self.other(x).view(-1, 32) * x.view(-1, 32)


def project(engine: Any) -> torch.Tensor:
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(2))
    loss: torch.Tensor = engine(x).square().sum()
    return loss


def projections_engine(path: Path, activations: str, **sections: Any) -> Any:
    torch.manual_seed(0)
    config = with_activations("host", path, activations, minimum=1024, **sections)
    return make_engine(Projections(), config)


def test_a_tensor_saved_by_several_ops_moves_once(tmp_path: Path) -> None:
    one = 4 * 16 * 32 * 4
    with projections_engine(tmp_path, "host") as engine:
        engine.backward(project(engine))
        report = engine._parts.activations.report()
        # x three times, the sigmoid twice; q, k and v
        assert report.moved_bytes == 5 * one
        assert report.deduplicated_bytes == 3 * one
        gradients = {name: state["gradient"] for name, state in engine.named_state()}
    with projections_engine(tmp_path, "device") as engine:
        engine.backward(project(engine))
        for name, state in engine.named_state():
            assert torch.equal(state["gradient"], gradients[name]), name


def test_a_tensor_that_has_changed_is_another_one(tmp_path: Path) -> None:
    """The first save of it is never used in backward, so the change in between is no error."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * 1.0
            unused = self.linear(y)
            y.add_(1.0)
            return unused, self.linear(y).sum()

    def gradient(activations: str) -> torch.Tensor:
        torch.manual_seed(0)
        with make_engine(Changed(), with_activations("host", tmp_path, activations)) as engine:
            unused, loss = engine(base(32, 32))
            engine.backward(loss)
            del unused
            return dict(engine.named_state())["linear.weight"]["gradient"]

    assert torch.equal(gradient("nvme"), gradient("device"))


def test_what_the_module_owns_stays(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.register_buffer("mask", torch.ones(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.mask).sum()

    with make_engine(Masked(), with_activations("host", tmp_path, "host")) as engine:
        x = torch.randn(32, 32)
        loss = engine(x)
        assert engine._parts.activations.report().moved_bytes == x.nbytes
        engine.backward(loss)


def push_out(engine: Any) -> None:
    """Let everything that is saved be on nvme only."""
    store = engine._parts.activations
    store.settle()
    store._advance()
    store.settle()
    for copy in list(store._at[Place.ON_BOTH].values()):
        copy.drop_host()
    assert len(store._at[Place.ON_NVME]) == len(store._alive) > 0


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose reads and writes end only when somebody waits for them."""
    monkeypatch.setattr(build, "open_io", lambda config: SimulatedIo(seed=5))


@pytest.mark.usefixtures("slow_disk")
def test_what_is_on_its_way_out_is_not_read_back(tmp_path: Path) -> None:
    with projections_engine(tmp_path, "nvme") as engine:
        loss = project(engine)
        engine.backward(loss)
        report = engine._parts.activations.report()
        assert report.forwarded_bytes == report.moved_bytes + report.deduplicated_bytes
        assert engine._parts.io.lanes()["nvme_read"][0] == 0
        engine.step()
        forwarded = {name: state["weight"] for name, state in engine.named_state()}
    with projections_engine(tmp_path, "nvme") as engine:
        loss = project(engine)
        push_out(engine)
        engine.backward(loss)
        assert engine._parts.activations.report().forwarded_bytes == 0
        assert engine._parts.io.lanes()["nvme_read"][0] > 0
        engine.step()
        for name, state in engine.named_state():
            assert torch.equal(state["weight"], forwarded[name]), name


@pytest.mark.usefixtures("slow_disk")
def test_backward_reads_ahead_in_the_opposite_order(tmp_path: Path) -> None:
    with any_engine(tmp_path, overlap={"prefetch_depth": 2}) as engine:
        loss = small_loss(engine, 0)
        store = engine._parts.activations
        push_out(engine)
        numbers = sorted(store._alive)
        seen: list[tuple[int, list[int]]] = []
        unpack = store.unpack

        def watched(shared: Any, view: Any) -> torch.Tensor:
            tensor = unpack(shared, view)
            seen.append((shared.copy.number, sorted(store._at[Place.READING])))
            return tensor

        store.unpack = watched
        engine.backward(loss)
        number, reading = seen[0]
        assert number == numbers[-1]
        assert reading == numbers[-3:-1]


def test_the_device_waits_before_it_holds_too_much_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "open_io", lambda config: SimulatedIo(seed=5))
    monkeypatch.setattr(activations_module, "_MOST_LEAVING_BYTES", 8192)
    most = 0
    move_out = ActivationStore._move_out

    def watched(store: ActivationStore, tensor: torch.Tensor, view: View) -> Any:
        nonlocal most
        shared = move_out(store, tensor, view)
        most = max(most, sum(copy.nbytes for copy in store._at[Place.LEAVING].values()))
        return shared

    monkeypatch.setattr(ActivationStore, "_move_out", watched)
    with any_engine(tmp_path, "host") as engine:
        engine.backward(small_loss(engine, 0))
    assert 0 < most <= 8192


# -- what PyTorch promises -------------------------------------------------------------------------


def any_engine(path: Path, activations: str = "nvme", **sections: Any) -> Any:
    return make_engine(small_model(), with_activations("host", path, activations, **sections))


@pytest.mark.parametrize("activations", ["device", "host", "nvme", "auto"])
def test_a_change_in_place_is_an_error_as_in_plain_pytorch(
    activations: str, tmp_path: Path
) -> None:
    class Edited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.edits = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).exp()
            z = y * y
            if self.edits:
                y.add_(1.0)
            return z.sum()

    model = Edited()
    with make_engine(model, with_activations("host", tmp_path, activations)) as engine:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(engine(torch.randn(32, 32)))
        model.edits = False
        engine.backward(engine(torch.randn(32, 32)))
        taken = engine.step()
        assert taken


@pytest.mark.parametrize("activations", ["host", "nvme"])
def test_a_graph_can_be_used_again(activations: str, tmp_path: Path) -> None:
    with any_engine(tmp_path, activations) as engine:
        loss = small_loss(engine, 0)
        engine.backward(loss, retain_graph=True)
        once = {name: state["gradient"] for name, state in engine.named_state()}
        engine.optimizer.zero_grad()
        engine._parts.activations.settle()
        engine.backward(loss)
        for name, state in engine.named_state():
            assert torch.equal(state["gradient"], once[name]), name
        with pytest.raises(RuntimeError, match="second time"):
            engine.backward(loss)


@pytest.mark.parametrize("activations", ["host", "nvme"])
def test_double_backward(activations: str, tmp_path: Path) -> None:
    def penalty(engine: Any) -> torch.Tensor:
        x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (slope,) = torch.autograd.grad(engine(x).square().sum(), x, create_graph=True)
        loss: torch.Tensor = slope.square().sum()
        return loss

    def gradients(activations: str) -> dict[str, torch.Tensor]:
        with projections_engine(tmp_path, activations) as engine:
            engine.backward(penalty(engine))
            return {name: state["gradient"] for name, state in engine.named_state()}

    expected = gradients("device")
    for name, gradient in gradients(activations).items():
        assert torch.equal(gradient, expected[name]), name


def test_hooks_of_the_user_come_first(tmp_path: Path) -> None:
    with any_engine(tmp_path) as engine, torch.autograd.graph.save_on_cpu():
        engine.backward(small_loss(engine, 0))
        assert engine._parts.activations.report().moved_bytes == 0
        taken = engine.step()
        assert taken


def test_only_the_inputs_of_a_checkpointed_region_are_saved(tmp_path: Path) -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.second = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> Any:
            x = x.sin() + self.first.bias
            return checkpoint(
                lambda y: self.second(self.first(y).sin()).sin(), x, use_reentrant=False
            )

    model = Region()
    with make_engine(model, with_activations("host", tmp_path, "nvme")) as engine:
        x = torch.randn(32, 32)
        loss = engine(x).sum()
        assert engine._parts.activations.report().moved_bytes == x.nbytes
        engine.backward(loss)
        taken = engine.step()
        assert taken


def test_backward_in_several_threads(tmp_path: Path) -> None:
    def gradients(activations: str) -> dict[str, torch.Tensor]:
        with any_engine(tmp_path, activations, device=1 << 20) as engine:
            losses = [small_loss(engine, index).double() for index in range(4)]

            def work(loss: torch.Tensor) -> None:
                torch.autograd.grad(loss, engine.module[1].weight, retain_graph=True)

            run_in_threads(*(partial(work, loss) for loss in losses))
            engine.backward(sum(losses))
            return {name: state["gradient"] for name, state in engine.named_state()}

    expected = gradients("device")
    for name, gradient in gradients("nvme").items():
        assert torch.equal(gradient, expected[name]), name


# -- nothing is left behind ------------------------------------------------------------------------


def assert_nothing_held(engine: Any) -> None:
    store = engine._parts.activations
    gc.collect()
    store.settle()
    assert store._share.used_bytes == 0
    assert store._lanes.records.used_bytes == 0
    assert not store._alive
    assert not store._draining
    assert store._device_used_bytes == 0


@pytest.mark.parametrize("activations", ["host", "nvme", "auto"])
def test_every_way_a_graph_ends_gives_everything_back(activations: str, tmp_path: Path) -> None:
    share = {"device_memory": "8KiB"} if activations == "auto" else {}
    with any_engine(tmp_path, activations, share=share) as engine:
        store = engine._parts.activations
        engine.backward(small_loss(engine, 0))
        assert_nothing_held(engine)

        loss = small_loss(engine, 1)  # a graph that is dropped
        assert store._alive
        del loss
        assert_nothing_held(engine)

        def fail(*_: object) -> None:
            raise ValueError("no forward")

        handle = engine.module[4].register_forward_hook(fail)
        with pytest.raises(ValueError, match="no forward"):
            small_loss(engine, 2)
        handle.remove()
        assert_nothing_held(engine)

        loss = small_loss(engine, 3)  # a backward that fails halfway
        handle = engine.module[1].weight.register_hook(fail)
        with pytest.raises(ValueError, match="no forward"):
            engine.backward(loss)
        handle.remove()
        del loss
        engine.backward(small_loss(engine, 4))  # torch keeps what a failed one had ready till then
        taken = engine.step()
        assert taken
        assert_nothing_held(engine)


def test_transfers_may_end_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a transfer has ended is another answer each time it is asked for."""
    drawn = random.Random(0)
    is_busy = ActivationCopy.is_busy.fget
    assert is_busy is not None
    unsure = property(lambda copy: is_busy(copy) or drawn.random() < 0.5)
    with any_engine(tmp_path) as engine:
        for index in range(3):
            engine.backward(small_loss(engine, index))
            engine._parts.activations.settle()
            loss = small_loss(engine, index)
            engine._parts.activations.settle()
            with monkeypatch.context() as patch:
                patch.setattr(ActivationCopy, "is_busy", unsure)
                patch.setattr(ActivationCopy, "release", release_surely(is_busy))
                del loss
                for _ in range(20):
                    engine._parts.activations.collect()
        assert_nothing_held(engine)


def release_surely(is_busy: Callable[[ActivationCopy], bool]) -> Callable[[ActivationCopy], None]:
    """`release` as it is, which asserts that no transfer is in flight."""
    release = ActivationCopy.release

    def released(copy: ActivationCopy) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ActivationCopy, "is_busy", property(is_busy))
            release(copy)

    return released


def test_ops_that_save_their_own_result_are_freed_without_a_backward(tmp_path: Path) -> None:
    """A hook that hands back the tensor it was given would keep it in a cycle for ever."""

    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self) -> torch.Tensor:
            return self.weight.exp()

    for activations in ("device", "host"):
        model = Exponential()
        with make_engine(model, with_activations("host", tmp_path, activations)) as engine:
            storage = torch.multiprocessing.reductions.StorageWeakRef(engine().untyped_storage())
            gc.collect()
            assert storage.expired()


def test_a_graph_of_a_closed_engine_is_an_error(tmp_path: Path) -> None:
    with any_engine(tmp_path) as engine:
        loss = small_loss(engine, 0)
    with pytest.raises(EngineStateError, match="closed"):
        loss.backward()


# -- budgets ---------------------------------------------------------------------------------------


def test_the_plan_counts_the_room(tmp_path: Path) -> None:
    config = with_activations("host", tmp_path, "nvme", share={"host_memory": "96KiB"})
    device = offload.plan(small_model(), settings("host", tmp_path))
    planned = offload.plan(small_model(), config)
    assert planned.bytes["host"]["activations"] == 96 << 10
    for amounts in ("peak_bytes", "need_bytes"):
        more = getattr(planned, amounts)["host"] - getattr(device, amounts)["host"]
        assert more == 96 << 10
    assert planned.budget_bytes == {**device.budget_bytes, "nvme": planned.budget_bytes["nvme"]}
    assert "activations" in str(planned)
    assert "activations" not in str(device)
    with make_engine(small_model(), config) as engine:
        engine.backward(small_loss(engine, 0))
        engine.step()
        assert engine.report().tiers["host"].peak_bytes == planned.peak_bytes["host"]


def test_auto_room_is_what_the_host_has_left(tmp_path: Path) -> None:
    planned = offload.plan(small_model(), with_activations("host", tmp_path, "host"))
    assert planned.peak_bytes["host"] == planned.budget_bytes["host"] == 64 << 20
    planned = offload.plan(small_model(), with_activations("host", tmp_path, "nvme", host=4 << 30))
    assert planned.bytes["host"]["activations"] == 256 << 20


def test_room_that_the_host_does_not_have_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = small_model()
    config = with_activations("host", tmp_path, "host", share={"host_memory": "63.9MiB"})
    with pytest.raises(DoesNotFitError, match=r"activations.host_memory"):
        make_engine(model, config)
    assert type(model[1].weight) is nn.Parameter


def test_without_room_a_tensor_stays_and_one_warning_tells(tmp_path: Path) -> None:
    config = with_activations("host", tmp_path, "host", share={"host_memory": "8KiB"})
    del config["tiers"]["nvme"]
    calm = train_engine(small_model(), settings("host"), small_loss, steps=STEPS)
    with pytest.warns(RuntimeWarning, match=r"activations.host_memory has 8.00 KiB") as caught:
        run = train_engine(small_model(), config, small_loss, steps=STEPS)
    assert len(caught) == 1
    assert_identical(run, calm)
    assert run.report.activations.kept_bytes > 0
    assert run.report.activations.host_peak_bytes <= 8192


def test_a_full_disk_keeps_the_rest_on_the_device(tmp_path: Path) -> None:
    def run(activations: str) -> Run:
        share = {"share": {"host_memory": "16KiB"}} if activations == "nvme" else {}
        config = with_activations("host", tmp_path, activations, **share)
        config["tiers"]["nvme"]["capacity"] = "24KiB"
        return train_engine(small_model(), config, small_loss, steps=STEPS)

    with pytest.warns(RuntimeWarning, match=r"nvme takes no more .*tiers.nvme.capacity") as caught:
        full = run("nvme")
    assert len(caught) == 1
    assert_identical(full, run("device"))
    assert full.report.tiers["nvme"].peak_bytes <= 24 << 10
    assert full.report.activations.kept_bytes > 0


def test_what_must_be_read_finds_room_on_a_full_disk(tmp_path: Path) -> None:
    """A skip connection wants its oldest tensor first, while newer ones fill the share."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = (x * self.linear.weight).exp()
            y = first
            for _ in range(6):
                y = y.sin()
            return (y * first.detach() * first).sum()

    def run(activations: str) -> Any:
        torch.manual_seed(0)
        config = with_activations(
            "host", tmp_path, activations, minimum=4096, **share_of(activations, "12KiB")
        )
        config["tiers"]["nvme"]["capacity"] = "8KiB"
        with make_engine(Skip(), config) as engine, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.backward(engine(base(32, 32)))
            return {name: s["gradient"] for name, s in engine.named_state() if "gradient" in s}

    found, expected = run("nvme"), run("device")
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def share_of(activations: str, host_memory: str) -> dict[str, Any]:
    return {} if activations == "device" else {"share": {"host_memory": host_memory}}


def test_auto_keeps_the_end_of_forward_on_the_device(tmp_path: Path) -> None:
    config = with_activations("host", tmp_path, "auto", share={"device_memory": "12KiB"})
    calm = train_engine(small_model(), settings("host", tmp_path), small_loss, steps=STEPS)
    with make_engine(small_model(), config) as engine:
        first = continue_engine(engine, small_loss, steps=1)
        loss = small_loss(engine, 1)
        store = engine._parts.activations
        total = engine.report().activations
        kept = store._device_used_bytes
        assert 0 < kept <= 12 << 10
        seen, moved = store._seen_bytes, sum(copy.nbytes for copy in store._alive.values())
        assert seen == moved + kept == total.moved_bytes + total.kept_bytes
        # whatever was seen first has left
        assert min(store._alive) == max(store._alive) - len(store._alive) + 1
        engine.backward(loss)
        engine.step()
        rest = continue_engine(engine, small_loss, steps=STEPS - 2)
    assert [*first.losses, loss.item(), *rest.losses] == calm.losses
    for name, tensors in calm.state.items():
        assert torch.equal(rest.state[name]["weight"], tensors["weight"]), name


def test_auto_without_an_accelerator_and_a_disk_moves_nothing() -> None:
    config = settings("host", placement={"activations": "auto"})
    with make_engine(small_model(), config) as engine:
        assert engine._parts.activations is None


@pytest.mark.parametrize(
    ("placement", "section", "part"),
    [
        ("nvme", {}, "tiers.nvme.paths"),
        ("device", {"min_bytes": 4096}, "activations.min_bytes"),
        ("host", {"device_memory": 4096}, "activations.device_memory"),
        ("disk", {}, "placement.activations"),
    ],
)
def test_contradictions_are_named(placement: str, section: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        OffloadConfig(placement={"activations": placement}, activations=section)


# -- errors of the disk ----------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that makes an engine with a fault; only activations are on its disk."""
    engines = []

    def make(fault: str | None, *, host_memory: str = "16KiB") -> Any:
        def open_io(config: OffloadConfig) -> IoEngine:
            return IoEngine(backend="threads", threads=2, fault=fault)

        monkeypatch.setattr(build, "open_io", open_io)
        engines.append(any_engine(tmp_path, share={"host_memory": host_memory}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (f"op=read,nth=3,errno={errno.EIO}", StorageError),
        ("op=read,nth=3,corrupt=1", ChecksumError),
        ("op=write,nth=4,lost=1", ChecksumError),
    ],
)
def test_an_activation_that_cannot_be_read_is_an_error_that_names_it(
    fault: str, kind: type[StorageError], faulty: Callable[..., Any], tmp_path: Path
) -> None:
    calm = train_engine(small_model(), settings("host", tmp_path), small_loss, steps=STEPS)
    engine = faulty(fault)
    loss = small_loss(engine, 0)
    push_out(engine)
    with pytest.raises(kind, match=r"activation \d+ \(torch.float32, \["):
        engine.backward(loss)
    assert engine.micro_steps == 0
    assert all("gradient" not in state for _, state in engine.named_state())
    del loss
    assert_nothing_held(engine)
    found = continue_engine(engine, small_loss, steps=STEPS)
    assert_identical(found, calm)


def test_what_cannot_be_written_stays_in_memory(faulty: Callable[..., Any], tmp_path: Path) -> None:
    calm = train_engine(small_model(), settings("host", tmp_path), small_loss, steps=STEPS)
    engine = faulty(f"op=write,nth=2,count=0,errno={errno.EIO}")
    with pytest.warns(RuntimeWarning) as caught:
        found = continue_engine(engine, small_loss, steps=STEPS)
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "activations.host_memory" in messages[0]
    assert "stays in host memory, because of an error: write of activation" in messages[1]
    assert_identical(found, calm)
    assert engine._parts.activations._share.peak_bytes <= 16 << 10
