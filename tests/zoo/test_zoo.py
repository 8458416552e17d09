"""Every module of the zoo trains to the same bits in every placement, and to plain PyTorch's."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offload
from tests.zoo.measure import (
    PLACEMENTS,
    TOLERANCE,
    compare_placements,
    largest,
    measure,
    train_harshest,
)
from tests.zoo.row import Row
from tests.zoo.rows import ROWS
from tests.zoo.table import COLUMNS, PAGE, cells_of, listed_rows

_LARGE_OPS = [row for row in ROWS if row.pages > 2]
_LISTED = {cells["module"]: cells for cells in listed_rows(PAGE.read_text(encoding="utf-8"))}
_ROUNDING = ("loss", "weights")  # the columns in which machines may differ


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_placement_gives_the_same_bits_and_plain_pytorchs_numbers(
    row: Row, tmp_path: Path
) -> None:
    measured = measure(row, tmp_path)
    assert measured.placements == PLACEMENTS
    assert measured.peak_bytes <= measured.device_bytes < measured.weight_bytes
    found, listed = dict(zip(COLUMNS, cells_of(row, measured), strict=True)), _LISTED[row.name]
    for column in COLUMNS:
        if column in _ROUNDING:
            assert 0 <= float(listed[column].removesuffix(" a step")) <= TOLERANCE, column
            assert listed[column].endswith(" a step") == found[column].endswith(" a step")
        else:
            assert listed[column] == found[column], f"{column}: run python -m tests.zoo.table"


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.has_bf16], ids=lambda row: row.name)
def test_every_placement_gives_the_same_bits_in_bf16(row: Row, tmp_path: Path) -> None:
    compare_placements(row, tmp_path, "bf16")


@pytest.mark.parametrize("row", _LARGE_OPS, ids=lambda row: row.name)
def test_no_row_has_more_room_than_its_largest_op_needs(row: Row, tmp_path: Path) -> None:
    less = dataclasses.replace(row, pages=row.pages - 1)
    with pytest.raises(offload.BudgetError, match="one operation needs all its parameters"):
        train_harshest(less, tmp_path, "fp32")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 2 * TOLERANCE])
def test_a_difference_that_is_too_large_or_no_number_fails(wrong: float) -> None:
    assert largest({"loss": 0.0, "weight": TOLERANCE}) == TOLERANCE
    with pytest.raises(AssertionError, match="weight"):
        largest({"loss": 0.0, "weight": wrong, "buffer": 0.0})


def test_rows_are_many_and_have_names_of_their_own() -> None:
    assert len(ROWS) >= 50
    assert Counter(row.name for row in ROWS).most_common(1)[0][1] == 1
    assert all(row.notes for row in _LARGE_OPS)


def test_the_page_lists_exactly_the_rows() -> None:
    listed = [(cells["module"], cells["family"], cells["notes"]) for cells in _LISTED.values()]
    assert listed == [(row.name, row.family, row.notes) for row in ROWS], (
        "run python -m tests.zoo.table"
    )
