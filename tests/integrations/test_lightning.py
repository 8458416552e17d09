"""The Lightning strategy: the numbers of plain Lightning, in every placement, and resuming."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import CheckpointError, ConfigError, OffloadError
from tests.oracle import relative_difference

pl: Any = pytest.importorskip("lightning.pytorch")

from offload.integrations.lightning import strategy_for  # noqa: E402
from offload.integrations.lightning.checkpoints import from_plain, to_plain  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TIERS: dict[str, Any] = {"device": {"memory": 1 << 20}, "host": {"memory": 8 << 20}}


class Recorder(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A small module that keeps its losses; `options` change what the hooks do."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16, bias=False)
        )
        self.options = options
        self.losses: list[float] = []
        if options.get("frozen"):
            self.net[0].weight.requires_grad_(False)
        if options.get("manual"):
            self.automatic_optimization = False

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self(batch) - batch).float().square().mean()

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        if not self.options.get("manual"):
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        make = self.options.get("make", torch.optim.AdamW)
        if make is None:
            return None
        optimizer = make(self.parameters(), lr=1e-2, foreach=False)
        if self.options.get("plateau"):
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer,
                mode="max",  # a falling loss is none: the rate falls
                patience=0,
                factor=0.5,
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val"},
            }
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OwnBackward(Recorder):
    def backward(self, loss: torch.Tensor) -> None:
        (loss * 2).backward()


@pytest.fixture
def strategies() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for strategy in made:
        strategy.close()


def loader(*, shuffle: bool = False) -> Any:
    rows = torch.randn(28, 16, generator=torch.Generator().manual_seed(3))
    return torch.utils.data.DataLoader(rows, batch_size=4, shuffle=shuffle)


def trainer(folder: Path, package: Any = pl, **options: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 2,
    }
    return package.Trainer(**quiet | options)


def strategy_of(
    strategies: list[Any], folder: Path, tier: str = "host", package: str = "lightning.pytorch"
) -> Any:
    config = {
        "tiers": TIERS | ({"nvme": {"paths": [str(folder)]}} if tier == "nvme" else {}),
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), tier),
    }
    strategies.append(strategy_for(package)(config))
    return strategies[-1]


def fit(module: Any, made: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    made.fit(module, loader(shuffle=True), loader(), **options)
    return module


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulated and clipped": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "frozen": ({"frozen": True}, {}),
    "manual": ({"manual": True}, {}),
    "plateau": ({"plateau": True}, {}),
    "autocast": ({}, {"precision": "bf16-mixed"}),
    "another optimizer": ({"make": torch.optim.NAdam}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_plain_lightning(
    name: str, tmp_path: Path, strategies: list[Any]
) -> None:
    of_module, of_trainer = CASES[name]
    plain = fit(Recorder(**of_module), trainer(tmp_path / "plain", **of_trainer))
    made = trainer(tmp_path, strategy=strategy_of(strategies, tmp_path), **of_trainer)
    found = fit(Recorder(**of_module), made)
    tolerance = 1e-6 if name != "autocast" else 1e-5  # its bf16 rounding doubles a flipped bit
    assert found.losses == pytest.approx(plain.losses, rel=tolerance, abs=0)
    weights = found.state_dict()
    for key, weight in plain.state_dict().items():
        assert relative_difference(weights[key], weight) <= tolerance, key
    assert made.global_step == plain.trainer.global_step
    assert made.callback_metrics["val"] == pytest.approx(
        plain.trainer.callback_metrics["val"].item(), rel=1e-5
    )
    rates = [
        [group["lr"] for group in each.trainer.optimizers[0].param_groups]
        for each in (found, plain)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_placement_changes_nothing(precision: str, tmp_path: Path, strategies: list[Any]) -> None:
    runs = []
    for tier in ("device", "host", "nvme"):
        strategy = strategy_of(strategies, tmp_path, tier)
        made = trainer(tmp_path, strategy=strategy, precision=precision, accumulate_grad_batches=2)
        module = fit(Recorder(), made)
        runs.append((module.losses, dict(strategy.engine.named_state())))
    compute = {"32-true": "fp32", "bf16-true": "bf16", "16-true": "fp16"}[precision]
    assert strategies[0].engine.config.precision.compute == compute
    assert runs[0][0][-1] < runs[0][0][0]
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        for name, tensors in runs[0][1].items():
            assert all(torch.equal(state[name][key], value) for key, value in tensors.items())


def test_a_backward_of_the_modules_own_is_called(tmp_path: Path, strategies: list[Any]) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    plain = fit(OwnBackward(), trainer(tmp_path / "plain", **options))
    strategy = strategy_of(strategies, tmp_path)
    found = fit(OwnBackward(), trainer(tmp_path, strategy=strategy, **options))
    assert found.losses == pytest.approx(plain.losses, rel=1e-6, abs=0)
    assert strategy.engine.grad_norm > 0.2


def test_a_run_resumes_bit_for_bit(tmp_path: Path, strategies: list[Any]) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 4}
    whole = strategy_of(strategies, tmp_path)
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path / "kept", monitor="val", save_top_k=2, save_last=True, filename="{epoch}"
    )
    stop = pl.callbacks.EarlyStopping("val", patience=9)
    made = trainer(tmp_path, strategy=whole, callbacks=[keep, stop], **options)
    expected = fit(Recorder(), made)
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]

    half = strategy_of(strategies, tmp_path)
    made = trainer(tmp_path / "half", strategy=half, **options | {"max_epochs": 2})
    first = fit(Recorder(), made)
    saved = made.checkpoint_callback.best_model_path
    assert Path(saved).is_dir()

    rest_strategy = strategy_of(strategies, tmp_path, "nvme")
    stop = pl.callbacks.EarlyStopping("val", patience=9)
    made = trainer(tmp_path / "half", strategy=rest_strategy, callbacks=[stop], **options)
    rest = Recorder()
    made.fit(rest, loader(shuffle=True), loader(), ckpt_path=saved)
    assert first.losses + rest.losses == expected.losses
    assert made.global_step == whole.lightning_module.trainer.global_step
    states = [dict(strategy.engine.named_state()) for strategy in (whole, rest_strategy)]
    for name, tensors in states[0].items():
        assert all(torch.equal(states[1][name][key], value) for key, value in tensors.items())


def test_after_fit_the_module_is_evaluated_and_saved(tmp_path: Path, strategies: list[Any]) -> None:
    strategy = strategy_of(strategies, tmp_path)
    module = Recorder()
    made = trainer(tmp_path, strategy=strategy)
    data = loader()
    before = made.validate(module, data, verbose=False)  # in the module's own memory
    assert strategy.engine is None
    fit(module, made)
    after = made.test(module, data, verbose=False)
    assert after[0]["val"] < before[0]["val"]
    predicted = made.predict(module, data)
    assert sum(len(batch) for batch in predicted) == 28
    again = made.test(module, data, ckpt_path="best", verbose=False)
    assert again[0]["val"] == after[0]["val"]
    saved = strategy.engine.state_dict()
    assert all(torch.equal(saved[n], p) for n, p in module.state_dict().items())
    path = tmp_path / "mine.ckpt"
    made.save_checkpoint(path)
    made.strategy.remove_checkpoint(path)
    assert not path.exists()
    with pytest.raises(OffloadError, match="an earlier fit"):
        made.fit(module, data, data)
    with pytest.raises(OffloadError, match="an earlier fit"):
        made.validate(Recorder(), data, verbose=False)


def test_the_configs_optimizer_and_schedule(tmp_path: Path, strategies: list[Any]) -> None:
    config = {
        "tiers": TIERS,
        "optimizer": {"name": "sgd", "lr": 0.5},
        "lr_scheduler": {"name": "linear", "total_steps": 10},
    }
    strategies.append(strategy_for("lightning.pytorch")(config))
    made = trainer(tmp_path, strategy=strategies[0], max_steps=5)
    module = fit(Recorder(make=None), made)
    assert len(module.losses) == 5
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25)


def test_the_other_package_has_a_strategy_of_its_own(tmp_path: Path, strategies: list[Any]) -> None:
    other = importlib.import_module("pytorch_lightning")

    class Other(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return (self.layer(batch) - batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = strategy_of(strategies, tmp_path, package="pytorch_lightning")
    made = trainer(tmp_path, other, strategy=strategy, max_epochs=1)
    made.fit(Other(), loader())
    assert strategy.engine.global_steps == 7
    with pytest.raises(OffloadError, match="a Lightning package"):
        strategy_for("fairseq")


def test_the_strategy_has_a_name(tmp_path: Path, strategies: list[Any]) -> None:
    made = trainer(tmp_path, strategy="offload")
    strategies.append(made.strategy)
    assert isinstance(made.strategy, strategy_for("lightning.pytorch"))
    assert made.strategy.engine is None


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precisions_that_are_refused(precision: str, tmp_path: Path, strategies: list[Any]) -> None:
    plugins = importlib.import_module("lightning.pytorch.plugins.precision")
    scaler = torch.amp.GradScaler("cpu")
    plugin = (
        plugins.DoublePrecision()
        if precision == "64-true"
        else plugins.MixedPrecision(precision, "cpu", scaler)
    )
    with pytest.raises(OffloadError, match=f"precision='{precision}'"):
        trainer(tmp_path, strategy=strategy_of(strategies, tmp_path), plugins=[plugin])


@pytest.mark.parametrize(
    ("of_module", "of_trainer", "config", "message"),
    [
        (
            {},
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            {},
            "gradient_clip_algorithm = 'value'",
        ),
        ({}, {"precision": "bf16-true"}, {"precision": {"compute": "fp16"}}, "give one of them"),
        ({}, {}, {"training": {"gradient_accumulation_steps": 2}}, "accumulate_grad_batches=1"),
        ({}, {"gradient_clip_val": 1.0}, {"training": {"max_grad_norm": 2.0}}, "give one"),
        ({}, {}, {"lr_scheduler": {"name": "constant"}}, "return the scheduler"),
        ({}, {}, {"optimizer": {"name": "mezo"}}, "no backward"),
        (
            {},
            {},
            {"checkpoint": {"directory": "x", "every_steps": 1}},
            "use Lightning's ModelCheckpoint",
        ),
    ],
)
def test_contradictions(
    of_module: dict[str, Any],
    of_trainer: dict[str, Any],
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
    strategies: list[Any],
) -> None:
    strategies.append(strategy_for("lightning.pytorch")({"tiers": TIERS, **config}))
    made = trainer(tmp_path, strategy=strategies[0], **of_trainer)
    with pytest.raises(ConfigError, match=message) as caught:
        fit(Recorder(**of_module), made)
    assert len(caught.value.problems) == 1
    assert strategies[0].engine is None


def test_fp16_needs_the_engines_backward(tmp_path: Path, strategies: list[Any]) -> None:
    made = trainer(tmp_path, strategy=strategy_of(strategies, tmp_path), precision="16-true")
    with pytest.raises(ConfigError, match="a backward of the module's own"):
        fit(OwnBackward(), made)
    made = trainer(tmp_path, strategy=strategy_of(strategies, tmp_path), precision="16-true")
    module = fit(Recorder(manual=True), made)
    assert module.losses[-1] < module.losses[0]


def test_several_optimizers_and_a_used_one(tmp_path: Path, strategies: list[Any]) -> None:
    class Two(Recorder):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
            used = torch.optim.AdamW(self.net[3].parameters(), lr=0.1)
            self.net[3].weight.sum().backward()
            used.step()
            return [first, used]

    with pytest.raises(ConfigError) as caught:
        fit(
            Two(manual=True),
            trainer(tmp_path, strategy=strategy_of(strategies, tmp_path)),
        )
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "configure_optimizers returned 2 optimizers",
        "configure_optimizers returned an optimizer that has taken steps",
    ]


def test_the_number_of_batches_may_change(tmp_path: Path, strategies: list[Any]) -> None:
    runs = []
    for options in ({}, {"strategy": strategy_of(strategies, tmp_path)}):
        schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})
        runs.append(fit(Recorder(), trainer(tmp_path, callbacks=[schedule], **options)))
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-6, abs=0)
    assert runs[1].trainer.global_step == runs[0].trainer.global_step == 10


def test_another_clipping_in_the_middle_is_refused(tmp_path: Path, strategies: list[Any]) -> None:
    class Clipping(Recorder):
        def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=0.5,
                gradient_clip_algorithm=self.options["algorithm"],
            )

    for algorithm in ("norm", "value"):
        made = trainer(tmp_path, strategy=strategy_of(strategies, tmp_path))
        with pytest.raises(OffloadError, match="gradient_clip"):
            fit(Clipping(algorithm=algorithm), made)


def test_checkpoints_that_are_refused(tmp_path: Path, strategies: list[Any]) -> None:
    plain = trainer(tmp_path)
    fit(Recorder(), plain)
    strategy = strategy_of(strategies, tmp_path)
    made = trainer(tmp_path / "offload", strategy=strategy)
    with pytest.raises(CheckpointError, match="which is a pickle"):
        fit(Recorder(), made, ckpt_path=plain.checkpoint_callback.best_model_path)

    class Large(Recorder):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["table"] = torch.zeros(1 << 13)

    made = trainer(tmp_path / "large", strategy=strategy_of(strategies, tmp_path))
    with pytest.raises(CheckpointError, match=r"checkpoint\['table'\]"):
        fit(Large(), made)
    other = trainer(tmp_path / "other", strategy=strategy_of(strategies, tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OffloadError, match="before fit"):
        other.test(Recorder(), loader(), ckpt_path=folder)
    with pytest.raises(OffloadError, match="checkpoint_io"):
        strategy_for("lightning.pytorch")(checkpoint_io=object())


def test_values_of_a_checkpoint_come_back() -> None:
    value = {
        "score": torch.tensor(0.1),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "none": torch.zeros(0, 2, dtype=torch.int64),
        "path": Path("a/b"),
        "nested": [(1, None), {"x": float("inf")}],
    }
    found = from_plain(to_plain(value))
    assert found.keys() == value.keys()
    for key in ("score", "half", "none"):
        assert found[key].dtype == value[key].dtype  # type: ignore[attr-defined]
        assert torch.equal(found[key], value[key])  # type: ignore[arg-type]
    assert (found["path"], found["nested"]) == (value["path"], value["nested"])
