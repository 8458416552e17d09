"""What a row of the table of uses runs in: plain PyTorch, then the engine at every placement.

A row is a function of a `Run`. It is called once for each run of `RUNS`, in one process, and
records tensors; every record must be the same bits in all runs. The optimizer is SGD with a
learning rate that is a power of two: its update is exact, so plain PyTorch is the oracle bit for
bit, over several steps.

The budgets are the smallest legal ones: on the device two pages (or as many as the row says that
one op needs) and one gradient; on the host the staging. Only `roomy` has its state on the host and
room for all of it on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.config import load_config
from offload.engine.build import build
from offload.engine.collect import collect
from offload.engine.engine import Engine
from offload.engine.keep_fp32 import kept_in_fp32
from offload.engine.planning import choose_rule, describe_machine, plan_module

RUNS = ("plain", "device", "host", "nvme", "activations")
LEARNING_RATE = 2.0**-4
_LARGE = 64 << 20
_EVERY_PAGE = 1000


@dataclass
class Row:
    """One row: `body(run)` under every run; it must fail on each build that `breaks` names."""

    name: str
    body: Callable[[Run], None]
    make: Callable[[], nn.Module]
    breaks: tuple[str, ...]
    pages: int
    runs: tuple[str, ...]
    config: Mapping[str, Any]


ROWS: dict[str, Row] = {}


def row(
    *breaks: str,
    make: Callable[[], nn.Module],
    pages: int = 2,
    runs: Sequence[str] = RUNS,
    **config: Any,
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Register a row; `config` are sections of the configuration."""

    def register(body: Callable[[Run], None]) -> Callable[[Run], None]:
        name = body.__name__
        assert name not in ROWS, f"two rows are called {name}"
        ROWS[name] = Row(name, body, make, breaks, pages, tuple(runs), config)
        return body

    return register


@dataclass
class Run:
    """One run of a row. It is used as an engine is, whatever is below it.

    Attributes:
        kind: plain, the home of all state, or roomy.
        module: the module under test.
        engine: the engine, None in the plain run.
        folder: for files of the row.
        records: what the row has recorded.
    """

    kind: str
    module: nn.Module
    engine: Engine | None
    folder: Path
    row: Row
    records: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    _steps: int = 0

    @property
    def offloaded(self) -> Engine:
        """The engine of a run that has one."""
        assert self.engine is not None
        return self.engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.engine or self.module)(*args, **kwargs)

    def record(self, what: str, value: Any) -> None:
        """Keep values that must be the same bits in every run."""
        for leaf in _leaves(value):
            tensor = leaf if torch.is_tensor(leaf) else torch.tensor(leaf)
            self.records.append((what, tensor.clone().detach()))

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """The backward of the run, by the engine if there is one."""
        if self.engine is not None:
            self.engine.backward(loss, **kwargs)
        else:
            loss.backward(**kwargs)

    def step(self) -> None:
        """Record all gradients, take a step, and check that nothing is left held."""
        self.record("gradients", self.gradients())
        self._steps += 1
        if self.engine is not None:
            taken = self.engine.step()
            assert taken
            self.check_at_rest()
        else:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                        parameter.grad = None

    def train(self, loss: torch.Tensor) -> None:
        """Record the loss, go back through it and take a step."""
        self.record("loss", loss)
        self.backward(loss)
        self.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the gradients that have arrived."""
        if self.engine is None:
            named = self.module.named_parameters()
            return {name: p.grad.clone() for name, p in named if p.grad is not None}
        states = self.engine.named_state()
        return {name: state["gradient"] for name, state in states if "gradient" in state}

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all weights as the optimizer sees them, but those that are quantized."""
        plain = {
            name: p
            for name, p in self.module.named_parameters()
            if p.is_floating_point() and not hasattr(type(p), "__tensor_flatten__")
        }
        if self.engine is None:
            return {name: p.detach().clone() for name, p in plain.items()}
        states = self.engine.named_state()
        return {n: s.get("master", s["weight"]) for n, s in states if n in plain}

    def check_at_rest(self) -> None:
        """Between steps: nothing is pinned, no window is open, the budget was never exceeded."""
        parts = self.offloaded._parts
        for page in parts.pages:
            assert page.pins == 0, f"bucket {page.index} is pinned {page.pins} times"
            assert page.windows == 0, f"bucket {page.index} is in {page.windows} windows"
            assert not page.kept, f"bucket {page.index} is kept"
        for tier in (parts.device, parts.host):
            assert tier.used_bytes <= tier.budget_bytes
            assert tier.peak_bytes <= tier.budget_bytes

    def evict_all(self) -> None:
        """Send every page home, as others of a larger model would."""
        if self.engine is None:
            return
        pager = self.engine._parts.pager
        for page in list(pager._present):
            if not (page.pins or page.kept or page.windows):
                pager._evict(page)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def make_engine(
    module: nn.Module, home: str, folder: Path, *, pages: int = 2, **sections: Any
) -> Engine:
    """An engine with all state at `home` and the smallest budgets under which it runs."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    tiers = {
        "device": {"kind": "cpu", "memory": _LARGE},
        "host": {"memory": _LARGE},
        "nvme": {"paths": [str(disk)], "capacity": _LARGE},
    }
    config = {
        "tiers": tiers,
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), home),
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "sgd", "lr": LEARNING_RATE, "weight_decay": 0.0},
        "partition": {"bucket_elements": 1024},
        **sections,
    }
    if home == "activations":
        config["placement"] = dict.fromkeys(("weights", "gradients", "optimizer"), "host") | {
            "activations": "nvme"
        }
        config["activations"] = {"min_bytes": 64, "host_memory": "96KiB"}
    if home != "device":
        loaded = load_config(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = kept_in_fp32(module, loaded.precision)
            collection = collect(module, loaded.precision.compute, kept=kept)
        rule, groups, *_ = choose_rule(collection, loaded, None)
        plan = plan_module(collection, loaded, describe_machine(loaded, _LARGE), rule, groups)
        sizes = sorted(layouts["weights"].nbytes for layouts in plan.layouts)
        need = sum(sizes[-pages:]) + plan.gradient_bytes + collection.resident_bytes
        tiers["device"]["memory"] = need
        tiers["host"]["memory"] = plan.peak_bytes["host"]
    return Engine(build(module, load_config(config), None), None)


def run_row(row: Row, folder: Path) -> None:
    """Run a row under all its runs and compare what they recorded.

    Raises:
        AssertionError: a run's record differs from that of the first run.
        Exception: the row itself has failed.
    """
    first: Run | None = None
    for kind in row.runs:
        torch.manual_seed(0)
        module = row.make()
        place = folder / kind
        place.mkdir()
        engine = None
        if kind == "roomy":
            engine = make_engine(module, "host", place, pages=_EVERY_PAGE, **row.config)
        elif kind != "plain":
            engine = make_engine(module, kind, place, pages=row.pages, **row.config)
        run = Run(kind, module, engine, place, row)
        torch.manual_seed(1)
        row.body(run)
        if engine is not None and not engine._closed:
            run.record("weights", run.weights())
            engine.close()
        elif engine is None:
            run.record("weights", run.weights())
        if first is None:
            first = run
        else:
            _compare(first, run)


def run_everywhere(
    body: Callable[[Run], None],
    folder: Path,
    make: Callable[[], nn.Module],
    *,
    pages: int = 2,
    runs: Sequence[str] = (*RUNS, "roomy"),
    **config: Any,
) -> None:
    """Run a body as a row that belongs to no table, in this process."""
    run_row(Row(body.__name__, body, make, (), pages, tuple(runs), config), folder)


def _compare(expected: Run, got: Run) -> None:
    # A row that closes its engine, or records nothing under one, has said so by recording nothing.
    assert len(expected.records) == len(got.records), (
        f"{got.kind}: {[what for what, _ in got.records]}, "
        f"{expected.kind}: {[what for what, _ in expected.records]}"
    )
    for index, ((what, a), (_, b)) in enumerate(zip(expected.records, got.records, strict=True)):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        if not same and a.dtype == b.dtype and a.shape == b.shape and a.is_floating_point():
            worst = (a.double() - b.double()).abs().max().item()
        else:
            worst = float("nan")
        assert same, f"{got.kind}: record {index}, {what}, is off by {worst} from {expected.kind}"
