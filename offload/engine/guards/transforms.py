"""What reads the memory of tensors past their classes: torch.func transforms and jit tracing."""

from __future__ import annotations

import torch


def active_transform() -> str | None:
    """What reads the memory of tensors past their classes at this moment; None if nothing does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch._C._is_tracing():
        return "torch.jit.trace"
    return None
