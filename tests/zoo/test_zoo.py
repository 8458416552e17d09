"""Every module of the zoo trains to the same bits in every placement, and to plain PyTorch's."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offload
from tests.zoo.measure import PLACEMENTS, compare_placements, measure, train_harshest
from tests.zoo.row import Row
from tests.zoo.rows import ROWS
from tests.zoo.table import PAGE, listed_rows

_LARGE_OPS = [row for row in ROWS if row.pages > 2]


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


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.has_bf16], ids=lambda row: row.name)
def test_every_placement_gives_the_same_bits_in_bf16(row: Row, tmp_path: Path) -> None:
    compare_placements(row, tmp_path, "bf16")


@pytest.mark.parametrize("row", _LARGE_OPS, ids=lambda row: row.name)
def test_no_row_has_more_room_than_its_largest_op_needs(row: Row, tmp_path: Path) -> None:
    less = dataclasses.replace(row, pages=row.pages - 1)
    with pytest.raises(offload.BudgetError, match="one operation needs all its parameters"):
        train_harshest(less, tmp_path, "fp32")


def test_rows_are_many_and_have_names_of_their_own() -> None:
    assert len(ROWS) >= 50
    assert Counter(row.name for row in ROWS).most_common(1)[0][1] == 1
    assert all(row.notes for row in _LARGE_OPS)


def test_the_page_lists_exactly_the_rows() -> None:
    assert listed_rows(PAGE.read_text(encoding="utf-8")) == [
        (row.name, row.family) for row in ROWS
    ], "run python -m tests.zoo.table"
