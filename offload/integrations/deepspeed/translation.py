"""A DeepSpeed configuration as one of offload, with a note on every key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.config import OffloadConfig, load_config
from offload.errors import ConfigError
from offload.integrations.deepspeed.keys import REFUSED_SECTIONS, REFUSED_WHEN_ENABLED
from offload.integrations.deepspeed.optimizers import read_optimizer, read_scheduler
from offload.integrations.deepspeed.reading import Note, Reading, leaves
from offload.integrations.deepspeed.schedules import Course
from offload.integrations.deepspeed.zero import read_aio, read_zero

_NEVER_GROWS = 2**31 - 1  # steps until a static loss scale would grow
_LARGEST_SCALE_POWER = 127  # of an fp32 number
OWN_SECTION = "offload"


@dataclass(frozen=True, slots=True)
class Translation:
    """What a DeepSpeed configuration is here.

    Attributes:
        config: the configuration for `offload.initialize`.
        plain: the same as nested plain values, only what the translation has set.
        notes: what became of each key; see [Note: Notes].
        course: the learning rate schedule, exactly; None without `scheduler`. `config.lr_scheduler`
            is the nearest that a configuration file can say.
        has_optimizer: whether the configuration names an optimizer.
        stage: the ZeRO stage.
        train_batch_size: samples in one optimizer step.
        micro_batch_size: samples in one forward pass.
        drop_last: whether a data loader leaves out an incomplete last batch.
    """

    config: OffloadConfig
    plain: dict[str, Any]
    notes: tuple[Note, ...]
    course: Course | None
    has_optimizer: bool
    stage: int
    train_batch_size: int
    micro_batch_size: int
    drop_last: bool

    def __str__(self) -> str:
        return "\n".join(map(str, self.notes))


def translate(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    values: Mapping[str, Any] | None = None,
    world_size: int = 1,
    own_optimizer: bool = False,
    own_scheduler: bool = False,
) -> Translation:
    """Translate a DeepSpeed configuration; every key of it gets a note.

    A top-level section `offload`, which DeepSpeed passes over, is laid over the result as it is:
    budgets in bytes, for instance.

    Args:
        config: a JSON file or its content.
        values: what `"auto"` stands for, by dotted key, e.g. `{"optimizer.params.lr": 1e-4}`.
        world_size: the processes that `train_batch_size` is divided by.
        own_optimizer: the program brings its optimizer; that of the configuration does not count.
        own_scheduler: the same of the schedule.

    Raises:
        ConfigError: with every problem at once: contradictions, an `"auto"` without a value, what
            would change the training and has no counterpart.
    """
    content, source = _content(config)
    if source is not None and not isinstance(content, Mapping):
        raise ConfigError(problems=["must be a JSON object"], source=source)
    own = content.get(OWN_SECTION, {})
    reading = Reading(content, values or {})
    plain: dict[str, Any] = {}
    _refuse_what_changes_training(reading)
    train, micro = _read_batch(reading, plain, world_size)
    _read_precision(reading, plain)
    _read_clipping(reading, plain)
    stage = read_zero(reading, plain)
    read_aio(reading, plain)
    _read_activations(reading, plain)
    has_optimizer = read_optimizer(reading, plain, own=own_optimizer)
    course = read_scheduler(reading, plain, own=own_scheduler)
    drop_last = reading.boolean("dataloader_drop_last")
    reading.note("dataloader_drop_last", "translated", "of the loader that initialize returns")
    if isinstance(own, Mapping):
        plain = _laid_over(plain, own)
        for key, _ in leaves({OWN_SECTION: own}):
            reading.note(key, "translated", "as it is")
    else:
        reading.problems.append(f"{OWN_SECTION} must be a section")
    notes = reading.close()
    problems = reading.problems
    made: OffloadConfig | None = None
    try:
        made = load_config(plain)
    except ConfigError as error:
        problems = problems + [f"as translated: {problem}" for problem in error.problems]
    if problems or made is None:
        raise ConfigError(problems=problems, source=source)
    return Translation(
        config=made,
        plain=plain,
        notes=notes,
        course=course,
        has_optimizer=has_optimizer,
        stage=stage,
        train_batch_size=train,
        micro_batch_size=micro,
        drop_last=drop_last,
    )


def _content(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Any, str | None]:
    if isinstance(config, Mapping):
        return config, None
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_without_duplicates), str(path)
    except OSError as error:
        raise ConfigError(
            problems=[f"cannot be read: {error.strerror}"], source=str(path)
        ) from error
    except ValueError as error:
        raise ConfigError(problems=[f"is not valid JSON: {error}"], source=str(path)) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As DeepSpeed, refuse a key that stands twice.

    Raises:
        ValueError: it does.
    """
    names = [key for key, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} more than once in a section")
    return dict(pairs)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[key] = _laid_over(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _refuse_what_changes_training(reading: Reading) -> None:
    for section, remedy in REFUSED_WHEN_ENABLED.items():
        if reading.raw(f"{section}.enabled") is True or reading.raw(section) is True:
            reading.problems.append(f"{section} is on, which has no counterpart here: {remedy}")
        for key in reading.keys_below(section):
            reading.note(f"{section}.{key}", "ignored", f"{section} is off")
        reading.note(section, "ignored", f"{section} is off")
    for section, remedy in REFUSED_SECTIONS.items():
        parts = [f"{section}.{key}" for key in reading.keys_below(section)]
        if any(key.endswith("enabled") and reading.raw(key) is True for key in parts):
            reading.problems.append(f"{section} is on, which has no counterpart here: {remedy}")
        for key in [section, *parts]:
            reading.note(key, "ignored", f"{section} is off")
    if reading.raw("managed_gradient_accumulation") is False:
        reading.problems.append(
            "managed_gradient_accumulation = false has no counterpart here: use offload.initialize,"
            " and call engine.optimizer.step() where a step is due"
        )


def _read_batch(reading: Reading, plain: dict[str, Any], world_size: int) -> tuple[int, int]:
    """DeepSpeed's rule: of the three numbers those that are absent follow from the others.

    Source: DeepSpeed 0.19 `DeepSpeedConfig._set_batch_related_parameters`.
    """
    num_problems = len(reading.problems)
    train = reading.integer("train_batch_size")
    micro = reading.integer("train_micro_batch_size_per_gpu")
    steps = reading.integer("gradient_accumulation_steps")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        reading.note(key, "translated", "batches are those of the data loader; checked")
    reading.note(
        "gradient_accumulation_steps", "translated", "training.gradient_accumulation_steps"
    )
    if len(reading.problems) > num_problems:
        return 1, 1  # an "auto" without a value says nothing about the others
    if train is None and micro is None:
        reading.problems.append(
            "train_batch_size or train_micro_batch_size_per_gpu is needed: samples in a step, or "
            "in a forward pass"
        )
        return 1, 1
    if micro is None and train is not None:
        micro = train // world_size // (steps or 1)
    assert micro is not None
    if steps is None:
        steps = 1 if train is None else train // max(micro, 1) // world_size
    if train is None:
        train = micro * steps * world_size
    if min(train, micro, steps) < 1 or train != micro * steps * world_size:
        reading.problems.append(
            f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} * "
            f"gradient_accumulation_steps {steps} * {world_size} "
            f"process{'' if world_size == 1 else 'es'}: change one of them"
        )
    elif steps > 1 or reading.has("gradient_accumulation_steps"):
        plain["training"] = {"gradient_accumulation_steps": steps}
    return train, micro


def _read_precision(reading: Reading, plain: dict[str, Any]) -> None:
    bf16 = "bfloat16" if reading.has("bfloat16") and not reading.has("bf16") else "bf16"
    half, brain = reading.boolean("fp16.enabled"), reading.boolean(f"{bf16}.enabled")
    if half and brain:
        reading.problems.append(f"fp16.enabled and {bf16}.enabled are both true: choose one")
    compute = "fp16" if half else "bf16" if brain else "fp32"
    precision: dict[str, Any] = {"compute": compute}
    plain["precision"] = precision
    reading.note("fp16.enabled", "translated", f"precision.compute = {compute!r}")
    reading.note(f"{bf16}.enabled", "translated", f"precision.compute = {compute!r}")
    masters = "masters and moments are fp32, which is more exact"
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        reading.note(f"{bf16}.{key}", "approximated", masters)
    reading.note("fp16.fp16_master_weights_and_grads", "approximated", masters)
    _read_gradient_dtype(reading, plain, compute)
    if not half:
        return
    static = reading.number("fp16.loss_scale", 0.0) or 0.0
    if static < 0:
        reading.problems.append("fp16.loss_scale must not be negative (0 is a dynamic scale)")
    elif static:
        precision |= {"initial_loss_scale": static, "growth_interval": _NEVER_GROWS}
        reading.note(
            "fp16.loss_scale",
            "approximated",
            "precision.initial_loss_scale, which does not grow; a step that overflows halves it, "
            "where DeepSpeed keeps it",
        )
        for key in (
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        ):
            reading.note(f"fp16.{key}", "ignored", "the loss scale is static")
        return
    reading.note("fp16.loss_scale", "translated", "0: the loss scale is dynamic")
    _read_dynamic_scale(reading, precision)


def _read_dynamic_scale(reading: Reading, precision: dict[str, Any]) -> None:
    power = reading.integer("fp16.initial_scale_power", 16)
    window = reading.integer("fp16.loss_scale_window", 1000)
    assert power is not None
    assert window is not None
    if not 0 <= power <= _LARGEST_SCALE_POWER:
        reading.problems.append(
            f"fp16.initial_scale_power = {power} must be 0 to {_LARGEST_SCALE_POWER}"
        )
    elif window < 1:
        reading.problems.append(f"fp16.loss_scale_window = {window} must be positive")
    else:
        precision |= {"initial_loss_scale": 2.0**power, "growth_interval": window}
    reading.note(
        "fp16.initial_scale_power", "translated", "precision.initial_loss_scale, a power of two"
    )
    reading.note(
        "fp16.loss_scale_window",
        "approximated",
        "precision.growth_interval: the scale grows after so many good steps; DeepSpeed waits for "
        "one more after an overflow and at the start",
    )
    reading.note(
        "fp16.hysteresis",
        "approximated" if reading.integer("fp16.hysteresis", 2) != 1 else "translated",
        "the scale is halved at the first overflow (hysteresis 1), as torch.amp does",
    )
    reading.note("fp16.consecutive_hysteresis", "ignored", "the scale is halved at every overflow")
    reading.note(
        "fp16.min_loss_scale",
        "approximated",
        "the scale goes on below it, where DeepSpeed ends the run",
    )


def _read_gradient_dtype(reading: Reading, plain: dict[str, Any], compute: str) -> None:
    key = "data_types.grad_accum_dtype"
    asked = reading.text(key)
    if asked is None:
        return
    known = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
    dtype = known.get(asked)
    if dtype is None:
        reading.problems.append(f"{key} = {asked!r} must be fp32, fp16 or bf16")
        return
    setting = "compute" if dtype == compute else "fp32"
    plain.setdefault("training", {})["gradient_dtype"] = setting
    same = dtype in (compute, "fp32")
    reading.note(
        key,
        "translated" if same else "approximated",
        f"training.gradient_dtype = {setting!r}"
        + ("" if same else f": {dtype} is neither fp32 nor the compute dtype"),
    )


def _read_clipping(reading: Reading, plain: dict[str, Any]) -> None:
    norm = reading.number("gradient_clipping", 0.0)
    assert norm is not None
    if reading.has("gradient_clipping"):
        plain.setdefault("training", {})["max_grad_norm"] = norm
    reading.note("gradient_clipping", "translated", "training.max_grad_norm")


def _read_activations(reading: Reading, plain: dict[str, Any]) -> None:
    key = "activation_checkpointing.cpu_checkpointing"
    if reading.boolean(key):
        plain.setdefault("placement", {})["activations"] = "host"
        reading.note(
            key,
            "approximated",
            "placement.activations = 'host': all that autograd saves, not inputs of blocks alone",
        )
