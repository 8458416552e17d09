"""What of a run's model is trained: all of it, what is not frozen, or adapters beside it."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import nn

from offload.cli.models import build_model
from offload.config import LoraSection, OffloadConfig, RunSection
from offload.errors import ConfigError, OffloadError


def trainable(model: nn.Module, config: OffloadConfig) -> nn.Module:
    """The model with `run.freeze` and `[lora]` applied; deferred if it is. Once for each model.

    Raises:
        ConfigError: a pattern that matches nothing, or all; targets that the model does not have.
        OffloadError: `[lora]` without the peft library.
    """
    assert config.run is not None
    if config.lora is not None:
        return _with_adapters(model, config.lora, config.run)
    _freeze(model, config.run.freeze)
    return model


def model_to_plan(config: OffloadConfig, source: str | None = None) -> nn.Module | str:
    """What `plan` takes: the folder's name, or a model on meta where more than its files counts.

    Raises:
        ConfigError, OffloadError: as of `trainable`; or there is no model.
    """
    run = config.run
    if run is None or (run.model is None and not run.hf_config):
        problem = "run.model and run.hf_config are missing: the model to plan for"
        raise ConfigError(problems=[problem], source=source)
    if run.model is not None and config.lora is None and not run.freeze:
        return run.model
    with torch.device("meta"):
        return trainable(build_model(run), config)


def _freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    problems = [
        f"run.freeze: {pattern!r} matches no parameter; one is {names[0]!r}"
        for pattern in patterns
        if not fnmatch.filter(names, pattern)
    ]
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append("run.freeze matches every parameter: nothing is left to train")
    if problems:
        raise ConfigError(problems=problems)


def _with_adapters(model: Any, lora: LoraSection, run: RunSection) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise OffloadError(
            f"[lora] needs the peft library: {error}", remedy="pip install 'offload[peft]'"
        ) from error

    targets: Any = lora.targets
    if targets == "auto":
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = known.get(getattr(model.config, "model_type", ""), "all-linear")
    made = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM" if "CausalLM" in type(model).__name__ else None,
    )
    torch.manual_seed(run.seed)
    try:
        # Adapters stay in the model's dtype: fp32 masters are what `precision` is for.
        adapted: Any = peft.get_peft_model(model, made, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(problems=[f"lora.targets = {lora.targets!r}: {error}"]) from error
    adapted.peft_config["default"].base_model_name_or_path = run.model
    made_model: nn.Module = adapted
    return made_model
