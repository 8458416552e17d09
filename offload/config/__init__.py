"""The configuration: sections, loading, and every problem at once.

    config = load_config("configs/quickstart.toml")     # or a dict, JSON, None (all defaults)
    config.tiers.host.memory                            # bytes, or "auto"

A configuration is frozen. Sizes are bytes after loading; ``"auto"`` stays ``"auto"`` and is
resolved by whoever knows the machine, e.g. `resolve_host_budget`.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from offload.config.contradictions import DECAYING_SCHEDULES, contradictions, section_of
from offload.config.host_budget import (
    HOST_SHARE,
    available_host_bytes,
    free_swap_bytes,
    host_room_bytes,
)
from offload.config.problems import describe_problems
from offload.config.sections import (
    KEPT_BY_ITSELF,
    ActivationsSection,
    CheckpointSection,
    DeviceTierSection,
    ExpectSection,
    GuardSection,
    HostTierSection,
    IoSection,
    LoraSection,
    LrSchedulerSection,
    NvmeTierSection,
    OptimizerGroupSection,
    OptimizerSection,
    OverlapSection,
    PartitionSection,
    PlacementSection,
    PrecisionSection,
    RunSection,
    Section,
    TiersSection,
    TilingSection,
    TrainingSection,
)
from offload.errors import ConfigError

__all__ = [
    "HOST_SHARE",
    "KEPT_BY_ITSELF",
    "ActivationsSection",
    "CheckpointSection",
    "DeviceTierSection",
    "ExpectSection",
    "GuardSection",
    "HostTierSection",
    "IoSection",
    "LoraSection",
    "LrSchedulerSection",
    "NvmeTierSection",
    "OffloadConfig",
    "OptimizerGroupSection",
    "OptimizerSection",
    "OverlapSection",
    "PartitionSection",
    "PlacementSection",
    "PrecisionSection",
    "RunSection",
    "TiersSection",
    "TilingSection",
    "TrainingSection",
    "available_host_bytes",
    "config_json_schema",
    "free_swap_bytes",
    "host_room_bytes",
    "load_config",
    "resolve_host_budget",
]


class OffloadConfig(Section):
    """Everything that can be set. Frozen; each section's defaults work.

    Raises:
        ConfigError: with every problem of the given sections.
    """

    tiers: TiersSection = TiersSection()
    """Where state can live, and how much of it."""
    placement: PlacementSection = PlacementSection()
    """Which state lives where."""
    activations: ActivationsSection = ActivationsSection()
    """How activations leave the device."""
    partition: PartitionSection = PartitionSection()
    """How parameters are grouped into buckets."""
    precision: PrecisionSection = PrecisionSection()
    """Number formats."""
    training: TrainingSection = TrainingSection()
    """What a step is."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer, when `initialize` gets no factory."""
    lr_scheduler: LrSchedulerSection = LrSchedulerSection()
    """The course of the learning rate, when `initialize` gets no factory."""
    overlap: OverlapSection = OverlapSection()
    """What runs beside the computation."""
    io: IoSection = IoSection()
    """How files are read and written."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints: where, how often, how many, and how they are written."""
    tiling: TilingSection = TilingSection()
    """Weights that come to the device in parts."""
    guard: GuardSection = GuardSection()
    """How touches of absent parameters are caught."""
    lora: LoraSection | None = None
    """Adapters for `offload train`; not used by `initialize`."""
    run: RunSection | None = None
    """What `offload train` does; not used by `initialize`."""

    def __init__(self, **sections: Any) -> None:
        plain = _with_total_steps(_plain(sections))
        problems: list[str] = []
        try:
            super().__init__(**plain)
        except ValidationError as error:
            problems = describe_problems(error, type(self))
        problems += contradictions(plain)
        if problems:
            raise ConfigError(problems=problems)


def load_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | OffloadConfig | None = None,
) -> OffloadConfig:
    """Return the configuration from a TOML or JSON file (by suffix), a mapping, or itself.

    None gives the defaults. Relative paths are relative to the current directory.

    Raises:
        ConfigError: with every problem at once; unknown keys with the nearest valid one.
    """
    if config is None:
        return OffloadConfig()
    if isinstance(config, OffloadConfig):
        return config
    if isinstance(config, Mapping):
        return OffloadConfig(**_keyed(config, None))
    path = Path(config)
    try:
        return OffloadConfig(**_keyed(_read(path), str(path)))
    except ConfigError as error:
        raise ConfigError(problems=error.problems, source=str(path)) from None


def config_json_schema() -> dict[str, Any]:
    """Return the JSON Schema, draft 2020-12, of a configuration file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **OffloadConfig.model_json_schema(),
        "title": "Configuration of offload",
        "description": "Everything that can be set; what is left out has a working default.",
    }


def resolve_host_budget(config: OffloadConfig) -> int:
    """Return the host tier's budget in bytes; see [Note: host budget] for what `auto` is."""
    if config.tiers.host.memory != "auto":
        return config.tiers.host.memory
    return int(available_host_bytes() * HOST_SHARE)


def _read(path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix not in {".toml", ".json"}:
        raise ConfigError(problems=[f"a configuration is a .toml or .json file, not {path.name!r}"])
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(problems=[f"cannot be read: {reason}"]) from error
    except ValueError as error:  # of both parsers, and of the decoding
        raise ConfigError(problems=[f"is not valid {suffix[1:].upper()}: {error}"]) from error


def _keyed(content: object, source: str | None) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        problem = f"must be a table of sections, not {type(content).__name__}"
        raise ConfigError(problems=[problem], source=source)
    return dict(content)


def _plain(value: Any) -> Any:
    """Return `value` with sections turned into mappings of the fields that were set."""
    if isinstance(value, BaseModel):
        return _plain({name: getattr(value, name) for name in value.model_fields_set})
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(inner) for inner in value)
    return value


def _with_total_steps(plain: dict[str, Any]) -> dict[str, Any]:
    """Return `plain` with a decaying schedule that ends with the run, unless it says where."""
    scheduler, run = section_of(plain, "lr_scheduler"), section_of(plain, "run")
    if scheduler.get("name") not in DECAYING_SCHEDULES or "steps" not in run:
        return plain
    if scheduler.get("total_steps", "auto") != "auto":
        return plain
    return {**plain, "lr_scheduler": {**scheduler, "total_steps": run["steps"]}}
