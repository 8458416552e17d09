"""Checkpoints: durable, atomic, bit-exact, independent of placement.

Tensors are pieces of blocks (see [Note: manifest body]); everything else that a step depends on -
counters, the optimizer's groups and scalars, scheduler, loss scale, random generators - is plain
values in the manifest. Loading verifies every checksum before a byte counts. Non-persistent buffers
are not part of a checkpoint, as they are not part of a state dict.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.config import KEPT_BY_ITSELF
from offload.errors import CheckpointError
from offload.state import export, manifest, plain, random_state, stored
from offload.state.block_loading import load_blocks, shared_blocks
from offload.state.manifest import Manifest, TensorRecord
from offload.state.moments import Described, Key, as_wanted, tensors_as_wanted
from offload.state.saver import Retention, Saver
from offload.state.saving import Request
from offload.state.source import StateSource, persistent_buffers
from offload.state.stored import StoredCheckpoint
from offload.tiers.uninterrupted import uninterrupted

# Sections of the config that decide the numbers; the others may differ between save and load.
_NUMERIC_SECTIONS = ("precision", "training", "optimizer", "lr_scheduler")


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor that a checkpoint of the engine has, and what it is."""

    kind: str
    name: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def save_checkpoint(
    engine: StateSource,
    saver: Saver,
    directory: str | Path,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    *,
    portable: bool | None = None,
    by_itself: bool = False,
) -> Path:
    """Save everything that resuming needs in ``directory/tag`` and return that path.

    With `checkpoint.asynchronous`, the default, the state is safe from what comes later when this
    returns, and durable when `Saver.wait` has returned. If it fails or the process dies, what was
    there before is intact.

    State on nvme is not copied if it is on the file system of `directory`: the checkpoint then
    refers to the extents that it is in, and later steps write to others.

    Args:
        engine: whose state.
        saver: the engine's.
        directory: is made if it is missing.
        tag: defaults to ``step-00000012``; an existing checkpoint of that tag is replaced.
        client_state: plain values (None, bool, int, float, str, lists, tuples, dicts).
        portable: copy everything; None: `checkpoint.portable`.
        by_itself: the engine saves, and nobody has asked.

    Raises:
        CheckpointError: a value is not plain, or the tag is no name; nothing was written.
        DiskFullError: a file system has too little room; nothing was written.
        BudgetError: `tiers.nvme.capacity` has none for the extents of later steps.
        StorageError: a system call failed; nothing is left behind.
    """
    root = Path(directory).absolute()
    config = engine.config.checkpoint
    name = manifest.check_tag(tag if tag is not None else f"step-{engine.global_steps:08d}")
    if saver.is_busy and config.when_busy == "skip":
        return saver.under_way or root / name
    saver.wait()
    origin = "tag" if tag is not None else "engine" if by_itself else "call"
    values = {**_collect_values(engine, client_state), "origin": origin}
    portable = config.portable if portable is None else portable
    retention = _retention(engine, by_itself=by_itself)
    with uninterrupted():  # else the barrier might stay closed
        snapshot = engine.snapshot()
        try:
            buffers = persistent_buffers(engine.module)
            copies = {
                ("buffer", name, "buffer"): buffer.detach().cpu().clone()
                for name, buffer in buffers
            }
            if not portable:
                num_versions = saver.num_linked(root, retention)
                snapshot.reserve_beside_pins(saver.device_of(root), num_versions)
            request = Request(
                root=root,
                tag=name,
                sequence=saver.next_sequence(root),
                values=values,
                copies={**snapshot.copies, **copies},
                portable=portable,
            )
            return saver.save(snapshot, request, retention, asynchronous=config.asynchronous)
        except BaseException:
            snapshot.end_capture()
            raise


def _retention(engine: StateSource, *, by_itself: bool) -> Retention:
    keep_last = engine.config.checkpoint.keep_last
    if keep_last == "auto":
        return Retention(("engine",), KEPT_BY_ITSELF) if by_itself else Retention()
    return Retention(("engine", "call"), keep_last)


def load_checkpoint(
    engine: StateSource, directory: str | Path, tag: str | None = None
) -> dict[str, Any]:
    """Restore the engine and the process's random generators; return the saved client state.

    The client state is {} if none was saved. Without a tag the newest checkpoint that verifies is
    used, and each newer, damaged one is named in a warning. Placement, budgets and bucket sizes
    may differ from the saving run's, and moments may be fp32 in one and 8-bit in the other. A step
    that is pending and gradients are given up, and nothing of the engine's old state is read: it
    may be damaged. Gradients that no step had used when the checkpoint was saved come back.

    All of a checkpoint is verified before the first byte of an engine that has been trained
    changes. One that has not is filled as the bytes come, each block verified before it counts.

    Raises:
        CheckpointError: none found; the one asked for is damaged (file and tensor are named); or
            it belongs to another model, optimizer or precision. The engine is unchanged, but for a
            damaged checkpoint and an engine without training: then its state is void.
        StorageError: reading failed, as above; or writing did, and the engine's state is void: it
            refuses every use but another load and `close`.
    """
    root = Path(directory)
    if tag is not None:
        manifest.check_tag(tag)
    is_trained = bool(engine.micro_steps or engine.global_steps or engine.skipped_steps)

    def use(found: StoredCheckpoint) -> dict[str, Any]:
        wanted = {(i.kind, i.name, i.field): (str(i.dtype), i.shape) for i in _items(engine)}
        _check_matches(engine, wanted, found.content, found.folder)
        if is_trained:
            found.verify()
        _warn_of_other_numerics(engine, found.content)
        with engine.replacing_state():
            _restore_tensors(engine, found, wanted)
            client_state = _restore_values(engine, found.content.values)
            _restore_gradients(engine, found)
            return client_state

    deadline_seconds = engine.config.io.deadline_seconds
    return stored.first_whole(root, tag, use, deadline_seconds=deadline_seconds)


def _restore_tensors(
    engine: StateSource, found: StoredCheckpoint, wanted: Mapping[Key, Described]
) -> None:
    shared = shared_blocks(engine.stored_tensors(), engine.block_nbytes, found.content)
    if shared is None:
        tensors = tensors_as_wanted(found, wanted)
    else:
        numbers, others = shared
        load_blocks(engine, found, numbers)
        engine.end_replacing()
        tensors = ((record, found.read(record)) for record in others)
    with contextlib.closing(tensors):
        while True:
            with found.reading():
                following = next(tensors, None)
            if following is None:
                return
            _restore_tensor(engine, *following)


def _restore_gradients(engine: StateSource, found: StoredCheckpoint) -> None:
    for record in found.content.tensors:
        if record.kind == "gradient" and record.field == "gradient":
            with found.reading():
                gradient = found.read(record)
                sums = found.read(found.content.find("gradient", record.name, "sums"))
            engine.write_gradient(record.name, gradient, sums)


def _items(engine: StateSource) -> Iterator[_Item]:
    for name in engine.parameter_names():
        for field, (dtype, shape) in engine.state_fields(name).items():
            yield _Item("parameter", name, field, dtype, tuple(shape))
    for name, buffer in persistent_buffers(engine.module):
        yield _Item("buffer", name, "buffer", buffer.dtype, tuple(buffer.shape))


def _check_matches(
    engine: StateSource, wanted: Mapping[Key, Described], content: Manifest, folder: Path
) -> None:
    """The checkpoint's tensors and the engine's are the same set, with equal dtypes and shapes.

    Moments may be fp32 in one and 8-bit in the other.
    """
    stored = {
        (r.kind, r.name, r.field): (r.dtype, r.shape)
        for r in content.tensors
        if r.kind != "gradient"
    }
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
        "optimizer_groups": plain.encode(engine.optimizer_groups(), where="optimizer groups"),
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
