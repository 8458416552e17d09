"""`optimizer.moments = "8bit"`: the same bits in every placement, fewer bytes, fp32's losses."""

from __future__ import annotations

import argparse
import inspect
import optparse
import tarfile
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import CheckpointError, ConfigError, OffloadError
from offload.optim.moments import decode, encode
from offload.state.export import export_checkpoint
from offload.state.safetensors_stream import SafetensorsReader
from tests.oracle import (
    ADAMW,
    Run,
    assert_identical,
    assert_same_state,
    continue_engine,
    language_loss,
    make_engine,
    settings,
    small_llama,
    small_loss,
    small_model,
    train_engine,
    transformers_model,
)

PLACES = ("device", "host", "nvme")
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", **ADAMW},
    "adam": {"name": "adam", "lr": 1e-3, "weight_decay": 0.1},
    "lion": {"name": "lion", "lr": 1e-3},
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}


def eight_bit(place: str, path: Path | None, name: str = "adamw", **options: Any) -> dict[str, Any]:
    optimizer = {**OPTIMIZERS[name], "moments": "8bit"}
    return settings(place, path, optimizer=optimizer, **options)


def odd_model() -> nn.Module:
    """Sizes that fill no block, an empty parameter, and one that small buckets cut into chunks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 29), nn.Linear(29, 2801), nn.GELU(), nn.Linear(2801, 37), nn.Linear(37, 64)
    )
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    return model


@pytest.mark.parametrize(
    ("name", "compute"),
    [("adamw", "bf16"), ("adamw", "fp32"), ("adam", "fp16"), ("lion", "bf16"), ("sgd", "bf16")],
)
def test_bits_do_not_depend_on_the_placement(name: str, compute: str, tmp_path: Path) -> None:
    """Nor on where buckets and chunks begin, which the blocks of the codes do not see."""
    expected: Run | None = None
    cases = [("device", 1 << 21), ("device", 4096), ("host", 1000), ("nvme", 4096)]
    for place, bucket_elements in cases:
        config = eight_bit(place, tmp_path, name, compute=compute, bucket_elements=bucket_elements)
        found = train_engine(odd_model(), config, small_loss, steps=4)
        expected = expected or found
        assert_identical(found, expected)
    plain = settings("device", compute=compute, optimizer=OPTIMIZERS[name])
    exact = train_engine(odd_model(), plain, small_loss, steps=4)
    assert expected is not None
    assert expected.losses[0] == exact.losses[0]
    assert expected.losses[1:] != exact.losses[1:], "8 bits are lossy: else this tests nothing"


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """A parameter of several pieces, which threads share, and one of a piece a chunk."""

    def run(number: int, bucket_elements: int) -> Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 40_000), nn.Linear(40_000, 64))
        with threads(number):
            config = eight_bit("device", None, device=256 << 20, bucket_elements=bucket_elements)
            engine = make_engine(model, config)
        with engine:
            return continue_engine(engine, small_loss, steps=2)

    expected = run(3, 1 << 21)
    assert_identical(run(1, 1 << 21), expected)
    assert_identical(run(2, 4096), expected)


def test_bits_do_not_depend_on_the_overlap(tmp_path: Path) -> None:
    """With clipping, a parameter group, accumulated gradients, and checksums or none."""
    shared: dict[str, Any] = {
        "compute": "bf16",
        "bucket_elements": 2048,
        "training": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    }
    runs = []
    for place, overlap, checksum in [
        ("host", True, True),
        ("nvme", True, False),
        ("nvme", False, True),
    ]:
        config = eight_bit(place, tmp_path, **shared)
        config["optimizer"]["groups"] = [{"match": ["*bias"], "weight_decay": 0.0, "lr": 1e-2}]
        config |= {"overlap": {"optimizer": overlap}, "io": {"checksum": checksum}}
        runs.append(train_engine(odd_model(), config, small_loss, steps=6))
    for found in runs[1:]:
        assert_identical(found, runs[0])


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(("name", "promised"), [("adamw", 4.125), ("lion", 3.0625)])
def test_the_state_has_the_bytes_that_are_promised(
    name: str, promised: float, tmp_path: Path
) -> None:
    """On disk, in the plan and over the lanes; 10 and 6 bytes a parameter with fp32 moments."""
    numel = 512 * 2048
    homes = {"weights": "host", "gradients": "host", "optimizer": "nvme"}

    def run(moments: str) -> Run:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False)
        )
        config = settings(
            "nvme",
            tmp_path,
            compute="bf16",
            bucket_elements=1 << 17,
            placement=homes,
            optimizer={**OPTIMIZERS[name], "moments": moments},
        )

        def loss_of(engine: Any, index: int) -> torch.Tensor:
            torch.manual_seed(index)
            result: torch.Tensor = engine(torch.randn(4, 512).bfloat16()).float().square().mean()
            return result

        return train_engine(model, config, loss_of, steps=3)

    run_fp32, run_8bit = run("fp32"), run("8bit")
    fp32_bytes = {"adamw": 10, "lion": 6}[name] * 2 * numel
    assert run_fp32.plan.bytes["nvme"]["optimizer"] == fp32_bytes
    found = run_8bit.plan.bytes["nvme"]["optimizer"]
    assert found == promised * 2 * numel
    for lane in ("nvme_read", "nvme_write"):
        assert run_8bit.report.lanes[lane].bytes <= found
        assert run_8bit.report.lanes[lane].bytes <= run_fp32.report.lanes[lane].bytes * 0.52
    assert run_8bit.plan.peak_bytes["nvme"] < run_fp32.plan.peak_bytes["nvme"]
    assert run_8bit.plan.staging_bytes < run_fp32.plan.staging_bytes


def test_the_plan_of_a_model_counts_them() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    found = [
        offload.plan(model, settings("host", compute="bf16", optimizer={"moments": moments}))
        for moments in ("fp32", "8bit")
    ]
    numbers = [planned.bytes["host"]["optimizer"] / 1024**2 for planned in found]
    assert numbers == [10, 4.125]
    assert found[1].step_seconds < found[0].step_seconds


# -- reading and writing ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_state_is_read_in_fp32_and_written_back_to_the_bit(
    place: str, compute: str, tmp_path: Path
) -> None:
    config = eight_bit(place, tmp_path, compute=compute, bucket_elements=2048)
    with make_engine(odd_model(), config) as engine:
        expected = continue_engine(engine, small_loss, steps=2).state
        for name, tensors in expected.items():
            assert [key for key in tensors if key in MOMENTS] == list(MOMENTS)
            for key in MOMENTS:
                assert tensors[key].dtype is torch.float32
                assert tensors[key].shape == tensors["weight"].shape
                values = tensors[key].flatten()
                again = decode(encode(values, signed=key == "exp_avg"))
                assert torch.equal(again, values), (name, key)
        for name in engine.parameter_names():
            zeros = {key: torch.zeros_like(expected[name][key]) for key in MOMENTS}
            engine.set_state(name, zeros)
        assert not any(tensors[key].any() for _, tensors in engine.named_state() for key in MOMENTS)
        for name, tensors in expected.items():
            engine.set_state(name, tensors)
        assert_same_state(dict(engine.named_state()), expected)


def test_values_that_are_set_are_rounded_as_a_step_rounds(tmp_path: Path) -> None:
    with make_engine(small_model(), eight_bit("nvme", tmp_path)) as engine:
        shape = dict(engine.module.named_parameters())["1.weight"].shape
        given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
        engine.set_state("1.weight", {"exp_avg": -given.double(), "exp_avg_sq": given})
        state = dict(engine.named_state())["1.weight"]
        flat = given.flatten()
        assert torch.equal(state["exp_avg"].flatten(), decode(encode(-flat, signed=True)))
        assert torch.equal(state["exp_avg_sq"].flatten(), decode(encode(flat, signed=False)))
        assert not torch.equal(state["exp_avg_sq"], given)
        assert (state["exp_avg"] + given).abs().max() < given.max() / 127


def test_values_that_no_code_stands_for_are_refused() -> None:
    with make_engine(small_model(), eight_bit("host", None)) as engine:
        before = dict(engine.named_state())
        like = torch.ones(dict(engine.module.named_parameters())["1.weight"].shape)
        for key, value in [("exp_avg", torch.inf), ("exp_avg_sq", torch.nan), ("exp_avg_sq", -1.0)]:
            with pytest.raises(OffloadError, match=rf"{key} of parameter 1.weight.*finite"):
                engine.set_state("1.weight", {key: like * value})
        with pytest.raises(OffloadError, match=r"exp_avg of .*expected: shape \(32, 32\)"):
            engine.set_state("1.weight", {"exp_avg": torch.ones(3)})
        assert_same_state(dict(engine.named_state()), before)


@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_step_changes_nothing(place: str, tmp_path: Path) -> None:
    with make_engine(odd_model(), eight_bit(place, tmp_path)) as engine:
        continue_engine(engine, small_loss, steps=2)
        before = dict(engine.named_state())
        engine.backward(small_loss(engine, 3) * torch.nan)
        assert not engine.step()
        assert_same_state(dict(engine.named_state()), before)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_unfrozen_and_what_is_edited(place: str, tmp_path: Path) -> None:
    """Moments of what was frozen start at zero; the master of an edited weight follows."""

    def run(place: str, bucket_elements: int) -> Run:
        model = odd_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("3"))
        config = eight_bit(place, tmp_path, compute="bf16", bucket_elements=bucket_elements)
        with make_engine(model, config) as engine:
            continue_engine(engine, small_loss, steps=2)
            engine.module[3].requires_grad_(True)
            with torch.no_grad():
                engine.module[1].weight.mul_(1.5)
            return continue_engine(engine, small_loss, steps=2)

    found = run(place, 2048)
    assert_identical(found, run("device", 1 << 20))
    assert found.state["3.weight"]["exp_avg_sq"].any()


def test_a_parameter_in_another_memory_order_and_a_complex_one(tmp_path: Path) -> None:
    """Blocks follow the memory; what is read and saved is in the order of the shape."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(6, 10, 3)
            self.conv.to(memory_format=torch.channels_last)
            self.turn = nn.Parameter(torch.randn(7, 11, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned: torch.Tensor = (self.turn * self.turn.conj()).real
            return self.conv(x).square().mean() + turned.mean()

    def loss_of(engine: Any, index: int) -> torch.Tensor:
        torch.manual_seed(index)
        result: torch.Tensor = engine(torch.randn(2, 6, 5, 5))
        return result

    with make_engine(Mixed(), eight_bit("host", None)) as engine:
        continue_engine(engine, loss_of, steps=3)
        engine.save_checkpoint(tmp_path / "saved")
        expected = continue_engine(engine, loss_of, steps=2)
    with make_engine(Mixed(), eight_bit("device", None, bucket_elements=100)) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert_identical(continue_engine(engine, loss_of, steps=2), expected)
        for name, tensors in expected.state.items():
            engine.set_state(name, tensors)
        assert_same_state(dict(engine.named_state()), expected.state)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "loaded"), [("nvme", "device"), ("device", "nvme")])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_resume_is_bit_exact_under_another_placement(
    name: str, saved: str, loaded: str, tmp_path: Path
) -> None:
    config = eight_bit(saved, tmp_path, name, compute="bf16", bucket_elements=2048)
    with make_engine(odd_model(), config) as engine:
        continue_engine(engine, small_loss, steps=2)
        folder = engine.save_checkpoint(tmp_path / "saved")
        expected = continue_engine(engine, small_loss, steps=2)
    if name == "adamw":
        stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        numel = sum(p.numel() for p in odd_model().parameters())
        assert stored_bytes < 6.3 * numel, "weights 2, remainders 2, moments 2.125 bytes"
    with make_engine(odd_model(), eight_bit(loaded, tmp_path, name, compute="bf16")) as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert_identical(continue_engine(engine, small_loss, steps=2), expected)


def test_a_checkpoint_becomes_an_export_of_its_masters(tmp_path: Path) -> None:
    config = eight_bit("nvme", tmp_path, compute="bf16")
    with make_engine(transformers_model("llama"), config) as engine:
        continue_engine(engine, language_loss, steps=2)
        engine.save_checkpoint(tmp_path / "saved")
        masters = {name: tensors["master"] for name, tensors in engine.named_state()}
    out = export_checkpoint(tmp_path / "saved", tmp_path / "out", dtype="fp32")
    with SafetensorsReader(out / "model.safetensors") as reader:
        assert set(reader.entries) == set(masters)
        for name, master in masters.items():
            assert torch.equal(reader.read(name), master), name


def _trained(config: dict[str, Any], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    with make_engine(odd_model(), config) as engine:
        state = continue_engine(engine, small_loss, steps=2).state
        engine.save_checkpoint(folder)
    return state


def test_a_checkpoint_with_fp32_moments_is_read_and_rounded(tmp_path: Path) -> None:
    exact = _trained(settings("device", compute="bf16"), tmp_path / "saved")
    with make_engine(odd_model(), eight_bit("nvme", tmp_path, compute="bf16")) as engine:
        with pytest.warns(RuntimeWarning, match=r"optimizer.moments: 'fp32' then, '8bit' now"):
            engine.load_checkpoint(tmp_path / "saved")
        for name, tensors in engine.named_state():
            assert torch.equal(tensors["master"], exact[name]["master"])
            for key in MOMENTS:
                rounded = encode(exact[name][key].flatten(), signed=key == "exp_avg")
                assert torch.equal(tensors[key].flatten(), decode(rounded)), (name, key)
        continue_engine(engine, small_loss, steps=1)


def test_a_checkpoint_with_8_bit_moments_is_read_exactly(tmp_path: Path) -> None:
    expected = _trained(eight_bit("nvme", tmp_path, compute="bf16"), tmp_path / "saved")
    with make_engine(odd_model(), settings("host", compute="bf16")) as engine:
        with pytest.warns(RuntimeWarning, match=r"optimizer.moments: '8bit' then, 'fp32' now"):
            engine.load_checkpoint(tmp_path / "saved")
        assert_same_state(dict(engine.named_state()), expected)
        continue_engine(engine, small_loss, steps=1)


def test_a_checkpoint_of_another_optimizer_is_still_refused(tmp_path: Path) -> None:
    _trained(eight_bit("host", None, "lion"), tmp_path / "saved")
    for config in (eight_bit("host", None), settings("host"), eight_bit("host", None, "sgd")):
        with make_engine(odd_model(), config) as engine:
            before = dict(engine.named_state())
            with pytest.raises(CheckpointError, match="another kind of engine"):
                engine.load_checkpoint(tmp_path / "saved")
            assert_same_state(dict(engine.named_state()), before)


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint from before there were 8-bit moments loads without a warning."""
    from offload.state import checkpoint

    written = checkpoint._numerics

    def of_old(engine: Any) -> dict[str, Any]:
        sections = written(engine)
        del sections["optimizer"]["moments"]
        return sections

    with make_engine(small_model(), settings("host")) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "_numerics", of_old)
            engine.save_checkpoint(tmp_path / "saved")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.load_checkpoint(tmp_path / "saved")
    with (
        make_engine(small_model(), eight_bit("host", None)) as engine,
        pytest.warns(RuntimeWarning, match="optimizer.moments: 'fp32' then, '8bit' now"),
    ):
        engine.load_checkpoint(tmp_path / "saved")


# -- which optimizers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    ],
)
def test_optimizers_of_a_factory_that_cannot_are_refused(factory: Callable[..., Any]) -> None:
    config = settings("host", optimizer={"moments": "8bit"})
    with pytest.raises(ConfigError, match=r"(?s)optimizer.moments = '8bit' needs.*momentum"):
        make_engine(small_model(), config, optimizer=factory)


def test_an_optimizer_of_a_factory_that_has_a_rule() -> None:
    expected = train_engine(small_model(), eight_bit("host", None), small_loss, steps=3)
    config = settings("host", optimizer={"moments": "8bit"})
    found = train_engine(
        small_model(),
        config,
        small_loss,
        steps=3,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **ADAMW),
    )
    assert_identical(found, expected)


# -- convergence -----------------------------------------------------------------------------------


def source_tokens() -> torch.Tensor:
    """Bytes of modules of the standard library."""
    modules = (argparse, optparse, textwrap, inspect, tarfile, typing)
    text = b"".join(Path(str(inspect.getsourcefile(m))).read_bytes() for m in modules)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def held_out_losses(optimizer: dict[str, Any], *, seed: int, steps: int) -> tuple[float, float]:
    """Of a Llama on source text before and after its training in bf16."""
    tokens = source_tokens()
    held_out, train = tokens[-4096:].view(-1, 64), tokens[:-4096]
    model = small_llama(seed=seed)
    config = settings(
        "device",
        compute="bf16",
        bucket_elements=65_536,
        optimizer=optimizer,
        training={"max_grad_norm": 1.0},
    )
    drawn = torch.Generator().manual_seed(seed)
    with make_engine(model, config) as engine:

        def held_out_loss() -> float:
            with torch.no_grad():
                loss: torch.Tensor = engine(input_ids=held_out, labels=held_out).loss
            return loss.item()

        before = held_out_loss()
        for _ in range(steps):
            starts = torch.randint(0, len(train) - 64, (8,), generator=drawn)
            batch = torch.stack([train[start : start + 64] for start in starts])
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            assert engine.step()
        return before, held_out_loss()


def check_convergence(optimizer: dict[str, Any], *, seed: int, steps: int, within: float) -> None:
    before, exact = held_out_losses(optimizer, seed=seed, steps=steps)
    assert exact < 0.7 * before, "else there is nothing to compare"
    same_before, found = held_out_losses({**optimizer, "moments": "8bit"}, seed=seed, steps=steps)
    assert same_before == before
    assert abs(found - exact) <= within * exact, (found, exact)


def test_training_converges_as_with_fp32_moments() -> None:
    """Within 3% of the held-out loss, of which training takes more than a third."""
    optimizer = {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.999]}
    check_convergence(optimizer, seed=0, steps=45, within=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("optimizer", "within"),
    [
        ({"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.999]}, 0.02),
        ({"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95]}, 0.02),
        ({"name": "lion", "lr": 3e-4, "betas": [0.9, 0.99]}, 0.02),
        ({"name": "sgd", "lr": 0.3, "momentum": 0.9}, 0.04),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_longer_training_converges_as_with_fp32_moments(
    optimizer: dict[str, Any], within: float, seed: int
) -> None:
    check_convergence(optimizer, seed=seed, steps=200, within=within)
