"""All rows of the zoo: the one place that lists them."""

from __future__ import annotations

from tests.zoo.row import Row
from tests.zoo.torch_rows import TORCH_ROWS
from tests.zoo.transformers_rows import TRANSFORMERS_ROWS

ROWS: tuple[Row, ...] = (*TRANSFORMERS_ROWS, *TORCH_ROWS)
