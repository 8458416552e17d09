"""What several fields of a configuration say against each other.

Works on the plain mapping, not on the validated sections, so that contradictions are reported
together with every other problem; a value of the wrong type is left to the sections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

_USED_BY = {
    "betas": ("adamw", "adam", "lion"),
    "eps": ("adamw", "adam", "adagrad"),
    "momentum": ("sgd",),
    "dampening": ("sgd",),
    "nesterov": ("sgd",),
    "perturbation": ("mezo",),
}
DECAYING_SCHEDULES = ("linear", "cosine")
_BLOCK_MULTIPLE = 4096

Plain = Mapping[str, object]


def section_of(config: Plain, dotted: str) -> dict[str, object]:
    """Return a copy of the section at `dotted`; empty where there is none."""
    section: object = config
    for key in dotted.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return dict(section) if isinstance(section, Mapping) else {}


def contradictions(config: Plain) -> list[str]:
    """Return one message for each contradiction in `config`, a mapping of sections."""
    rules: tuple[Callable[[Plain], list[str]], ...] = (
        _nvme_without_paths,
        _checkpoints_without_directory,
        _repeated_paths,
        _settings_of_activations_that_stay,
        _settings_of_another_optimizer,
        _nesterov_without_momentum,
        _eight_bit_without_moments,
        _forward_only_with_gradients,
        _decay_without_end,
        _unaligned_blocks,
        _head_without_chunks,
        _run_without_steps,
        _run_without_evaluation,
        _adapters_of_nothing,
    )
    return [problem for rule in rules for problem in rule(config)]


def _nvme_without_paths(config: Plain) -> list[str]:
    nvme = section_of(config, "tiers.nvme")
    if nvme.get("paths"):
        return []
    problems = [
        f"placement.{state_class} = 'nvme' needs tiers.nvme.paths, which is empty: name a "
        "directory there, or choose auto, device or host"
        for state_class, tier in section_of(config, "placement").items()
        if tier == "nvme" and state_class in {"weights", "gradients", "optimizer", "activations"}
    ]
    if "capacity" in nvme:
        problems.append(
            "tiers.nvme.capacity is set but tiers.nvme.paths is empty: name a directory there, or "
            "remove tiers.nvme.capacity"
        )
    return problems


def _checkpoints_without_directory(config: Plain) -> list[str]:
    settings = section_of(config, "checkpoint")
    every_steps = settings.get("every_steps")
    if not every_steps or settings.get("directory") is not None or config.get("run") is not None:
        return []
    return [
        f"checkpoint.every_steps = {every_steps} needs checkpoint.directory: say where to save, "
        "or call engine.save_checkpoint"
    ]


def _repeated_paths(config: Plain) -> list[str]:
    paths = section_of(config, "tiers.nvme").get("paths")
    if not isinstance(paths, (list, tuple)):
        return []
    names = [str(path).rstrip("/") for path in paths]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [f"tiers.nvme.paths names {name!r} more than once" for name in repeated]


def _settings_of_activations_that_stay(config: Plain) -> list[str]:
    home = section_of(config, "placement").get("activations", "device")
    useless: dict[object, tuple[str, ...]] = {
        "device": ("min_bytes", "host_memory", "device_memory"),
        "host": ("device_memory",),
        "nvme": ("device_memory",),
    }
    return [
        f"activations.{key} is set but placement.activations = {home!r} does not use it: choose "
        f"{'auto, host or nvme' if home == 'device' else 'auto'} there, or remove it"
        for key in section_of(config, "activations")
        if isinstance(home, str) and key in useless.get(home, ())
    ]


def _settings_of_another_optimizer(config: Plain) -> list[str]:
    optimizer = section_of(config, "optimizer")
    name = optimizer.get("name", "adamw")
    groups = optimizer.get("groups")
    places = {"optimizer": optimizer}
    if isinstance(groups, (list, tuple)):
        places |= {
            f"optimizer.groups.{index}": dict(group)
            for index, group in enumerate(groups)
            if isinstance(group, Mapping)
        }
    if not isinstance(name, str) or not any(name in names for names in _USED_BY.values()):
        return []
    return [
        f"{place}.{key} is not a setting of {name}, but of {', '.join(names)}: remove it, or "
        "choose another optimizer.name"
        for place, section in places.items()
        for key, names in _USED_BY.items()
        if key in section and name not in names
    ]


def _nesterov_without_momentum(config: Plain) -> list[str]:
    optimizer = section_of(config, "optimizer")
    if optimizer.get("name") != "sgd" or optimizer.get("nesterov") is not True:
        return []
    if optimizer.get("momentum") and not optimizer.get("dampening"):
        return []
    return ["optimizer.nesterov needs optimizer.momentum above 0 and optimizer.dampening = 0"]


def _eight_bit_without_moments(config: Plain) -> list[str]:
    """An optimizer from a factory takes the place of the name's; what that is comes out later."""
    optimizer = section_of(config, "optimizer")
    if optimizer.get("moments") != "8bit":
        return []
    name, groups = optimizer.get("name", "adamw"), optimizer.get("groups")
    if name in ("adagrad", "mezo"):
        return [
            f"optimizer.moments = '8bit' is not for {name}, but for adamw, adam, lion, and sgd "
            "with momentum: remove it, or choose another optimizer.name"
        ]
    sections = [optimizer, *groups] if isinstance(groups, (list, tuple)) else [optimizer]
    if name == "sgd" and not any(
        section.get("momentum") for section in sections if isinstance(section, Mapping)
    ):
        return ["optimizer.moments = '8bit' needs optimizer.momentum above 0: sgd keeps none"]
    return []


def _forward_only_with_gradients(config: Plain) -> list[str]:
    """What mezo, which has no gradients and perturbs what is on the device, makes no sense of."""
    if section_of(config, "optimizer").get("name") != "mezo":
        return []
    training, placement = section_of(config, "training"), section_of(config, "placement")
    problems = []
    steps = training.get("gradient_accumulation_steps", 1)
    if isinstance(steps, int) and steps > 1:
        problems.append(
            f"training.gradient_accumulation_steps = {steps} is of no use to mezo, which has no "
            "gradients: loop over the micro-batches in the closure, and return their mean loss"
        )
    if training.get("accumulation", "micro_batch_major") != "micro_batch_major":
        problems.append(
            "training.accumulation is of no use to mezo, which has no gradients: remove it"
        )
    if training.get("max_grad_norm"):
        problems.append(
            "training.max_grad_norm is of no use to mezo, which has no gradients: remove it"
        )
    if section_of(config, "tiling").get("modules"):
        problems.append(
            "tiling.modules is of no use to mezo, which perturbs whole pages: remove it"
        )
    problems += [
        f"placement.{state_class} is of no use to mezo, which has weights only: remove it"
        for state_class in ("gradients", "optimizer")
        if placement.get(state_class, "auto") != "auto"
    ]
    if placement.get("update", "auto") not in ("auto", "cpu"):
        problems.append(
            "placement.update is of no use to mezo, whose noise is drawn on the CPU: remove it"
        )
    if placement.get("weights") == "device":
        problems.append(
            "placement.weights = 'device' leaves mezo no true weights, because those on the "
            "device are perturbed: choose auto, host or nvme"
        )
    return problems


def _decay_without_end(config: Plain) -> list[str]:
    scheduler = section_of(config, "lr_scheduler")
    name, total = scheduler.get("name"), scheduler.get("total_steps", "auto")
    if name in DECAYING_SCHEDULES and total == "auto":
        return [
            f"lr_scheduler.name = {name!r} needs the step at which the decay ends: set "
            "lr_scheduler.total_steps or run.steps"
        ]
    warmup = scheduler.get("warmup_steps", 0)
    if isinstance(total, int) and isinstance(warmup, int) and warmup > total:
        return [
            f"lr_scheduler.warmup_steps = {warmup} is more than the {total} steps of the whole "
            "schedule (lr_scheduler.total_steps, or run.steps)"
        ]
    return []


def _unaligned_blocks(config: Plain) -> list[str]:
    block_bytes = section_of(config, "io").get("block_bytes")
    if isinstance(block_bytes, int) and block_bytes % _BLOCK_MULTIPLE:
        nearest = max(_BLOCK_MULTIPLE, block_bytes // _BLOCK_MULTIPLE * _BLOCK_MULTIPLE)
        return [f"io.block_bytes = {block_bytes} is no multiple of 4096: did you mean {nearest}?"]
    return []


def _head_without_chunks(config: Plain) -> list[str]:
    training = section_of(config, "training")
    if training.get("lm_head") and not training.get("loss_chunk_tokens"):
        return ["training.lm_head is set but training.loss_chunk_tokens is 0: set that too"]
    return []


def _run_without_steps(config: Plain) -> list[str]:
    run = section_of(config, "run")
    if run and "steps" not in run:
        return ["run.steps is missing: the number of optimizer steps to train"]
    return []


def _run_without_evaluation(config: Plain) -> list[str]:
    run = section_of(config, "run")
    lacking = [
        need
        for need, is_there in (
            ("run.eval_every above 0", run.get("eval_every")),
            ("held-out data (run.validation)", run.get("validation", 0.05)),
        )
        if not is_there
    ]
    return [
        f"run.{key} needs {' and '.join(lacking)}: it follows the held-out loss"
        for key in ("keep_best", "patience")
        if run.get(key) and lacking
    ]


def _adapters_of_nothing(config: Plain) -> list[str]:
    """What an adapter alone is of no use for, and what [lora] freezes anyway."""
    lora, run = section_of(config, "lora"), section_of(config, "run")
    if config.get("lora") is None:
        return []
    problems = []
    if run.get("freeze"):
        problems.append("run.freeze is of no use with [lora], which freezes the model: remove it")
    if run.get("hf_config") and run.get("export") and lora.get("export", "adapter") == "adapter":
        problems.append(
            "lora.export = 'adapter' of a model with new weights (run.hf_config) fits no other "
            "model: choose 'merged', or name a folder with weights in run.model"
        )
    return problems
