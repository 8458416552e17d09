"""Sizes as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config.sizes import SIZE_PATTERN, parse_count_or_auto, parse_size, parse_size_or_auto


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (4096, 4096),
        ("20GiB", 20 << 30),
        ("20 gib", 20 << 30),
        ("1.5KiB", 1536),
        ("2MB", 2 * 10**6),
        ("512B", 512),
        ("3TiB", 3 << 40),
    ],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes
    if isinstance(text, str):
        assert re.search(SIZE_PATTERN, text)


@given(st.integers(1, 2**53), st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30)]))
def test_whole_numbers_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number << unit[1]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("20G", "did you mean 20GiB or 20GB"),
        ("20", "has no unit"),
        ("20 parsecs", "units are"),
        ("much", "such as"),
        ("-1GiB", "such as"),
        ("0GiB", "at least 1 byte"),
        (0, "at least 1 byte"),
        (-5, "at least 1 byte"),
        (True, "such as"),
        (1.5, "such as"),
        (None, "such as"),
    ],
)
def test_what_is_no_size(value: object, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse_size(value)


def test_auto() -> None:
    assert parse_size_or_auto("auto") == "auto"
    assert parse_size_or_auto("1KiB") == 1024
    assert parse_count_or_auto("auto") == "auto"
    assert parse_count_or_auto(3) == 3
    for value in (0, True, "3", 1.0):
        with pytest.raises(ValueError, match="whole number"):
            parse_count_or_auto(value)
