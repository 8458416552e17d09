"""`zero_optimization` and `aio`: where state lives, and how files are read."""

from __future__ import annotations

from typing import Any

from offload.integrations.deepspeed.reading import Reading

ZERO = "zero_optimization"
_BLOCK_MULTIPLE = 4096
_CLASSES = {"offload_param": "weights", "offload_optimizer": "optimizer"}
_HOMES = {"none": "device", "cpu": "host", "nvme": "nvme"}


def read_zero(reading: Reading, plain: dict[str, Any]) -> int:
    """Set `[placement]` and `[tiers.nvme]`; returns the ZeRO stage."""
    if isinstance(reading.raw(ZERO), bool):
        stage = int(reading.boolean(ZERO))
        reading.note(ZERO, "translated", f"stage {stage}")
    else:
        found = reading.integer(f"{ZERO}.stage", 0)
        assert found is not None
        stage = found
    if stage not in range(4):
        reading.problems.append(f"{ZERO}.stage = {stage} must be 0, 1, 2 or 3")
    reading.note(
        f"{ZERO}.stage",
        "translated",
        "there is one process, which has every partition; the offload_* sections say where",
    )
    weights = _home(reading, "offload_param", stage, least=3)
    optimizer = _home(reading, "offload_optimizer", stage, least=1)
    gradients = {"nvme": "auto"}.get(optimizer, optimizer)
    plain.setdefault("placement", {}).update(
        weights=weights, gradients=gradients, optimizer=optimizer
    )
    _read_paths(reading, plain, (("offload_param", weights), ("offload_optimizer", optimizer)))
    _read_ratio(reading, plain, optimizer)
    _read_prefetch(reading, plain)
    return stage


def read_aio(reading: Reading, plain: dict[str, Any]) -> None:
    """Set `[io]`."""
    io: dict[str, Any] = {}
    asked = reading.integer("aio.block_size")
    if asked is not None:
        block = max(_BLOCK_MULTIPLE, asked // _BLOCK_MULTIPLE * _BLOCK_MULTIPLE)
        io["block_bytes"] = block
        reading.note(
            "aio.block_size",
            "translated" if block == asked else "approximated",
            f"io.block_bytes = {block}" + ("" if block == asked else ", a multiple of 4096"),
        )
    depth = reading.integer("aio.queue_depth")
    if depth is not None:
        io["queue_depth"] = depth
        reading.note("aio.queue_depth", "translated", "io.queue_depth")
    for key in ("aio.thread_count", "aio.intra_op_parallelism"):
        threads = reading.integer(key)
        if threads is not None:
            io["threads"] = threads
            reading.note(key, "approximated", "io.threads, of the backends that have threads")
    if io:
        plain["io"] = io


def _home(reading: Reading, section: str, stage: int, *, least: int) -> str:
    """The tier that an offload section asks for."""
    name = f"{ZERO}.{section}"
    old_keys = (
        (f"{ZERO}.cpu_offload",)
        if section == "offload_optimizer"
        else (f"{ZERO}.cpu_offload_param", f"{ZERO}.cpu_offload_params")
    )
    device = reading.text(f"{name}.device", "none")
    for old in old_keys:
        if reading.boolean(old) and not reading.has(f"{name}.device"):
            device = "cpu"
        reading.note(old, "translated", f"as {section} with device = cpu")
    if device not in _HOMES:
        reading.problems.append(f"{name}.device = {device!r} must be cpu, nvme or none")
        return "device"
    if stage < least and device != "none":
        reading.note(
            f"{name}.device",
            "ignored",
            f"DeepSpeed does this from stage {least} on: the state stays on the device",
        )
        return "device"
    home = _HOMES[device]
    text = f"placement.{_CLASSES[section]} = {home!r}"
    if section == "offload_optimizer" and device == "nvme" and stage < 3:
        text += "; at this stage DeepSpeed would have used the CPU"
        reading.note(f"{name}.device", "approximated", text)
    reading.note(f"{name}.device", "translated", text)
    reading.note(name, "ignored", "an empty section")
    return home


def _read_paths(
    reading: Reading, plain: dict[str, Any], homes: tuple[tuple[str, str], ...]
) -> None:
    paths: list[str] = []
    for section, home in homes:
        key = f"{ZERO}.{section}.nvme_path"
        if home != "nvme":
            reading.note(key, "ignored", "the section's device is not nvme")
            continue
        path = reading.text(key)
        if not path:
            reading.problems.append(
                f"{ZERO}.{section}.device = 'nvme' needs {key}: a directory on the disk"
            )
            plain["placement"][_CLASSES[section]] = "auto"  # one problem is enough
        elif path not in paths:
            paths.append(path)
    if not paths:
        return
    plain.setdefault("tiers", {})["nvme"] = {"paths": paths}
    for section, _ in homes:
        key = f"{ZERO}.{section}.nvme_path"
        if len(paths) == 1:
            reading.note(key, "translated", "tiers.nvme.paths")
        else:
            reading.note(
                key, "approximated", "tiers.nvme.paths: all state is striped over both paths"
            )


def _read_ratio(reading: Reading, plain: dict[str, Any], home: str) -> None:
    key = f"{ZERO}.offload_optimizer.ratio"
    ratio = reading.number(key)
    if ratio is None:
        return
    if not 0 <= ratio <= 1:
        reading.problems.append(f"{key} = {ratio} must be 0 to 1")
    elif home == "device":
        reading.note(key, "ignored", "the optimizer is on the device")
    elif ratio == 1:
        reading.note(
            key, "approximated", "placement.update = 'auto': a share that is measured, same bits"
        )
    else:
        plain["placement"]["update"] = round(1 - ratio, 6)
        reading.note(
            key,
            "approximated",
            "placement.update: the rest is updated on the accelerator, its state stays away",
        )


def _read_prefetch(reading: Reading, plain: dict[str, Any]) -> None:
    key = f"{ZERO}.stage3_prefetch_bucket_size"
    if reading.raw(key) != "auto" and reading.integer(key) == 0:
        plain["overlap"] = {"prefetch": False}
        reading.note(key, "translated", "overlap.prefetch = false")
