"""Every row of the table, registered on import."""

from __future__ import annotations

from tests.faults import (  # noqa: F401
    rows_backward,
    rows_between,
    rows_edits,
    rows_failures,
    rows_modules,
    rows_ops,
    rows_quantized,
    rows_refused,
    rows_threads,
)
from tests.faults.lab import ROWS

__all__ = ["ROWS"]
