"""What Lightning asks of its precision plugin, answered by the engine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from offload.errors import OffloadError
from offload.state.session import OffloadEngine

# `Trainer(precision=...)` -> `precision.compute`. The masters are fp32 in all of them.
COMPUTE = {
    "32-true": "fp32",
    "bf16-mixed": "fp32",  # under torch.autocast, whose casts of weights are not kept
    "bf16-true": "bf16",
    "16-true": "fp16",
}


class EnginePrecision:
    """A plugin on Lightning's own: what concerns inputs and contexts is left to that one.

    Backward and clipping are the engine's, the module is converted by the engine.

    Args:
        given: the plugin that the Trainer has made.

    Attributes:
        engine: the engine, once there is one.
        step_is_due: whether the backward that comes is the last one of its step.
    """

    def __init__(self, given: Any) -> None:
        if given.precision not in COMPUTE:
            raise OffloadError(
                f"Trainer(precision={given.precision!r})",
                expected=", ".join(map(repr, COMPUTE)),
                remedy="'16-true' is fp16 with fp32 masters and a dynamic loss scale"
                if given.precision == "16-mixed"
                else None,
            )
        self.given = given
        self.precision = given.precision
        self.engine: OffloadEngine | None = None
        self.step_is_due = False

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Without an engine, as Lightning does."""
        converted: nn.Module = self.given.convert_module(module)
        return converted

    def convert_input(self, data: Any) -> Any:
        return self.given.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self.given.convert_output(data)

    def forward_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.given.forward_context()
        return context

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.given.tensor_init_context()
        return context

    def module_init_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.given.module_init_context()
        return context

    def backward(
        self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the engine's backward; that of the module where it has one of its own."""
        engine = self.engine
        if engine is None or args or has_own_backward(model):
            model.backward(tensor, *args, **kwargs)
            return
        # In manual optimization, without an optimizer, who knows when the step comes.
        is_last = self.step_is_due and optimizer is not None
        engine.backward(tensor, is_last=is_last, **kwargs)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """The engine clips in its step, to the norm that it was made with.

        Raises:
            OffloadError: `clip_val` is another.
        """
        del optimizer
        norm = 0.0 if self.engine is None else self.engine.config.training.max_grad_norm
        if clip_val != norm:
            raise OffloadError(
                f"clip_gradients(gradient_clip_val={clip_val})",
                expected=f"{norm}, as at the beginning of fit",
                remedy="set Trainer(gradient_clip_val=...)",
            )

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        """Refused: gradients are not all there at once.

        Raises:
            OffloadError: always.
        """
        del optimizer, clip_val
        raise OffloadError(
            "gradient_clip_algorithm='value'", expected="'norm'", remedy="clip by norm"
        )


def has_own_backward(model: Any) -> bool:
    """Whether the user's class overrides `LightningModule.backward`."""
    owner = next(cls for cls in type(model).__mro__ if "backward" in vars(cls))
    return not owner.__module__.startswith(("lightning.", "pytorch_lightning."))
