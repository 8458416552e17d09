"""The strategy, without its Lightning base class: `strategy_for` adds that.

[Note: Fit under the engine]
The engine is made when `fit` begins, of the whole LightningModule: what `configure_optimizers` has
returned says which rule it applies, and its schedulers are moved to the engine's optimizer.
`training_step` and its siblings run as the forward of that module, so that they are one run of the
engine. Lightning decides when a step is due and when a scheduler moves; the engine has the
gradients, the norm, the clipping and the update. After `fit` the engine stays open, so that the
module can be evaluated, called and saved, until `close`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offload.config import OffloadConfig, load_config
from offload.errors import CheckpointError, ConfigError, OffloadError
from offload.integrations.lightning.checkpoints import from_plain, to_plain
from offload.integrations.lightning.precision import COMPUTE, has_own_backward
from offload.integrations.schedulers import moved_to
from offload.state.folders import retire
from offload.state.session import OffloadEngine, initialize

_TAG = "state"  # a checkpoint's folder inside of the path that Lightning names


class EngineStrategy:
    """Trains on one device, with weights, gradients and optimizer state on the config's tiers.

    Args:
        config: as of `offload.initialize`. The Trainer says what it has arguments for.
        accelerator: as of Lightning's strategies.
        checkpoint_io: must be None: the engine writes and reads checkpoints.
        precision_plugin: as of Lightning's strategies.

    Attributes:
        engine: the `OffloadEngine`, from the beginning of `fit` to `close`.
    """

    strategy_name: ClassVar[str] = "offload"
    precision_class: ClassVar[type[Any]]
    schedule_class: ClassVar[type[Any]]
    # Of the Lightning base class.
    lightning_module: Any
    accelerator: Any
    optimizers: Any
    lr_scheduler_configs: Any
    model: Any

    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
        *,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        self.engine: OffloadEngine | None = None
        self._config = load_config(config)
        if checkpoint_io is not None:
            raise OffloadError(
                "OffloadStrategy(checkpoint_io=...)",
                remedy="leave it out: the engine writes and reads checkpoints",
            )
        parent: Any = super()
        parent.__init__(
            device=torch.device("cpu"), accelerator=accelerator, precision_plugin=precision_plugin
        )

    # -- what the Trainer sets ---------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        """The engine's plugin on that of the Trainer."""
        parent: Any = super()
        return parent.precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and not isinstance(plugin, self.precision_class):
            plugin = self.precision_class(plugin)
        self._precision_plugin = plugin

    def setup_environment(self) -> None:
        """Choose the device: what the config says, or what the Trainer's accelerator is for."""
        kind = self._config.tiers.device.kind
        if kind == "auto":
            kind = "cuda:0" if "CUDA" in type(self.accelerator).__name__ else "cpu"
        self._root_device = torch.device("cuda:0" if kind == "cuda" else kind)
        parent: Any = super()
        parent.setup_environment()

    def setup(self, trainer: Any) -> None:
        """Make the engine, if the Trainer is about to fit; else, without one, as Lightning does.

        Raises:
            ConfigError: the Trainer and the config contradict each other, or ask for what the
                engine does not do.
            OffloadError: there is an engine of another module, or it has been trained already.
            DoesNotFitError, StorageError: see `offload.initialize`.
        """
        fits = trainer.state.fn == "fit"
        if self.engine is None and not fits:
            parent: Any = super()
            parent.setup(trainer)
            return
        self.accelerator.setup(trainer)
        if self.engine is None:
            self._make_engine(trainer)
            return
        if fits or self.engine.module is not self.lightning_module:
            raise OffloadError(
                "the strategy has an engine, that of an earlier fit",
                remedy="go on in a new Trainer, strategy and module with fit(ckpt_path=...)",
            )

    def _make_engine(self, trainer: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*this fit will run with no optimizer")
            parent: Any = super()
            parent.setup_optimizers(trainer)
        chosen = [o for o in self.optimizers if type(o).__name__ != "_MockOptimizer"]
        config = self._settled(trainer, chosen)
        self.engine = initialize(
            self.lightning_module,
            config,
            optimizer=(lambda _: chosen[0]) if chosen else None,
            lr_scheduler=self._scheduler_factory() if chosen else None,
        )
        self.precision_plugin.engine = self.engine
        if not chosen:
            # The config's schedule moves after every step, as everywhere.
            made = self.schedule_class(self.engine.lr_scheduler, interval="step")
            self.lr_scheduler_configs = [made]
        self.optimizers = [self.engine.optimizer]
        self.model = self.lightning_module

    def _scheduler_factory(self) -> Callable[[torch.optim.Optimizer], LRScheduler]:
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]

        def move(optimizer: torch.optim.Optimizer) -> LRScheduler:
            moved = [moved_to(optimizer, scheduler) for scheduler in schedulers]
            return moved[0] if moved else LambdaLR(optimizer, lambda _: 1.0)

        return move

    def _settled(self, trainer: Any, chosen: list[Any]) -> OffloadConfig:
        """The configuration with what the Trainer says; every contradiction at once."""
        config, module = self._config, self.lightning_module
        problems = _contradictions(trainer, config, chosen)
        precision = self.precision_plugin.precision
        compute = COMPUTE[precision]
        if "compute" in config.precision.model_fields_set and config.precision.compute != compute:
            if precision == "32-true":  # what the Trainer has without being told
                compute = config.precision.compute
            else:
                problems.append(
                    f"Trainer(precision={precision!r}) and precision.compute = "
                    f"{config.precision.compute!r}: give one of them"
                )
        if compute == "fp16" and has_own_backward(module):
            problems.append(
                "fp16 with a backward of the module's own: the loss scale needs the engine's; use "
                "bf16"
            )
        if problems:
            raise ConfigError(problems=problems, source="Trainer and OffloadStrategy")
        is_manual = not module.automatic_optimization
        training: dict[str, Any] = {
            # Says in which dtype gradients are added; Lightning counts.
            "gradient_accumulation_steps": 1 if is_manual else trainer.accumulate_grad_batches,
            "max_grad_norm": float(trainer.gradient_clip_val or config.training.max_grad_norm),
        }
        if is_manual and config.training.gradient_dtype == "auto":
            training["gradient_dtype"] = "fp32"  # who knows how many of them are added
        device = config.tiers.device.model_copy(update={"kind": str(self._root_device)})
        sections = {name: getattr(config, name) for name in config.model_fields_set}
        return OffloadConfig(
            **sections
            | {
                "precision": config.precision.model_copy(update={"compute": compute}),
                "training": config.training.model_copy(update=training),
                "tiers": config.tiers.model_copy(update={"device": device}),
            }
        )

    # -- steps -------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Run the closure, whose backward is the step's last, and take the step."""
        self.precision_plugin.step_is_due = True
        try:
            parent: Any = super()
            return parent.optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self.precision_plugin.step_is_due = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._run("training_step", args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._run("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._run("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._run("predict_step", args, kwargs)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the module, as its forward if there is an engine."""
        module = self.lightning_module
        if self.engine is None:
            return getattr(module, name)(*args, **kwargs)
        before = vars(module).get("forward")

        def restore() -> None:
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before

        def redirected(*inner: Any, **named: Any) -> Any:
            restore()  # the method calls the real one
            return getattr(module, name)(*inner, **named)

        module.forward = redirected
        try:
            return self.engine(*args, **kwargs)
        finally:
            restore()

    # -- checkpoints -------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Checkpoints are loaded into the engine, which `setup` makes."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engine's checkpoint has the optimizer's state."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty while there is an engine, whose checkpoint has it all."""
        if self.engine is not None:
            return {}
        parent: Any = super()
        found: dict[str, Any] = parent.lightning_module_state_dict()
        return found

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: the engine's checkpoint has it."""
        del optimizer
        return {}

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Write a folder of that name: the engine's checkpoint, with Lightning's state in it.

        Raises:
            OffloadError: there is no engine, or there are storage options.
            CheckpointError: a value of the callbacks, the hyperparameters or the like is not plain.
        """
        if self.engine is None or storage_options is not None:
            raise OffloadError(
                "save_checkpoint() before fit, or with storage_options",
                remedy="save when training has begun, to a local path",
            )
        self.engine.save_checkpoint(Path(filepath), _TAG, {"lightning": to_plain(checkpoint)})
        self.engine.wait_for_checkpoint()

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the engine's state of a folder; returns Lightning's.

        Raises:
            CheckpointError: it is a file, or no checkpoint of this strategy.
            OffloadError: there is no engine: nothing was fitted.
        """
        del weights_only  # nothing is unpickled
        path = Path(checkpoint_path).resolve()
        if path.is_file():
            raise CheckpointError(
                f"{path} is a file: a checkpoint of another strategy, which is a pickle",
                remedy="load its weights into the module yourself, with "
                "torch.load(path, weights_only=True)['state_dict'], and fit without ckpt_path",
            )
        if self.engine is None:
            raise OffloadError(
                f"checkpoint {path} before fit",
                remedy="offload export makes safetensors of it; load them into the module",
            )
        state = self.engine.load_checkpoint(path, _TAG)
        if "lightning" not in state:
            raise CheckpointError(f"{path} is no checkpoint of OffloadStrategy")
        content: dict[str, Any] = from_plain(state["lightning"])
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint's folder, which is no checkpoint at any moment in between."""
        path = Path(filepath)
        if (path / _TAG).is_dir():
            retire(path / _TAG)
        shutil.rmtree(path)

    # -- the end -----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Fit is over: nothing moves, and the engine stays open."""
        if self.engine is None:
            parent: Any = super()
            parent.teardown()
            return
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def close(self) -> None:
        """Close the engine; the module is of no use afterwards. See `OffloadEngine.close`."""
        if self.engine is not None:
            self.engine.close()


def _contradictions(trainer: Any, config: OffloadConfig, chosen: list[Any]) -> list[str]:
    problems = []
    if len(chosen) > 1:
        problems.append(
            f"configure_optimizers returned {len(chosen)} optimizers: one with several groups works"
        )
    if any(optimizer.state for optimizer in chosen):
        problems.append("configure_optimizers returned an optimizer that has taken steps")
    if chosen and config.lr_scheduler.model_fields_set:
        problems.append("[lr_scheduler] is set: return the scheduler from configure_optimizers")
    if config.optimizer.name == "mezo":
        problems.append("optimizer.name = 'mezo' has no backward: use offload.initialize")
    if config.checkpoint.every_steps:
        problems.append("checkpoint.every_steps is set: use Lightning's ModelCheckpoint")
    steps, batches = config.training.gradient_accumulation_steps, trainer.accumulate_grad_batches
    if steps not in (1, batches):
        problems.append(
            f"training.gradient_accumulation_steps = {steps} and Trainer(accumulate_grad_batches="
            f"{batches}): give one of them, to the Trainer"
        )
    norm, value = config.training.max_grad_norm, trainer.gradient_clip_val
    if norm and value and norm != value:
        problems.append(
            f"training.max_grad_norm = {norm} and Trainer(gradient_clip_val={value}): give one"
        )
    if value and str(getattr(trainer.gradient_clip_algorithm, "value", "norm")) == "value":
        problems.append("gradient_clip_algorithm = 'value' is not done: use 'norm'")
    return problems
