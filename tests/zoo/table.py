"""Measure every row of the zoo and write docs/compatibility.md: `python -m tests.zoo.table`."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.zoo.measure import PLACEMENTS, STEPS, Measured, measure
from tests.zoo.row import Row
from tests.zoo.rows import ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
_LINE = re.compile(r"^\| ([^|]+? \| [^|]+? \| `.*) \|$", re.MULTILINE)
COLUMNS = (
    *("module", "family", "class", "parameters", "equal placements"),
    *("loss", "weights", "faults", "budget", "peak", "notes"),
)

HEAD = """\
# Compatibility

<!-- Written by `python -m tests.zoo.table`; do not edit. -->

Every module below was trained for {steps} steps in fp32 in {num_placements} placements: all state
on the device, all on the host, all on NVMe, and the harshest: all on NVMe, with a device budget of
two buckets and one gradient (more buckets only where one op takes more) and a host budget of the
least staging that runs. Losses, weights, masters, moments and buffers are the same bits in all of
them, and no tier has held more than its budget. The table is written by the test suite
(`tests/zoo`), where a difference of one bit fails. The modules are tiny, with random weights: what
counts is what their code does with its parameters, not their size. A module that is not listed is
not refused: the engine knows none of these classes but PyTorch's attention and encoder layers,
whose fused kernels in evaluation need all their weights at once.

*Loss* and *weights* are the largest relative differences from a plain PyTorch loop with
`torch.optim.AdamW`, in any step, evaluation, weight, master or buffer (norm over norm); 1e-6 is
where the suite fails. What comes before the first update is the same bits as in plain PyTorch
(nearly the same in the evaluation of `nn.TransformerEncoder`, for which torch itself takes other
kernels once a module has hooks); after it, rounding inside the update rule differs in last bits. *A
step* says that weights were compared after each step from the same state, with losses and gradients
equal to the bit: such a module has a gradient that is rounding noise (of the bias of attention
keys, of a bias before a normalization), and Adam divides noise by its own size. *Faults* are the
fetches of the last step, in the harshest placement, that had not been started ahead; where modules
that run inside one another need more than the budget together there is no plan, and every fetch is
a fault. *Budget* is that of the device there as a share of the weights, and *peak* the most that
was held of it. Measured with torch {torch} and transformers {transformers}, on one thread of a CPU
({machine}).

"""


def page(measured: Iterable[tuple[Row, Measured]]) -> str:
    """The whole page."""
    import transformers

    head = HEAD.format(
        steps="five" if STEPS == 5 else STEPS,
        num_placements="four" if len(PLACEMENTS) == 4 else len(PLACEMENTS),
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=platform.machine(),
    )
    lines = [COLUMNS, *(cells_of(row, found) for row, found in measured)]
    above, *rows = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return "".join([head, above, "|---" * len(COLUMNS) + "|\n", *rows])


def cells_of(row: Row, found: Measured) -> list[str]:
    """What the page says of a row, in the order of `COLUMNS`."""
    weights = f"{found.weight_difference:.1e}" + (" a step" if row.per_step else "")
    return [
        row.name,
        row.family,
        f"`{found.class_names}`",
        f"{found.num_parameters:,}",
        f"{len(found.placements)} of {len(PLACEMENTS)}",
        f"{found.loss_difference:.1e}" if found.loss_difference else "0",
        weights,
        f"{found.faults}",
        f"{found.device_bytes / found.weight_bytes:.0%}",
        f"{found.peak_bytes / found.device_bytes:.0%}",
        row.notes,
    ]


def listed_rows(text: str) -> list[dict[str, str]]:
    """The rows that a page lists, by `COLUMNS`."""
    found = (line.split("|") for line in _LINE.findall(text))
    return [dict(zip(COLUMNS, (cell.strip() for cell in cells), strict=True)) for cells in found]


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measured = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(row, Path(folder))
        measured.append((row, found))
        print(*cells_of(row, found), sep=" | ", file=sys.stderr)
    PAGE.write_text(page(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
