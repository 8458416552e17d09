"""Adapters of peft over a frozen base that lives on any tier: plain PyTorch's numbers, and the base
costs nothing but its weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offload.errors import GuardError
from offload.state import adapters
from tests.oracle import (
    ADAMW,
    Run,
    assert_close,
    assert_identical,
    assert_same_state,
    continue_engine,
    language_loss,
    make_engine,
    round_half_up,
    settings,
    train_engine,
    train_plain,
    transformers_model,
    two_buckets_bytes,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

TOLERANCE = 1e-6
STEPS = 3
PLACEMENTS = ("device", "host", "nvme", "tight")

ATTENTION = ["q_proj", "v_proj"]
CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, lora_dropout=0.1)),
    "lora of gpt2": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=["c_attn"])),
    "lora of embeddings": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, target_modules=["wte", "c_proj"]),
    ),
    "dora": ("llama", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION)),
    "modules_to_save": (
        "llama",
        lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    ),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    "prefix": (
        "llama",
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
    "prompt": (
        "llama",
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
}


def make_adapted(kind: str = "lora", checkpointing: str = "off") -> Any:
    """A peft model with seeded adapters that change what the base computes."""
    base, config = CONFIGS[kind]
    model: Any = transformers_model(base, checkpointing)
    torch.manual_seed(1)
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gpt2's layers are transposed
        model = peft.get_peft_model(model, config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "ia3" in name:
                parameter.normal_(std=0.02)
    return model.train()


def placed(placement: str, path: Path, **sections: Any) -> dict[str, Any]:
    """`settings` of a placement; "tight" is nvme with the smallest device budget."""
    if placement != "tight":
        return settings(placement, path, **sections)
    compute = sections.get("compute", "fp32")
    device = two_buckets_bytes(
        make_adapted("modules_to_save"),
        itemsize=4 if compute == "fp32" else 2,
        bucket_elements=4096,
    )
    return settings("nvme", path, **{"device": device, **sections})


@functools.cache
def plain_run(kind: str) -> Run:
    return train_plain(make_adapted(kind), language_loss, steps=STEPS)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_adapters_train_as_in_plain_pytorch(kind: str, tmp_path: Path) -> None:
    runs = [
        train_engine(make_adapted(kind), placed(tier, tmp_path), language_loss, steps=STEPS)
        for tier in ("device", "tight")
    ]
    assert_close(runs[0], plain_run(kind), tolerance=TOLERANCE)
    assert_identical(runs[1], runs[0])


@pytest.mark.parametrize("placement", ["host", "nvme"])
def test_placement_changes_no_bit_of_bf16(placement: str, tmp_path: Path) -> None:
    runs = [
        train_engine(
            make_adapted(), placed(tier, tmp_path, compute="bf16"), language_loss, steps=STEPS
        )
        for tier in ("device", placement)
    ]
    assert_identical(runs[1], runs[0])


def test_bf16_adapters_compute_in_bf16_and_keep_fp32_masters(tmp_path: Path) -> None:
    """peft makes the adapters of a bf16 base fp32: `precision.compute` decides over both."""
    plain, model = make_adapted("modules_to_save"), make_adapted("modules_to_save")
    for parameter in plain.parameters():
        trained = parameter.requires_grad
        parameter.data = round_half_up(parameter.data) if trained else parameter.data.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" not in name and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    expected = language_loss(plain, 0)
    expected.backward()
    with make_engine(model, placed("tight", tmp_path, compute="bf16")) as engine:
        loss = language_loss(engine, 0)
        assert loss.item() == expected.item()
        engine.backward(loss)
        found = dict(engine.named_state())
        engine.step()
        for name, parameter in plain.named_parameters():
            assert found[name]["weight"].dtype is torch.bfloat16
            assert ("master" in found[name]) == parameter.requires_grad, name
            if parameter.requires_grad:
                assert found[name]["master"].dtype is torch.float32
                assert torch.equal(found[name]["gradient"], parameter.grad), name


@pytest.mark.parametrize("checkpointing", ["reentrant", "not_reentrant"])
def test_gradient_checkpointing_reaches_the_adapters(checkpointing: str, tmp_path: Path) -> None:
    plain = train_plain(make_adapted("lora", checkpointing), language_loss, steps=2)
    run = train_engine(
        make_adapted("lora", checkpointing), placed("tight", tmp_path), language_loss, steps=2
    )
    assert_close(run, plain, tolerance=TOLERANCE)


def frozen_buckets(engine: Any) -> list[int]:
    return [bucket.index for bucket in engine.plan.buckets if not bucket.trainable]


def generations(engine: Any, buckets: list[int]) -> list[int]:
    store = engine._parts.store
    return [record.generation for i in buckets for record in store.block(i, "weights").records]


@pytest.mark.usefixtures("by_itself")
def test_a_frozen_base_costs_its_weights_only(tmp_path: Path) -> None:
    model = make_adapted()
    adapter_numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_numel * 20 < sum(p.numel() for p in model.parameters())
    with make_engine(model, placed("nvme", tmp_path)) as engine:
        store = engine._parts.store
        frozen = frozen_buckets(engine)
        assert all(list(store.classes(bucket)) == ["weights"] for bucket in frozen)
        planned = engine.plan.bytes["nvme"]
        # One adapter bucket, in whole blocks of 4096 bytes: fp32 gradients, and two moments.
        assert adapter_numel * 4 <= planned["gradients"] <= adapter_numel * 4 + (4 << 12)
        assert planned["optimizer"] == 2 * planned["gradients"]
        held = sum(sum(b.layout.chunk_nbytes) for b in store.blocks() if b.home == "nvme")
        assert held == sum(planned.values())
        before = generations(engine, frozen)
        assert set(before) == {1}, "written once, by initialize"
        continue_engine(engine, language_loss, steps=STEPS)
        assert generations(engine, frozen) == before
        adapter_bytes = sum(
            sum(store.block(bucket.index, name).layout.chunk_nbytes)
            for bucket in engine.plan.buckets
            if bucket.trainable
            for name in ("weights", "gradients", "optimizer")
        )
        assert engine.report().lanes["nvme_write"].bytes == adapter_bytes


# -- saving and loading ----------------------------------------------------------------------------


def adapter_values(engine: Any, names: set[str] | None = None) -> dict[str, torch.Tensor]:
    """Weights of adapters under the names that peft writes: without the adapter's own name."""
    return {
        name.replace(".default", ""): state["weight"]
        for name, state in engine.named_state()
        if "master" in state and (names is None or name in names)
    }


@pytest.mark.parametrize("through", ["engine", "peft"])
@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "ia3"])
def test_saved_adapters_are_what_peft_loads(kind: str, through: str, tmp_path: Path) -> None:
    model = make_adapted(kind)
    with make_engine(model, placed("host", tmp_path)) as engine:
        continue_engine(engine, language_loss, steps=STEPS)
        (engine if through == "engine" else model).save_pretrained(tmp_path / "adapter")
        written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        expected = adapter_values(engine)
        for name, tensor in written.items():
            known = name if name in expected else name.replace("lm_head", "lm_head.modules_to_save")
            known = known.replace("magnitude_vector", "magnitude_vector.weight").replace(
                "weight.weight", "weight"
            )
            assert torch.equal(tensor, expected[known]), name
        assert len(written) == len(expected)
        engine.eval()
        with torch.no_grad():
            loss = language_loss(engine, 9)
    base: Any = transformers_model(CONFIGS[kind][0])
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert language_loss(again, 9).item() == loss.item()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = make_adapted(kind)
    with make_engine(model, placed("tight", tmp_path)) as engine:
        continue_engine(engine, language_loss, steps=STEPS)
        engine.save_pretrained(tmp_path / "adapter")
        (trained,) = adapter_values(engine).values()
        loss = language_loss(engine, 9).item()
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(written["prompt_embeddings"], trained)
    with make_engine(make_adapted(kind), placed("host", tmp_path)) as engine:
        assert language_loss(engine, 9).item() != loss
        peft.set_peft_model_state_dict(engine.module, written)
        assert language_loss(engine, 9).item() == loss


def test_saving_through_the_engine_leaves_nothing_on_a_small_device(tmp_path: Path) -> None:
    """peft alone asks for raw memory, which keeps what it saves on the device until the step."""
    config = placed("tight", tmp_path)
    with make_engine(make_adapted("modules_to_save"), config) as engine:
        continue_engine(engine, language_loss, steps=1)
        engine.save_pretrained(tmp_path / "adapter")
        assert not any(page.kept for page in engine._parts.pages)
        continue_engine(engine, language_loss, steps=1)


def test_every_adapter_is_saved_in_its_folder(tmp_path: Path) -> None:
    model = make_adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ATTENTION))
    with make_engine(model, placed("host", tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "saved")
    ranks = {
        folder: load_file(tmp_path / "saved" / folder / "adapter_model.safetensors")[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ].shape[0]
        for folder in (".", "other")
    }
    assert ranks == {".": 4, "other": 2}


def test_other_models_have_no_adapters() -> None:
    assert adapters.has_adapters(make_adapted("prefix"))
    assert not adapters.has_adapters(transformers_model("llama"))
    assert not adapters.has_adapters(nn.Linear(2, 2))


@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_adapters_load_into_a_running_engine(compute: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with make_engine(make_adapted(), placed("nvme", tmp_path, compute=compute)) as engine:
        continue_engine(engine, language_loss, steps=2)
        engine.save_pretrained(folder)
        saved = adapter_values(engine)
    model = make_adapted()
    with make_engine(model, placed("nvme", tmp_path, compute=compute)) as engine:
        continue_engine(engine, language_loss, steps=1)
        if how == "load_adapter":
            model.load_adapter(
                str(folder), "default", is_trainable=True, autocast_adapter_dtype=False
            )
        else:
            written = load_file(folder / "adapter_model.safetensors")
            peft.set_peft_model_state_dict(model, written)
        assert_same_state({"": adapter_values(engine)}, {"": saved})
        for name, state in engine.named_state():
            if "master" in state:
                assert torch.equal(state["master"], state["weight"].float()), name
        run = continue_engine(engine, language_loss, steps=1)
    assert all(torch.isfinite(state["weight"]).all() for state in run.state.values())


def test_adapters_that_peft_casts_are_refused_by_name(tmp_path: Path) -> None:
    """Unless told otherwise, peft's load_adapter puts fp32 parameters in the place of bf16 ones."""
    model = make_adapted()
    with make_engine(model, placed("host", tmp_path, compute="bf16")) as engine:
        engine.save_pretrained(tmp_path / "adapter")
        model.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
        with pytest.raises(GuardError, match=r"parameter .*lora_A\.default\.weight was replaced"):
            language_loss(engine, 0)


def test_the_checkpoint_of_an_adapted_model_resumes_to_the_bit(tmp_path: Path) -> None:
    with make_engine(make_adapted(), placed("host", tmp_path, compute="bf16")) as engine:
        continue_engine(engine, language_loss, steps=2)
        engine.save_checkpoint(tmp_path / "checkpoints")
        expected = continue_engine(engine, language_loss, steps=2)
    other = make_adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)  # a checkpoint holds the frozen base, too
    with make_engine(other, placed("tight", tmp_path, compute="bf16")) as engine:
        engine.load_checkpoint(tmp_path / "checkpoints")
        assert_identical(continue_engine(engine, language_loss, steps=2), expected)


# -- the base as peft changes it -------------------------------------------------------------------


def test_the_base_alone_between_steps(tmp_path: Path) -> None:
    """`disable_adapter` freezes and unfreezes the adapters; what it computes is the base."""
    plain = make_adapted("modules_to_save")
    model = make_adapted("modules_to_save")
    rule = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-3, foreach=False
    )
    config = placed(
        "tight", tmp_path, optimizer={"name": "adamw", "lr": 1e-3, "weight_decay": 0.01}
    )
    with make_engine(model, config) as engine:
        for index in range(STEPS):
            with torch.no_grad(), plain.disable_adapter(), model.disable_adapter():
                assert language_loss(engine, index).item() == language_loss(plain, index).item()
            expected, loss = language_loss(plain, index), language_loss(engine, index)
            assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
            expected.backward()
            rule.step()
            rule.zero_grad()
            engine.backward(loss)
            taken = engine.step()
            assert taken


@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_another_adapter_may_be_trained_in_turn(placement: str, tmp_path: Path) -> None:
    """`set_adapter` freezes one and unfreezes the other, which had no optimizer state so far."""
    plain, model = make_adapted(), make_adapted()
    for each in (plain, model):
        torch.manual_seed(2)
        each.add_adapter("other", peft.LoraConfig(r=4, target_modules=["o_proj"]))
    rule = torch.optim.AdamW(plain.parameters(), foreach=False, **ADAMW)
    with make_engine(model, placed(placement, tmp_path)) as engine:
        for index in range(4):
            if index in (1, 3):
                for each in (plain, model):
                    each.set_adapter("other" if index == 1 else "default")
            expected = language_loss(plain, index)
            expected.backward()
            rule.step()
            rule.zero_grad()
            loss = language_loss(engine, index)
            assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
            engine.backward(loss)
            taken = engine.step()
            assert taken
        found = Run(state=dict(engine.named_state()))
        moved = {name for name, state in found.state.items() if "exp_avg" in state}
        assert all("lora_" in name for name in moved)
        assert any(".other." in name for name in moved)
        engine.save_pretrained(tmp_path / "saved")
    expected_state = {
        name: {"weight": p.detach(), "exp_avg": rule.state[p]["exp_avg"]}
        for name, p in plain.named_parameters()
        if name in moved
    }
    assert_close(found, Run(state=expected_state), tolerance=TOLERANCE)
    assert_close(found, Run(state=expected_state), tolerance=TOLERANCE, key="exp_avg")
    assert (tmp_path / "saved" / "other" / "adapter_model.safetensors").exists()


def test_a_merged_base_is_unfrozen_as_it_is(tmp_path: Path) -> None:
    """From adapters to full training, in bf16: the masters are what was merged."""
    model = make_adapted()
    weight = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    with make_engine(model, placed("nvme", tmp_path, compute="bf16")) as engine:
        continue_engine(engine, language_loss, steps=1)
        model.merge_adapter()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
        language_loss(engine, 0)
        merged = dict(engine.named_state())[weight]
        assert torch.equal(merged["master"], merged["weight"].float())
        assert not merged["exp_avg"].any()
        run = continue_engine(engine, language_loss, steps=1)
        assert not torch.equal(run.state[weight]["master"], merged["master"])
        assert engine.plan.fits


@pytest.mark.parametrize("placement", ["device", "tight"])
def test_merged_adapters_are_kept_in_the_base(placement: str, tmp_path: Path) -> None:
    plain, model = make_adapted(), make_adapted()
    weight = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    with make_engine(model, placed(placement, tmp_path)) as engine:
        frozen = frozen_buckets(engine)
        before = engine.read_state(weight, "weight")
        written = generations(engine, frozen)
        for each in (model, plain):
            each.merge_adapter()
        merged = dict(plain.named_parameters())[weight].detach()
        assert torch.equal(engine.read_state(weight, "weight"), merged)
        assert not torch.equal(merged, before)
        if placement == "tight":
            grown = sum(
                new > old for new, old in zip(generations(engine, frozen), written, strict=True)
            )
            assert 4 <= grown < len(written), "what was merged is written home, and nothing else"
        engine.eval(), plain.eval()
        with torch.no_grad():
            assert language_loss(engine, 3).item() == language_loss(plain, 3).item()
        for each in (model, plain):
            each.unmerge_adapter()
        assert torch.equal(
            engine.read_state(weight, "weight"), dict(plain.named_parameters())[weight]
        )
        engine.train()
        continue_engine(engine, language_loss, steps=1)


def test_a_merged_model_is_saved_for_transformers(tmp_path: Path) -> None:
    model, plain = make_adapted(), make_adapted()
    with make_engine(model, placed("host", tmp_path)) as engine, engine.gathered(writable=True):
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    plain.merge_and_unload().save_pretrained(tmp_path / "expected")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert_same_state({"": found}, {"": expected})
