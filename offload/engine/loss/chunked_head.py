"""The head of a language model whose logits are computed late; see [Note: Lazy logits].

The head module keeps its identity and everything in it; like a guarded parameter it wears a
subclass of its own class while the engine is open. A copy or a pickle of it has the class it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from offload.config import OffloadConfig
from offload.engine.guards.autocast import autocast_dtype
from offload.engine.guards.transforms import active_transform
from offload.engine.loss.lazy_logits import LazyHead, LazyLogits
from offload.errors import ConfigError


class _ChunkedHead:
    """Mixin of the class of one head: in training it returns lazy logits."""

    _chunk_tokens: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The head's forward, or in training what will run it chunk by chunk."""
        assert isinstance(self, nn.Module)
        whole: Callable[..., Any] = super().forward  # type: ignore[misc]
        if (
            len(args) != 1
            or kwargs
            or not (self.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or active_transform() is not None
        ):
            return whole(*args, **kwargs)
        (given,) = args
        head = LazyHead(
            whole,
            list(self.parameters()),
            vocabulary=int(self.out_features),  # type: ignore[arg-type]
            chunk_tokens=self._chunk_tokens,
        )
        return LazyLogits.make(head, given, _output_dtype(given))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles have the user's own class."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, (worn, *rest), *state = reduced
        return (object.__new__, (worn.__bases__[1], *rest), *state)


class Handle(Protocol):
    """What ends something, as torch's handles of hooks do."""

    def remove(self) -> None:
        """End it; a second call does nothing."""
        ...


class _ChunkedHeadHandle:
    """Ends the chunking of a head."""

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module

    def remove(self) -> None:
        """Give the head back its class; a second call does nothing."""
        module, self._module = self._module, None
        if module is not None:
            module.__class__ = type(module).__bases__[1]


def chunk_head(module: nn.Module, config: OffloadConfig) -> list[Handle]:
    """Let the model's head return lazy logits if the configuration says so; the handles end it.

    Raises:
        ConfigError: see `find_head`.
    """
    if not config.training.loss_chunk_tokens:
        return []
    head = find_head(module, config)
    plain = type(head)
    body = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "_chunk_tokens": config.training.loss_chunk_tokens,
    }
    head.__class__ = type(plain.__name__, (_ChunkedHead, plain), body)
    return [_ChunkedHeadHandle(head)]


def find_head(module: nn.Module, config: OffloadConfig) -> nn.Module:
    """The module that makes logits: the one the configuration names, or the model's own answer.

    Raises:
        ConfigError: there is none, or it does not say how wide its output is.
    """
    path = config.training.lm_head
    head: object = None
    if path is not None:
        head = dict(module.named_modules()).get(path)
        if head is None:
            raise ConfigError(problems=[f"training.lm_head: the model has no module {path!r}"])
    else:
        ask = getattr(module, "get_output_embeddings", None)
        head = ask() if callable(ask) else None
        if head is None:
            raise ConfigError(
                problems=[
                    "training.loss_chunk_tokens: the model does not say which module makes its "
                    "logits (get_output_embeddings): name it in training.lm_head"
                ]
            )
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "out_features", None), int):
        raise ConfigError(
            problems=[
                f"training.loss_chunk_tokens: the head is {type(head).__name__}, which has no "
                "out_features: expected an nn.Linear, or a module that maps each token alone"
            ]
        )
    return head


def _output_dtype(given: torch.Tensor) -> torch.dtype:
    dtype = autocast_dtype(given)
    return given.dtype if dtype is None or given.dtype == torch.float64 else dtype
