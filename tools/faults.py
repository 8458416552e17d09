"""Crash and fault suites: what must hold when a process, a disk or the power fails.

    python3 tools/faults.py                                list the parts
    python3 tools/faults.py PART --trials 1000 --seed 1    run one, with more trials than usual
    python3 tools/faults.py PART --teeth                   break the code: the test must see it
    python3 tools/faults.py PART --help                    its own options

Every class of faults is a line of a table. The exit code is 1 when anything was lost, mixed,
undetected or otherwise wrong, or, with --teeth, when a broken build has passed. --json FILE writes
the results. Trials with the same seed break the same things at the same places, as far as they are
places in the code; moments in time are only drawn from it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fault.result import Part, print_rows

FOLDER = Path(__file__).resolve().parent / "fault"
SHARED = {"__init__", "result"}  # no parts; nor is what starts with an underscore


def part_names() -> dict[str, str]:
    """The parts, and what each one breaks: the first line of its module."""
    names = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        if path.stem not in SHARED:
            first = path.read_text(encoding="utf-8").lstrip().lstrip('"').splitlines()[0]
            names[path.stem] = first.strip('"')
    return names


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """List the parts, or run the one that `arguments` name; return the exit code."""
    # Before torch is imported: a process that forks its trials must have one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = part_names()
    listed = "\n".join(f"  {name:12} {first}" for name, first in names.items())
    if not given:
        print(listed)
        return 0
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=names, metavar="PART")
    if given[0] not in names:
        parser.parse_args(given[:1])  # says what there is
    part = cast(Part, importlib.import_module(f"fault.{given[0]}"))
    parser = argparse.ArgumentParser(
        prog=f"faults.py {given[0]}",
        description=sys.modules[f"fault.{given[0]}"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=_whole, help="how many, where it is a matter of choice")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--teeth", action="store_true", help="break the code; it must be seen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    part.add_arguments(parser)
    options = parser.parse_args(given[1:])
    began = time.perf_counter()
    rows = print_rows(part.run(options))
    seconds = time.perf_counter() - began
    good = bool(rows) and all(row.good for row in rows)
    print(f"{given[0]}: {'good' if good else 'FAILED'}, {seconds:.1f} s")
    if options.json is not None:
        result = {
            "part": given[0],
            "arguments": given[1:],
            "good": good,
            "seconds": seconds,
            "rows": [row.as_json() for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
