"""The optimizer on a device that the CPU does not reach: the bits of the CPU's, whoever updates.

Copies of the simulated device end in random order, and their targets hold NaNs until then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.engine import planning
from offload.engine import update_site as sites
from offload.errors import DoesNotFitError, NonFiniteError, StorageError
from offload.optim import device_update
from offload.optim.device_update import SCRATCH_OWNER
from offload.optim.streamed import StreamedStep
from offload.schedule import update_site
from offload.tiers.nvme import NvmeStore
from offload.tiers.transfer import Transfer
from tests.engine.accelerator import PLACEMENTS as ACCELERATOR_PLACEMENTS
from tests.engine.accelerator import STEPS, make_model, use_accelerator

PLACEMENTS = ACCELERATOR_PLACEMENTS | {
    "split": {"weights": "device", "gradients": "host", "optimizer": "host"},
    "state": {"weights": "host", "gradients": "host", "optimizer": "device"},
}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get a simulated accelerator for their device tier."""
    use_accelerator(monkeypatch)


def make_config(
    path: Path, placement: dict[str, str], update: str | float | None, compute: str = "bf16"
) -> dict[str, Any]:
    chosen = {} if update is None else {"update": update}
    return {
        "tiers": {
            "device": {"kind": "cpu", "memory": "2MiB"},
            "host": {"memory": "8MiB"},
            "nvme": {"paths": [str(path)]} if "nvme" in placement.values() else {},
        },
        "placement": {**placement, **chosen},
        "precision": {"compute": compute},
        "partition": {"bucket_elements": 8192},
        "training": {"max_grad_norm": 1.0},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
    }


IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))


def loss_of(engine: Any, micro_step: int) -> torch.Tensor:
    ids = IDS[micro_step % 4 :]
    return nn.functional.cross_entropy(engine(ids).float().flatten(0, 1), ids.flatten())


def take(engine: Any, micro_step: int) -> float:
    loss = loss_of(engine, micro_step)
    engine.backward(loss)
    engine.step()
    return loss.item()


def train(
    config: dict[str, Any],
    *,
    before: Callable[[Any, int], None] | None = None,
    frozen: int = 0,
    **factories: Any,
) -> Any:
    """Losses, full state, report; `before` is called with the engine before each micro-step."""
    model = make_model()
    model[:frozen].requires_grad_(False)
    losses = []
    with offload.initialize(model, config, **factories) as engine:
        accumulation = config["training"].get("gradient_accumulation_steps", 1)
        for micro_step in range(STEPS * accumulation):
            if before is not None:
                before(engine, micro_step)
            losses.append(take(engine, micro_step))
        return losses, dict(engine.named_state()), engine.report()


@functools.cache
def in_memory(compute: str = "bf16", case: str | None = None) -> Any:
    """All state in host memory, and the CPU updates it; to be called without an accelerator."""
    assert planning.device_is_host_memory.__name__ == "device_is_host_memory", "no accelerator yet"
    given = dict(CASES[case]) if case else {}
    calls = {name: given.pop(name) for name in ("before", "frozen") if name in given}
    return train(make_config(Path(), PLACEMENTS["host"], "cpu", compute) | given, **calls)


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensors in one[1].items():
        for field, tensor in tensors.items():
            assert torch.equal(other[1][name][field], tensor), (name, field)


@pytest.mark.parametrize("update", ["device", 0.5])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_the_device_updates_to_the_bits_of_the_cpu(
    placement: str,
    compute: str,
    update: str | float,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    expected = in_memory(compute)
    request.getfixturevalue("accelerator")
    found = train(make_config(tmp_path, PLACEMENTS[placement], update, compute))
    assert_same(found, expected)
    report = found[2]
    assert report.update.on_device
    assert bool(report.update.num_cpu) == (update == 0.5)
    for tier in report.tiers.values():
        assert tier.peak_bytes <= tier.budget_bytes


@pytest.mark.usefixtures("accelerator", "by_itself")  # the lanes of one step
def test_state_at_home_on_the_device_does_not_travel(tmp_path: Path) -> None:
    moved = {}
    for update in ("cpu", "device"):
        _, _, report = train(make_config(tmp_path, PLACEMENTS["device"], update))
        moved[update] = {lane: report.lanes[lane].bytes for lane in ("h2d", "d2h")}
    state = 21 * 1024 * (2 + 2 + 2 + 4 + 4)  # at least, in bf16 with AdamW
    assert moved["cpu"]["d2h"] - moved["device"]["d2h"] > state
    assert moved["cpu"]["h2d"] - moved["device"]["h2d"] > state - 21 * 1024 * 2


@pytest.mark.parametrize("placement", ["device", "host", "nvme"])
def test_a_chunk_of_many_pieces_has_the_same_bits(
    placement: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = in_memory()
    request.getfixturevalue("accelerator")
    monkeypatch.setattr(update_site, "PIECE_NUMEL", 1000)
    assert_same(train(make_config(tmp_path, PLACEMENTS[placement], "device")), expected)


@pytest.mark.parametrize("rule", ["adam", "sgd", "lion", "adagrad"])
def test_every_rule_runs_on_the_device(
    rule: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = {"name": rule, "lr": 1e-3, "weight_decay": 0.1}
    settings |= {"momentum": 0.9} if rule == "sgd" else {}
    config = make_config(tmp_path, PLACEMENTS["host"], "cpu") | {"optimizer": settings}
    on_cpu = train(config)
    request.getfixturevalue("accelerator")
    config = make_config(tmp_path, PLACEMENTS["host"], "device") | {"optimizer": settings}
    assert_same(train(config), on_cpu)


def edit(engine: Any, micro_step: int) -> None:
    """Change a weight between steps; set another parameter's whole state."""
    if micro_step == 2:
        with torch.no_grad(), engine.gathered(["1.weight"], writable=True):
            engine.module[1].weight.mul_(0.5)
        engine.set_state("4.weight", {"master": torch.full((64, 64), 0.0123)})


def thaw(engine: Any, micro_step: int) -> None:
    engine.module[-1 - 4 * micro_step :].requires_grad_(True)


def skip(engine: Any, micro_step: int) -> None:
    """A step whose gradient is not finite, and which therefore changes nothing."""
    if micro_step == 1:
        engine.backward(loss_of(engine, micro_step) * float("inf"))
        taken = engine.step()
        assert not taken


CASES: dict[str, dict[str, Any]] = {
    "edited weights": {"before": edit},
    "unfrozen parameters": {"before": thaw, "frozen": 12},
    "skipped steps": {"before": skip},
    "accumulation": {"training": {"gradient_accumulation_steps": 2}},
    "no clipping": {"training": {"max_grad_norm": 0.0}},
    "always clipping": {"training": {"max_grad_norm": 1e-3}},
    "groups": {
        "optimizer": {"lr": 1e-2, "groups": [{"match": ["*bias"], "weight_decay": 0.3, "lr": 0.1}]}
    },
    "no overlap": {"overlap": {"optimizer": False}},
    "tiles": {"tiling": {"modules": ["*"], "tiles": 5}},
}


@pytest.mark.parametrize("placement", ["device", "host", "nvme"])
@pytest.mark.parametrize("case", list(CASES))
def test_what_happens_between_steps_is_followed(
    case: str, placement: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = in_memory(case=case)
    request.getfixturevalue("accelerator")
    given = dict(CASES[case])
    calls = {name: given.pop(name) for name in ("before", "frozen") if name in given}
    config = make_config(tmp_path, PLACEMENTS[placement], "device") | given
    assert_same(train(config, **calls), expected)


class Skipping(nn.Module):
    """A model of which every second micro-batch leaves a layer without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if index != 1 + self.number % 2:
                x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("placement", ["device", "host", "nvme"])
def test_a_parameter_without_a_gradient_is_not_touched(
    placement: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def run(update: str) -> Any:
        config = make_config(tmp_path, PLACEMENTS[placement], update)
        model = Skipping()
        with offload.initialize(model, config) as engine:
            for number in range(STEPS):
                model.number = number
                engine.backward(engine(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum())
                engine.step()
            return [], dict(engine.named_state()), engine.parameter_steps()

    on_cpu = run("cpu")
    request.getfixturevalue("accelerator")
    found = run("device")
    assert_same(found, on_cpu)
    assert found[2] == on_cpu[2] == [4, 4, 2, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_weight_that_becomes_infinite_is_told_as_on_the_cpu(
    placement: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def run(update: str) -> Any:
        config = make_config(tmp_path, PLACEMENTS[placement], update)
        config |= {"optimizer": {"name": "sgd", "lr": 1e38}, "training": {}}
        with offload.initialize(make_model(), config) as engine:
            with pytest.raises(NonFiniteError, match="step 1 made a weight of parameter") as raised:
                engine.backward(loss_of(engine, 0) * 1e6)
                engine.step()
            return str(raised.value), engine.global_steps

    on_cpu = run("cpu")
    request.getfixturevalue("accelerator")
    assert run("device") == on_cpu


# -- errors ----------------------------------------------------------------------------------------


class Broken:
    """The nth copy of a lane that `DeviceUpdate` starts fails, `times` times in a row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lane: str, nth: int, times: int) -> None:
        self.left = times
        self.seen = 0
        name = {"h2d": "start_copy_in", "d2h": "start_copy_out"}[lane]
        start = device_update.DeviceUpdate.start

        def start_breaking(updater: Any, *arguments: Any) -> None:
            device = updater._store.device
            copy = getattr(device, name)

            def breaking(dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
                return self._broken(copy(dst, src, what), dst, nth)

            with _replaced(device, name, breaking):
                start(updater, *arguments)

        monkeypatch.setattr(device_update.DeviceUpdate, "start", start_breaking)

    def _broken(self, transfer: Any, dst: torch.Tensor, nth: int) -> Transfer:
        self.seen += 1
        if self.seen >= nth and self.left:
            self.left -= 1
            ticket = transfer._ticket
            ticket.wait()
            dst.fill_(0xFF)  # a copy that failed may have left anything
            ticket.errno = 5
        return transfer


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute of one object, whatever its class, for the length of a block."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def train_through_errors(config: dict[str, Any]) -> Any:
    """As `train`, calling `step` again until it is complete; also the number of errors."""
    errors = 0
    losses = []
    with offload.initialize(make_model(), config) as engine:
        for micro_step in range(STEPS):
            loss = loss_of(engine, micro_step)
            engine.backward(loss)
            while True:
                try:
                    engine.step()
                    break
                except StorageError:
                    errors += 1
            losses.append(loss.item())
        return losses, dict(engine.named_state()), errors


EVERY_FAILURE = [
    pytest.param(
        placement,
        lane,
        nth,
        times,
        marks=() if (nth, times) in {(3, 1)} else pytest.mark.slow,
        id=f"{placement}-{lane}-{nth}-{times}",
    )
    for placement in ("host", "nvme", "split", "mixed", "state")
    for lane in ("h2d", "d2h")
    for nth in (1, 2, 3, 4, 7)
    for times in (1, 2, 5)
]


@pytest.mark.parametrize(("placement", "lane", "nth", "times"), EVERY_FAILURE)
def test_a_copy_that_fails_is_made_good_by_stepping_again(
    placement: str,
    lane: str,
    nth: int,
    times: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = in_memory()
    use_accelerator(monkeypatch)
    Broken(monkeypatch, lane, nth, times)
    found = train_through_errors(make_config(tmp_path, PLACEMENTS[placement], "device"))
    assert found[2] >= 1
    assert_same(found, expected)


@pytest.mark.usefixtures("by_itself")  # the error is for the step, not for a pump beside it
@pytest.mark.parametrize(("placement", "update"), [("nvme", 0.5), ("mixed", "device")])
@pytest.mark.parametrize("nth", [1, 3, 4, 7, 9])
@pytest.mark.parametrize("operation", ["start_read", "start_write"])
def test_a_disk_that_fails_in_between_is_made_good_by_stepping_again(
    operation: str,
    nth: int,
    placement: str,
    update: str | float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the device has updated when a read ahead fails is sent home by the next `step`."""
    expected = in_memory()
    use_accelerator(monkeypatch)
    original, count = getattr(NvmeStore, operation), 0
    run = StreamedStep.run

    def failing(*arguments: Any, **named: Any) -> Transfer:
        nonlocal count
        count += is_stepping
        if count == nth:
            count += 1
            raise StorageError(operation="read", path="disk", errno=5)
        return original(*arguments, **named)

    is_stepping = False

    def stepping(*arguments: Any, **named: Any) -> None:
        nonlocal is_stepping
        is_stepping = True
        try:
            run(*arguments, **named)
        finally:
            is_stepping = False

    monkeypatch.setattr(NvmeStore, operation, failing)
    monkeypatch.setattr(StreamedStep, "run", stepping)
    found = train_through_errors(make_config(tmp_path, PLACEMENTS[placement], update))
    assert found[2] >= 1
    assert_same(found, expected)


@pytest.mark.usefixtures("accelerator")
def test_a_step_that_failed_is_given_up_by_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "disk", PLACEMENTS["host"], "device")
    with offload.initialize(make_model(), config) as engine:
        take(engine, 0)
        engine.save_checkpoint(tmp_path / "saved")
        expected = take(engine, 1), take(engine, 2)
        engine.load_checkpoint(tmp_path / "saved")
        engine.backward(loss_of(engine, 3))
        with monkeypatch.context() as patched:
            Broken(patched, "d2h", 3, 100)
            for _ in range(2):
                with pytest.raises(StorageError):
                    engine.step()
        engine.load_checkpoint(tmp_path / "saved")
        assert (take(engine, 1), take(engine, 2)) == expected


@pytest.mark.usefixtures("accelerator")
def test_a_missing_wait_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, PLACEMENTS["split"], "device")
    expected = train(config)
    monkeypatch.setattr(device_update.DeviceUpdate, "_after_current", _waiting_for_nothing)
    try:
        found = train(config)
    except NonFiniteError:
        return
    assert found[0] != expected[0]


@contextlib.contextmanager
def _waiting_for_nothing(updater: Any) -> Iterator[None]:
    with _replaced(updater._store.device, "make_current_wait", lambda transfer: None):
        yield


# -- the choice ------------------------------------------------------------------------------------


def choice_of(config: dict[str, Any], **factories: Any) -> Any:
    with offload.initialize(make_model(), config, **factories) as engine:
        return engine.report().update


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_auto_measures_and_leaves_no_trace(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "MAX_SCRATCH_SHARE", 1.0)
    found = train(make_config(tmp_path, PLACEMENTS[placement], None))
    assert found[2].update.reason.startswith("measured, in GB/s: CPU ")
    monkeypatch.undo()
    assert_same(found, in_memory())


@pytest.mark.usefixtures("accelerator")
def test_auto_leaves_the_device_to_the_state_where_room_is_short(tmp_path: Path) -> None:
    config = make_config(tmp_path, PLACEMENTS["host"], "auto")
    found = choice_of(config)
    assert not found.on_device
    assert found.reason == "the device has no room beside the state"


@pytest.mark.usefixtures("accelerator")
def test_the_device_asked_for_without_room_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, PLACEMENTS["host"], "device")
    config["tiers"]["device"]["memory"] = "300KiB"
    with pytest.raises(DoesNotFitError, match=r"or set placement\.update to 'cpu'"):
        choice_of(config)
    assert choice_of(config | {"placement": PLACEMENTS["host"] | {"update": "cpu"}}).num_cpu > 0


@pytest.mark.usefixtures("accelerator")
def test_the_plan_counts_the_device_memory_of_updates(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    held = {}
    for update in ("cpu", "device"):
        placement = {**PLACEMENTS["host"], "weights": "device"}
        config = make_config(tmp_path, placement, update)
        planned = offload.plan(model, config)
        with offload.initialize(nn.Linear(64, 64), config) as engine:
            used = engine.report().tiers["device"].used_bytes
            assert used <= planned.peak_bytes["device"]
            assert ("device room for updates" in str(planned)) == (update == "device")
            held[update] = used, planned.update_bytes
            tier = engine._parts.device
        assert SCRATCH_OWNER not in tier.owners(), "closed"
    assert held["device"][0] - held["cpu"][0] == held["device"][1] > held["cpu"][1] == 0


@pytest.mark.usefixtures("accelerator")
def test_what_the_device_has_no_rule_for_is_the_cpus(tmp_path: Path) -> None:
    config = make_config(tmp_path, PLACEMENTS["host"], "device")
    found = choice_of(config, optimizer=lambda ps: torch.optim.RMSprop(ps, lr=1e-3))
    assert (found.on_device, found.reason) == ((), "GenericRule has no form for the device")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.usefixtures("accelerator")
def test_8_bit_moments_are_the_cpus(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, PLACEMENTS[placement], "device")
    config["optimizer"]["moments"] = "8bit"
    found = train(config)
    assert not found[2].update.on_device
    assert found[2].update.reason == "EightBitAdamWRule has no form for the device"
    monkeypatch.undo()
    config["placement"] = PLACEMENTS["host"]
    assert_same(found, train(config))


def test_a_device_that_is_host_memory_has_one_site(tmp_path: Path) -> None:
    found = choice_of(make_config(tmp_path, PLACEMENTS["host"], "device"))
    assert (found.on_device, found.reason) == ((), "the device is host memory")


@pytest.mark.usefixtures("accelerator")
def test_a_resumed_run_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "MAX_SCRATCH_SHARE", 1.0)
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    with offload.initialize(make_model(), make_config(disk, PLACEMENTS["host"], 0.5)) as engine:
        take(engine, 0)
        chosen = engine.report().update.on_device
        engine.save_checkpoint(saved)
    assert len(chosen) > 0
    for asked, kept in (("auto", chosen), ("cpu", ())):
        config = make_config(disk, PLACEMENTS["host"], asked)
        with offload.initialize(make_model(), config) as engine:
            engine.load_checkpoint(saved)
            take(engine, 1)
            assert engine.report().update.on_device == kept


@pytest.mark.usefixtures("accelerator")
def test_what_is_unfrozen_and_too_large_for_a_slot_is_the_cpus(tmp_path: Path) -> None:
    config = make_config(tmp_path, PLACEMENTS["host"], "device")
    config["partition"]["bucket_elements"] = 4096
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 512))
    model[1:].requires_grad_(False)
    with offload.initialize(model, config) as engine:
        for _ in range(2):
            engine.backward(engine(IDS).float().sum())
            engine.step()
            model.requires_grad_(True)
        found = engine.report().update
    assert found.num_cpu == 1
    assert len(found.on_device) >= 2


def run_with_given_gradients(config: dict[str, Any], width: int) -> Any:
    """The gradients are given, because those of a backward need not repeat on a GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    drawn = torch.Generator().manual_seed(0)
    with offload.initialize(model, config) as engine:
        for _ in range(STEPS):
            for name, parameter in model.named_parameters():
                gradient = 1e-4 * torch.randn(parameter.shape, generator=drawn)
                engine.set_state(name, {"gradient": gradient})
            taken = engine.optimizer.step()
            assert taken is None
            engine.optimizer.zero_grad()
        return engine.global_steps, dict(engine.named_state()), engine.report()


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_given_gradients_give_the_same_bits(
    compute: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    placement = PLACEMENTS["host"]
    on_cpu = run_with_given_gradients(make_config(tmp_path, placement, "cpu", compute), 64)
    request.getfixturevalue("accelerator")
    found = run_with_given_gradients(make_config(tmp_path, placement, "device", compute), 64)
    assert found[0] == STEPS
    assert_same(found, on_cpu)
    assert found[2].update.on_device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("placement", ["device", "host", "split", "state"])
def test_a_gpu_updates_to_the_bits_of_the_cpu(placement: str, compute: str, tmp_path: Path) -> None:
    def run(update: str | float) -> Any:
        config = make_config(tmp_path, PLACEMENTS[placement], update, compute)
        config["tiers"]["device"] = {"kind": "cuda", "memory": "256MiB"}
        config["tiers"]["host"] = {"memory": "256MiB"}
        config["partition"]["bucket_elements"] = 1 << 20
        return run_with_given_gradients(config, 1024)

    on_cpu = run("cpu")
    for update in ("device", 0.5, "auto"):
        found = run(update)
        assert_same(found, on_cpu)
        assert found[2].update.on_device or update == "auto"
