"""`initialize` with DeepSpeed's arguments and its four results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from offload.errors import ConfigError, OffloadError
from offload.integrations.deepspeed.idiom import DeepSpeedEngine
from offload.integrations.deepspeed.schedules import CourseLR
from offload.integrations.deepspeed.translation import Translation, translate
from offload.integrations.schedulers import moved_to
from offload.state.session import initialize as initialize_engine

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

Optimizer = torch.optim.Optimizer
_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")


def initialize(  # noqa: PLR0913, PLR0917 (the arguments are DeepSpeed's)
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[list[Any]], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    distributed_port: int | None = None,  # noqa: ARG001
    mpu: Any = None,
    dist_init_required: bool | None = None,  # noqa: ARG001
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Optimizer, DataLoader[Any] | None, Any]:
    """What `deepspeed.initialize` does, in one process, without a launcher.

    Args:
        args: `args.deepspeed_config` counts where there is no `config`.
        model: any module.
        optimizer: a torch optimizer of the model's parameters that has not taken a step, or a
            function of them that makes one. It comes before that of the configuration.
        model_parameters: parameters or groups of them that are trained; None: all that require
            gradients.
        training_data: a dataset; the loader draws from it in the order of DeepSpeed's.
        lr_scheduler: a torch scheduler of `optimizer`, or a function of the engine's optimizer.
        distributed_port: without effect: there is one process.
        mpu: must be None.
        dist_init_required: without effect.
        collate_fn: of the loader.
        config: DeepSpeed's configuration, a JSON file or its content.
        mesh_param: must be None.
        config_params: an older name of `config`; one of them.
        values: what `"auto"` stands for, see `translate`.

    Returns:
        The engine, its optimizer, the data loader or None, and the schedule, or None where neither
        the configuration nor an argument names one.

    Raises:
        ConfigError: see `translate`; or there is no optimizer.
        OffloadError: there are several processes, or a group of model parallelism.
        DoesNotFitError, StorageError: see `offload.initialize`.
    """
    if model is None:
        raise OffloadError("initialize() without a model", remedy="initialize(model=...)")
    _check_one_process(mpu, mesh_param)
    asked = _configuration(args, config, config_params)
    translation = translate(
        asked,
        values=values,
        own_optimizer=optimizer is not None,
        own_scheduler=lr_scheduler is not None,
    )
    if optimizer is None and not translation.has_optimizer:
        raise ConfigError(
            problems=["there is no optimizer: name one in the configuration, or give one"]
        )
    for path in translation.config.tiers.nvme.paths:
        path.mkdir(parents=True, exist_ok=True)  # as DeepSpeed does
    engine = initialize_engine(
        model,
        translation.config,
        optimizer=_optimizer_factory(optimizer, model_parameters, translation),
        lr_scheduler=_scheduler_factory(lr_scheduler, translation),
    )
    loader = _loader(training_data, collate_fn, translation)
    has_schedule = lr_scheduler is not None or translation.course is not None
    wrapped = DeepSpeedEngine(engine, translation)
    return wrapped, engine.optimizer, loader, engine.lr_scheduler if has_schedule else None


def _check_one_process(mpu: Any, mesh_param: Any) -> None:
    distributed = torch.distributed
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed.is_available() and distributed.is_initialized():
        world_size = distributed.get_world_size()
    if world_size > 1:
        raise OffloadError(
            f"initialize() in one of {world_size} processes", expected="one process, no launcher"
        )
    if mpu is not None or mesh_param is not None:
        raise OffloadError("initialize(mpu=...) or (mesh_param=...)", expected="one process")


def _configuration(args: Any, config: Any, config_params: Any) -> Any:
    given = [c for c in (config, config_params) if c is not None]
    named = getattr(args, "deepspeed_config", None)
    if len(given) > 1 or (given and named is not None):
        raise ConfigError(problems=["the configuration is given twice: give it once"])
    found = given[0] if given else named
    if found is None:
        raise ConfigError(problems=["there is no configuration: initialize(config=...)"])
    return found


def _optimizer_factory(
    optimizer: Optimizer | Callable[[list[Any]], Optimizer] | None,
    model_parameters: Iterable[Any] | None,
    translation: Translation,
) -> Callable[[Sequence[nn.Parameter]], Optimizer] | None:
    given = None if model_parameters is None else list(model_parameters)
    if isinstance(optimizer, Optimizer):
        if optimizer.state:
            raise OffloadError(
                "an optimizer that has taken steps",
                remedy="give a new one, and load its state with engine.engine.import_checkpoint",
            )
        return lambda _: optimizer
    if optimizer is not None:
        return lambda parameters: optimizer(_trained(given, parameters))
    section = translation.config.optimizer
    if given is None:
        return None
    if section.name not in _CLASSES:
        raise OffloadError(
            f"model_parameters with optimizer {section.name}",
            remedy="set requires_grad for what is trained, and leave model_parameters out",
        )
    settings = {
        key: value
        for key, value in section.model_dump(include={*_SETTINGS}).items()
        if key in section.model_fields_set
    }
    make = _CLASSES[section.name]
    return lambda parameters: make(_trained(given, parameters), **settings)


def _trained(given: list[Any] | None, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """Those of the given parameters, or groups, that the engine trains."""
    if given is None:
        return list(parameters)
    known = {id(parameter) for parameter in parameters}
    if not any(isinstance(entry, Mapping) for entry in given):
        return [p for p in given if id(p) in known]
    return [
        {**group, "params": [p for p in _listed(group["params"]) if id(p) in known]}
        for group in given
    ]


def _listed(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _scheduler_factory(
    lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None,
    translation: Translation,
) -> Callable[[Optimizer], LRScheduler]:
    if isinstance(lr_scheduler, LRScheduler):
        return lambda optimizer: moved_to(optimizer, lr_scheduler)
    if lr_scheduler is not None:
        return lr_scheduler
    course = translation.course
    if course is not None:
        return lambda optimizer: CourseLR(optimizer, course)
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def _loader(
    dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, translation: Translation
) -> DataLoader[Any] | None:
    from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

    if dataset is None:
        return None
    sampler: DistributedSampler[Any] | None = None
    if not isinstance(dataset, IterableDataset):
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
    return DataLoader(
        dataset,
        batch_size=translation.micro_batch_size,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=translation.drop_last,
    )
