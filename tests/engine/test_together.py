"""Features that are each tested alone, used together: the same bits in every placement, within the
budgets, and nothing left behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import offload
from offload.errors import OffloadError
from tests.oracle import (
    Run,
    assert_identical,
    continue_engine,
    language_loss,
    make_engine,
    settings,
    small_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

TILES: dict[str, Any] = {"tiling": {"modules": ["*lm_head", "*embed_tokens"], "tiles": 3}}
TRAINING = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "loss_chunk_tokens": 5,
}


def llama(checkpointing: str = "off", *, tied: bool = True) -> Any:
    """A language model of 16 KiB fp32 pages, but for its embedding and head of 64 KiB."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=64,
            num_hidden_layers=2,
            tie_word_embeddings=tied,
        )
    )
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train()


def with_adapters(model: Any) -> Any:
    """Seeded LoRA adapters over a frozen base."""
    torch.manual_seed(1)
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def placed(placement: str, path: Path, **sections: Any) -> dict[str, Any]:
    """All state, activations too, in one tier; "tight" is nvme with a small device budget."""
    itemsize = 4 if sections.get("compute", "fp32") == "fp32" else 2
    if placement == "tight":
        config = settings("nvme", path, **{"device": 4 * 256 * 64 * itemsize, **sections})
    else:
        config = settings(placement, path, **sections)
    if placement != "device":
        config["placement"]["activations"] = "host" if placement == "host" else "nvme"
        config["activations"] = {"min_bytes": 1024, "host_memory": "256KiB"}
    return config


def train(
    model: Any, config: dict[str, Any], *, unfreeze_at: int = -1, plainly: bool = False
) -> Run:
    """Three optimizer steps; before that of number `unfreeze_at` the whole model is unfrozen.

    `plainly`: the module is called itself, and `loss.backward()` and the optimizer too.
    """
    run = Run()
    with make_engine(model, config) as engine:
        for step in range(3):
            if step == unfreeze_at:
                model.requires_grad_(True)
            for micro in range(engine.config.training.gradient_accumulation_steps):
                index = 10 * step + micro
                if plainly:
                    loss = language_loss(model, index)
                    loss.backward()
                else:
                    loss = language_loss(engine, index)
                    engine.backward(loss)
                    engine.step()
                run.losses.append(loss.item())
            if plainly:
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            run.norms.append(engine.grad_norm)
        run.state, run.steps = dict(engine.named_state()), engine.parameter_steps()
        for tier in engine.report().tiers.values():
            assert tier.peak_bytes <= tier.budget_bytes
        assert not any(page.pins or page.windows for page in engine._parts.pager.pages)
    return run


@pytest.mark.parametrize(
    ("checkpointing", "compute"),
    [("off", "bf16"), ("reentrant", "fp32"), ("not_reentrant", "bf16")],
)
def test_adapters_tiles_chunks_and_activations_of_a_deferred_model_that_is_unfrozen(
    checkpointing: str, compute: str, tmp_path: Path
) -> None:
    runs = []
    for placement in ("device", "host", "tight"):
        with offload.deferred_init():
            model = llama(checkpointing)
        config = placed(placement, tmp_path, compute=compute, training=TRAINING, **TILES)
        runs.append(train(with_adapters(model), config, unfreeze_at=1))
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.parametrize("placement", ["device", "tight"])
def test_the_plain_idiom_unfreezes_what_is_tiled(placement: str, tmp_path: Path) -> None:
    training = {**TRAINING, "gradient_accumulation_steps": 1}
    found, expected = (
        train(
            with_adapters(llama()),
            placed(placement, tmp_path, training=training, **TILES),
            unfreeze_at=1,
            plainly=plainly,
        )
        for plainly in (True, False)
    )
    assert_identical(found, expected)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_module_of_an_engine_gets_no_second_one(
    placement: str, is_frozen: bool, is_open: bool, tmp_path: Path
) -> None:
    model = small_model()
    config = settings(placement, tmp_path)
    engine = make_engine(model, config)
    if is_frozen:
        model.requires_grad_(False)
    if not is_open:
        engine.close()
    around = nn.ModuleList([model, nn.Linear(4, 4)])
    for module in (model, around):
        with pytest.raises(OffloadError, match=r"0\.weight belongs to an engine already"):
            offload.initialize(module, config)
        with pytest.raises(OffloadError, match=r"0\.weight belongs to an engine already"):
            offload.plan(module, config)
    engine.close()


@pytest.mark.parametrize("placement", ["device", "tight"])
def test_a_checkpoint_between_unfreezing_and_the_next_forward_loads(
    placement: str, tmp_path: Path
) -> None:
    config = placed(placement, tmp_path, training=TRAINING, **TILES)
    runs = []
    for saves in (True, False):
        model = with_adapters(llama())
        with make_engine(model, config) as engine:
            continue_engine(engine, language_loss, steps=1)
            model.requires_grad_(True)
            if saves:
                engine.save_checkpoint(tmp_path / "saved")
                continue_engine(engine, language_loss, steps=1)
                engine.load_checkpoint(tmp_path / "saved")
            runs.append(continue_engine(engine, language_loss, steps=2))
    assert_identical(*runs)


def test_training_goes_on_without_hooks_that_were_removed(tmp_path: Path) -> None:
    runs = []
    for has_hook in (True, False):
        model = with_adapters(llama("reentrant"))
        config = placed("host", tmp_path, training=TRAINING)
        with make_engine(model, config) as engine:
            watched = [p for p in model.parameters() if p.requires_grad] if has_hook else []
            handles = [p.register_post_accumulate_grad_hook(lambda _: None) for p in watched]
            first = continue_engine(engine, language_loss, steps=1)
            for handle in handles:
                handle.remove()
            runs.append(continue_engine(engine, language_loss, steps=2))
            runs[-1].losses += first.losses
    assert_identical(*runs)
