"""TRL's SFTTrainer under the engine, against itself without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import peft
import trl

from offload.integrations.transformers import OffloadTrainerMixin
from tests.integrations.offline import texts, tokenizer
from tests.integrations.test_transformers import assert_as_stock, logged, placed
from tests.oracle import small_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class OffloadSFTTrainer(OffloadTrainerMixin, trl.SFTTrainer):
    """As the documentation shows it."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


def train(trainer_class: Any, folder: Path, *, resume: Any = None, **given: Any) -> Any:
    extra: dict[str, Any] = {}
    if given.pop("lora", False):
        extra["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    config = given.pop("offload_config", None)
    if trainer_class is OffloadSFTTrainer:
        extra["offload_config"] = config
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "max_length": 32,
    }
    trainer = trainer_class(
        model=small_llama(),
        args=trl.SFTConfig(**{**usual, **given}),
        train_dataset=texts(),
        eval_dataset=texts(4),
        processing_class=tokenizer(),
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CASES: dict[str, dict[str, Any]] = {
    "plain": {"gradient_accumulation_steps": 2},
    "packed": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "adapters": {"lora": True, "learning_rate": 1e-2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "wrapped")) for n in CASES]
)
def test_numbers_are_those_of_trl(name: str, tmp_path: Path) -> None:
    given = CASES[name]
    expected = train(trl.SFTTrainer, tmp_path, **given)
    config = placed("host", tmp_path)
    found = train(OffloadSFTTrainer, tmp_path, offload_config=config, **given)
    assert_as_stock(found, expected)
    assert logged(found, "mean_token_accuracy") == logged(expected, "mean_token_accuracy")
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])


def test_bf16_is_the_default_and_resumes(tmp_path: Path) -> None:
    given: dict[str, Any] = {"bf16": None, "save_strategy": "steps", "save_steps": 2, "lora": True}
    whole = train(OffloadSFTTrainer, tmp_path / "one", **given)
    assert whole.offload_engine.config.precision.compute == "bf16"
    folder = tmp_path / "one" / "checkpoint-2"
    again = train(OffloadSFTTrainer, tmp_path / "two", resume=str(folder), **given)
    assert logged(again) == logged(whole)
    state = again.offload_engine.state_dict()
    for key, tensor in whole.offload_engine.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert (folder / "adapter_model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
