"""The engine as programs written for DeepSpeed call it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from offload.errors import EngineStateError, OffloadError
from offload.integrations.deepspeed.translation import Translation
from offload.state.folders import subfolders
from offload.state.session import OffloadEngine

_TAG = "deepspeed_tag"  # in the client state: the name under which it was saved


class DeepSpeedEngine:
    """An `OffloadEngine` behind DeepSpeed's names; what it does not have is the module's.

    Attributes:
        engine: the `OffloadEngine`, with everything that DeepSpeed has no name for.
        translation: what the configuration was translated to, with the notes.
    """

    def __init__(self, engine: OffloadEngine, translation: Translation) -> None:
        self.engine = engine
        self.translation = translation
        self._step_was_taken = False

    def __getattr__(self, name: str) -> Any:
        if name in ("engine", "translation"):  # not made yet
            raise AttributeError(name)
        return getattr(self.engine.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.engine(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        return self.engine(*args, **kwargs)

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Run backward of `loss` divided by `gradient_accumulation_steps`; returns the quotient.

        Args:
            loss: a scalar.
            retain_graph: as of `torch.Tensor.backward`.
            scale_wrt_gas: whether to divide. If not, the loss itself counts.
        """
        steps = self.gradient_accumulation_steps()
        self.engine.backward(loss if scale_wrt_gas else loss * steps, retain_graph=retain_graph)
        return loss / steps if scale_wrt_gas else loss

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Count a backward; at the boundary take an optimizer step, and one of the schedule.

        Raises:
            OffloadError: there are `lr_kwargs`.
        """
        if lr_kwargs:
            raise OffloadError(
                "step(lr_kwargs=...): the schedule is stepped without arguments",
                remedy="step a scheduler that takes arguments yourself",
            )
        self._step_was_taken = self.engine.step()

    def train(self, mode: bool = True) -> Self:
        """Set the module's training mode."""
        self.engine.train(mode)
        return self

    def eval(self) -> Self:
        """Set the module's evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients, and the micro-batches of the step under way."""
        self.engine.optimizer.zero_grad()

    def destroy(self) -> None:
        """Close the engine; see `OffloadEngine.close`."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.destroy()

    # -- what is asked -----------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The user's module."""
        return self.engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The engine's optimizer."""
        return self.engine.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule; `step` steps it."""
        return self.engine.lr_scheduler

    @property
    def device(self) -> torch.device:
        """Where forward runs, and inputs belong."""
        return next(self.engine.module.parameters()).device

    @property
    def local_rank(self) -> int:
        """0: there is one process."""
        return 0

    @property
    def global_rank(self) -> int:
        """0: there is one process."""
        return 0

    @property
    def global_steps(self) -> int:
        """Optimizer steps, with those that were skipped: as DeepSpeed counts."""
        return self.engine.global_steps + self.engine.skipped_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that a non-finite gradient has skipped."""
        return self.engine.skipped_steps

    @property
    def micro_steps(self) -> int:
        """Backward passes that `step` has counted."""
        return self.engine.micro_steps

    @property
    def global_samples(self) -> int:
        """Samples of all optimizer steps."""
        return self.global_steps * self.train_batch_size()

    def train_batch_size(self) -> int:
        """Samples in one optimizer step."""
        return self.translation.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples in one forward pass."""
        return self.translation.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        """Backward passes in one optimizer step."""
        return self.engine.config.training.gradient_accumulation_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` takes an optimizer step."""
        return self.engine.is_accumulation_boundary()

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self._step_was_taken

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of all gradients of the last step, before clipping."""
        return self.engine.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self.engine.optimizer.param_groups]

    def gradient_clipping(self) -> float:
        """The norm that gradients are clipped to; 0 is no clipping."""
        return self.engine.config.training.max_grad_norm

    def zero_optimization_stage(self) -> int:
        """The stage that the configuration asked for."""
        return self.translation.stage

    def fp16_enabled(self) -> bool:
        """Whether the compute dtype is fp16."""
        return self.engine.config.precision.compute == "fp16"

    def bfloat16_enabled(self) -> bool:
        """Whether the compute dtype is bf16."""
        return self.engine.config.precision.compute == "bf16"

    # -- saving ------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that resuming needs; see `OffloadEngine.save_checkpoint`. Returns True.

        It is durable when it returns. The tag is DeepSpeed's, `global_stepN`, without one.

        Raises:
            OffloadError: frozen parameters are to be left out, or `latest` is not to be written.
        """
        if exclude_frozen_parameters or not save_latest:
            raise OffloadError(
                "save_checkpoint(exclude_frozen_parameters=True) or (save_latest=False)",
                remedy="leave them: a checkpoint is whole, and loading looks at what is there",
            )
        name = str(tag) if tag else f"global_step{self.global_steps}"
        self.engine.save_checkpoint(save_dir, name, {**(client_state or {}), _TAG: name})
        self.engine.wait_for_checkpoint()
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume bit-exactly; the checkpoint's path and client state, or (None, None) without one.

        Raises:
            OffloadError: only a part is to be loaded.
            CheckpointError: see `OffloadEngine.load_checkpoint`.
        """
        whole = load_module_strict and load_optimizer_states and load_lr_scheduler_states
        if not whole or load_module_only or custom_load_fn is not None:
            raise OffloadError(
                "load_checkpoint of a part",
                remedy="load the whole, or export the checkpoint and load its weights with "
                "engine.engine.import_checkpoint(path, optimizer=False)",
            )
        folder = Path(load_dir)
        if tag is None and not (folder.is_dir() and subfolders(folder)):
            return None, None
        state = self.engine.load_checkpoint(folder, None if tag is None else str(tag))
        return str(folder / state.pop(_TAG, tag or "")), state

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights in the compute dtype as safetensors. Returns True.

        Raises:
            OffloadError: the file name is not `model.safetensors`: no pickle is written.
        """
        if exclude_frozen_parameters or save_filename != "model.safetensors":
            raise OffloadError(
                f"save_16bit_model({save_filename!r})",
                expected="model.safetensors, with all weights",
                remedy="leave the name out; safetensors.torch.load_file reads it",
            )
        self.engine.save_pretrained(save_dir)
        return True

    save_fp16_model = save_16bit_model

    def no_sync(self) -> Any:
        """Not needed: there is one process.

        Raises:
            EngineStateError: always.
        """
        raise EngineStateError(
            "no_sync(): there is one process",
            remedy="leave it out; gradient_accumulation_steps says when a step is due",
        )
