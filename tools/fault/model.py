"""State machines of the tiers, blocks and pager against dicts, in any order, while I/O fails.

Each class is a hypothesis `RuleBasedStateMachine` of tests/: it draws sequences of calls and of
faults (requests that fail, are late, hang, or that the disk lies about), and compares everything
that is read with a dict of what should be there. Invariants are asserted after every call: budgets,
leases and extents with one owner each, legal residencies. An example is one sequence of up to 50
calls; what fails is shrunk to the shortest sequence that does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # offload, and its tests

from fault._broken_models import BREAKS
from fault.result import Row

_TRIALS = 500
_TRIALS_OF_TEETH = 1_000
_STEPS = 50

MACHINES = {
    "NVMe store": ("tests.tiers.nvme_machine", "StoreMachine"),
    "host arena": ("tests.tiers.memory_machines", "ArenaMachine"),
    "device tier": ("tests.tiers.memory_machines", "DeviceMachine"),
    "accelerator tier": ("tests.tiers.memory_machines", "AcceleratorMachine"),
    "blocks and held versions": ("tests.partition.block_machine", "BlockMachine"),
    "pager": ("tests.engine.pager_machine", "PagerMachine"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--only", choices=MACHINES, help="this machine")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Run each machine, or each broken build until it is seen."""
    torch.set_num_threads(1)
    if options.teeth:
        for name, (machine, broken) in BREAKS.items():
            if options.only in (None, machine):
                with broken():
                    yield trial(
                        machine, options.trials or _TRIALS_OF_TEETH, options.seed, broken=name
                    )
        return
    for machine in MACHINES:
        if options.only in (None, machine):
            yield trial(machine, options.trials or _TRIALS, options.seed)


def trial(name: str, most: int, seed: int, *, broken: str = "") -> Row:
    """Up to `most` examples of a machine; of a broken build until one of them fails."""
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    module, class_name = MACHINES[name]
    machine: Any = getattr(importlib.import_module(module), class_name)
    row = Row(name, broken=broken)

    class Counted(machine):  # type: ignore[misc]
        def __init__(self) -> None:
            row.trials += 1
            super().__init__()

    phases = [Phase.generate] if broken else [Phase.generate, Phase.shrink]
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_state_machine_as_test(
                seeded(seed)(Counted),
                settings=settings(
                    max_examples=most,
                    stateful_step_count=_STEPS,
                    phases=phases,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    report_multiple_bugs=False,
                    print_blob=False,
                ),
            )
    except Exception as error:  # noqa: BLE001 - whatever it is, the machine has found it
        notes = "\n".join(getattr(error, "__notes__", []))
        row.problems.append(f"{type(error).__name__}: {error} (--seed {seed})\n{notes}")
    row.seconds = time.perf_counter() - began
    return row
