"""Every key of a DeepSpeed configuration gets a note; contradictions are found together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import ConfigError
from offload.integrations.deepspeed import Translation, translate
from offload.integrations.deepspeed.keys import IGNORED
from offload.integrations.deepspeed.reading import leaves
from tests.integrations.deepspeed_configs import (
    HF_ZERO2_VALUES,
    hf_zero2,
    hf_zero3,
    megatron_infinity,
)


def translated(**keys: Any) -> Translation:
    return translate({"train_batch_size": 1, **keys})


def verdicts(translation: Translation) -> dict[str, str]:
    return {note.key: note.verdict for note in translation.notes}


def problems_of(config: Any, **named: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        translate(config, **named)
    return caught.value.problems


def test_the_zero3_configuration_of_transformers() -> None:
    made = translate(hf_zero3() | {"train_batch_size": 4})
    assert made.config.placement.weights == "host"
    assert made.config.placement.optimizer == "host"
    assert made.config.precision.compute == "fp16"
    assert made.config.precision.initial_loss_scale == 2.0**16
    assert made.config.precision.growth_interval == 1000
    assert made.config.optimizer.betas == (0.8, 0.999)
    assert not made.config.overlap.prefetch
    found = verdicts(made)
    assert found["fp16.hysteresis"] == "approximated"
    assert found["zero_optimization.sub_group_size"] == "ignored"
    assert found["zero_optimization.stage3_prefetch_bucket_size"] == "translated"


def test_the_zero2_configuration_of_transformers_with_its_autos() -> None:
    made = translate(hf_zero2(), values=HF_ZERO2_VALUES)
    assert made.config.placement.weights == "device"
    assert made.config.placement.gradients == "host"
    assert made.config.training.gradient_accumulation_steps == 2
    assert made.config.training.max_grad_norm == 1.0
    problems = problems_of(hf_zero2())
    assert len(problems) == len(HF_ZERO2_VALUES)
    for key, problem in zip(sorted(HF_ZERO2_VALUES), sorted(problems), strict=True):
        assert problem.startswith(f"{key} = 'auto'")


def test_the_infinity_configuration_of_megatron(tmp_path: Path) -> None:
    made = translate(megatron_infinity(str(tmp_path)), own_optimizer=True)
    assert made.config.tiers.nvme.paths == (tmp_path,)
    assert made.config.placement.weights == made.config.placement.optimizer == "nvme"
    assert made.config.io.block_bytes == 1 << 20
    assert made.config.io.queue_depth == 16
    assert made.config.precision.initial_loss_scale == 1024
    assert not made.has_optimizer
    notes = {note.key: note for note in made.notes}
    misspelt = notes["zero_optimization.stage3_param_persitance_threshold"]
    assert misspelt.verdict == "ignored"
    assert notes["aio.thread_count"].verdict == "approximated"


@pytest.mark.parametrize("config", [hf_zero2(), hf_zero3() | {"train_batch_size": 1}])
def test_every_key_has_one_note_in_the_order_of_the_file(config: dict[str, Any]) -> None:
    made = translate(config, values=HF_ZERO2_VALUES)
    assert [note.key for note in made.notes] == [key for key, _ in leaves(config)]
    assert [note.value for note in made.notes] == [value for _, value in leaves(config)]
    assert all(note.text for note in made.notes)
    assert str(made).count("\n") == len(made.notes) - 1


_KNOWN = sorted({key for key, _ in IGNORED if "*" not in key and not key.endswith("enabled")})


@given(
    st.dictionaries(st.sampled_from(_KNOWN), st.sampled_from([True, 0, 7, 1e9, None, "x", {}])),
    st.dictionaries(st.text("abc_", min_size=4, max_size=9), st.integers() | st.just({"a": {}})),
)
def test_no_key_is_passed_over_in_silence(known: dict[str, Any], unknown: dict[str, Any]) -> None:
    config: dict[str, Any] = {"train_batch_size": 2} | unknown
    for dotted, value in known.items():
        section, _, key = dotted.rpartition(".")
        inner = config.setdefault(section, {}) if section else config
        inner[key] = value
    notes: set[str] = set()
    problems: list[str] = []
    try:
        notes = {note.key for note in translate(config).notes}
    except ConfigError as error:
        problems = error.problems
    if problems:
        assert all("must be" in problem or "managed" in problem for problem in problems)
    else:
        assert notes == {key for key, _ in leaves(config)}


def test_unknown_keys_are_named_and_the_nearest_is_shown() -> None:
    made = translated(wall_clock_breakdwn=True, colour="blue")
    texts = {note.key: note.text for note in made.notes}
    assert "did you mean wall_clock_breakdown" in texts["wall_clock_breakdwn"]
    assert texts["colour"] == "no key that is known here"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((8, 4, 2), (8, 4, 2)),
        ((8, 4, None), (8, 4, 2)),
        ((8, None, 2), (8, 4, 2)),
        ((None, 4, 2), (8, 4, 2)),
        ((8, None, None), (8, 8, 1)),
        ((None, 4, None), (4, 4, 1)),
        ((8, 4, 3), None),
        ((8, 3, None), None),
        ((2, 4, None), None),
        ((None, None, 2), None),
        ((-8, 4, -2), None),
    ],
)
def test_the_three_batch_sizes(
    keys: tuple[int | None, ...], expected: tuple[int, int, int] | None
) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {name: value for name, value in zip(names, keys, strict=True) if value is not None}
    if expected is None:
        assert len(problems_of(config)) == 1
        return
    made = translate(config)
    steps = made.config.training.gradient_accumulation_steps
    assert (made.train_batch_size, made.micro_batch_size, steps) == expected


def test_processes_divide_the_batch() -> None:
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}
    assert translate(config, world_size=4).config.training.gradient_accumulation_steps == 4
    assert translate(config).config.training.gradient_accumulation_steps == 16


def test_adam_means_adamw_as_in_deepspeed() -> None:
    def name(kind: str, **params: Any) -> tuple[str, float]:
        made = translated(optimizer={"type": kind, "params": params}).config.optimizer
        return made.name, made.weight_decay

    assert name("Adam") == ("adamw", 0.0)
    assert name("Adam", adam_w_mode=False, weight_decay=0.1) == ("adam", 0.1)
    assert name("AdamW", adam_w_mode=False) == ("adamw", 0.0)
    assert name("AdamW", torch_adam=True) == ("adamw", 0.01)
    assert name("Adam", torch_adam=True, adam_w_mode=False) == ("adam", 0.0)


def test_homes() -> None:
    def homes(stage: int, **sections: Any) -> tuple[str, str, str]:
        zero = {"stage": stage, **sections}
        placement = translated(zero_optimization=zero).config.placement
        return placement.weights, placement.gradients, placement.optimizer

    cpu = {"device": "cpu"}
    assert homes(3) == ("device", "device", "device")
    assert homes(3, offload_param=cpu) == ("host", "device", "device")
    assert homes(2, offload_param=cpu, offload_optimizer=cpu) == ("device", "host", "host")
    assert homes(0, offload_optimizer=cpu) == ("device", "device", "device")
    assert homes(2, cpu_offload=True) == ("device", "host", "host")
    assert homes(3, cpu_offload_params=True) == ("host", "device", "device")
    nvme = {"device": "nvme", "nvme_path": "/tmp"}
    assert homes(3, offload_optimizer=nvme) == ("device", "auto", "nvme")


def test_two_paths_are_striped(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    zero = {
        "stage": 3,
        "offload_param": {"device": "nvme", "nvme_path": paths[0]},
        "offload_optimizer": {"device": "nvme", "nvme_path": paths[1], "ratio": 0.75},
    }
    made = translated(zero_optimization=zero)
    assert [str(p) for p in made.config.tiers.nvme.paths] == paths
    assert made.config.placement.update == 0.25
    found = verdicts(made)
    assert found["zero_optimization.offload_param.nvme_path"] == "approximated"
    assert found["zero_optimization.offload_optimizer.ratio"] == "approximated"


def test_the_own_section_is_laid_over() -> None:
    own = {"tiers": {"device": {"memory": "64MiB"}}, "placement": {"weights": "auto"}}
    made = translated(offload=own, zero_optimization={"stage": 3})
    assert made.config.tiers.device.memory == 64 << 20
    assert made.config.placement.weights == "auto"
    assert made.config.placement.optimizer == "device"
    assert verdicts(made)["offload.tiers.device.memory"] == "translated"


def test_gradient_dtypes() -> None:
    def dtype(asked: str) -> tuple[str, str]:
        made = translated(bf16={"enabled": True}, data_types={"grad_accum_dtype": asked})
        return made.config.training.gradient_dtype, verdicts(made)["data_types.grad_accum_dtype"]

    assert dtype("fp32") == ("fp32", "translated")
    assert dtype("bf16") == ("compute", "translated")
    assert dtype("fp16") == ("fp32", "approximated")


def test_a_file_is_read_and_duplicates_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(hf_zero3() | {"train_batch_size": 1}))
    assert translate(path).config.precision.compute == "fp16"
    path.write_text('{"train_batch_size": 1, "train_batch_size": 2}')
    assert "train_batch_size more than once" in problems_of(path)[0]
    path.write_text("[1]")
    assert problems_of(path) == ["must be a JSON object"]
    assert "cannot be read" in problems_of(tmp_path / "none.json")[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
        ({"fp16": {"enabled": "yes"}}, "must be true or false"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "must not be negative"),
        ({"fp16": {"enabled": True, "initial_scale_power": 200}}, "0 to 127"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "must be positive"),
        ({"amp": {"enabled": True}}, "amp is on"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is on"),
        ({"compression_training": {"x": {"shared": {"enabled": True}}}}, "compression"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"optimizer": {"type": "Lamb"}}, "none of Adam"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type is missing"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 1}}}, "two numbers"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "gradient_clipping"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "no counterpart"),
        ({"optimizer": {"type": "Adam", "params": {"wieght_decay": 1}}}, "mean weight_decay"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, "as translated: optimizer.lr"),
        ({"scheduler": {"type": "Cosine"}}, "none of WarmupLR"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "total_num_steps is missing"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "positive"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}}, "did you mean"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1]}}}, "one number"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "cpu, nvme"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 2},
                }
            },
            "must be 0 to 1",
        ),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "fp32, fp16 or bf16"),
        ({"offload": 1}, "must be a section"),
        ({"offload": {"tiers": {"host": {"memroy": 1}}}}, "did you mean tiers.host.memory"),
    ],
)
def test_what_is_wrong_is_said(keys: dict[str, Any], message: str) -> None:
    problems = problems_of({"train_batch_size": 1, **keys})
    assert len(problems) == 1
    assert message in problems[0]


def test_all_problems_come_at_once() -> None:
    problems = problems_of(
        {
            "fp16": {"enabled": True},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}},
            "optimizer": {"type": "Lamb"},
            "scheduler": {"type": "Cosine"},
        }
    )
    assert len(problems) == 5
