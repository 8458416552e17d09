"""A Lightning strategy whose training state lives on tiers; see docs/lightning.md.

    from offload.integrations.lightning import OffloadStrategy

    trainer = Trainer(strategy=OffloadStrategy("offload.toml"))

`lightning` and `pytorch_lightning` are two packages whose classes do not mix. `OffloadStrategy` is
that of the one which is imported already, or else installed, `lightning` first; `strategy_for`
names it. Importing this module registers `strategy="offload"` there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

from offload.errors import OffloadError
from offload.integrations.lightning.precision import EnginePrecision
from offload.integrations.lightning.strategy import EngineStrategy

__all__ = ["OffloadStrategy", "strategy_for"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@functools.cache
def strategy_for(package: str) -> type[Any]:
    """The strategy class for `lightning.pytorch` or for `pytorch_lightning`.

    Raises:
        OffloadError: the package is another, or not installed.
    """
    if package not in PACKAGES:
        raise OffloadError(f"a Lightning package {package!r}", expected=" or ".join(PACKAGES))
    try:
        strategies = importlib.import_module(f"{package}.strategies")
        plugins = importlib.import_module(f"{package}.plugins.precision")
        types = importlib.import_module(f"{package}.utilities.types")
    except ImportError as error:
        raise OffloadError(
            f"{package} cannot be imported: {error}", remedy="pip install 'offload[lightning]'"
        ) from error
    precision = type("OffloadPrecision", (EnginePrecision, plugins.Precision), {})
    made = type(
        "OffloadStrategy",
        (EngineStrategy, strategies.SingleDeviceStrategy),
        {
            "precision_class": precision,
            "schedule_class": types.LRSchedulerConfig,
            "__doc__": EngineStrategy.__doc__,
        },
    )
    registry = strategies.StrategyRegistry
    if EngineStrategy.strategy_name not in registry:
        registry.register(EngineStrategy.strategy_name, made, description="offload's engine")
    return made


def _package() -> str:
    for package in PACKAGES:
        if package in sys.modules:
            return package
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is not None:
            return package
    return PACKAGES[0]


OffloadStrategy: type[Any] = strategy_for(_package())
