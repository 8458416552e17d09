"""Where the scalars of a run go beside its metrics file: TensorBoard, Weights & Biases, trackio.

Their packages are imported only when they are asked for, and before anything is loaded, so that one
that is absent costs nothing. A sink that fails while training goes on is left out from then on,
with a warning: the metrics file has everything.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from offload.errors import ConfigError
from offload.telemetry import JsonlWriter

# By the name in `run.sinks`: the module that is imported, and the package to install.
_PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
}
_PROJECT = "offload"
_LOGGED = ("step", "eval")  # kinds of metrics that have scalars of a step


class Sink(Protocol):
    """Takes the scalars of a step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keep them."""

    def close(self) -> None:
        """No more will come."""


def require_sinks(names: Sequence[str]) -> None:
    """Import the packages of the sinks.

    Raises:
        ConfigError: one cannot be imported; names all of them, and what to install.
    """
    problems = []
    for name in names:
        module, package = _PACKAGES[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(
                f"run.sinks names {name!r}, whose package cannot be imported ({error}): "
                f"pip install {package}, or remove it there"
            )
    if problems:
        raise ConfigError(problems=problems)


class MetricsWriter:
    """The metrics file of a run and its sinks, which get the same scalars.

    Args:
        path: of the metrics file.
        sinks: names; `require_sinks` has imported their packages.
        config: what the run was told, for those that keep it.
    """

    def __init__(self, path: Path, sinks: Sequence[str], config: Mapping[str, Any]) -> None:
        self._sinks: dict[str, Sink] = {}
        self._file = JsonlWriter(path)
        for name in sinks:
            self._try(name, partial(self._open, name, path.parent, config))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry to the file, and give the scalars of a step to every sink."""
        self._file.write(entry)
        if entry["kind"] not in _LOGGED:
            return
        found = dict(scalars(entry))
        step = int(found.pop("step"))
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.log, step, found))

    def close(self) -> None:
        """Close all of them."""
        self._file.close()
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        module = importlib.import_module(_PACKAGES[name][0])
        if name == "tensorboard":
            self._sinks[name] = _TensorBoard(module, folder)
        else:
            self._sinks[name] = _Tracker(module, name, folder, config)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._sinks.pop(name, None)
            warnings.warn(
                f"{name} gets no more metrics of this run: {error!r}; the metrics file has them",
                RuntimeWarning,
                stacklevel=3,
            )


def scalars(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an entry of the metrics file, by their path: ``report/lanes/cpu/bytes``."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """A run of wandb, or of trackio, which has the same calls."""

    def __init__(self, module: Any, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        place = {"dir": str(folder)} if name == "wandb" else {}
        module.init(project=_PROJECT, name=folder.name, config=dict(config), **place)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._module.log(dict(scalars), step=step)

    def close(self) -> None:
        self._module.finish()
