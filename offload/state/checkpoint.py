"""Checkpoints: durable, atomic, bit-exact, independent of placement.

Tensors stand per parameter and field (see source.py, [Note: state]); everything else that a step
depends on - counters, the optimizer's groups and scalars, scheduler, loss scale, random generators
- is plain values in the manifest. Saving streams one tensor at a time; loading verifies every
checksum before the first byte of the engine changes. Non-persistent buffers are not part of a
checkpoint, as they are not part of a state dict.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload import __version__
from offload.errors import CheckpointError, DiskFullError
from offload.state import durable, export, folders, manifest, plain, random_state, stored
from offload.state.manifest import FileRecord, Manifest, TensorRecord
from offload.state.moments import Described, Key, as_wanted, tensors_as_wanted
from offload.state.safetensors_stream import (
    DATA_ALIGNMENT_BYTES,
    SafetensorsWriter,
    tensor_nbytes,
)
from offload.state.source import StateSource, persistent_buffers

# Large enough that a file per shard costs nothing, small enough to copy and to check one at a time.
SHARD_BYTES = 2 << 30
# Header bytes to reserve for one tensor when the free space is checked: key, dtype, shape, offsets.
_HEADER_BYTES_PER_TENSOR = 512
# Sections of the config that decide the numbers; the others may differ between save and load.
_NUMERIC_SECTIONS = ("precision", "training", "optimizer", "lr_scheduler")


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor to save: where it comes from and what it is."""

    kind: str
    name: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.field}|{self.name}"

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


def save_checkpoint(
    engine: StateSource,
    directory: str | Path,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write everything that resuming needs to ``directory/tag`` and return that path.

    When it returns, the checkpoint survives power loss; if it raises or the process dies, what was
    there before is intact. `tag` defaults to ``step-00000012``; an existing checkpoint of that tag
    is replaced atomically. `client_state`: plain values (None, bool, int, float, str, lists,
    tuples, dicts).

    Raises:
        CheckpointError: a value is not plain, the tag is no name, or micro-steps are pending;
            nothing was written.
        DiskFullError: the file system has too little room; nothing was written.
        StorageError: a system call failed; nothing is left behind.
    """
    root = Path(directory)
    name = manifest.check_tag(tag if tag is not None else f"step-{engine.global_steps:08d}")
    _check_boundary(engine)
    values = _collect_values(engine, client_state)
    items = list(_items(engine))
    durable.make_folder(root)
    folders.sweep(root)
    _check_room(root, items)
    known, _ = folders.candidates(root, None)
    with folders.pending_folder(root, name) as pending:
        files, tensors = _write_tensors(engine, pending, items)
        content = Manifest(
            tag=name,
            sequence=1 + max((parsed.sequence for _, parsed in known), default=0),
            offload_version=__version__,
            torch_version=str(torch.__version__),
            files=tuple(files),
            tensors=tuple(tensors),
            values=values,
        )
        durable.write_file(pending / manifest.MANIFEST_NAME, manifest.encode(content))
        final = folders.publish(pending, root, name)
    folders.write_hint(root, name)
    return final


def load_checkpoint(
    engine: StateSource, directory: str | Path, tag: str | None = None
) -> dict[str, Any]:
    """Restore the engine and the process's random generators; return the saved client state.

    The client state is {} if none was saved. Without a tag the newest checkpoint that verifies is
    used, and each newer, damaged one is named in a warning. Placement, budgets and bucket sizes
    may differ from the saving run's, and moments may be fp32 in one and 8-bit in the other. A step
    that is pending and gradients are given up, and nothing of the engine's old state is read: it
    may be damaged.

    Raises:
        CheckpointError: none found; the one asked for is damaged (file and tensor are named); or
            it belongs to another model, optimizer or precision. The engine is unchanged.
        StorageError: reading failed, and the engine is unchanged; or writing did, and its state is
            void: it refuses every use but another load and `close`.
    """
    root = Path(directory)
    if tag is not None:
        manifest.check_tag(tag)
    with stored.find(root, tag) as found:
        wanted = {(i.kind, i.name, i.field): (str(i.dtype), i.shape) for i in _items(engine)}
        _check_matches(engine, wanted, found.content, found.folder)
        _warn_of_other_numerics(engine, found.content)
        with engine.replacing_state():
            for record, tensor in tensors_as_wanted(found, wanted):
                _restore_tensor(engine, record, tensor)
            return _restore_values(engine, found.content.values)


def _check_boundary(engine: StateSource) -> None:
    pending = engine.micro_steps % engine.config.training.gradient_accumulation_steps
    if pending:
        raise CheckpointError(
            f"{pending} micro-steps have gradients that no step has used",
            expected="a save between steps",
            remedy="save after a call of step() that returned True",
        )


def _items(engine: StateSource) -> Iterator[_Item]:
    for name in engine.parameter_names():
        for field, (dtype, shape) in engine.state_fields(name).items():
            yield _Item("parameter", name, field, dtype, tuple(shape))
    for name, buffer in persistent_buffers(engine.module):
        yield _Item("buffer", name, "buffer", buffer.dtype, tuple(buffer.shape))


def _check_room(root: Path, items: list[_Item]) -> None:
    tensor_bytes = sum(item.nbytes for item in items)
    # Header and manifest entry of each tensor, and one aligned header per shard.
    other_bytes = 2 * _HEADER_BYTES_PER_TENSOR * len(items)
    other_bytes += DATA_ALIGNMENT_BYTES * (2 + tensor_bytes // SHARD_BYTES)
    free = durable.free_bytes(root)
    if tensor_bytes + other_bytes > free:
        raise DiskFullError(
            path=root,
            needed_bytes=tensor_bytes + other_bytes,
            free_bytes=free,
            what="checkpoint",
            remedy=f"free space on the file system of {root}, or save elsewhere",
        )


def _shards(items: list[_Item]) -> list[list[_Item]]:
    """Cut the list where a shard would exceed `SHARD_BYTES`; a tensor is never cut."""
    shards: list[list[_Item]] = [[]]
    filled_bytes = 0
    for item in items:
        if shards[-1] and filled_bytes + item.nbytes > SHARD_BYTES:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(item)
        filled_bytes += item.nbytes
    return shards


def _write_tensors(
    engine: StateSource, folder: Path, items: list[_Item]
) -> tuple[list[FileRecord], list[TensorRecord]]:
    buffers = dict(persistent_buffers(engine.module))
    files: list[FileRecord] = []
    records: list[TensorRecord] = []
    for index, shard in enumerate(_shards(items)):
        declared = [(item.key, item.dtype, item.shape) for item in shard]
        with SafetensorsWriter(folder / manifest.data_file_name(index), declared) as writer:
            for item in shard:
                if item.kind == "buffer":
                    tensor = buffers[item.name].detach().cpu()
                else:
                    tensor = engine.read_state(item.name, item.field)
                checksum = writer.write(item.key, tensor)
                del tensor  # one tensor at a time, not two
                records.append(
                    TensorRecord(
                        item.kind,
                        item.name,
                        item.field,
                        index,
                        str(item.dtype),
                        item.shape,
                        checksum,
                    )
                )
            writer.finish()
            files.append(FileRecord(writer.nbytes, writer.header_checksum))
    return files, records


def _check_matches(
    engine: StateSource, wanted: Mapping[Key, Described], content: Manifest, folder: Path
) -> None:
    """The checkpoint's tensors and the engine's are the same set, with equal dtypes and shapes.

    Moments may be fp32 in one and 8-bit in the other.
    """
    stored = {(r.kind, r.name, r.field): (r.dtype, r.shape) for r in content.tensors}
    stored = as_wanted(stored, wanted)
    problems = [
        f"{field} of {name!r} is missing" for _, name, field in wanted.keys() - stored.keys()
    ]
    problems += [
        f"{field} of {name!r} is not of this engine"
        for _, name, field in stored.keys() - wanted.keys()
    ]
    problems += [
        f"{key[2]} of {key[1]!r} is {stored[key]} instead of {wanted[key]}"
        for key in wanted.keys() & stored.keys()
        if stored[key] != wanted[key]
    ]
    for name in ("lr_scheduler", "loss_scale"):
        if (content.values.get(name) is None) != (getattr(engine, name) is None):
            owner = "engine" if content.values.get(name) is None else "checkpoint"
            problems.append(f"only the {owner} has a {name}")
    num_stored, num_groups = len(content.values["optimizer_groups"]), len(engine.optimizer_groups())
    if num_stored != num_groups:
        problems.append(f"it has {num_stored} parameter groups instead of {num_groups}")
    if problems:
        shown = sorted(problems)[:8]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise CheckpointError(
            "\n  ".join([f"{folder} was saved by another kind of engine:", *shown, *more]),
            expected="the same model, optimizer and precision, and the same parameters trainable",
            remedy="unfreeze what was trained (requires_grad_(True), add_param_group) before "
            "loading; it may be frozen again afterwards",
        )


def _numerics(engine: StateSource) -> dict[str, Any]:
    dumped = engine.config.model_dump(mode="json")
    return {section: dumped.get(section) for section in _NUMERIC_SECTIONS}


def _warn_of_other_numerics(engine: StateSource, content: Manifest) -> None:
    # A setting that the saving version did not have was what is now its default.
    defaults = type(engine.config)().model_dump(mode="json")
    stored, now = content.values["config"], _numerics(engine)
    then = {
        section: (defaults.get(section) or {}) | (stored.get(section) or {})
        for section in _NUMERIC_SECTIONS
    }
    changed = [
        f"{section}.{key}: {then[section].get(key)!r} then, {value!r} now"
        for section in _NUMERIC_SECTIONS
        for key, value in (now[section] or {}).items()
        if then[section].get(key) != value
    ]
    if changed:
        warnings.warn(
            f"the checkpoint was saved under another config ({'; '.join(changed)}): the run "
            "goes on with other numbers than the first would have had",
            RuntimeWarning,
            stacklevel=3,
        )


def _collect_values(engine: StateSource, client_state: Mapping[str, Any] | None) -> dict[str, Any]:
    scheduler, scale = engine.lr_scheduler, engine.loss_scale
    return {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "micro_steps": engine.micro_steps,
        "parameter_steps": list(engine.parameter_steps()),
        "optimizer_groups": plain.encode(engine.optimizer_groups(), where="optimizer groups"),
        "optimizer_scalars": plain.encode(engine.scalar_state(), where="optimizer scalars"),
        "update": engine.update_choice(),
        "lr_scheduler": scheduler and plain.encode(scheduler.state_dict(), where="lr_scheduler"),
        "loss_scale": scale and plain.encode(scale.state_dict(), where="loss scale"),
        "extra_state": _extra_state(engine),
        "random_state": random_state.capture(),
        "config": _numerics(engine),
        "export": export.description(engine),
        "client_state": plain.encode(dict(client_state or {}), where="client_state"),
    }


def _modules_with_extra_state(engine: StateSource) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in engine.module.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            yield name, module


def _extra_state(engine: StateSource) -> dict[str, Any]:
    return {
        name: plain.encode(module.get_extra_state(), where=f"extra state of {name!r}")
        for name, module in _modules_with_extra_state(engine)
    }


def _restore_tensor(engine: StateSource, record: TensorRecord, tensor: torch.Tensor) -> None:
    if record.kind == "parameter":
        engine.write_state(record.name, record.field, tensor)
        return
    with torch.no_grad():
        engine.module.get_buffer(record.name).copy_(tensor)


def _restore_values(engine: StateSource, values: dict[str, Any]) -> dict[str, Any]:
    engine.global_steps = values["global_steps"]
    engine.skipped_steps = values["skipped_steps"]
    engine.micro_steps = values["micro_steps"]
    engine.set_parameter_steps(values["parameter_steps"])
    engine.load_optimizer_groups(plain.decode(values["optimizer_groups"]))
    engine.load_scalar_state(plain.decode(values["optimizer_scalars"]))
    engine.keep_update_choice(values.get("update"))  # an older checkpoint has none
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(plain.decode(values["lr_scheduler"]))
    if engine.loss_scale is not None:
        engine.loss_scale.load_state_dict(plain.decode(values["loss_scale"]))
    for name, module in _modules_with_extra_state(engine):
        module.set_extra_state(plain.decode(values["extra_state"][name]))
    random_state.restore(values["random_state"])
    client_state: dict[str, Any] = plain.decode(values["client_state"])
    return client_state
