"""offload: virtual memory for training state; trains models larger than memory.

`import offload` imports neither torch nor numpy: names are resolved when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME_OF = {
    "BudgetError": "offload.errors",
    "CheckpointError": "offload.errors",
    "ChecksumError": "offload.errors",
    "ConfigError": "offload.errors",
    "DeadlineError": "offload.errors",
    "DiskFullError": "offload.errors",
    "DoesNotFitError": "offload.errors",
    "EngineStateError": "offload.errors",
    "GuardError": "offload.errors",
    "MemoryPressureError": "offload.errors",
    "NonFiniteError": "offload.errors",
    "OffloadConfig": "offload.config",
    "OffloadEngine": "offload.state.session",
    "OffloadError": "offload.errors",
    "Plan": "offload.schedule.plan",
    "StepReport": "offload.telemetry",
    "StorageError": "offload.errors",
    "UnsupportedPlatformError": "offload.errors",
    "apply_delta": "offload.state.delta",
    "deferred_init": "offload.state.deferred",
    "from_pretrained": "offload.state.pretrained",
    "initialize": "offload.state.session",
    "load_config": "offload.config",
    "plan": "offload.state.session",
}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "DeadlineError",
    "DiskFullError",
    "DoesNotFitError",
    "EngineStateError",
    "GuardError",
    "MemoryPressureError",
    "NonFiniteError",
    "OffloadConfig",
    "OffloadEngine",
    "OffloadError",
    "Plan",
    "StepReport",
    "StorageError",
    "UnsupportedPlatformError",
    "__version__",
    "apply_delta",
    "deferred_init",
    "from_pretrained",
    "initialize",
    "load_config",
    "plan",
]

if TYPE_CHECKING:
    from offload.config import OffloadConfig, load_config
    from offload.errors import (
        BudgetError,
        CheckpointError,
        ChecksumError,
        ConfigError,
        DeadlineError,
        DiskFullError,
        DoesNotFitError,
        EngineStateError,
        GuardError,
        MemoryPressureError,
        NonFiniteError,
        OffloadError,
        StorageError,
        UnsupportedPlatformError,
    )
    from offload.schedule.plan import Plan
    from offload.state.deferred import deferred_init
    from offload.state.delta import apply_delta
    from offload.state.pretrained import from_pretrained
    from offload.state.session import OffloadEngine, initialize, plan
    from offload.telemetry import StepReport


def __getattr__(name: str) -> object:
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'offload' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
