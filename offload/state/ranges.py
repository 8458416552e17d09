"""Ranges of a recorded tensor that can be read without making the whole of it.

What comes from a file, or is put together from files by stacking and concatenating (the experts of
a layer, say), is read piece by piece. Anything else has to be evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from offload.state.tape import Operation, View

_STACK = torch.ops.aten.stack.default
_CAT = torch.ops.aten.cat.default
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_COPY_INTO = torch.ops.aten.copy_.default


def read_range(view: View, start: int, numel: int) -> torch.Tensor | None:
    """Elements [start, start + numel) of a view, row-major: 1-D; None if they cannot be had so.

    Conversions between floating-point dtypes on the way apply to the pieces.
    """
    if not is_readable(view):
        return None
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        pieces = list(_pieces(view, start, numel))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def is_readable(view: View) -> bool:
    """Whether ranges of the view can be read."""
    if view.conjugated or view.negated or not _is_row_major(view):
        return False
    origin = view.version.origin
    if not isinstance(origin, Operation):
        return origin is not None and origin.dtype == view.dtype
    sources = _sources(view, origin)
    return sources is not None and all(is_readable(source) for source in sources)


def _is_row_major(view: View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _sources(view: View, operation: Operation) -> list[View] | None:
    """The views that the result is put together from; None if it is not put together."""
    listed: list[Any]
    if operation.func in (_STACK, _CAT):
        listed = list(operation.args[0])
        layout = operation.layouts[0]
    elif operation.func in _COPIES:
        listed = [operation.args[0]]
        layout = operation.layouts[0]
    elif operation.func is _COPY_INTO:
        listed = [operation.args[1]]
        layout = operation.args[0]
    else:
        return None
    fits = (
        all(isinstance(source, View) for source in listed)
        and layout.dtype == view.dtype
        and layout.offset == 0
        and layout.numel * layout.dtype.itemsize == view.version.nbytes
        and _is_row_major(layout)
        and (operation.func is not _COPY_INTO or listed[0].size == layout.size)
    )
    return listed if fits else None


def _pieces(view: View, start: int, numel: int) -> Iterator[torch.Tensor]:
    """The pieces in order; `view` is readable."""
    start += view.offset
    origin = view.version.origin
    if not isinstance(origin, Operation):
        assert origin is not None
        yield origin.read(start, numel)
        return
    sources = _sources(view, origin)
    assert sources is not None
    for source, begin, count in _blocks(origin, sources, start, numel):
        for piece in _pieces(source, begin, count):
            yield piece.to(view.dtype)


def _blocks(
    operation: Operation, sources: list[View], start: int, numel: int
) -> Iterator[tuple[View, int, int]]:
    """Which elements of which source make elements [start, start + numel) of the result."""
    if operation.func not in (_STACK, _CAT):
        yield sources[0], start, numel
        return
    given = operation.args[1] if len(operation.args) > 1 else operation.kwargs.get("dim", 0)
    rank = len(operation.layouts[0].size)
    dim = given % rank
    inner = [_elements_along(operation, source, dim) for source in sources]
    row = sum(inner)
    end = start + numel
    while start < end:
        outer, within = divmod(start, row)
        for source, width in zip(sources, inner, strict=True):
            if within < width:
                count = min(width - within, end - start)
                yield source, outer * width + within, count
                start += count
                break
            within -= width


def _elements_along(operation: Operation, source: View, dim: int) -> int:
    """Elements that a source gives to each outer row of the result."""
    if operation.func is _STACK:
        return math.prod(source.size[dim:])
    return math.prod(source.size[dim:]) if len(source.size) > dim else 0
