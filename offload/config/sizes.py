"""Sizes as people write them: ``"20GiB"``, ``"1.5 GB"`` or a number of bytes."""

from __future__ import annotations

import re
from typing import Literal

_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BARE_PREFIXES = "kmgt"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_EXPECTED = "must be a size such as '20GiB' or a whole number of bytes"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KkMmGgTt][Ii]?)?[Bb]\s*$"


def parse_size(value: object) -> int:
    """Return the bytes that `value` stands for: an integer >= 1, or e.g. ``"20GiB"``.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers of 1000.

    Raises:
        ValueError: anything else, with what would have been right.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{_EXPECTED}, not {value!r}")
    if isinstance(value, int):
        nbytes = value
    else:
        nbytes = _parse_size_text(value)
    if nbytes < 1:
        raise ValueError(f"must be at least 1 byte, not {value!r}")
    return nbytes


def _parse_size_text(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{_EXPECTED}, not {text!r}")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"has no unit: write {number}GiB, or the bare number for bytes")
    factor = _UNIT_BYTES.get(unit.lower())
    if factor is None:
        prefix = unit[0].upper()
        if prefix.lower() in _BARE_PREFIXES:
            hint = f"did you mean {number}{prefix}iB or {number}{prefix}B?"
        else:
            hint = "the units are B, KiB, MiB, GiB, TiB, KB, MB, GB and TB"
        raise ValueError(f"has the unknown unit {unit!r}: {hint}")
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def parse_size_or_auto(value: object) -> int | Literal["auto"]:
    """Return ``"auto"`` for itself, else as `parse_size`."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    return parse_size(value)


def parse_count_or_auto(value: object) -> int | Literal["auto"]:
    """Return ``"auto"`` for itself, or `value` if it is an integer >= 1.

    Raises:
        ValueError: anything else.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be 'auto' or a whole number of at least 1, not {value!r}")
    return value
