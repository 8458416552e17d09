"""The Trainer of transformers under the engine: against the stock Trainer, and against itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import offload
from offload.integrations.transformers import STATE_FOLDER, OffloadTrainer, OffloadTrainerMixin
from tests.oracle import relative_difference, small_llama, transformers_model

TOLERANCE = 1e-6
PLACEMENTS = ("device", "host", "nvme")


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random tokens, the same for the same index."""

    def __init__(self, length: int = 22, *, offset: int = 0) -> None:
        self._length, self._offset = length, offset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(self._offset + index)
        tokens = torch.randint(5, 256, (16,), generator=drawn)
        return {"input_ids": tokens, "labels": tokens}


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    """Ten small steps with everything that changes numbers: decay, warm-up, clipping."""
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-6,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "use_cpu": True,
    }
    return TrainingArguments(**{**usual, **given})


def placed(tier: str, tmp_path: Path) -> dict[str, Any]:
    """All state on one tier, with little room on the device if it is another."""
    tiers: dict[str, Any] = {"nvme": {"paths": [str(tmp_path)]}} if tier == "nvme" else {}
    if tier != "device":
        tiers["device"] = {"memory": "300KiB"}
    return {
        "tiers": tiers,
        "partition": {"bucket_elements": 16384},
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), tier),
    }


def logged(trainer: Any, *keys: str) -> list[tuple[Any, ...]]:
    keys = keys or ("loss", "learning_rate", "grad_norm")
    return [tuple(line[k] for k in keys) for line in trainer.state.log_history if "loss" in line]


def assert_as_stock(found: Any, expected: Any) -> None:
    """Losses, rates, norms and weights agree."""
    ours, theirs = logged(found), logged(expected)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)
    weights = expected.model.state_dict()
    state = found.offload_engine.state_dict()
    assert state.keys() == weights.keys()
    for name, weight in weights.items():
        assert relative_difference(state[name], weight) <= TOLERANCE, name


def train(
    trainer_class: Any, folder: Path, model: Any = None, *, resume: Any = None, **given: Any
) -> Any:
    config = given.pop("offload_config", None)
    extra = {
        key: given.pop(key)
        for key in ("optimizers", "callbacks", "eval_dataset", "compute_metrics", "model_init")
        if key in given
    }
    if issubclass(trainer_class, OffloadTrainerMixin):
        extra["offload_config"] = config
    if "model_init" not in extra:
        extra["model"] = small_llama() if model is None else model
    torch.manual_seed(0)
    trainer = trainer_class(args=arguments(folder, **given), train_dataset=Tokens(), **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lora(seed: int = 0) -> Any:
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(small_llama(), config)


def linear_decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.1, momentum=0.9)


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulation_with_a_rest": {
        "gradient_accumulation_steps": 4,
        "max_steps": -1,
        "num_train_epochs": 2,
    },
    "without_clipping": {"max_grad_norm": 0.0},
    "label_smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.4},
    "another_rule": {"optim": "adagrad"},
}


SLOW = ("cosine", "another_rule")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_numbers_are_those_of_the_trainer(name: str, tmp_path: Path) -> None:
    given = CASES[name]
    expected = train(Trainer, tmp_path, **given)
    found = train(OffloadTrainer, tmp_path, offload_config=placed("host", tmp_path), **given)
    assert_as_stock(found, expected)


def test_adapters_train_as_with_the_trainer(tmp_path: Path) -> None:
    given = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    expected = train(Trainer, tmp_path, lora(), **given)
    model = lora()
    found = train(OffloadTrainer, tmp_path, model, offload_config=placed("host", tmp_path), **given)
    assert_as_stock(found, expected)
    found.save_model(str(tmp_path / "adapter"))
    import peft

    again = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "adapter")
    state = found.offload_engine.state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_factories_of_optimizer_and_scheduler(tmp_path: Path) -> None:
    model = small_llama()
    optimizer = sgd(model.parameters())
    expected = train(Trainer, tmp_path, model, optimizers=(optimizer, linear_decay(optimizer)))
    found = train(OffloadTrainer, tmp_path, optimizers=(sgd, linear_decay))
    assert_as_stock(found, expected)
    model = small_llama()
    found = train(OffloadTrainer, tmp_path, model, optimizers=(sgd(model.parameters()), None))
    assert found.offload_engine.optimizer.param_groups[0]["momentum"] == 0.9


def test_weight_decay_groups_are_those_of_the_trainer(tmp_path: Path) -> None:
    found = train(OffloadTrainer, tmp_path, transformers_model("gpt2"), max_steps=1)
    members = found.offload_engine.optimizer_members()
    assert [group["weight_decay"] for group in found.optimizer.param_groups] == [0.1, 0.0]
    assert all("bias" in name or "ln_" in name for name in members[1])
    assert not any("bias" in name for name in members[0])


def test_placement_does_not_change_the_numbers(tmp_path: Path) -> None:
    runs = [
        train(
            OffloadTrainer,
            tmp_path,
            transformers_model("gpt2"),  # with dropout
            offload_config=placed(tier, tmp_path),
            gradient_accumulation_steps=2,
        )
        for tier in PLACEMENTS
    ]
    first = runs[0]
    for other in runs[1:]:
        assert logged(other) == logged(first)
        weights = other.offload_engine.state_dict()
        for name, tensor in first.offload_engine.state_dict().items():
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_follows_the_arguments(precision: str, tmp_path: Path) -> None:
    found = train(OffloadTrainer, tmp_path, **{precision: True})
    engine = found.offload_engine
    assert engine.config.precision.compute == precision
    losses = [loss for (loss,) in logged(found, "loss")]
    plain = [loss for (loss,) in logged(train(Trainer, tmp_path), "loss")]
    assert losses == pytest.approx(plain, rel=1e-2)


def test_mixed_precision_of_the_trainer_with_fp32_weights(tmp_path: Path) -> None:
    config = {"precision": {"compute": "fp32"}}
    found = train(OffloadTrainer, tmp_path, bf16=True, offload_config=config)
    assert_as_stock(found, train(Trainer, tmp_path, bf16=True))


def test_dtype_of_the_model_decides_where_nobody_says(tmp_path: Path) -> None:
    found = train(OffloadTrainer, tmp_path, small_llama().to(torch.bfloat16), max_steps=1)
    assert found.offload_engine.config.precision.compute == "bf16"


def test_a_skipped_step_of_fp16_leaves_the_rate(tmp_path: Path) -> None:
    config = {"precision": {"initial_loss_scale": 2.0**40, "backoff_factor": 2.0**-12}}
    found = train(OffloadTrainer, tmp_path, fp16=True, offload_config=config)
    engine = found.offload_engine
    assert engine.skipped_steps
    assert engine.global_steps
    assert found.lr_scheduler.last_epoch == engine.global_steps
    assert not math.isfinite(logged(found, "grad_norm")[0][0])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    def model() -> Any:
        return lora() if name == "lora" else transformers_model("gpt2")

    given: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_steps": 9,  # an epoch ends with the sixth
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
    }
    whole = train(
        OffloadTrainer,
        tmp_path / "whole",
        model(),
        offload_config=placed("device", tmp_path),
        **given,
    )
    folder = tmp_path / "whole" / "checkpoint-6"
    assert not (tmp_path / "whole" / "checkpoint-3").exists()
    again = train(
        OffloadTrainer,
        tmp_path / "again",
        model(),
        resume=str(folder),
        offload_config=placed("nvme", tmp_path),
        **given,
    )
    assert logged(again) == logged(whole)
    state = again.offload_engine.state_dict()
    for key, tensor in whole.offload_engine.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 9


def test_resuming_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = train(OffloadTrainer, tmp_path / "one", transformers_model("gpt2"), **given)
    folder = str(tmp_path / "one" / "checkpoint-3")
    again = train(
        OffloadTrainer, tmp_path / "two", transformers_model("gpt2"), resume=folder, **given
    )
    assert logged(again) == logged(whole)


def test_the_last_checkpoint_is_found(tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(OffloadTrainer, tmp_path, **given)
    again = train(OffloadTrainer, tmp_path, resume=True, **{**given, "max_steps": 6})
    assert again.state.global_step == 6
    assert again.offload_engine.global_steps == 6


def test_a_checkpoint_without_state_is_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    train(OffloadTrainer, tmp_path, **given)
    folder = tmp_path / "checkpoint-2"
    assert not (folder / STATE_FOLDER).exists()
    with pytest.raises(offload.CheckpointError, match="has no state of the engine"):
        train(OffloadTrainer, tmp_path, resume=str(folder), **given)


def test_saved_models_are_those_of_from_pretrained(tmp_path: Path) -> None:
    trainer = train(OffloadTrainer, tmp_path, offload_config=placed("nvme", tmp_path))
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = trainer.offload_engine.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_best_model_is_loaded(name: str, only_model: bool, tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """From step 3 on the rate is so high that the model gets worse."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 2:
                for group in given["optimizer"].param_groups:
                    group["lr"] = 10.0

    trainer = train(
        OffloadTrainer,
        tmp_path,
        lora() if name == "lora" else None,
        callbacks=[Worse()],
        eval_dataset=Tokens(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        load_best_model_at_end=True,
        save_only_model=only_model,
    )
    scores = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(scores) < scores[-1]
    assert trainer.evaluate()["eval_loss"] == min(scores)


def test_evaluation_and_prediction_are_those_of_the_trainer(tmp_path: Path) -> None:
    def metrics(found: Any) -> dict[str, float]:
        return {"mean": float(abs(found.predictions).mean())}

    stock = Trainer(
        model=small_llama(), args=arguments(tmp_path), compute_metrics=metrics, train_dataset=None
    )
    ours = OffloadTrainer(
        model=small_llama(),
        args=arguments(tmp_path),
        compute_metrics=metrics,
        offload_config=placed("nvme", tmp_path),
    )
    expected, found = stock.evaluate(Tokens(6)), ours.evaluate(Tokens(6))
    for key in ("eval_loss", "eval_mean"):
        assert found[key] == expected[key]
    assert (ours.predict(Tokens(4)).predictions == stock.predict(Tokens(4)).predictions).all()


def test_generation_between_steps(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Generate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model, prompt = given["model"], torch.tensor([[7, 8, 9]])
            made = model.generate(
                prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            seen.append(made)

    train(Trainer, tmp_path, callbacks=[Generate()])
    expected = list(seen)
    seen.clear()
    train(OffloadTrainer, tmp_path, callbacks=[Generate()], offload_config=placed("host", tmp_path))
    assert len(seen) == 5
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_a_trainer_that_generates_in_evaluation(tmp_path: Path) -> None:
    class OffloadSeq2SeqTrainer(OffloadTrainerMixin, Seq2SeqTrainer):
        pass

    def predictions(trainer_class: Any, **extra: Any) -> Any:
        args = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_max_length=6,
            max_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            model=transformers_model("t5").eval(), args=args, train_dataset=Tokens(), **extra
        )
        trainer.train()
        return trainer.predict(Tokens(4)).predictions

    expected = predictions(Seq2SeqTrainer)
    found = predictions(OffloadSeq2SeqTrainer, offload_config=placed("host", tmp_path))
    assert (found == expected).all()


def test_callbacks_see_model_and_optimizer_of_the_engine(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen.append((given["model"], given["optimizer"], given["lr_scheduler"]))

    trainer = train(OffloadTrainer, tmp_path, callbacks=[Watch()], max_steps=1)
    engine = trainer.offload_engine
    assert seen == [(engine.module, engine.optimizer, trainer.lr_scheduler)]


def test_the_log_has_what_the_engine_says(tmp_path: Path) -> None:
    trainer = train(OffloadTrainer, tmp_path, offload_config=placed("nvme", tmp_path))
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["offload_step_seconds"] > 0
    assert 0 < line["offload_device_peak_bytes"] <= 300 << 10
    assert line["offload_nvme_peak_bytes"] > 0


def test_a_model_init_gives_each_training_a_new_engine(tmp_path: Path) -> None:
    trainer = train(OffloadTrainer, tmp_path, model_init=lambda: small_llama(), max_steps=2)
    first, losses = trainer.offload_engine, logged(trainer)
    trainer.train()
    assert trainer.offload_engine is not first
    assert logged(trainer) == losses
    with pytest.raises(offload.EngineStateError, match="closed"):
        first(input_ids=torch.tensor([[1]]))


def test_training_goes_on_with_the_same_engine(tmp_path: Path) -> None:
    trainer = train(OffloadTrainer, tmp_path, max_steps=2)
    first = trainer.offload_engine
    trainer.train()
    assert trainer.offload_engine is first
    assert first.global_steps == 4


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "compile": ({"torch_compile": True}, {}, "compile submodules before"),
    "batch_size": ({"auto_find_batch_size": True}, {}, "per_device_train_batch_size"),
    "full_eval": ({"bf16_full_eval": True}, {}, "precision.compute"),
    "liger": ({"use_liger_kernel": True}, {}, "loss_chunk_tokens"),
    "8bit": ({"optim": "adamw_bnb_8bit"}, {}, "optimizer.moments = '8bit'"),
    "lomo": ({"optim": "lomo"}, {}, "updates inside of backward"),
    "norm": ({}, {"training": {"max_grad_norm": 1.0}}, "TrainingArguments.max_grad_norm is 0.5"),
    "rate": ({}, {"optimizer": {"lr": 1.0}}, "TrainingArguments.learning_rate is 0.001"),
    "rule": ({}, {"optimizer": {"name": "mezo"}}, "TrainingArguments.optim is 'adamw'"),
    "groups": ({}, {"optimizer": {"groups": [{"match": ["*"]}]}}, "pass factories"),
    "order": ({}, {"training": {"accumulation": "layer_major"}}, "one micro-batch after the other"),
    "saves": (
        {},
        {"checkpoint": {"every_steps": 1, "directory": "x"}},
        "TrainingArguments.save_steps",
    ),
    "precision": ({"fp16": True}, {"precision": {"compute": "bf16"}}, "whose loss scale"),
    "device": ({}, {"tiers": {"device": {"kind": "cuda"}}}, "set use_cpu=True, or kind = 'auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of liger, which is not installed
def test_refused_before_anything_moves(name: str, tmp_path: Path) -> None:
    given, config, message = REFUSED[name]
    model = small_llama()
    with pytest.raises(offload.ConfigError) as caught:
        OffloadTrainer(
            model=model,
            args=arguments(tmp_path, **given),
            train_dataset=Tokens(),
            offload_config=config,
        )
    assert message in str(caught.value)
    assert type(model.model.norm.weight) is torch.nn.Parameter


@pytest.mark.parametrize("name", ["world_size", "n_gpu", "fsdp", "deepspeed"])
def test_several_devices_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    if name in ("world_size", "n_gpu"):
        monkeypatch.setattr(TrainingArguments, name, property(lambda _: 2))
    else:
        setattr(args, name, "anything")
    with pytest.raises(offload.ConfigError, match=r"one process and one device|takes its place"):
        OffloadTrainer(model=small_llama(), args=args, train_dataset=Tokens())


def test_what_both_say_may_be_the_same(tmp_path: Path) -> None:
    config = {
        "training": {"max_grad_norm": 0.5, "gradient_accumulation_steps": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "moments": "8bit"},
        "lr_scheduler": {"name": "linear", "warmup_steps": 2, "total_steps": 5},
        "run": {"model": "x", "steps": 5},
    }
    with pytest.raises(offload.ConfigError, match=r"lr_scheduler\.total_steps is not used"):
        train(OffloadTrainer, tmp_path, offload_config=config)
    del config["lr_scheduler"]
    trainer = train(OffloadTrainer, tmp_path, offload_config=config)
    assert trainer.offload_engine.config.optimizer.moments == "8bit"


def test_optimizers_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    model = small_llama()
    optimizer = sgd(model.parameters())
    with pytest.raises(offload.OffloadError, match="schedules another optimizer"):
        train(OffloadTrainer, tmp_path, model, optimizers=(optimizer, linear_decay(optimizer)))
    model = small_llama()
    optimizer = sgd(model.parameters())
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    with pytest.raises(offload.OffloadError, match="has taken steps"):
        train(OffloadTrainer, tmp_path, model, optimizers=(optimizer, None))
    with pytest.raises(offload.OffloadError, match="expected: a factory"):
        train(OffloadTrainer, tmp_path, optimizers=(3, None))


def test_another_norm_is_refused(tmp_path: Path) -> None:
    trainer = train(OffloadTrainer, tmp_path, max_steps=1)
    clip = trainer.accelerator.clip_grad_norm_
    for norm, kind in ((0.25, 2), (0.5, 1)):
        with pytest.raises(offload.OffloadError, match=r"max_norm 0\.5"):
            clip(trainer.model.parameters(), norm, kind)


def test_the_overlapped_step_runs_under_the_trainer(tmp_path: Path) -> None:
    """Only the last backward of a step updates ahead: what is held is not dropped."""
    trainer = train(
        OffloadTrainer,
        tmp_path,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        offload_config=placed("nvme", tmp_path),
    )
    updates = trainer.offload_engine._parts.updates
    assert updates.committed > 0
    assert updates.dropped == 0
