"""What a part of tools/faults.py is, and what it finds.

[Note: parts] A part is a module of this folder. Its docstring says what is broken and what must
hold afterwards; the first line is shown in the list. It has two functions:

    add_arguments(parser)      its own options, beside those of every part (tools/faults.py)
    run(options) -> Iterator   a `Row` for each class of faults, as soon as that is done

[Note: teeth] With `--teeth` a part breaks what it tests (an fsync left out, a checksum ignored) and
yields rows with `broken` set: such a row is good only if the test has seen the damage. A test that
cannot fail is a defect.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

HEADINGS = ("class", "trials", "lost", "mixed", "undetected", "problems", "seconds", "verdict")
_SHOWN_LINES = 5


@dataclass
class Row:
    """The trials of one class of faults.

    A trial is counted once, by the worst that happened: `lost` (older than what was acknowledged,
    or nothing can be loaded), `mixed` (parts of two states), `undetected` (wrong bytes without an
    error), with a line in `details`. Everything else that must not be is a line in `problems`.
    """

    name: str
    trials: int = 0
    lost: int = 0
    mixed: int = 0
    undetected: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    remark: str = ""  # what the trials were, e.g. how many were killed in a save
    skipped: str = ""  # why there can be no trial here; such a row spoils nothing
    peer: bool = False  # of another system: whatever it does is a result
    broken: str = ""  # what was broken on purpose; see [Note: teeth]

    @property
    def damage(self) -> bool:
        """Whether the test has seen anything that must not be."""
        return bool(self.lost or self.mixed or self.undetected or self.problems)

    @property
    def good(self) -> bool:
        """Whether this row is as it must be: with trials and no damage, or broken and seen."""
        if self.skipped:
            return True
        return self.trials > 0 and (self.peer or self.damage == bool(self.broken))

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        if self.trials == 0:
            return "NO TRIALS"
        if self.peer:
            return "measured"
        if self.broken:
            return "caught" if self.good else "NOT CAUGHT"
        return "ok" if self.good else "FAILED"

    def cells(self) -> list[str]:
        """The columns of `HEADINGS`."""
        counts = [self.trials, self.lost, self.mixed, self.undetected, len(self.problems)]
        name = f"{self.name}, broken: {self.broken}" if self.broken else self.name
        return [name, *map(str, counts), f"{self.seconds:.1f}", self.verdict]

    def as_json(self) -> dict[str, Any]:
        """All fields, and whether it is good."""
        return asdict(self) | {"good": self.good}


class Part(Protocol):
    """A module of this folder; see [Note: parts]."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the part's own options."""

    def run(self, options: argparse.Namespace) -> Iterator[Row]:
        """Do the trials."""


def print_rows(rows: Iterable[Row]) -> list[Row]:
    """Print a table in markdown, each line at once, then remarks and problems; return all."""
    print("| " + " | ".join(HEADINGS) + " |")
    print("|---" + "|---:" * (len(HEADINGS) - 2) + "|---|", flush=True)
    done = []
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |", flush=True)
        done.append(row)
    for row in done:
        if row.remark:
            print(f"{row.cells()[0]}: {row.remark}")
        lines = [] if row.broken else row.details + row.problems
        for line in lines[:_SHOWN_LINES]:
            print(f"{row.name}: {line}")
        if len(lines) > _SHOWN_LINES:
            print(f"{row.name}: and {len(lines) - _SHOWN_LINES} more")
    return done
