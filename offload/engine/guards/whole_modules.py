"""Modules that take all their weights at once, so that no guard sees the single ones used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def fused_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that may run as one kernel over all their weights, the outermost ones."""
    kinds = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    found = {name: child for name, child in module.named_modules() if isinstance(child, kinds)}
    inner = {
        id(below) for child in found.values() for below in child.modules() if below is not child
    }
    return {name: child for name, child in found.items() if id(child) not in inner}


def gathered_modules(module: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The modules below which nothing moves while they run: named ones, and compiled ones.

    A module inside another one of them is left out.

    Raises:
        AttributeError: a path names no module.
    """
    found = {path: module.get_submodule(path) for path in paths}
    for name, child in module.named_modules():
        compiled = getattr(child, "_compiled_call_impl", None) is not None
        if compiled or hasattr(child, "_torchdynamo_orig_callable") or _is_optimized(child):
            found[name] = child
    inner = {
        id(below) for outer in found.values() for below in outer.modules() if below is not outer
    }
    return {name: child for name, child in found.items() if id(child) not in inner}


def _is_optimized(module: nn.Module) -> bool:
    """Whether this is what torch.compile returns for a module; asked without importing dynamo."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
