"""Import of other programs' checkpoints into an engine.

[Note: import]
What is read, and from where, is the formats' affair: dcp.py, universal.py, weight_files.py. Here it
is compared with the engine, all of it at once; then everything is read for the first time, so that
damage is found while the engine is as it was; then it is read again, a tensor at a time, and
written to where the engine keeps it. A weight becomes the fp32 master, and the compute weight is
rounded from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.errors import CheckpointError, ConfigError
from offload.state.checkpoint_keys import ignored_missing, ignored_unexpected, match
from offload.state.dcp import METADATA_NAME, DcpDirectory, open_dcp
from offload.state.deferred import building, refuse_inside
from offload.state.delta import DELTA_NAME
from offload.state.fitting import (
    Fitting,
    ImportTarget,
    check_values,
    fit,
    known_of,
    moments_of,
)
from offload.state.foreign import Foreign, ForeignTensor
from offload.state.manifest import MANIFEST_NAME
from offload.state.recording import materialized
from offload.state.source import persistent_buffers
from offload.state.universal import open_universal, universal_folder
from offload.state.weight_files import open_files

_ALWAYS_NEW = "random generators, data position and client state"
_SCHEDULE = "the learning rate scheduler and the loss scale"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has brought. `str()` of it is for people.

    Attributes:
        form: the format that was found.
        num_parameters, num_buffers: brought.
        optimizer: moments and step counts have been brought; else they begin at zero.
        global_steps: what the engine's counter is now.
        new: what of the optimizer's state begins at zero, although other state has been brought.
        passed_over: names in the checkpoint that the engine has no use for.
        not_resumed: what begins anew.
    """

    form: str
    num_parameters: int
    num_buffers: int
    optimizer: bool
    global_steps: int
    new: tuple[str, ...]
    passed_over: tuple[str, ...]
    not_resumed: tuple[str, ...]

    def __str__(self) -> str:
        state = (
            f"optimizer state at step {self.global_steps}"
            if self.optimizer
            else "no optimizer state: moments and step counts begin at zero"
        )
        lines = [
            f"imported from {self.form}: {self.num_parameters} parameters, {self.num_buffers} "
            f"buffers, {state}",
            *(f"begins at zero: {what}" for what in self.new),
            *(f"passed over: {name}" for name in self.passed_over),
            *(f"not resumed: {what}" for what in self.not_resumed),
        ]
        return "\n".join(lines)


def import_checkpoint(
    engine: ImportTarget, path: str | Path, *, optimizer: bool | None = None, strict: bool = True
) -> Imported:
    """Take weights, and optimizer state where there is some, from another program's checkpoint.

    `path` is a directory of torch.distributed.checkpoint, a universal checkpoint of DeepSpeed (its
    folder, or the one that has `latest_universal`), or a folder of safetensors as Hugging Face has
    them. No pickle is unpickled. A step that is pending and gradients are given up. The learning
    rates, the scheduler, the loss scale and random generators stay as the engine has them: see
    `Imported.not_resumed`.

    Args:
        engine: of the same model; which parameters are trainable, precision and placement are its
            own.
        path: the checkpoint.
        optimizer: None: take the optimizer's state if there is some. True: it has to be there.
            False: only weights; moments and step counts begin at zero.
        strict: every parameter, persistent buffer and moment has to be there, and nothing else.
            False: moments that are missing begin at zero, buffers stay, and what is in excess is
            passed over.

    Raises:
        CheckpointError: it is no such checkpoint, damaged, does not fit the engine (all that is
            missing, in excess or of another shape is listed), or asks for anything but plain values
            and tensors. The engine is unchanged.
        StorageError: reading failed, and the engine is unchanged; or writing did, and its state is
            void: it refuses every use but another load or import, and `close`.
    """
    refuse_inside("import_checkpoint")
    if engine.composite_names():
        raise CheckpointError(
            f"{engine.composite_names()[0]} is quantized, and {path} would hold it plain",
            remedy="import before quantizing, or into a model that is not quantized",
        )
    with _opened(engine, Path(path)) as foreign:
        if optimizer and not foreign.state:
            raise CheckpointError(
                f"{foreign.path} has no optimizer state for {type(engine.module).__name__}",
                remedy="import without optimizer=True: moments then begin at zero",
            )
        takes_state = bool(foreign.state) if optimizer is None else optimizer
        fitting = fit(engine, foreign, takes_state=takes_state, strict=strict)
        check_values(engine, fitting)
        with engine.replacing_state():
            _write(engine, fitting)
            _set_counters(engine, foreign, fitting)
    return _summary(engine, foreign, fitting, takes_state=takes_state)


@contextlib.contextmanager
def _opened(engine: ImportTarget, path: Path) -> Iterator[Foreign]:
    """What there is at a path, by what the folder has in it.

    Raises:
        CheckpointError: nothing that is known; says what it may be instead.
    """
    if not path.is_dir():
        raise ConfigError(problems=[f"{str(path)!r} is no local folder"])
    universal = universal_folder(path)
    if (path / METADATA_NAME).is_file():
        with DcpDirectory(path) as directory:
            yield open_dcp(directory, known_of(engine))
    elif universal is not None:
        yield open_universal(universal, known_of(engine))
    elif (path / MANIFEST_NAME).is_file() or any(path.glob(f"*/{MANIFEST_NAME}")):
        raise CheckpointError(
            f"{path} is a checkpoint of offload", remedy="load it: engine.load_checkpoint"
        )
    elif (path / DELTA_NAME).is_file():
        raise CheckpointError(f"{path} is a delta", remedy="apply it to its base first")
    else:
        with contextlib.ExitStack() as files:
            yield _weights_of(engine, path, files)


def _weights_of(engine: ImportTarget, path: Path, files: contextlib.ExitStack) -> Foreign:
    """A folder of safetensors; the model's library may rename and convert, as when it loads."""
    stored = open_files(path, files)
    foreign = Foreign(path, "safetensors")
    with torch.random.fork_rng(devices=[]), building(drawing=False):
        found, unexpected = match(engine.module, list(stored), lambda name: stored[name].deferred())
    for name, tensors in found.items():
        foreign.weights[name] = _from_deferred(tensors[-1])
    excess = set(unexpected) - ignored_unexpected(engine.module, unexpected)
    foreign.weights |= {name: _from_deferred(stored[name].deferred()) for name in excess}
    every = [*engine.parameter_names(), *(name for name, _ in persistent_buffers(engine.module))]
    foreign.expected_missing = frozenset(ignored_missing(engine.module, every))
    return foreign


def _from_deferred(tensor: torch.Tensor) -> ForeignTensor:
    def read() -> torch.Tensor:
        return materialized([tensor])[0]

    return ForeignTensor(tensor.dtype, tuple(tensor.shape), read)


def _write(engine: ImportTarget, fitting: Fitting) -> None:
    """Every field of every parameter, and the buffers, a tensor at a time."""
    for name in engine.parameter_names():
        engine.set_state(name, {"weight": fitting.weight(engine, name)})
        for field, shape in moments_of(engine, name).items():
            tensor = fitting.moment(name, field, shape)
            engine.set_state(name, {field: torch.zeros(shape) if tensor is None else tensor})
    with torch.no_grad():
        for name in fitting.buffers:
            buffer = engine.module.get_buffer(name)
            buffer.copy_(fitting.buffer(name, buffer))


def _set_counters(engine: ImportTarget, foreign: Foreign, fitting: Fitting) -> None:
    steps = [fitting.steps.get(name, 0) for name in engine.parameter_names()]
    engine.set_parameter_steps(steps)
    engine.load_scalar_state(fitting.scalars)
    counted = foreign.global_steps if foreign.global_steps is not None else max(steps, default=0)
    engine.global_steps = counted if fitting.steps else 0
    engine.skipped_steps = (foreign.skipped_steps or 0) if fitting.steps else 0
    engine.micro_steps = 0


def _summary(
    engine: ImportTarget, foreign: Foreign, fitting: Fitting, *, takes_state: bool
) -> Imported:
    return Imported(
        form=foreign.form,
        num_parameters=len(fitting.weights),
        num_buffers=len(fitting.buffers),
        optimizer=takes_state,
        global_steps=engine.global_steps,
        new=tuple(fitting.new),
        passed_over=tuple(fitting.passed_over),
        not_resumed=(*foreign.not_resumed, _SCHEDULE, _ALWAYS_NEW),
    )
