"""What `transformers.TrainingArguments` say, as a configuration of the engine, or why they cannot.

[Note: Who decides]
The Trainer's arguments decide what a step is: batch, accumulation, clipping, optimizer, schedule,
when to save. The configuration decides where state lives and how it moves. What both say has to be
the same; `[run]` is for `offload train` and not looked at. Everything that is wrong is told at
once, when the trainer is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offload.config import OffloadConfig, load_config
from offload.errors import ConfigError

_ONE_PROCESS = "one process and one device are supported"


def optimizer_name(args: Any) -> str:
    """The `optimizer.name` that `args.optim` stands for, or `args.optim` itself."""
    name = str(getattr(args.optim, "value", args.optim))
    return {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}.get(name, name)


# Settings that have a counterpart among the arguments: its name, and its value.
_BOTH: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "training.gradient_accumulation_steps": (
        "gradient_accumulation_steps",
        lambda args: args.gradient_accumulation_steps,
    ),
    "training.max_grad_norm": ("max_grad_norm", lambda args: args.max_grad_norm or 0.0),
    "training.seed": ("seed", lambda args: args.seed),
    "optimizer.name": ("optim", optimizer_name),
    "optimizer.lr": ("learning_rate", lambda args: args.learning_rate),
    "optimizer.betas": ("adam_beta1, adam_beta2", lambda args: (args.adam_beta1, args.adam_beta2)),
    "optimizer.eps": ("adam_epsilon", lambda args: args.adam_epsilon),
    "optimizer.weight_decay": ("weight_decay", lambda args: args.weight_decay),
    "lr_scheduler.name": ("lr_scheduler_type", lambda args: str(args.lr_scheduler_type.value)),
    "lr_scheduler.warmup_steps": ("warmup_steps", lambda args: args.warmup_steps),
}
# Settings that only the engine's own loop follows, and what to use instead.
_ELSEWHERE = {
    "training.accumulation": "the Trainer runs one micro-batch after the other: remove it",
    "checkpoint.directory": "set TrainingArguments.output_dir",
    "checkpoint.every_steps": "set TrainingArguments.save_steps",
    "checkpoint.keep_last": "set TrainingArguments.save_total_limit",
    "checkpoint.when_busy": "the Trainer waits for every checkpoint: remove it",
}
_KEPT_OF_OPTIMIZER = ("moments",)
_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def engine_config(given: Any, args: Any, model: nn.Module) -> OffloadConfig:
    """The engine's configuration under a Trainer; see [Note: Who decides].

    Args:
        given: what `offload.initialize` takes as `config`.
        args: `TrainingArguments`.
        model: what will be trained.

    Raises:
        ConfigError: with every problem of the configuration, of the arguments, and between them.
    """
    loaded = load_config(given)
    problems = [*_refused_arguments(args, model), *_contradictions(loaded, args)]
    plain = _plain(loaded)
    training, precision = plain.get("training", {}), plain.get("precision", {})
    compute = precision.get("compute")
    problems += _precision_problems(args, compute)
    problems += _device_problems(args, loaded.tiers.device.kind)
    if problems:
        raise ConfigError(problems=problems)
    optimizer = plain.get("optimizer", {})
    tiers = plain.get("tiers", {})
    sections = {key: plain[key] for key in plain if key not in ("run", "lr_scheduler", "optimizer")}
    return OffloadConfig(
        **{
            **sections,
            "tiers": {**tiers, "device": {**tiers.get("device", {}), "kind": _device(args)}},
            "precision": {**precision, "compute": compute or _compute(args, model)},
            "training": {
                **training,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                "max_grad_norm": float(args.max_grad_norm or 0.0),
            },
            "optimizer": {key: optimizer[key] for key in _KEPT_OF_OPTIMIZER if key in optimizer},
        }
    )


def _plain(config: OffloadConfig) -> dict[str, Any]:
    """Its sections as mappings of what was set."""
    plain: dict[str, Any] = config.model_dump(exclude_unset=True)
    return plain


def _contradictions(config: OffloadConfig, args: Any) -> list[str]:
    problems = []
    plain = _plain(config)
    for section in ("training", "optimizer", "lr_scheduler", "checkpoint"):
        for key, value in (plain.get(section) or {}).items():
            name = f"{section}.{key}"
            if name in _ELSEWHERE:
                problems.append(f"{name} is not used under a Trainer: {_ELSEWHERE[name]}")
            elif name in _BOTH:
                argument, read = _BOTH[name]
                if read(args) != value:
                    problems.append(
                        f"{name} = {value!r}, but TrainingArguments.{argument} is {read(args)!r}: "
                        "the Trainer decides; say the same, or remove it"
                    )
            elif section in ("optimizer", "lr_scheduler") and key not in _KEPT_OF_OPTIMIZER:
                problems.append(
                    f"{name} is not used under a Trainer: set it in TrainingArguments, or pass "
                    "factories as optimizers=(...)"
                )
    return problems


def _refused_arguments(args: Any, model: nn.Module) -> list[str]:
    """What of the arguments and of the model the engine cannot do."""
    problems = []
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        problems.append(
            "TrainingArguments.deepspeed is set: offload takes its place; remove it, or give its "
            "file to offload.integrations.deepspeed"
        )
    if getattr(args, "fsdp", None) or getattr(args, "fsdp_plugin_args", None):
        problems.append(f"TrainingArguments.fsdp is set, but {_ONE_PROCESS}: remove it")
    if getattr(args, "parallelism_config", None) is not None:
        problems.append(f"TrainingArguments.parallelism_config is set, but {_ONE_PROCESS}")
    if args.world_size > 1:
        problems.append(
            f"{args.world_size} processes were launched, but {_ONE_PROCESS}: start it with python, "
            "not with torchrun or accelerate launch"
        )
    elif args.n_gpu > 1:
        problems.append(
            f"{args.n_gpu} GPUs are visible, but {_ONE_PROCESS}: set CUDA_VISIBLE_DEVICES=0"
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        problems.append("the model is spread by a device_map: load it without one")
    for name, why in _UNUSABLE.items():
        if getattr(args, name, None):
            problems.append(f"TrainingArguments.{name} is set: {why}")
    name = optimizer_name(args)
    for part, why in _UNUSABLE_OPTIMIZERS.items():
        if part in name:
            problems.append(f"TrainingArguments.optim = {name!r}: {why}")
            break
    return problems


_UNUSABLE = {
    "torch_compile": "a graph of the whole model would have to hold all weights at once; compile "
    "submodules before (docs/training-any-module.md)",
    "auto_find_batch_size": "a run that starts again in the middle of a step is not supported; "
    "choose per_device_train_batch_size, and see docs/activations.md for room",
    "use_liger_kernel": "it is not tested under the engine; training.loss_chunk_tokens saves the "
    "logits, too (docs/tiling.md)",
    "fp16_full_eval": "weights have the dtype of precision.compute in evaluation, too: remove it",
    "bf16_full_eval": "weights have the dtype of precision.compute in evaluation, too: remove it",
}
_UNUSABLE_OPTIMIZERS = {
    "lomo": "it updates inside of backward; choose another one",
    "layerwise": "it updates inside of backward; choose another one",
    "8bit": "set optimizer.moments = '8bit' in the configuration, and optim = 'adamw_torch'",
    "4bit": "set optimizer.moments = '8bit' in the configuration, and optim = 'adamw_torch'",
    "paged": "paging is what the engine does; set optim = 'adamw_torch'",
}


def _precision_problems(args: Any, compute: str | None) -> list[str]:
    if args.fp16 and compute not in (None, "fp16"):
        return [
            f"TrainingArguments.fp16 with precision.compute = {compute!r}: say 'fp16', whose loss "
            "scale is the engine's, or remove one of them"
        ]
    if args.bf16 and compute == "fp16":
        return ["TrainingArguments.bf16 with precision.compute = 'fp16': remove one of them"]
    return []


def _device(args: Any) -> str:
    return str(args.device)


def _device_problems(args: Any, kind: str) -> list[str]:
    found = args.device.type
    if found not in ("cpu", "cuda"):
        return [
            f"TrainingArguments.device is {found!r}, which has no tier: set use_cpu=True, or use a "
            "machine with CUDA"
        ]
    if kind != "auto" and kind.split(":", maxsplit=1)[0] != found:
        return [
            f"tiers.device.kind = {kind!r}, but TrainingArguments.device is {str(args.device)!r}: "
            "set use_cpu=True, or kind = 'auto'"
        ]
    return []


def _compute(args: Any, model: nn.Module) -> str:
    """What the arguments say, or else the dtype that most of the model is in."""
    if args.fp16 or args.bf16:
        return "fp16" if args.fp16 else "bf16"
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype)] += parameter.numel()
    known: Mapping[str, int] = {key: counts[key] for key in _DTYPES if counts[key]}
    return _DTYPES[max(known, key=lambda key: known[key])] if known else "fp32"
