"""The model and the tokenizer that a `[run]` section names."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.cli.data import ByteTokenizer, PretrainedTokenizer, Tokenizer
from offload.config import RunSection
from offload.errors import ConfigError, OffloadError
from offload.state.deferred import deferred_init
from offload.state.pretrained import opened


@contextlib.contextmanager
def opened_model(run: RunSection) -> Iterator[nn.Module]:
    """The model to train, deferred, in training mode; inside, the files it comes from are open.

    Raises:
        ConfigError: no model, an unknown architecture, or unknown fields of its configuration.
        CheckpointError: the folder's weights are damaged or of another model.
    """
    config, folder = _model_config(run)
    if folder is None:
        yield build_model(run)
        return
    with opened(folder, _model_class(run.architecture or _first_architecture(config))) as model:
        yield _as_configured(model.train(), run)


def build_model(run: RunSection) -> nn.Module:
    """A new model in fp32, deferred; its weights depend on `run.seed` alone.

    Under another default device, e.g. meta, it is built there.

    Raises:
        ConfigError: no model, an unknown architecture, or unknown fields of its configuration.
    """
    config, _ = _model_config(run)
    model_class = _model_class(run.architecture or _first_architecture(config))
    torch.manual_seed(run.seed)
    with deferred_init():
        model: nn.Module = model_class(config).to(torch.float32)
    return _as_configured(model, run)


def _as_configured(model: nn.Module, run: RunSection) -> nn.Module:
    if run.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    return model


def _first_architecture(config: Any) -> str | None:
    return next(iter(config.architectures or ()), None)


def vocabulary_size(model: nn.Module) -> int:
    """The tokens that a model of transformers knows."""
    config: Any = model.config
    return int(config.vocab_size)


def build_tokenizer(run: RunSection, vocab_size: int) -> Tokenizer:
    """The tokenizer beside the model, else bytes.

    Raises:
        ConfigError: the model's vocabulary is smaller than the tokenizer's.
    """
    folder = Path(run.model) if run.model is not None else None
    tokenizer: Tokenizer = ByteTokenizer()
    if folder is not None and (folder / "tokenizer_config.json").exists():
        tokenizer = PretrainedTokenizer(folder)
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            problems=[
                f"the model's vocab_size is {vocab_size}, but the tokenizer "
                f"({type(tokenizer).__name__}) has {tokenizer.vocab_size} tokens"
            ]
        )
    return tokenizer


def _model_config(run: RunSection) -> tuple[Any, Path | None]:
    """The Hugging Face configuration, and the folder of weights if there is one."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise OffloadError(
            f"the model of [run] needs transformers: {error}", remedy="pip install 'offload[hf]'"
        ) from error

    if (run.model is None) == (not run.hf_config):
        raise ConfigError(problems=["give either run.model or run.hf_config: the model to train"])
    if run.model is None:
        if run.architecture is None:
            raise ConfigError(
                problems=["run.hf_config needs run.architecture, a transformers class"]
            )
        config_class = _model_class(run.architecture).config_class
        return config_class(**_known_fields(run.hf_config, config_class)), None
    path = Path(run.model)
    if not path.exists():
        raise ConfigError(
            problems=[f"run.model = {run.model!r} does not exist: name a local folder"]
        )
    return AutoConfig.from_pretrained(path), path if path.is_dir() else None


def _model_class(name: str | None) -> Any:
    import transformers

    found = getattr(transformers, name, None) if name else None
    if found is None or not hasattr(found, "config_class"):
        names = [n for n in dir(transformers) if n.endswith(("LM", "Generation"))]
        nearest = difflib.get_close_matches(name or "", names, 1)
        raise ConfigError(
            problems=[
                f"run.architecture = {name!r} is no model class of transformers"
                + (f": did you mean {nearest[0]!r}?" if nearest else "")
            ]
        )
    return found


def _known_fields(fields: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """The fields with lists instead of tuples; transformers itself would keep unknown ones."""
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    problems = []
    for name in fields.keys() - known:
        nearest = difflib.get_close_matches(name, sorted(known), 1)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        problems.append(f"unknown key run.hf_config.{name} of {config_class.__name__}{hint}")
    if problems:
        raise ConfigError(problems=sorted(problems))
    return {name: _with_lists(value) for name, value in fields.items()}


def _with_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(
            problems=[f"run.gradient_checkpointing: {type(model).__name__} does not support it"]
        )
    with warnings.catch_warnings():
        # Recent transformers rename the method; the old name works in all supported versions.
        warnings.simplefilter("ignore", FutureWarning)
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
