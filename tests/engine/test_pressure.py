"""Host memory runs short between steps: the host's budget shrinks, and no number changes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload.config import OffloadConfig
from offload.engine import build, pressure
from offload.engine.snapshot import Snapshot
from offload.errors import DiskFullError, MemoryPressureError, StorageError
from offload.native import IoEngine
from offload.tiers.nvme import NvmeStore
from tests.engine.accelerator import use_accelerator
from tests.oracle import Run, assert_identical, make_engine, settings

WIDTH, LAYERS, STEPS = 32, 16, 5
AUTO = dict.fromkeys(("weights", "gradients", "optimizer"), "auto")
MARGIN = 8192
PRESSED_AT = 2  # before this step, and the one after the next


def layers() -> nn.Module:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(LAYERS):
        made += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*made)


def loss_of(model: Any, index: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(index)
    batch = torch.randn(4, WIDTH, generator=drawn).to(next(model.module.parameters()).dtype)
    loss: torch.Tensor = model(batch).float().square().mean()
    return loss


def configured(path: Path, host: int = 4 << 20, **sections: Any) -> dict[str, Any]:
    placement = {**AUTO, **sections.pop("placement", {})}
    sizes = {"device": 20 << 10, "host": host, "bucket_elements": WIDTH * WIDTH}
    return settings("auto", path, **{**sizes, **sections}, placement=placement)


class Room:
    """A machine on which the engine's arena, and `others`, take memory from `limit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit = 1 << 40
        self.looks = 0
        self.engine: Any = None
        monkeypatch.setattr(pressure, "host_room_bytes", self.read)
        monkeypatch.setattr(pressure, "free_swap_bytes", lambda: 0)
        monkeypatch.setattr(pressure, "_anonymous_bytes", lambda: 0)
        monkeypatch.setattr(pressure, "MARGIN_BYTES", MARGIN)
        monkeypatch.setattr(pressure, "_MOST_SHARE", 1.0)  # every look of these tests is wanted

    def read(self) -> int:
        self.looks += 1
        return max(0, self.limit - int(self.engine._parts.host.budget_bytes))

    def press(self, share: float) -> None:
        """Leave room for this share of what the arena holds now."""
        self.limit = int(self.engine._parts.host.budget_bytes * share) + MARGIN


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(monkeypatch)


def train(engine: Any, before: Callable[[int], None] = lambda step: None) -> Run:
    run = Run()
    for step in range(STEPS):
        before(step)
        for _ in range(engine.config.training.gradient_accumulation_steps):
            loss = loss_of(engine, engine.micro_steps)
            engine.backward(loss)
            run.losses.append(loss.item())
            taken = engine.step()
        assert taken
        run.norms.append(engine.grad_norm)
    run.state = dict(engine.named_state())
    run.steps = engine.parameter_steps()
    return run


@contextmanager
def pressed(room: Room, engine: Any, share: float) -> Iterator[Callable[[int], None]]:
    room.engine = engine

    def act(step: int) -> None:
        if step in (PRESSED_AT, PRESSED_AT + 2):
            room.press(share)

    with pytest.warns(RuntimeWarning, match="host memory runs short"):
        yield act


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"compute": "bf16"},
    "by itself": {"overlap": {"optimizer": False, "prefetch": False}},
    "accumulating": {"training": {"gradient_accumulation_steps": 3}},
    "clipped sgd": {
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "training": {"max_grad_norm": 1e-3},
    },
    "weights stay": {"placement": {"weights": "host"}},
    "optimizer on nvme": {"placement": {"optimizer": "nvme"}},
    "activations": {
        "placement": {"activations": "nvme"},
        "activations": {"min_bytes": 1, "host_memory": 64 << 10},
    },
    "threads": {"io": {"backend": "threads"}},
    "python": {"io": {"backend": "python"}},
}


@pytest.mark.parametrize(
    ("name", "accelerator"),
    [(name, False) for name in SETTINGS]
    + [(name, True) for name in ("bf16", "weights stay", "activations", "accumulating")],
)
def test_the_budget_shrinks_and_numbers_stay(
    name: str, accelerator: bool, room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accelerator:
        use_accelerator(monkeypatch)
    config = configured(tmp_path, **SETTINGS[name])
    with make_engine(layers(), config) as engine:
        room.engine = engine
        expected = train(engine)
    with make_engine(layers(), config) as engine:
        arena = engine._parts.host
        full = arena.budget_bytes
        budgets = []

        with pressed(room, engine, 0.6) as press:

            def act(step: int) -> None:
                press(step)
                budgets.append(arena.budget_bytes)

            found = train(engine, act)
        report = engine.report()
        assert budgets[PRESSED_AT] == full
        assert arena.budget_bytes < budgets[PRESSED_AT + 1] <= 0.6 * full
        host = report.tiers["host"]
        assert host.used_bytes <= arena.budget_bytes <= host.budget_bytes < full
        assert engine.plan.budget_bytes["host"] == host.budget_bytes
        assert engine.plan.bytes["nvme"]["optimizer"] > 0
        for block in engine._parts.store.blocks():
            assert block.home == engine.plan.tier(block.bucket.index, block.state_class)
        assert engine._parts.shrinks.count == 2
    assert_identical(found, expected)


def test_the_report_of_the_step_tells(room: Room, tmp_path: Path) -> None:
    with make_engine(layers(), configured(tmp_path)) as engine:
        shrinks = []
        full = engine._parts.host.budget_bytes
        with pressed(room, engine, 0.8) as press:

            def act(step: int) -> None:
                if step:
                    shrinks.append(engine.report().shrinks)
                press(step)

            train(engine, act)
            shrinks.append(engine.report().shrinks)
        assert [each.count for each in shrinks] == [0, 0, 1, 0, 1]
        assert shrinks[0].last == ""
        assert "of optimizer moved to nvme" in shrinks[2].last
        assert shrinks[2].moved_bytes > 0
        total = sum(each.given_back_bytes for each in shrinks)
        assert total == full - engine._parts.host.budget_bytes
        assert type(engine.report()).from_dict(engine.report().to_dict()) == engine.report()


def test_what_is_named_stays_and_too_little_is_an_error_that_costs_nothing(
    room: Room, tmp_path: Path
) -> None:
    """With weights and gradients named, only optimizer state can go."""
    config = configured(tmp_path, placement={"weights": "host", "gradients": "host"})
    with make_engine(layers(), config) as engine:
        room.engine = engine
        expected = train(engine)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        before = engine.plan
        swing = 1 << 20

        def act(step: int) -> None:
            if step != PRESSED_AT:
                return
            engine._pressure._swing_bytes = swing  # what the steps before have taken
            room.limit = swing // 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(2):
                    with pytest.raises(MemoryPressureError, match="only staging") as caught:
                        loss_of(engine, 0)
            assert caught.value.needed_bytes == swing
            assert caught.value.room_bytes < swing
            room.limit = 1 << 40

        found = train(engine, act)
        plan = engine.plan
        assert plan.bytes["host"]["optimizer"] == 0
        for name in ("weights", "gradients"):
            assert plan.bytes["host"][name] == before.bytes["host"][name] > 0
        assert plan.overlap.host_bytes == 0
    assert_identical(found, expected)


def test_swap_space_is_room_too(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "free_swap_bytes", lambda: 1 << 40)
    with make_engine(layers(), configured(tmp_path)) as engine:
        engine._pressure._swing_bytes = 1 << 20

        def act(step: int) -> None:
            room.limit = 0 if step == PRESSED_AT else room.limit

        room.engine = engine
        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            train(engine, act)


@pytest.mark.parametrize("off", ["shrink", "nvme"])
def test_nobody_looks_where_nothing_shrinks(off: str, room: Room, tmp_path: Path) -> None:
    config = configured(tmp_path)
    if off == "shrink":
        config["tiers"]["host"]["shrink"] = False
    else:
        del config["tiers"]["nvme"]
    room.limit = 0
    with make_engine(layers(), config) as engine:
        train(engine)
    assert room.looks == 0


def test_one_look_a_step(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_LEAST_SECONDS", 1e9)
    config = configured(tmp_path, training={"gradient_accumulation_steps": 3})
    with make_engine(layers(), config) as engine:
        room.engine = engine
        train(engine)
        assert room.looks == STEPS
        with torch.no_grad():
            for index in range(3):
                loss_of(engine, index)
    assert room.looks == STEPS + 1


def test_looking_takes_little_of_the_time(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that takes long, and steps that take no time: there is no second one for a while."""
    now = [0.0]

    def look() -> int:
        now[0] += 1.0
        return room.read()

    monkeypatch.setattr(pressure, "host_room_bytes", look)
    monkeypatch.setattr(pressure, "_MOST_SHARE", 1 / 50)
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with make_engine(layers(), configured(tmp_path)) as engine:
        room.engine = engine
        now[0] = 100.0
        train(engine)
        assert room.looks == 1
        now[0] += 49.0
        loss_of(engine, 0)
        assert room.looks == 1
        now[0] += 1.0
        loss_of(engine, 0)
        assert room.looks == 2


def test_the_step_after_the_swing_is_counted_on(room: Room, tmp_path: Path) -> None:
    """What a step takes beside the tiers is seen at its backward, and has to be left free."""
    config = configured(tmp_path)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        taken = iter([10, 10, 1_000_010])  # of the first step only what stays is seen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pressure, "_anonymous_bytes", lambda: next(taken))
            for step in range(2):
                engine.backward(loss_of(engine, step))
                engine.step()
            assert next(taken, None) is None
        room.limit = engine._parts.host.budget_bytes + 1_000_000
        with pytest.warns(RuntimeWarning, match="a step takes 976.56 KiB"):
            loss_of(engine, 2)


def test_a_full_disk_moves_nothing(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        expected = train(engine)

    def refuse(*_: object, **__: object) -> None:
        raise DiskFullError(path=tmp_path, needed_bytes=1, free_bytes=0)

    with make_engine(layers(), config) as engine:
        plan, full = engine.plan, engine._parts.host.budget_bytes
        room.engine = engine

        def act(step: int) -> None:
            if step == PRESSED_AT:
                monkeypatch.setattr(NvmeStore, "reserve", refuse)
                room.limit = full  # the swing fits, the margin does not
            if step == PRESSED_AT + 1:
                engine._pressure._swing_bytes = 1 << 20
                with pytest.raises(MemoryPressureError, match="cannot shrink: allocate of"):
                    loss_of(engine, 0)
                engine._pressure._swing_bytes = 0

        found = train(engine, act)
        assert engine.plan is plan
        assert engine._parts.host.budget_bytes == full
    assert_identical(found, expected)


def test_a_write_that_fails_leaves_every_block_on_the_host(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        expected = train(engine)
    start_write = NvmeStore.start_write
    is_broken = False

    def fail_third(store: NvmeStore, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += is_broken
        if is_broken and count == 3:
            raise StorageError(operation="write", path=tmp_path)
        return start_write(store, *args, **kwargs)

    count = 0
    monkeypatch.setattr(NvmeStore, "start_write", fail_third)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        plan, nvme = engine.plan, engine._parts.nvme

        def act(step: int) -> None:
            nonlocal is_broken
            is_broken = step == PRESSED_AT
            if step == PRESSED_AT:
                room.press(0.6)
            if step == PRESSED_AT + 1:
                assert count >= 3
                assert engine.plan is plan
                reserved.append(nvme.used_bytes)
                engine._pressure._stuck = None  # another try
            if step == PRESSED_AT + 2:
                reserved.append(nvme.used_bytes)

        reserved: list[int] = []
        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            found = train(engine, act)
        assert engine.plan.bytes["nvme"]["optimizer"] > 0
        assert reserved[0] > 0
    assert_identical(found, expected)


def test_memory_that_was_given_back_is_not_the_process_s_any_more(
    room: Room, tmp_path: Path
) -> None:
    """Also with registered buffers, which hold on to their pages."""
    width, num = 256, 6
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num)))
    config = configured(tmp_path, host=64 << 20, bucket_elements=width * width)
    config["tiers"]["device"]["memory"] = 1 << 20
    with make_engine(model, config) as engine:
        room.engine = engine

        def step(index: int) -> None:
            drawn = torch.Generator().manual_seed(index)
            engine.backward(engine(torch.randn(4, width, generator=drawn)).square().mean())
            engine.step()

        step(0)
        before, full = shared_bytes(), engine._parts.host.budget_bytes
        room.press(0.5)
        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            step(1)
        given_back = full - engine._parts.host.budget_bytes
        assert given_back > full // 3
        assert before - shared_bytes() > 0.9 * given_back


def shared_bytes() -> int:
    """Memory of arenas that the process holds."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return int(line.split()[1]) << 10
    raise AssertionError("every Linux since 5.4 tells")


def test_promotion_after_a_shrink_plans_within_the_new_budget(room: Room, tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = layers()
        for parameter in list(model.parameters())[:8]:
            parameter.requires_grad_(False)
        return model

    def unfreeze(engine: Any, step: int) -> None:
        if step == PRESSED_AT + 1:
            for parameter in engine.module.parameters():
                parameter.requires_grad_(True)

    config = configured(tmp_path)
    with make_engine(frozen(), config) as engine:
        room.engine = engine
        expected = train(engine, lambda step: unfreeze(engine, step))
    with make_engine(frozen(), config) as engine:
        room.engine = engine

        def act(step: int) -> None:
            if step == PRESSED_AT:
                room.press(0.5)
            unfreeze(engine, step)

        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            found = train(engine, act)
        host = engine.report().tiers["host"]
        assert engine._parts.host.budget_bytes <= host.budget_bytes
    assert_identical(found, expected)


def test_a_checkpoint_from_before_loads_after(room: Room, tmp_path: Path) -> None:
    config = configured(tmp_path / "nvme")
    (tmp_path / "nvme").mkdir()
    with make_engine(layers(), config) as engine:
        room.engine = engine
        train(engine)
        engine.save_checkpoint(tmp_path / "saved")
        at_save = dict(engine.named_state())
        room.press(0.5)
        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            expected = train(engine)
        engine.load_checkpoint(tmp_path / "saved")
        loaded = dict(engine.named_state())
        for name, tensors in at_save.items():
            for key, tensor in tensors.items():
                assert torch.equal(loaded[name][key], tensor), (name, key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = train(engine)
    assert_identical(found, expected)


def test_io_uring_reads_what_is_written_after_registrations_have_changed(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that stayed registered would go on using the pages that were given up."""
    if IoEngine.probe()["io_uring"] != "ok":
        pytest.skip("no io_uring here")
    registered: dict[int, int] = {}
    register, unregister = IoEngine.register, IoEngine.unregister

    def watched_register(io: IoEngine, address: int, nbytes: int) -> str:
        registered[address] = nbytes
        return register(io, address, nbytes)

    def watched_unregister(io: IoEngine, address: int) -> None:
        del registered[address]
        unregister(io, address)

    def open_io(config: OffloadConfig) -> IoEngine:
        del config
        return IoEngine(backend="io_uring")

    monkeypatch.setattr(build, "open_io", open_io)
    monkeypatch.setattr(IoEngine, "register", watched_register)
    monkeypatch.setattr(IoEngine, "unregister", watched_unregister)
    with make_engine(layers(), configured(tmp_path)) as engine:
        with pressed(room, engine, 0.7) as press:
            train(engine, press)
        segments = engine._parts.host._segments
        of_arena = [
            nbytes
            for address, nbytes in registered.items()
            if any(each.address <= address < each.address + each.nbytes for each in segments)
        ]
        assert sum(of_arena) == engine._parts.host.budget_bytes


@pytest.mark.parametrize("placement", [{}, {"weights": "host", "gradients": "host"}])
@pytest.mark.parametrize("portable", [False, True])
def test_a_checkpoint_that_is_being_written_has_the_state_of_its_call(
    portable: bool,
    placement: dict[str, str],
    room: Room,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it has captured, and not copied yet, is the memory that would be given up."""
    capture = Snapshot.capture

    def slow_capture(snapshot: Snapshot, key: Any) -> Any:
        version = capture(snapshot, key)
        time.sleep(0.01)
        return version

    monkeypatch.setattr(Snapshot, "capture", slow_capture)
    (tmp_path / "nvme").mkdir()
    config = configured(tmp_path / "nvme", placement=placement)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        expected = train(engine)
        at_save = {name: dict(tensors) for name, tensors in engine.named_state()}
        rest = train(engine)
    with make_engine(layers(), config) as engine:
        room.engine = engine
        assert_identical(train(engine), expected)
        engine.save_checkpoint(tmp_path / "saved", portable=portable)
        room.press(0.5)
        with pytest.warns(RuntimeWarning, match="host memory runs short"):
            assert_identical(train(engine), rest)
        engine.wait_for_checkpoint()
        room.limit = 1 << 40
        engine.load_checkpoint(tmp_path / "saved")
        for name, tensors in engine.named_state():
            for key, tensor in tensors.items():
                assert torch.equal(at_save[name][key], tensor), (name, key)
