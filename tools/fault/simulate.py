"""Thousands of small trainings on a virtual clock, with random order, latency and failure.

A seed draws a model of some pages, a placement on all tiers with budgets as tight as the plan
allows, and how disks and copies behave: in which order requests end, how late, which of them fail,
which never end, and what the disk lies about. The training then runs in the production code: pager,
gradients, overlapped and streamed step, executor, blocks, shadows and tiers. It has to end with the
bits of a serial loop over plain arrays, after steps that raised were repeated; with nothing leaked.
Where a request never ends, it has to raise a typed error that names it, at its deadline in virtual
time. A state in which nobody can go on is a deadlock, and an error.

A seed always gives the same run, on every machine: `--seed S --trials 1` repeats one.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the offload of this checkout

from fault._broken_steps import BREAKS
from fault._trial import Outcome, run_trial
from fault._virtual import installed
from fault._world import draw_shape
from fault.result import Row

_TRIALS = 10_000
_TRIALS_OF_TEETH = 1_500
_SEEDS_A_TASK = 20

S = TypeVar("S")
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="processes")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Run the seeds, or the seeds until each broken build is seen."""
    if options.teeth:
        yield from _teeth(options)
        return
    trials = options.trials or _TRIALS
    seeds = range(options.seed, options.seed + trials)
    tasks = [seeds[at : at + _SEEDS_A_TASK] for at in range(0, trials, _SEEDS_A_TASK)]
    rows: dict[str, Row] = {}
    errors = steps = 0
    for outcomes in _map(_run_seeds, tasks, options.jobs):
        for outcome, seconds in outcomes:
            row = rows.setdefault(kind_of(outcome.seed), Row(kind_of(outcome.seed)))
            row.trials += 1
            row.seconds += seconds
            row.problems += [outcome.problem] if outcome.problem else []
            errors += sum(outcome.errors.values())
            steps += outcome.steps
    yield from (rows[name] for name in sorted(rows))
    print(f"{steps} steps were taken, {errors} errors were raised on the way")


def kind_of(seed: int) -> str:
    """The class of a seed: the device, and what goes wrong."""
    shape = draw_shape(seed)
    weather = shape.weather
    if weather.may_hang:
        what = "a request never ends"
    elif weather.may_damage:
        what = "the disk lies about a write"
    elif weather.rates:
        what = "requests fail or are late"
    else:
        what = "nothing fails"
    return f"{'accelerator' if shape.has_accelerator else 'cpu'}: {what}"


def _run_seeds(seeds: Sequence[int]) -> list[tuple[Outcome, float]]:
    found = []
    with _folder() as path, installed():
        for seed in seeds:
            began = time.perf_counter()
            found.append((run_trial(seed, path), time.perf_counter() - began))
    return found


def _teeth(options: argparse.Namespace) -> Iterator[Row]:
    """Each broken build until a seed fails; how many it took is the number of trials."""
    most = options.trials or _TRIALS_OF_TEETH
    tasks = [(name, options.seed, most) for name in BREAKS]
    yield from _map(_run_broken, tasks, options.jobs)


def _run_broken(task: tuple[str, int, int]) -> Row:
    name, first, most = task
    row = Row("simulation", broken=name)
    began = time.perf_counter()
    with _folder() as path, installed(), BREAKS[name]():
        for seed in range(first, first + most):
            row.trials += 1
            problem = run_trial(seed, path).problem
            if problem:
                row.problems.append(problem)
                break
    row.seconds = time.perf_counter() - began
    return row


class _folder:  # noqa: N801 - a context manager
    """A folder in memory, if there is one, for the files of the worlds."""

    def __enter__(self) -> str:
        memory = Path("/dev/shm")
        self._path = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path)


def _map(function: Callable[[S], T], tasks: Sequence[S], jobs: int) -> Iterator[T]:
    """The results in order, of several processes that have everything compiled."""
    torch.set_num_threads(1)
    if jobs == 1 or len(tasks) == 1:
        yield from map(function, tasks)
        return
    _run_seeds(range(4))
    gc.collect()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(function, tasks)
