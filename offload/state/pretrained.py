"""From a folder of safetensors files to an engine, without the model ever being in memory.

[Note: Streaming load]
The module is built deferred (see deferred.py), so that its own code computes its tables, and random
ops draw nothing. Each parameter is then given a deferred tensor that stands for a tensor in a file,
or for what the model's library makes of several. All names and shapes are checked against the
files' headers, and only then does `initialize` plan, reserve, and read range after range into
staging, from where each goes to its home.

Files are read, not mapped: what the page cache keeps of them is the kernel's to take back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.config import OffloadConfig
from offload.engine.engine import SchedulerFactory
from offload.engine.planning import OptimizerFactory
from offload.errors import CheckpointError, ConfigError
from offload.state.checkpoint_keys import (
    Problems,
    Targets,
    group_names,
    ignored_missing,
    ignored_unexpected,
    match,
)
from offload.state.deferred import building, dress, refuse_inside
from offload.state.exported import CONFIG_NAME, GENERATION_CONFIG_NAME
from offload.state.ranges import is_readable, read_range
from offload.state.recording import deferred_view, materialized, version_of
from offload.state.session import OffloadEngine, initialize
from offload.state.weight_files import StoredTensor, open_files

_COMPARED_ELEMENTS = 1 << 20

ModelClass = Callable[..., nn.Module]


def from_pretrained(
    path: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
    *,
    model_class: ModelClass | None = None,
    optimizer: OptimizerFactory | None = None,
    lr_scheduler: SchedulerFactory | None = None,
) -> OffloadEngine:
    """Load a model from a folder straight into the config's tiers; returns its engine.

    The host holds staging, buffers, and the largest parameter that a conversion has to put
    together; never the model. As after transformers' own `from_pretrained` the model is in
    evaluation mode: call `engine.train()`. A file in fp32 (or any dtype) is where masters start
    from; weights are rounded to `precision.compute` from there.

    Args:
        path: a local folder with `model.safetensors`, or shards and their index; for a transformers
            model also its `config.json`.
        config: as of `initialize`.
        model_class: a transformers class, or any callable without arguments that returns a module;
            None: the architecture that `config.json` names.
        optimizer: as of `initialize`.
        lr_scheduler: as of `initialize`.

    Raises:
        CheckpointError: the files are damaged, or tensors are missing, unexpected or misshaped
            (all are listed); nothing has been placed. Or a trainable weight is not finite: found
            when its turn comes.
        ConfigError: no such folder, or its architecture is not known.
        DoesNotFitError, StorageError: as of `initialize`.
    """
    with opened(path, model_class) as module:
        return initialize(module, config, optimizer=optimizer, lr_scheduler=lr_scheduler)


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], model_class: ModelClass | None = None
) -> Iterator[nn.Module]:
    """A deferred module over the files of a folder, which are open inside; see `from_pretrained`.

    Raises:
        CheckpointError, ConfigError: as of `from_pretrained`.
    """
    refuse_inside("offload.from_pretrained")
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(problems=[f"the model {str(path)!r} is no local folder"])
    with contextlib.ExitStack() as files:
        stored = open_files(root, files)
        with torch.random.fork_rng(devices=[]), building(drawing=False):
            module = _build(root, model_class)
            _assign(module, stored, root)
        for parameter in module.parameters():
            if version_of(parameter) is not None:
                dress(parameter)
        _attach_generation_config(module, root)
        yield module.eval()


# -- module ----------------------------------------------------------------------------------------


def _build(root: Path, model_class: Any) -> nn.Module:
    if model_class is None:
        model_class = _architecture(root)
    make = getattr(model_class, "_from_config", None) or getattr(model_class, "from_config", None)
    if make is None:
        module = model_class()
        if not isinstance(module, nn.Module):
            raise ConfigError(problems=[f"model_class returned a {type(module).__name__}"])
        return module
    hf_config = _hf_config(root, getattr(model_class, "config_class", None))
    # In fp32 modules compute their tables as exactly as they ever do.
    model: Any = make(hf_config, dtype=torch.float32)
    model.config.name_or_path = str(root)
    built: nn.Module = model
    return built


def _architecture(root: Path) -> Any:
    import transformers

    if not (root / CONFIG_NAME).is_file():
        raise ConfigError(
            problems=[f"{root} has no {CONFIG_NAME}: name the module with model_class"]
        )
    names = _hf_config(root, None).architectures or ()
    found = getattr(transformers, next(iter(names), ""), None)
    if found is None:
        raise ConfigError(
            problems=[
                f"{root / CONFIG_NAME} names no architecture that transformers has "
                f"({', '.join(names) or 'none'}): give model_class"
            ]
        )
    return found


def _hf_config(root: Path, config_class: Any) -> Any:
    import transformers

    try:
        hf_config = (config_class or transformers.AutoConfig).from_pretrained(root)
    except (OSError, ValueError) as error:
        raise ConfigError(problems=[f"{root / CONFIG_NAME} cannot be read: {error}"]) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            problems=[
                f"{root} holds quantized weights: load it with transformers, and give the model to "
                "offload.initialize"
            ]
        )
    return hf_config


def _attach_generation_config(module: Any, root: Path) -> None:
    can_generate = getattr(module, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return
    from transformers import GenerationConfig

    if (root / GENERATION_CONFIG_NAME).is_file():
        module.generation_config = GenerationConfig.from_pretrained(root)
    elif (root / CONFIG_NAME).is_file():
        # Older models keep what generates in the model's configuration, whose class drops it.
        module.generation_config = GenerationConfig.from_pretrained(
            root, config_file_name=CONFIG_NAME, _from_model_config=True
        )


# -- values ----------------------------------------------------------------------------------------


def _assign(module: nn.Module, stored: Mapping[str, StoredTensor], root: Path) -> None:
    """Let every parameter and persistent buffer come from the files.

    Raises:
        CheckpointError: with everything that does not fit.
    """
    found, unexpected = match(module, list(stored), lambda name: stored[name].deferred())
    targets = Targets.of(module)
    problems = Problems(module)
    names_of = group_names(targets.parameters)
    given = {
        parameter: [(name, tensor) for name in names for tensor in found.get(name, ())]
        for parameter, names in names_of.items()
    }
    lacking = [names_of[parameter][0] for parameter, tensors in given.items() if not tensors]
    lacking += [name for name in targets.buffers if name not in found]
    excess = set(unexpected) - ignored_unexpected(module, unexpected)
    for name in sorted(set(lacking) - ignored_missing(module, lacking)):
        problems.add("missing:", name, excess)
    known = [*targets.parameters, *targets.buffers]
    for name in sorted(excess):
        problems.add("unexpected:", name, known)
    for name, candidates in found.items():
        target = targets.get(name)
        for tensor in candidates:
            if target is None:
                problems.add("unexpected:", name)
            elif not _fits(tensor, target):
                problems.add(f"is {_kind(tensor)} in the files, expected {_kind(target)}:", name)
    problems.raise_if_any(root)
    _refuse_untied(given)
    with torch.no_grad():
        for parameter, tensors in given.items():
            if tensors:
                _give(parameter, tensors[0][1])
        for name, buffer in targets.buffers.items():
            if name in found:
                buffer.copy_(found[name][-1])


def _give(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """The engine converts to the compute dtype, so the file's own dtype is not lost on the way."""
    if not parameter.numel():
        return
    parameter.data = tensor


def _fits(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    if tuple(tensor.shape) != tuple(target.shape):
        return False
    wide = [t.is_floating_point() and t.dtype.itemsize > 1 for t in (tensor, target)]
    return all(wide) or tensor.dtype == target.dtype


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse_untied(given: Mapping[nn.Parameter, Sequence[tuple[str, torch.Tensor]]]) -> None:
    """Refuse tensors for one tied parameter that differ.

    Raises:
        CheckpointError: names both.
    """
    for tensors in given.values():
        for name, tensor in tensors[1:]:
            if not _equal(tensors[0][1], tensor):
                raise CheckpointError(
                    f"{tensors[0][0]} and {name} are one tied parameter of the module, and differ "
                    "in the files",
                    remedy="build the module untied, e.g. with tie_word_embeddings = false in its "
                    "config.json",
                )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal values, range by range where both can be read so."""
    first, second = deferred_view(a), deferred_view(b)
    if first is None or second is None or not (is_readable(first) and is_readable(second)):
        return _equal_values(*materialized([a, b]))
    for start in range(0, first.numel, _COMPARED_ELEMENTS):
        numel = min(_COMPARED_ELEMENTS, first.numel - start)
        left, right = read_range(first, start, numel), read_range(second, start, numel)
        assert left is not None
        assert right is not None
        if not _equal_values(left, right):
            return False
    return True


def _equal_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As `torch.equal`, also of different dtypes: compared in one that holds both exactly."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))
