"""Plain Python values as JSON and back, exactly; anything else is refused instead of pickled.

JSON has no tuples and only string keys. So a tuple becomes {"$tuple": [...]} and a dict with other
keys, or with a key that starts with "$", becomes {"$dict": [[key, value], ...]}. Floats keep every
bit (repr round-trips; NaN and infinities are written as Python's json does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.errors import CheckpointError

_SCALARS = (str, int, float, bool, type(None))
# Deeper values are refused before the interpreter's own recursion limit can be met.
_MAX_DEPTH = 64


def encode(value: Any, *, where: str) -> Any:
    """The JSON form of a plain value; `where` names it in the error.

    Raises:
        CheckpointError: something in it is not None, a bool, int, float, str, or a list, tuple or
            dict of these.
    """
    return _encode(value, where, _MAX_DEPTH)


def _encode(value: Any, where: str, depth: int) -> Any:
    if type(value) in _SCALARS:
        return value
    if depth == 0:
        raise CheckpointError(f"{where} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_encode(v, f"{where}[{i}]", depth - 1) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, f"{where}[{i}]", depth - 1) for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {k: _encode(v, f"{where}[{k!r}]", depth - 1) for k, v in value.items()}
        pairs = [
            [_encode(k, f"a key of {where}", depth - 1), _encode(v, f"{where}[{k!r}]", depth - 1)]
            for k, v in value.items()
        ]
        return {"$dict": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, "
        "which a checkpoint cannot hold",
        expected="None, bool, int, float, str, or lists, tuples and dicts of these",
        remedy="convert it (e.g. `.item()`, `.tolist()`), or save it as a file of your own",
    )


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        CheckpointError: no form that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(v) for v in value]
    if isinstance(value, dict):
        if set(value) == {"$tuple"} and isinstance(value["$tuple"], list):
            return tuple(decode(v) for v in value["$tuple"])
        if set(value) == {"$dict"} and isinstance(value["$dict"], list):
            return _decode_pairs(value["$dict"])
        return {k: decode(v) for k, v in value.items()}
    return value


def _decode_pairs(pairs: list[Any]) -> dict[Any, Any]:
    try:
        return {decode(key): decode(item) for key, item in pairs}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a stored dict is no list of pairs ({error})") from error
