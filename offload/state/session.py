"""The public engine: training (offload.engine) with saving and loading (this layer)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from offload.config import OffloadConfig, load_config
from offload.engine import planning
from offload.engine.build import Parts, build
from offload.engine.engine import Engine, SchedulerFactory
from offload.engine.optimizer import Closure
from offload.engine.planning import OptimizerFactory
from offload.engine.zeroth_order import Reduce
from offload.errors import OffloadError
from offload.schedule.cost import LaneSpeeds
from offload.schedule.forecast import Workload
from offload.schedule.plan import Plan
from offload.state import adapters, checkpoint, durable, export
from offload.state.deferred import placing, refuse_inside
from offload.state.importing import Imported, import_checkpoint
from offload.state.interactive import close_replaced
from offload.state.saver import Saver
from offload.timeline import StepTimeline


class OffloadEngine(Engine):
    """A model whose training state lives on several tiers; made by `initialize`.

    Attributes:
        client_state: plain values that go into the checkpoints that the engine saves by itself.
    """

    def __init__(self, parts: Parts, lr_scheduler: SchedulerFactory | None) -> None:
        self._saver = Saver(parts.io, parts.config.io.deadline_seconds)
        self.client_state: dict[str, Any] = {}
        super().__init__(parts, lr_scheduler)

    def step(self, closure: Closure | None = None, *, reduce: Reduce | None = None) -> bool:
        """See `Engine.step`. Every `checkpoint.every_steps` a checkpoint is saved after it.

        If that cannot be saved, the step counts all the same: the next use of the engine says so.
        """
        self._saver.raise_error()
        taken = super().step(closure, reduce=reduce)
        settings = self.config.checkpoint
        is_due = settings.every_steps and self.global_steps % settings.every_steps == 0
        if taken and is_due and settings.directory is not None:
            try:
                with durable.storage_errors("save", settings.directory, what="checkpoint"):
                    checkpoint.save_checkpoint(
                        self,
                        self._saver,
                        settings.directory,
                        client_state=self.client_state,
                        by_itself=True,
                    )
            except OffloadError as error:
                self._saver.keep_error(error)
        return taken

    def save_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        portable: bool | None = None,
    ) -> Path:
        """Save everything that resuming needs; see `checkpoint.save_checkpoint`.

        Unless `checkpoint.asynchronous` is false it returns when training may go on; the checkpoint
        is durable when `wait_for_checkpoint` has returned. The next save, a load and `close` wait
        for it. Parameters that were unfrozen get their place first, as in `load_checkpoint`.
        """
        self._check_ready("save_checkpoint")
        self._admit_unfrozen()
        with durable.storage_errors("save", Path(directory), what=tag or "checkpoint"):
            return checkpoint.save_checkpoint(
                self, self._saver, Path(directory), tag, client_state, portable=portable
            )

    def wait_for_checkpoint(self) -> Path | None:
        """Wait for the last checkpoint; the path of the newest that survives power loss, or None.

        Raises:
            BudgetError, CheckpointError, StorageError: it could not be saved, and nothing of it is
                left. Raised once, here or by the next use of the engine; training may go on.
        """
        self._saver.wait()
        return self._saver.path

    @property
    def durable_checkpoint(self) -> Path | None:
        """The newest checkpoint of this engine that survives power loss; never waits."""
        return self._saver.path

    def close(self) -> None:
        """Wait for the last checkpoint, then see `Engine.close`.

        Raises:
            StorageError: as `Engine.close`, or the checkpoint could not be saved; everything is
                freed all the same.
        """
        with contextlib.ExitStack() as closing:
            closing.callback(super().close)
            self._saver.close()

    def record_timeline(self) -> None:
        """Record what every lane does from now until the next step has ended.

        It changes no number. `recorded_timeline` gives it out.
        """
        self._check_not_closed()
        self._meter.record(self.global_steps + 1)

    def recorded_timeline(self, *, now: bool = False) -> StepTimeline | None:
        """The step that was recorded, once; None where there is none.

        What a step has begun may end in the next: without `now` there is none before that has ended
        as well.
        """
        return self._meter.recorded(now=now)

    def _end_saves(self) -> None:
        self._saver.wait_quietly()
        super()._end_saves()

    def _check_ready(self, what: str) -> None:
        super()._check_ready(what)
        self._saver.raise_error()

    def load_checkpoint(
        self, directory: str | os.PathLike[str], tag: str | None = None
    ) -> dict[str, Any]:
        """Resume bit-exactly and return the client state; see `checkpoint.load_checkpoint`.

        Legal while a step is pending, too: that step is given up. Parameters that were unfrozen get
        their place first, so that the checkpoint may have state for them.
        """
        self._check_not_closed()
        self._saver.wait()
        if self._pending is None and not self._is_void:
            self._admit_unfrozen()
        with durable.storage_errors("load", Path(directory), what=tag or "checkpoint"):
            return checkpoint.load_checkpoint(self, Path(directory), tag)

    def import_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: bool | None = None,
        strict: bool = True,
    ) -> Imported:
        """Go on from another program's checkpoint; see `importing.import_checkpoint`.

        Legal when `load_checkpoint` is; parameters that were unfrozen get their place first.
        """
        self._check_not_closed()
        self._saver.wait()
        if self._pending is None and not self._is_void:
            self._admit_unfrozen()
        return import_checkpoint(self, Path(path), optimizer=optimizer, strict=strict)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write what transformers' `from_pretrained` loads; see `export.save_pretrained`.

        Of a model of peft, its adapters, as peft loads them; see `adapters.save_adapters`.
        """
        self._check_ready("save_pretrained")
        if adapters.has_adapters(self.module):
            return adapters.save_adapters(self, Path(directory))
        return export.save_pretrained(self, Path(directory))


def initialize(
    model: nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
    *,
    optimizer: OptimizerFactory | None = None,
    lr_scheduler: SchedulerFactory | None = None,
) -> OffloadEngine:
    """Place the training state of `model` on the config's tiers and return its engine.

    In a notebook the engine whose name the result is assigned to is closed first, with a warning:
    see [Note: Cells that run again].

    Args:
        model: any module; its parameters keep their identity, and lose their storage. They may be
            deferred, see `deferred_init`.
        config: a TOML or JSON file, a mapping, an `OffloadConfig`, or None: everything `auto`.
        optimizer: a factory of any torch optimizer; None is the config's `[optimizer]`.
        lr_scheduler: a factory; None is the config's `[lr_scheduler]`.

    Raises:
        ConfigError: with every problem at once.
        DoesNotFitError: the state does not fit in the budgets; the model is unchanged.
        StorageError: an nvme path cannot be used.
    """
    refuse_inside("offload.initialize")
    loaded = load_config(config)
    close_replaced(model)
    with placing(model) as source:
        return OffloadEngine(build(model, loaded, optimizer, source), lr_scheduler)


def plan(
    model_or_path: nn.Module | str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
    *,
    speeds: LaneSpeeds | None = None,
    workload: Workload | None = None,
) -> Plan:
    """Plan the training state of a model; needs no weights and allocates none.

    Args:
        model_or_path: a module, which may be deferred or on the meta device, or a Hugging Face
            directory or `config.json`, of which only the configuration is read.
        config: as of `initialize`.
        speeds: of the lanes; by default those that `offload bench` has kept, else conservative
            ones.
        workload: what a step computes; by default its transfers and updates only.

    Returns:
        The plan; `plan.fits` tells whether the budgets suffice, `str(plan)` is a table.

    Raises:
        ConfigError: with every problem at once, or the model's configuration cannot be read.
        OffloadError: a parameter that the engine cannot take; names it.
    """
    if not isinstance(model_or_path, nn.Module):
        return planning.plan(model_or_path, config, speeds=speeds, workload=workload)
    with placing(model_or_path):
        return planning.plan(model_or_path, config, speeds=speeds, workload=workload)
