"""Which tensor of a checkpoint becomes which tensor of a module.

A plain module's keys are those of its state dict. A transformers model may rename keys, stack
experts into one parameter, or split a fused one: its library knows how, and its own conversions
run here on deferred tensors, so that they are recorded and not computed.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.errors import CheckpointError
from offload.state.source import persistent_buffers

_MOST_HINTS = 16


@dataclass(slots=True)
class Targets:
    """What a module wants to have loaded.

    Attributes:
        parameters: by every name; tied names lead to one object.
        buffers: persistent ones, by name.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Targets:
        """The targets of a module."""
        return cls(
            dict(module.named_parameters(remove_duplicate=False)),
            dict(persistent_buffers(module)),
        )

    def __contains__(self, name: object) -> bool:
        return name in self.parameters or name in self.buffers

    def get(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer of that name."""
        found = self.parameters.get(name)
        return self.buffers.get(name) if found is None else found


@dataclass(slots=True)
class Problems:
    """Everything that is wrong with a checkpoint for a module; raised together."""

    module: nn.Module
    lines: list[str] = field(default_factory=list)
    _num_hints: int = 0

    def add(self, what: str, name: str, candidates: Iterable[str] = ()) -> None:
        """One problem with a tensor, and the name it may have been meant for."""
        nearest: Sequence[str] = ()
        if candidates and self._num_hints < _MOST_HINTS:
            self._num_hints += 1
            nearest = difflib.get_close_matches(name, list(candidates), 1)
        self.lines.append(f"{what} {name}" + (f" (nearest: {nearest[0]})" if nearest else ""))

    def raise_if_any(self, where: object, *, remedy: str | None = None) -> None:
        """Raise CheckpointError with all of them."""
        if self.lines:
            raise CheckpointError(
                "\n  - ".join(
                    [
                        f"{where} does not fit {type(self.module).__name__}, "
                        f"{len(self.lines)} problems:",
                        *self.lines,
                    ]
                ),
                remedy=remedy,
            )


def match(
    module: nn.Module, names: Sequence[str], tensor_of: Callable[[str], torch.Tensor]
) -> tuple[dict[str, list[torch.Tensor]], list[str]]:
    """Give each tensor of a checkpoint to the target it is for.

    To be called where ops on what `tensor_of` returns are recorded.

    Returns:
        target name -> the tensors for it (more than one: several keys lead there); and the names
        that no target wants.

    Raises:
        CheckpointError: a conversion of the model's library fails.
    """
    transforms = _conversions_of(module)
    if transforms is None:
        targets = Targets.of(module)
        found = {name: [tensor_of(name)] for name in names if name in targets}
        return found, [name for name in names if name not in found]
    return _converted(module, transforms, names, tensor_of)


def _conversions_of(module: Any) -> list[Any] | None:
    """The transforms of a transformers model; None if it is none, or the library is older."""
    if not hasattr(module, "base_model_prefix"):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return None
    return list(get_model_conversion_mapping(module))


def _converted(
    module: Any,
    transforms: Sequence[Any],
    names: Sequence[str],
    tensor_of: Callable[[str], torch.Tensor],
) -> tuple[dict[str, list[torch.Tensor]], list[str]]:
    """As `match`, with the transforms of transformers.

    Source: transformers/core_model_loading.py, `convert_and_load_state_dict_in_model`.
    """
    from transformers import core_model_loading as loading

    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = Targets.of(module)
    known = {**wanted.parameters, **wanted.buffers}
    prefix = module.base_model_prefix
    found: dict[str, list[torch.Tensor]] = {}
    pending: dict[str, Any] = {}
    unexpected = []
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = loading.rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unexpected.append(name)
        elif pattern is None:
            found.setdefault(target, []).append(tensor_of(name))
        else:
            if target not in pending:
                pending[target] = copy.deepcopy(by_pattern[pattern])
            pending[target].add_tensor(target, name, pattern, tensor_of(name))
    for target, converter in pending.items():
        for name, tensor in _convert(module, target, converter).items():
            found.setdefault(name, []).append(tensor)
    module._weight_conversions = [t for t in transforms if t.was_used()]
    return found, unexpected


def _convert(module: Any, target: str, converter: Any) -> dict[str, torch.Tensor]:
    try:
        made = converter.convert(target, model=module, config=module.config)
    except Exception as error:
        raise CheckpointError(
            f"the tensors for {target} cannot be converted: {error}",
            expected="a complete checkpoint in the format of the model's class",
        ) from error
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def ignored_missing(module: nn.Module, names: Iterable[str]) -> set[str]:
    """The names that the module's class allows a checkpoint to lack."""
    return _matching(names, getattr(module, "_keys_to_ignore_on_load_missing", None) or ())


def ignored_unexpected(module: nn.Module, names: Iterable[str]) -> set[str]:
    """The names that the module's class allows a checkpoint to have in excess.

    Of a transformers model also tables that older versions have saved and now compute.
    """
    patterns = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    if hasattr(module, "base_model_prefix"):
        buffers = [name for name, _ in module.named_buffers()]
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.append(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.append(r"(^|\.)position_ids$")
    return _matching(names, patterns)


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if any(p.search(name) for p in compiled)}


def group_names(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, list[str]]:
    """Every name of each parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(parameter, []).append(name)
    return names
