"""The Trainer of transformers, with its training state on the engine's tiers.

    trainer = OffloadTrainer(model=model, args=args, train_dataset=data, offload_config="my.toml")
    trainer.train()

`OffloadTrainerMixin` does the same for what derives from `transformers.Trainer`, as TRL's trainers
do: ``class OffloadSFTTrainer(OffloadTrainerMixin, SFTTrainer): ...``.

[Note: Under a Trainer]
The Trainer's loop stays its own: data, accumulation, callbacks, evaluation, when to save. It
reaches torch in few places, and those go to the engine:

    create_optimizer         the engine is made, with the optimizer that the Trainer would have made
    accelerator.backward     Engine.backward; the accelerator knows which one is the last of a step
    accelerator.clip_grad..  the norm of all gradients; what is clipped is frozen in the config
    optimizer.step           OffloadOptimizer.step
    save, resume, best       the engine's checkpoint, beside weights for from_pretrained

The engine is made by the first `train`, `evaluate` or `predict`, because whatever wraps the model
(peft, gradient checkpointing) comes first. Schedulers are the Trainer's, on the engine's optimizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from offload.engine.optimizer import OffloadOptimizer
from offload.errors import CheckpointError, OffloadError
from offload.integrations.trainer_arguments import engine_config
from offload.state import random_state
from offload.state.adapters import has_adapters
from offload.state.interactive import close_replaced
from offload.state.session import OffloadEngine, initialize

STATE_FOLDER = "offload"
"""The folder in a Trainer's checkpoint that holds the engine's."""
_TAG = "state"

_Base: Any = object  # what the mixin stands before: a Trainer


class EngineAccelerator(Accelerator):  # type: ignore[misc]
    """An accelerator whose backward, clipping and placement are the engine's, once there is one.

    Attributes:
        engine: set by the trainer; None until it is made.
    """

    engine: OffloadEngine | None = None

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run the backward of a loss that is scaled for accumulation already.

        Raises:
            OffloadError: as `Engine.backward`.
        """
        if self.engine is None:
            super().backward(loss, **kwargs)
            return
        kwargs.pop("learning_rate", None)  # for optimizers that update in backward
        self.engine.backward(loss, is_last=bool(self.sync_gradients), **kwargs)

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """The norm of all gradients before clipping, which the step does; 0-dim, fp64.

        Raises:
            OffloadError: it is another norm than the engine clips to.
        """
        if self.engine is None:
            clipped: torch.Tensor = super().clip_grad_norm_(parameters, max_norm, norm_type)
            return clipped
        limit = self.engine.config.training.max_grad_norm
        if norm_type != 2 or not (math.isinf(max_norm) or max_norm == limit):
            raise OffloadError(
                f"clip_grad_norm_(max_norm={max_norm}, norm_type={norm_type})",
                expected=f"the L2 norm and max_norm {limit}, which the engine was made with",
                remedy="set TrainingArguments.max_grad_norm",
            )
        norm = self.engine.accumulated_grad_norm()
        return torch.tensor(norm, dtype=torch.float64)

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> nn.Module:
        """As the accelerator does, but the engine's module stays where it is."""
        if self.engine is not None and model is self.engine.module:
            device_placement = False
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> torch.optim.Optimizer:
        """The engine's optimizer as it is: accelerate's wrapper would move its state."""
        if isinstance(optimizer, OffloadOptimizer):
            if not any(known is optimizer for known in self._optimizers):
                self._optimizers.append(optimizer)
            return optimizer
        prepared: torch.optim.Optimizer = super().prepare_optimizer(optimizer, device_placement)
        return prepared


class OffloadTrainerMixin(_Base):  # type: ignore[misc]
    """What makes a Trainer train under the engine; see [Note: Under a Trainer].

    Stands before the Trainer among the bases. Arguments are the Trainer's and:

    Args:
        offload_config: what `offload.initialize` takes as `config`. `TrainingArguments` decide what
            both say: see `trainer_arguments`.

    `optimizers` takes factories, `params -> Optimizer` and `optimizer -> LRScheduler`, or an
    optimizer on the model's parameters that has not taken a step.

    Attributes:
        offload_engine: the engine; None until the first `train`, `evaluate` or `predict`.

    Raises:
        ConfigError: with every problem of the configuration and of the arguments.
        OffloadError: `optimizers` are of no use to the engine.
    """

    offload_engine: OffloadEngine | None = None
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, offload_config: Any = None, **kwargs: Any) -> None:
        self._offload_config = offload_config
        close_replaced(args[0] if args else kwargs.get("model"))
        super().__init__(*args, **kwargs)
        self._optimizer_factory = _optimizer_factory(self.optimizer)
        self._scheduler_factory = _scheduler_factory(self.lr_scheduler)
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None

    # -- the engine --------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Refuse what cannot be done, before anything is; then make the accelerator."""
        if self.model is not None:
            engine_config(self._offload_config, self.args, self.model)
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = EngineAccelerator
        self.accelerator.engine = self.offload_engine
        self.accelerator.scaler = None  # the engine has a loss scale of its own

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """The optimizer of the engine, which is made if there is none yet.

        Raises:
            ConfigError, DoesNotFitError, StorageError, OffloadError: as `offload.initialize`.
        """
        if self.offload_engine is None:
            self._open_engine()
        assert self.offload_engine is not None
        self.optimizer = self.offload_engine.optimizer
        return self.offload_engine.optimizer

    def _open_engine(self) -> None:
        config = engine_config(self._offload_config, self.args, self.model)
        self.offload_engine = initialize(self.model, config, optimizer=self._prototype)
        self.accelerator.engine = self.offload_engine
        self.model_wrapped = self.model

    def _prototype(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that the Trainer would train with: groups and settings are taken of it."""
        if self._optimizer_factory is None:
            self.optimizer = None
            super().create_optimizer()
            made: torch.optim.Optimizer = self.optimizer
        else:
            made = self._optimizer_factory(parameters)
        return made

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the Trainer, without `fused`: the engine has kernels of its own."""
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, {key: value for key, value in kwargs.items() if key != "fused"}

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The scheduler of the factory among `optimizers`, or the one that the arguments name."""
        if self._scheduler_factory is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = self._scheduler_factory(optimizer or self.optimizer)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, after the engine of the old one is closed."""
        if self.offload_engine is not None:
            self.offload_engine.close()
            self.offload_engine = self.accelerator.engine = None
        made: nn.Module = super().call_model_init(trial)
        return made

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if model is not self.model:  # the engine moves the one that is trained
            super()._move_model_to_device(model, device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the engine is made first."""
        self.create_optimizer()
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; with the loss of a step, what the engine says of that step."""
        engine = self.offload_engine
        if engine is not None and "loss" in logs and engine.global_steps:
            report = engine.report()
            logs["offload_step_seconds"] = report.measured_seconds
            logs["offload_bound_seconds"] = report.bound_seconds
            logs["offload_faults"] = report.faults
            for name, tier in report.tiers.items():
                logs[f"offload_{name}_peak_bytes"] = tier.peak_bytes
        super().log(logs, *args, **kwargs)

    # -- saving and loading ------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.offload_engine is None or state_dict is not None:
            super()._save(output_dir, state_dict=state_dict)
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.offload_engine.save_pretrained(folder)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self.offload_engine
        if engine is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        client_state = {"lr_scheduler": self.lr_scheduler.state_dict()}
        engine.save_checkpoint(Path(output_dir) / STATE_FOLDER, _TAG, client_state)
        engine.wait_for_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        """Everything is in the engine's checkpoint, which is loaded when there is an engine."""
        if not _has_state(resume_from_checkpoint):
            raise CheckpointError(
                f"{resume_from_checkpoint} has no state of the engine to go on from",
                expected=f"a folder {STATE_FOLDER}/ in it, as this trainer saves without "
                "save_only_model",
                remedy="to start anew from its weights, load the model from it and train",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.offload_engine is None:
            return
        client_state = self.offload_engine.load_checkpoint(Path(checkpoint) / STATE_FOLDER, _TAG)
        self.lr_scheduler.load_state_dict(client_state["lr_scheduler"])

    def _load_best_model(self) -> None:
        """The engine as it was at the best step, but for random generators; or its weights."""
        engine, best = self.offload_engine, self.state.best_model_checkpoint
        if engine is None:
            super()._load_best_model()
            return
        if _has_state(best):
            before = random_state.capture()
            engine.load_checkpoint(Path(best) / STATE_FOLDER, _TAG)
            random_state.restore(before)
        elif has_adapters(engine.module):
            from peft import load_peft_weights, set_peft_model_state_dict

            module: Any = engine.module
            set_peft_model_state_dict(module, load_peft_weights(best), module.active_adapters[0])
        else:
            engine.import_checkpoint(best, optimizer=False)


def _has_state(folder: str) -> bool:
    return (Path(folder) / STATE_FOLDER / _TAG).is_dir()


def _optimizer_factory(given: Any) -> Any:
    if isinstance(given, torch.optim.Optimizer):
        if given.state:
            raise OffloadError(
                f"the {type(given).__name__} in optimizers=(...) has taken steps",
                expected="a new one, for its state would be lost",
                remedy="pass a factory: params -> Optimizer",
            )
        return lambda _: given
    if given is None or callable(given):
        return given
    raise OffloadError(f"{given!r} as optimizer", expected="a factory: params -> Optimizer")


def _scheduler_factory(given: Any) -> Any:
    if given is None or (callable(given) and _num_required(given) == 1):
        return given
    raise OffloadError(
        f"the {type(given).__name__} in optimizers=(...) schedules another optimizer",
        expected="a factory: optimizer -> LRScheduler",
        remedy="pass lambda optimizer: LambdaLR(optimizer, ...)",
    )


def _num_required(factory: Callable[..., Any]) -> int:
    parameters = inspect.signature(factory).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


class OffloadTrainer(OffloadTrainerMixin, Trainer):
    """`transformers.Trainer` under the engine; see `OffloadTrainerMixin`."""
