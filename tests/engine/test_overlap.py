"""The overlapped optimizer step: the same bits as the step that is taken by itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import OffloadConfig
from offload.engine import build
from offload.errors import ChecksumError, NonFiniteError
from offload.native import IoEngine
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

STEPS = 7
HOST = 1 << 20
PLACEMENTS = {
    "all on nvme": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
    "weights on the host": {"weights": "host", "gradients": "host", "optimizer": "nvme"},
    "weights on the device": {"weights": "device", "gradients": "host", "optimizer": "nvme"},
    "only weights on nvme": {"weights": "nvme", "gradients": "device", "optimizer": "host"},
}
OFF = {"overlap": {"optimizer": False}}
CLIPPING = ("never", "sometimes", "always")


def overlapped_settings(path: Path, placement: str = "all on nvme", **sections: Any) -> Any:
    """The small model with room for the overlapped step, and little else."""
    config = settings("nvme", path, bucket_elements=1024, device=1 << 20, host=HOST, **sections)
    return {**config, "placement": PLACEMENTS[placement]}


@pytest.fixture(scope="module")
def serial() -> Callable[..., Run]:
    """Runs in host memory, which has nothing to overlap, by their settings."""
    known: dict[str, Run] = {}

    def run(**sections: Any) -> Run:
        key = repr(sections)
        if key not in known:
            config = settings("host", bucket_elements=1024, **sections, **OFF)
            known[key] = train_engine(small_model(), config, small_loss, steps=STEPS)
        return known[key]

    return run


def rows(is_quick: Callable[..., bool], *choices: Sequence[Any]) -> list[Any]:
    """All combinations; slow are those whose numbers, one a choice, are not `is_quick`."""
    return [
        pytest.param(
            *(values[i] for values, i in zip(choices, row, strict=True)),
            marks=() if is_quick(*row) else pytest.mark.slow,
        )
        for row in itertools.product(*(range(len(values)) for values in choices))
    ]


@pytest.mark.parametrize(
    ("placement", "compute", "clipping", "accumulation"),
    rows(
        # With each placement each way to clip, and each accumulation, once.
        lambda p, c, k, a: (p + k + a) % 3 == 0 and (p + k) % 2 == c,
        list(PLACEMENTS),
        ["fp32", "bf16"],
        CLIPPING,
        [1, 2, 4],
    ),
)
def test_the_bits_are_those_of_the_serial_step(
    placement: str,
    compute: str,
    clipping: str,
    accumulation: int,
    serial: Callable[..., Run],
    tmp_path: Path,
) -> None:
    training = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    precision = {"compute": compute}
    norms = serial(training=training, precision=precision).norms
    limits = {"never": 0.0, "sometimes": 0.999 * max(norms), "always": 1e-3}
    training["max_grad_norm"] = limits[clipping]
    expected = serial(training=training, precision=precision)
    clipped = sum(norm > limits[clipping] > 0 for norm in expected.norms)
    assert clipped in {"never": {0}, "sometimes": range(1, STEPS), "always": {STEPS}}[clipping]
    config = overlapped_settings(tmp_path, placement, training=training, precision=precision)
    with make_engine(small_model(), config) as engine:
        assert engine.plan.overlap.flow_bytes, "nothing is overlapped"
        found = continue_engine(engine, small_loss, steps=STEPS)
        tiers = engine.report().tiers
        assert all(tier.peak_bytes <= tier.budget_bytes for tier in tiers.values())
        assert tiers["host"].peak_bytes <= engine.plan.peak_bytes["host"]
        assert tiers["nvme"].peak_bytes == engine.plan.peak_bytes["nvme"]
    assert_identical(found, expected)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_held_is_committed_or_dropped(
    placement: str, clipping: str, serial: Callable[..., Run], tmp_path: Path
) -> None:
    """With time enough in backward, all but the first layers are held when the step comes."""
    training = {"max_grad_norm": 0.0}
    precision = {"compute": "bf16"}
    norms = serial(training=training, precision=precision).norms
    training["max_grad_norm"] = {"never": 0.0, "sometimes": sorted(norms)[2], "always": 1e-3}[
        clipping
    ]
    expected = serial(training=training, precision=precision)
    config = overlapped_settings(tmp_path, placement, training=training, precision=precision)
    with make_engine(small_model(), config) as engine:
        updates = engine._parts.updates

        def take_time(*_: Any) -> None:
            limit = time.monotonic() + 20
            while (updates._loading or updates._complete) and time.monotonic() < limit:
                updates.advance()

        engine.module[1].register_full_backward_hook(take_time)
        found = Run()
        counts = []
        for _ in range(STEPS):
            before = updates.committed, updates.dropped
            run = continue_engine(engine, small_loss, steps=1)
            found.losses += run.losses
            found.norms += run.norms
            counts.append((updates.committed - before[0], updates.dropped - before[1]))
        found.state, found.steps = run.state, run.steps
    assert_identical(found, expected)
    limit = training["max_grad_norm"]
    paused = 0
    for norm, (committed, dropped) in zip(expected.norms, counts, strict=True):
        clipped = norm > limit > 0
        assert (dropped > 0) == (clipped and not paused)
        assert committed > 0 or clipped or paused
        paused = 4 if clipped and not paused else max(0, paused - 1)


def late(seed: int) -> str:
    """A fault specification: operations end late at random places."""
    drawn = random.Random(seed)
    rules = [
        f"op={drawn.choice(('read', 'write'))},nth={drawn.randint(1, 1500)},"
        f"count={drawn.randint(1, 20)},delay={drawn.randint(1, 8)}"
        for _ in range(40)
    ]
    return ";".join(rules)


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that gives the engines made from here on an I/O engine with this fault."""

    def disturb(fault: str) -> None:
        def open_io(config: OffloadConfig) -> IoEngine:
            del config
            return IoEngine(backend="threads", threads=3, fault=fault)

        monkeypatch.setattr(build, "open_io", open_io)

    return disturb


def _check_under_delays(
    seed: int, serial: Callable[..., Run], disturbed: Callable[[str], None], path: Path
) -> None:
    drawn = random.Random(seed)
    training = {
        "gradient_accumulation_steps": drawn.choice((1, 2)),
        "max_grad_norm": drawn.choice((0.0, 1.0)),
    }
    expected = serial(training=training, precision={"compute": "bf16"})
    disturbed(late(seed))
    config = overlapped_settings(
        path, drawn.choice(list(PLACEMENTS)), training=training, precision={"compute": "bf16"}
    )
    found = train_engine(small_model(), config, small_loss, steps=STEPS)
    assert_identical(found, expected)


@pytest.mark.parametrize("seed", range(6))
def test_delays_change_nothing(
    seed: int, serial: Callable[..., Run], disturbed: Callable[[str], None], tmp_path: Path
) -> None:
    _check_under_delays(seed, serial, disturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 150))
def test_delays_change_nothing_often(
    seed: int, serial: Callable[..., Run], disturbed: Callable[[str], None], tmp_path: Path
) -> None:
    _check_under_delays(seed, serial, disturbed, tmp_path)


def loss_with_nan_in(steps: set[int]) -> Callable[[Any, int], torch.Tensor]:
    """The small loss; in these micro-batches the gradient of the first layer alone is NaN."""

    def loss_of(model: Any, index: int) -> torch.Tensor:
        loss = small_loss(model, index)
        if index not in steps:
            return loss
        module = getattr(model, "module", model)
        # The first layer's gradient comes last: what is behind it has been updated by then.
        return loss + (module[0].weight.sum() * 0.0).sqrt().to(loss.dtype)

    return loss_of


@pytest.mark.parametrize(
    ("placement", "accumulation", "compute"),
    rows(lambda p, a, c: (p + a + c) % 2 == 0, list(PLACEMENTS), [1, 2], ["fp16", "bf16"]),
)
def test_steps_that_are_skipped_leave_nothing(
    placement: str, accumulation: int, compute: str, tmp_path: Path
) -> None:
    sections = {
        "training": {"gradient_accumulation_steps": accumulation},
        "precision": {"compute": compute, "initial_loss_scale": 256.0, "growth_interval": 2},
    }
    loss_of = loss_with_nan_in({2, 5, 6, 11})
    memory = settings("host", bucket_elements=1024, **sections, **OFF)
    expected = train_engine(small_model(), memory, loss_of, steps=8)
    with make_engine(small_model(), overlapped_settings(tmp_path, placement, **sections)) as engine:
        found = continue_engine(engine, loss_of, steps=8)
        assert engine.skipped_steps >= 2
    assert_identical(found, expected)


def backward_twice(engine: Any, index: int) -> None:
    engine.backward(small_loss(engine, index + 100))


def edit(engine: Any, index: int) -> None:
    with torch.no_grad():
        engine.module[1].weight.mul_(0.5)


def edit_by_data(engine: Any, index: int) -> None:
    engine.module[-1].bias.data.add_(0.25)


def change_rate(engine: Any, index: int) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + index)


def read_state(engine: Any, index: int) -> None:
    assert all(torch.isfinite(state["weight"]).all() for _, state in engine.named_state())


def write_state(engine: Any, index: int) -> None:
    name = engine.parameter_names()[3]
    engine.set_state(name, {"exp_avg": torch.full_like(_state(engine, name)["weight"], 0.01)})


def write_gradient(engine: Any, index: int) -> None:
    name = engine.parameter_names()[2]
    engine.set_state(name, {"gradient": torch.full_like(_state(engine, name)["weight"], 0.01)})


def assign_gradient(engine: Any, index: int) -> None:
    weight = engine.module[1].weight
    weight.grad = torch.full(weight.shape, 0.01, dtype=weight.dtype)


def drop_gradient(engine: Any, index: int) -> None:
    engine.module[1].bias.grad = None


def forget_and_repeat(engine: Any, index: int) -> None:
    engine.optimizer.zero_grad()
    engine.backward(small_loss(engine, index + 50))


def evaluate(engine: Any, index: int) -> None:
    with torch.no_grad():
        small_loss(engine, index)


def load_weights(engine: Any, index: int) -> None:
    engine.load_state_dict({k: v * 0.9 for k, v in engine.state_dict().items()})


def gather(engine: Any, index: int) -> None:
    with engine.gathered(writable=True), torch.no_grad():
        engine.module[4].weight.clamp_(-0.1, 0.1)


def freeze(engine: Any, index: int) -> None:
    engine.module[4].weight.requires_grad_(index % 2 == 0)


def _state(engine: Any, name: str) -> dict[str, torch.Tensor]:
    return dict(engine.named_state())[name]


BETWEEN = [
    backward_twice,
    edit,
    edit_by_data,
    change_rate,
    read_state,
    write_state,
    write_gradient,
    assign_gradient,
    drop_gradient,
    forget_and_repeat,
    evaluate,
    load_weights,
    gather,
    freeze,
]


def train_with(
    config: Any, *, before_step: Callable[..., None] | None, after_step: Callable[..., None] | None
) -> Run:
    with make_engine(small_model(), config) as engine:
        run = Run()
        for index in range(STEPS):
            loss = small_loss(engine, index)
            engine.backward(loss)
            if before_step is not None and index % 2:
                before_step(engine, index)
            taken = engine.step()
            assert taken
            if after_step is not None and index % 2:
                after_step(engine, index)
            run.losses.append(loss.item())
            run.norms.append(engine.grad_norm)
        run.state = {name: dict(state) for name, state in engine.named_state()}
        run.steps = engine.parameter_steps()
    return run


@pytest.mark.parametrize(
    ("act", "placement", "when"),
    rows(
        # Each at both times; acts follow each other through the placements.
        lambda a, p, w: (a + p + w) % 3 == 0,
        BETWEEN,
        list(PLACEMENTS)[:3],
        ["before", "after"],
    ),
    ids=lambda each: getattr(each, "__name__", each),
)
def test_whatever_happens_around_the_step(
    act: Callable[..., None], placement: str, when: str, tmp_path: Path
) -> None:
    """What was held is not what the step wants any more, or what is pending is wanted now."""
    if when == "after" and act in (backward_twice, forget_and_repeat, write_gradient):
        pytest.skip("a gradient between two steps is the next one's, as in the other tests")
    if act is edit_by_data and placement == "weights on the device":
        pytest.skip("edits of .data in the middle of a step are seen where weights come and go")
    hooks = {"before_step": None, "after_step": None, f"{when}_step": act}
    memory = settings("host", bucket_elements=1024, compute="bf16", **OFF)
    expected = train_with(memory, **hooks)
    config = overlapped_settings(tmp_path, placement, precision={"compute": "bf16"})
    found = train_with(config, **hooks)
    assert_identical(found, expected)


def test_every_byte_of_state_moves_once_each_way(tmp_path: Path) -> None:
    """What was expected comes true: nothing is read or written a second time."""
    config = overlapped_settings(
        tmp_path, "weights on the host", precision={"compute": "bf16"}, optimizer={"lr": 1e-4}
    )
    with make_engine(small_model(), config) as engine:
        before = engine._parts.io.lanes()
        for index in range(STEPS):
            engine.backward(small_loss(engine, index))
            taken = engine.step()
            assert taken
        engine.parameter_steps()  # homes are what the last step says
        state = sum(
            engine._parts.store.block(bucket.index, "optimizer").layout.nbytes
            for bucket in engine.plan.buckets
        )
        for lane in ("nvme_read", "nvme_write"):
            assert engine._parts.io.lanes()[lane][0] - before[lane][0] == STEPS * state


def test_a_checkpoint_has_what_is_pending(tmp_path: Path) -> None:
    memory = settings("host", bucket_elements=1024, compute="bf16", **OFF)
    expected = train_engine(small_model(), memory, small_loss, steps=STEPS)
    config = overlapped_settings(tmp_path, precision={"compute": "bf16"})
    with make_engine(small_model(), config) as engine:
        continue_engine(engine, small_loss, steps=STEPS - 2)
        engine.save_checkpoint(tmp_path / "checkpoint")
        continue_engine(engine, small_loss, steps=1)
        engine.load_checkpoint(tmp_path / "checkpoint")
        found = continue_engine(engine, small_loss, steps=2)
    assert found.losses == expected.losses[-2:]
    found.losses, found.norms = expected.losses, expected.norms
    assert_identical(found, expected)


@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
def test_damaged_state_is_found_by_whoever_needs_it(tmp_path: Path) -> None:
    """Nothing is lost but the step: a checkpoint brings the run back."""
    with make_engine(small_model(), overlapped_settings(tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=2)
        engine.save_checkpoint(tmp_path / "checkpoint")
        expected = continue_engine(engine, small_loss, steps=2)
        engine.backward(small_loss(engine, 9))
        engine.parameter_steps()  # nothing is held any more
        store = engine._parts.store
        for bucket in engine.plan.buckets:
            flip(engine, store.block(bucket.index, "optimizer").records[0])
        for _ in range(2):
            with pytest.raises(ChecksumError, match="optimizer of bucket"):
                engine.step()
                engine.parameter_steps()
        engine.load_checkpoint(tmp_path / "checkpoint")
        assert_identical(continue_engine(engine, small_loss, steps=2), expected)


def flip(engine: Any, record: Any) -> None:
    """Turn one bit of a record on the disk."""
    extent = record.current
    path = f"/proc/self/fd/{engine._parts.nvme._files[extent.file].io.fd}"
    descriptor = os.open(path, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, extent.offset)
    os.pwrite(descriptor, bytes([byte ^ 1]), extent.offset)
    os.close(descriptor)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_that_becomes_infinite_is_told_of_at_the_next_call(
    placement: str, tmp_path: Path
) -> None:
    sgd = {"name": "sgd", "lr": 1e38, "momentum": 0.5}
    with make_engine(
        small_model(), overlapped_settings(tmp_path, placement, optimizer=sgd)
    ) as engine:
        engine.backward(small_loss(engine, 0) * 1e4)
        with pytest.raises(NonFiniteError, match="step 1 made a weight of parameter"):
            engine.step()
            loss = small_loss(engine, 1)
            engine.backward(loss)
        assert engine.global_steps == 1


def test_a_budget_without_room_takes_the_step_by_itself(tmp_path: Path) -> None:
    config = overlapped_settings(tmp_path)
    with make_engine(small_model(), config) as engine:
        least = engine.plan.need_bytes["host"]
    config["tiers"]["host"]["memory"] = least
    with make_engine(small_model(), config) as engine:
        assert not engine.plan.overlap.flow_bytes
        found = continue_engine(engine, small_loss, steps=STEPS)
    memory = settings("host", bucket_elements=1024, **OFF)
    assert_identical(found, train_engine(small_model(), memory, small_loss, steps=STEPS))


def test_an_engine_closes_with_an_update_pending(tmp_path: Path) -> None:
    with make_engine(small_model(), overlapped_settings(tmp_path)) as engine:
        engine.backward(small_loss(engine, 0))
        taken = engine.step()
        assert taken
        engine.backward(small_loss(engine, 1))  # what is held now is never committed
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Crossed(torch.nn.Module):
    """Pairs of layers that are neighbours in their buckets and far from each other in a pass."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(20, 20, bias=False) for _ in range(2 * pairs)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers[::2], *self.layers[1::2]):
            values = torch.tanh(layer(values))
        return values


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_chunk_that_is_closed_and_opened_again_is_complete_when_it_is_home(
    accumulation: int, tmp_path: Path
) -> None:
    """More chunks are half full at once than stay open."""
    training = {"gradient_accumulation_steps": accumulation}

    def run(**sections: Any) -> tuple[Run, int]:
        config = settings("nvme", tmp_path, bucket_elements=1024, training=training, **sections)
        found = Run()
        with make_engine(Crossed(6), config) as engine:
            generator = torch.Generator().manual_seed(1)
            for _ in range(5 * accumulation):
                loss = engine(torch.randn(4, 20, generator=generator)).square().mean()
                engine.backward(loss)
                found.losses.append(loss.item())
                engine.step()
            found.state = dict(engine.named_state())
            return found, engine._parts.updates.committed

    expected, _ = run(**OFF)
    found, committed = run()
    assert committed > 0
    assert_identical(found, expected)


def test_an_update_that_another_thread_makes_first_is_not_looked_for(
    disturbed: Callable[[str], None], tmp_path: Path
) -> None:
    disturbed("op=read,count=0,delay=5")  # so that something is left to the next forward
    with make_engine(small_model(), overlapped_settings(tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=1)
        engine.backward(small_loss(engine, 1))
        engine.step()
        updates = engine._parts.updates
        bucket = next(iter(updates._pending))
        caller = updates._turns.caller

        @contextlib.contextmanager
        def late(**kwargs: bool) -> Iterator[None]:
            with caller(**kwargs):
                updates._apply_all()
            updates._turns.caller = caller
            updates.give_back()  # which forgets what could be pending
            with caller(**kwargs):
                yield

        updates._turns.caller = late
        updates.apply(bucket)
        assert not updates.is_pending(bucket)
