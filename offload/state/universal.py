"""Universal checkpoints of DeepSpeed (ds_to_universal), read without DeepSpeed and without pickle.

[Note: universal checkpoint]
    zero/<name>/fp32.pt                  the fp32 master, or a frozen weight or buffer in fp32
    zero/<name>/exp_avg.pt, ...          moments; step.pt, of ZeRO 1 and 2: updates taken
    zero/optimizer_state.pt              what ranks share; of ZeRO 3 the step
    *_model_states.pt                    counters, buffers in their own dtype, and frozen weights,
                                         of ZeRO 3 flat and cut over the ranks
A file holds a tensor, or {"param": tensor, ...} with notes about tensor parallelism. Of ZeRO 3 it
is flat. The weights of a tied parameter's other names are rounded to the compute dtype.
Model states hold what the user gave `save_checkpoint`, too: where that is refused (see pickled.py)
they are passed over, and what is then missing is missing.
Source: deepspeed/checkpoint/ds_to_universal.py, deepspeed/runtime/engine.py (0.19).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.state import durable
from offload.state.foreign import OPTIMIZER_GROUPS, Foreign, ForeignTensor, Known, count_of
from offload.state.pickled import Constructor, class_names
from offload.state.safetensors_stream import MAX_TENSORS
from offload.state.stored_zip import ReadOnlyFile
from offload.state.torch_archive import ArchivedTensor, TorchArchive

ZERO_NAME = "zero"
LATEST_NAME = "latest_universal"
_MAX_LATEST_BYTES = 4096
_WEIGHT = "fp32"
_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]{1,9})_mp_rank_00_model_states\.pt")
_FIRST_RANK = "mp_rank_00_model_states.pt"


def _same(value: Any) -> Any:
    return value


_NAMES = {
    **class_names("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "DynamicLossScaler"),
    **class_names("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): Constructor(_same),
}


def universal_folder(path: Path) -> Path | None:
    """The folder of a universal checkpoint, at `path` or the newest in it; None if there is none.

    Raises:
        CheckpointError: `latest_universal` names no folder beside it.
        StorageError: it cannot be read.
    """
    if (path / ZERO_NAME).is_dir():
        return path
    if not (path / LATEST_NAME).is_file():
        return None
    data = durable.read_small_file(path / LATEST_NAME, limit_bytes=_MAX_LATEST_BYTES)
    name = data.decode("utf-8", errors="replace").strip()
    if Path(name).name != name or not (path / name / ZERO_NAME).is_dir():
        raise CheckpointError(
            f"{path / LATEST_NAME} names {name[:100]!r}: no universal checkpoint is beside it",
            remedy="name the folder that ds_to_universal wrote",
        )
    return path / name


def open_universal(folder: Path, known: Known) -> Foreign:
    """What a universal checkpoint has for the engine. No file stays open.

    Raises:
        CheckpointError: a file is damaged, or asks for anything but plain values and tensors.
        StorageError: one cannot be read.
    """
    foreign = Foreign(folder, "DeepSpeed universal checkpoint")
    foreign.not_resumed = [OPTIMIZER_GROUPS]
    states = _model_states(folder, foreign)
    for name in _folders(folder / ZERO_NAME):
        _add_parameter(foreign, folder / ZERO_NAME / name, name)
    if states:
        _add_model_states(foreign, states, known)
    if foreign.state and not any("step" in fields for fields in foreign.state.values()):
        step = _shared_step(folder, foreign)
        for fields in foreign.state.values() if step is not None else ():
            fields["step"] = step
    return foreign


def _folders(root: Path) -> list[str]:
    with (
        durable.storage_errors("list", root, what="universal checkpoint"),
        os.scandir(root) as found,
    ):
        names = sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"{root} has {len(names)} folders, more than the limit")
    return names


def _add_parameter(foreign: Foreign, folder: Path, name: str) -> None:
    """Describe the files of one parameter or buffer."""
    with (
        durable.storage_errors("list", folder, what=name),
        os.scandir(folder) as found,
    ):
        fields = sorted(e.name.removesuffix(".pt") for e in found if e.name.endswith(".pt"))
    for field in fields:
        path = folder / f"{field}.pt"
        with ReadOnlyFile(path) as file:
            archive = TorchArchive(file, names=_NAMES)
            if field == "step":
                step = count_of(archive.value, archive, str(path))
                foreign.state.setdefault(name, {})[field] = step
                continue
            tensor = _param(archive.value, path)
            read = partial(_read, path)
            described = ForeignTensor(
                tensor.dtype, tensor.shape, read, may_be_flat=True, may_be_float=True
            )
        if field == _WEIGHT:
            foreign.weights[name] = described
        else:
            foreign.state.setdefault(name, {})[field] = described


def _param(value: Any, path: Path) -> ArchivedTensor:
    tensor = value.get("param") if type(value) is dict else value
    if not isinstance(tensor, ArchivedTensor):
        raise CheckpointError(f"{path}: it holds no tensor, and no dict with one at 'param'")
    return tensor


def _read(path: Path) -> torch.Tensor:
    with ReadOnlyFile(path) as file:
        archive = TorchArchive(file, names=_NAMES)
        return archive.read(_param(archive.value, path))


# -- what stands beside zero/ ----------------------------------------------------------------------


def _model_states(folder: Path, foreign: Foreign) -> list[tuple[Path, dict[Any, Any]]]:
    """The model states of each rank in order; [] if there are none, or not readable ones."""
    ranks = {}
    for path in folder.glob("*_model_states.pt"):
        match = _RANK.fullmatch(path.name)
        if match is not None or path.name == _FIRST_RANK:
            ranks[0 if match is None else int(match[1])] = path
    found = []
    for _, path in sorted(ranks.items()):
        try:
            with ReadOnlyFile(path) as file:
                value = TorchArchive(file, names=_NAMES).value
        except CheckpointError as error:
            foreign.not_resumed.append(f"counters, buffers and frozen weights of {error}")
            return []
        if type(value) is dict:
            found.append((path, value))
    return found


def _add_model_states(
    foreign: Foreign, states: Sequence[tuple[Path, dict[Any, Any]]], known: Known
) -> None:
    """Counters, buffers in their own dtype, and frozen weights that are not in zero/."""
    path, first = states[0]
    steps, skipped = first.get("global_steps"), first.get("skipped_steps")
    if type(steps) is int and type(skipped) is int and 0 <= skipped <= steps:
        foreign.global_steps, foreign.skipped_steps = steps - skipped, skipped
    buffers, module = first.get("buffer_names"), first.get("module")
    for name in buffers if type(buffers) is list else ():
        tensor = module.get(name) if type(module) is dict and type(name) is str else None
        if isinstance(tensor, ArchivedTensor) and name in known.names:
            read = partial(_read_state, path, ("module", name))
            foreign.weights[name] = ForeignTensor(tensor.dtype, tensor.shape, read)
    shapes = first.get("frozen_param_shapes")
    for name, shape in shapes.items() if type(shapes) is dict else ():
        if type(name) is str and type(shape) is tuple and name not in foreign.weights:
            _add_frozen(foreign, states, name, shape)


def _add_frozen(
    foreign: Foreign,
    states: Sequence[tuple[Path, dict[Any, Any]]],
    name: str,
    shape: tuple[int, ...],
) -> None:
    pieces = []
    for path, state in states:
        fragments = state.get("frozen_param_fragments")
        piece = fragments.get(name) if type(fragments) is dict else None
        if not isinstance(piece, ArchivedTensor):
            return
        pieces.append((path, piece))
    numel = prod(shape)
    if sum(piece.numel for _, piece in pieces) >= numel:
        read = partial(_read_frozen, [path for path, _ in pieces], name, shape)
        foreign.weights[name] = ForeignTensor(pieces[0][1].dtype, shape, read)


def _read_state(path: Path, keys: tuple[str, str]) -> torch.Tensor:
    with ReadOnlyFile(path) as file:
        archive = TorchArchive(file, names=_NAMES)
        return archive.read(archive.value[keys[0]][keys[1]])


def _read_frozen(paths: Sequence[Path], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    flat = [_read_state(path, ("frozen_param_fragments", name)).flatten() for path in paths]
    return torch.cat(flat)[: prod(shape)].view(shape)


def _shared_step(folder: Path, foreign: Foreign) -> int | None:
    """The step of ZeRO 3, which all parameters share; None if nothing says it."""
    path = folder / ZERO_NAME / "optimizer_state.pt"
    if path.is_file():
        try:
            with ReadOnlyFile(path) as file:
                archive = TorchArchive(file, names=_NAMES)
                value = archive.value["optimizer_state_dict"]["state"][0]["step"]
                return count_of(value, archive, str(path))
        except (CheckpointError, KeyError, TypeError, IndexError):
            pass  # another optimizer's, or with something of the user's: the counters say it, too
    return foreign.global_steps
