"""`optimizer` and `scheduler`."""

from __future__ import annotations

import difflib
from typing import Any

from offload.integrations.deepspeed.reading import Reading
from offload.integrations.deepspeed.schedules import DEFAULTS, NEEDED, Course

_PARAMS = "optimizer.params"
_ADAM_DECAY_OF_TORCH = 0.01  # torch.optim.AdamW's default; DeepSpeed's own Adams have 0
# What DeepSpeed's optimizers, or torch's for SGD, have where nothing is given.
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "lion": {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0},
    "adagrad": {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0},
    "sgd": {
        "lr": 1e-3,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
    },
}
_NO_MATTER = {
    "fused": "one kernel over gradient, master and moments in any case",
    "foreach": "one kernel over gradient, master and moments in any case",
    "set_grad_none": "gradients are always forgotten",
    "fp32_optimizer_states": "moments are fp32; see optimizer.moments for 8 bits",
    "legacy_fusion": "there is one kernel",
}
_REFUSED_UNLESS = {
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "lr_decay": 0,
    "initial_accumulator_value": 0,
}


def read_optimizer(reading: Reading, plain: dict[str, Any], *, own: bool) -> bool:
    """Set `[optimizer]`; returns whether the configuration names one."""
    if own or not reading.has("optimizer"):
        for key in reading.keys_below("optimizer"):
            reading.note(f"optimizer.{key}", "ignored", "the program brings its own optimizer")
        return False
    kind = reading.text("optimizer.type")
    if kind is None:
        reading.problems.append("optimizer.type is missing")
        return False
    name = kind.lower()
    defaults = _OPTIMIZERS.get("adam" if name == "adamw" else name)
    if defaults is None:
        reading.problems.append(
            f"optimizer.type = {kind!r} is none of Adam, AdamW, Adagrad, Lion and SGD: give "
            "initialize a torch optimizer, any works on any tier"
        )
        return True
    if name in ("adam", "adamw"):
        name = _adam(reading, name)
        if reading.boolean(f"{_PARAMS}.torch_adam") and name == "adamw":
            defaults = {**defaults, "weight_decay": _ADAM_DECAY_OF_TORCH}
    plain["optimizer"] = {"name": name, **_settings(reading, defaults)}
    reading.note("optimizer.type", "translated", f"optimizer.name = {name!r}")
    reading.note(_PARAMS, "ignored", "an empty section")
    return True


def _adam(reading: Reading, name: str) -> str:
    """Adam's name means AdamW, unless `adam_w_mode` is false.

    Source: DeepSpeed 0.19 `DeepSpeedEngine._configure_basic_optimizer`.
    """
    decoupled = reading.boolean(f"{_PARAMS}.adam_w_mode", True)
    reading.note(
        f"{_PARAMS}.adam_w_mode",
        "translated" if name == "adam" else "ignored",
        "whether the weight decay is decoupled" if name == "adam" else "AdamW is always decoupled",
    )
    reading.note(
        f"{_PARAMS}.torch_adam", "translated", "the arithmetic is torch.optim's in any case"
    )
    return "adamw" if decoupled else name


def _settings(reading: Reading, defaults: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, default in defaults.items():
        dotted = f"{_PARAMS}.{key}"
        if isinstance(default, tuple):
            settings[key] = list(reading.pair(dotted, default))
        elif isinstance(default, bool):
            settings[key] = reading.boolean(dotted, default)
        else:
            settings[key] = reading.number(dotted, default)
        reading.note(dotted, "translated", f"optimizer.{key}")
    for key in reading.keys_below(_PARAMS):
        dotted = f"{_PARAMS}.{key}"
        value = reading.raw(dotted)
        if key in defaults or key in ("adam_w_mode", "torch_adam"):
            continue
        if key == "max_grad_norm":
            reading.problems.append(
                f"{dotted} is no parameter of an optimizer: use gradient_clipping"
            )
        elif key in _NO_MATTER:
            reading.note(dotted, "ignored", _NO_MATTER[key])
        elif key in _REFUSED_UNLESS and value in (_REFUSED_UNLESS[key], None):
            reading.note(dotted, "translated", "as it is here")
        elif key in _REFUSED_UNLESS:
            reading.problems.append(
                f"{dotted} = {value!r} has no counterpart here: give initialize a torch optimizer"
            )
        else:
            reading.problems.append(
                f"{dotted} is no parameter of this optimizer{_meant(key, list(defaults))}"
            )
    return settings


def read_scheduler(reading: Reading, plain: dict[str, Any], *, own: bool) -> Course | None:
    """The schedule, exactly; `[lr_scheduler]` is set to the nearest that it can say."""
    if own or not reading.has("scheduler"):
        for key in reading.keys_below("scheduler"):
            reading.note(f"scheduler.{key}", "ignored", "the program brings its own schedule")
        return None
    name = reading.text("scheduler.type")
    if name is None or name not in DEFAULTS:
        reading.problems.append(
            f"scheduler.type = {name!r} is none of {', '.join(DEFAULTS)}: give initialize a torch "
            "scheduler"
        )
        return None
    params: dict[str, Any] = {}
    num_problems = len(reading.problems)
    for key, default in DEFAULTS[name].items():
        params[key] = _parameter(reading, f"scheduler.params.{key}", default)
        reading.note(f"scheduler.params.{key}", "translated", "exactly, by initialize")
    for key in reading.keys_below("scheduler.params"):
        if key not in params and key != "last_batch_iteration":
            reading.problems.append(
                f"scheduler.params.{key} is no parameter of {name}{_meant(key, list(params))}"
            )
    if len(reading.problems) == num_problems:
        reading.problems += _wrong_parameters(name, params)
    if len(reading.problems) > num_problems:
        return None
    nearest, text = _nearest(name, params)
    if nearest is not None:
        plain["lr_scheduler"] = nearest
    reading.note(
        "scheduler.type", "translated", f"exactly, by initialize; a configuration file {text}"
    )
    return Course(name, params)


def _parameter(reading: Reading, key: str, default: Any) -> Any:
    last = key.rpartition(".")[2]
    if isinstance(default, bool):
        return reading.boolean(key, default)
    if isinstance(default, str):
        kind = reading.text(key, default)
        return kind if kind in ("log", "linear") else default  # as DeepSpeed, with a warning
    if last.endswith("_count") or last in (
        "warmup_num_steps",
        "total_num_steps",
        "lr_range_test_step_size",
    ):
        return reading.integer(key, default)
    return reading.number(key, default)


def _wrong_parameters(name: str, params: dict[str, Any]) -> list[str]:
    problems = [
        f"scheduler.params.{key} is missing: {name} needs it"
        for key in NEEDED.get(name, ())
        if params[key] is None
    ]
    problems += [
        f"scheduler.params.{key} = {params[key]} must be positive"
        for key in ("warmup_num_steps", "cycle_first_step_size", "lr_range_test_step_size")
        if params.get(key) is not None and params[key] <= 0
    ]
    second = params.get("cycle_second_step_size")
    if second is not None and second < 0:
        problems.append("scheduler.params.cycle_second_step_size must not be negative")
    return problems


def _nearest(name: str, params: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What `[lr_scheduler]` can say of it, and what is lost."""
    warmup = params.get("warmup_num_steps", 0)
    total = params.get("total_num_steps")
    if name == "WarmupLR":
        return {"name": "constant", "warmup_steps": warmup}, (
            "has a linear warm-up from 0 to optimizer.lr, one step earlier"
        )
    if name in ("WarmupDecayLR", "WarmupCosineLR") and warmup <= total:
        decay = "linear" if name == "WarmupDecayLR" else "cosine"
        nearest: dict[str, Any] = {
            "name": decay,
            "warmup_steps": warmup,
            "total_steps": total,
        }
        if decay == "cosine":
            nearest["min_lr_ratio"] = params["cos_min_ratio"]
        return nearest, "has a linear warm-up from 0 to optimizer.lr, one step earlier"
    return None, "has no schedule like this one"


def _meant(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean {nearest[0]}?" if nearest else ""
