"""What activations take of the tiers, as far as it is known before the first step.

How many bytes a step saves is known only when it has run. Planned is therefore the *room*: a share
of the host budget, leased at the start, through which everything goes that leaves the device. On
NVMe extents are allocated in the first step, within the capacity.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from offload.config import HOST_SHARE, OffloadConfig, available_host_bytes
from offload.engine.activations.copies import Lanes
from offload.engine.activations.store import ActivationStore
from offload.partition.layout import BLOCK_ALIGNMENT_BYTES, round_up
from offload.schedule.footprint import Machine
from offload.schedule.plan import Plan
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.nvme import NvmeStore
from offload.tiers.record_pool import RecordPool

_MIN_BYTES = 1 << 20
_LEAST_HOST_SHARE = 1 / 8
_LEAST_HOST_BYTES = 64 << 20
_MOST_WAY_BYTES = 256 << 20  # of nvme activations on their way through the host
_DEVICE_SHARE = 0.5  # of what the device budget leaves free; the rest is for what is not saved
_CPU_DEVICE_SHARE = 0.5  # the same, of what the host budget leaves of host memory
_PREFETCH_DEPTH = 3


def leaves_device(config: OffloadConfig, machine: Machine) -> bool:
    """Whether activations may leave the device at all.

    `auto` without an accelerator and without nvme moves nothing: the device is host memory.
    """
    home = config.placement.activations
    if home == "auto":
        return not machine.host_addressable or bool(config.tiers.nvme.paths)
    return home != "device"


def reserved_host_bytes(config: OffloadConfig, machine: Machine, known: Plan | None = None) -> int:
    """The host room that other state must leave: what is configured, or for `auto` a least one.

    Beside a plan that is `known` already, it is what that has.
    """
    if known is not None:
        return known.bytes["host"]["activations"]
    if not leaves_device(config, machine):
        return 0
    asked = config.activations.host_memory
    least = min(int(machine.host_bytes * _LEAST_HOST_SHARE), _LEAST_HOST_BYTES)
    return round_up(least if asked == "auto" else asked, BLOCK_ALIGNMENT_BYTES)


def with_activations(
    planned: Plan, reserved_bytes: int, config: OffloadConfig, machine: Machine, *, grows: bool
) -> Plan:
    """Count the host room; `auto` takes what the budget and the machine have left beside it.

    `planned` is for a host budget without `reserved_bytes`. With `grows` False the room stays.
    """
    if not reserved_bytes:
        return planned
    room_bytes = reserved_bytes
    if grows and config.activations.host_memory == "auto" and planned.fits:
        room_bytes += _left_bytes(planned, reserved_bytes, config, machine)

    def with_host(amounts: dict[str, int], nbytes: int) -> dict[str, int]:
        return {**amounts, "host": amounts["host"] + nbytes}

    beside = f"; beside that, activations.host_memory is {reserved_bytes} bytes"
    shortfalls = tuple(
        replace(
            short,
            need_bytes=short.need_bytes + reserved_bytes,
            have_bytes=short.have_bytes + reserved_bytes,
            remedy=short.remedy + beside,
        )
        if short.tier == "host"
        else short
        for short in planned.shortfalls
    )
    homes = {**planned.bytes, "host": {**planned.bytes["host"], "activations": room_bytes}}
    return replace(
        planned,
        bytes=homes,
        peak_bytes=with_host(planned.peak_bytes, room_bytes),
        need_bytes=with_host(planned.need_bytes, reserved_bytes),
        budget_bytes=with_host(planned.budget_bytes, reserved_bytes),
        shortfalls=shortfalls,
    )


def _left_bytes(planned: Plan, reserved_bytes: int, config: OffloadConfig, machine: Machine) -> int:
    left = planned.budget_bytes["host"] - planned.peak_bytes["host"]
    held = planned.peak_bytes["host"] + reserved_bytes
    if machine.host_addressable:
        held += planned.peak_bytes["device"]
    left = min(left, int(available_host_bytes() * HOST_SHARE) - held)
    if config.placement.activations == "nvme":
        left = min(left, _MOST_WAY_BYTES - reserved_bytes)
    return max(left, 0) // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES


def open_activations(
    config: OffloadConfig,
    plan: Plan,
    host: HostArena,
    device: DeviceTier,
    nvme: NvmeStore | None,
) -> ActivationStore | None:
    """The store of what leaves the device, with its host room; None if nothing does.

    Raises:
        BudgetError: the arena is smaller than the plan says.
    """
    room_bytes = plan.bytes["host"]["activations"]
    if not room_bytes:
        return None
    home, depth = config.placement.activations, config.overlap.prefetch_depth
    min_bytes = config.activations.min_bytes
    return ActivationStore(
        Lanes(
            device,
            nvme,
            None if nvme is None else RecordPool(nvme),
            config.io.deadline_seconds,
        ),
        HostShare(host, room_bytes, "activations"),
        writes_early=home == "nvme",
        min_bytes=_MIN_BYTES if min_bytes == "auto" else min_bytes,
        device_bytes=_kept_bytes(config, device) if home == "auto" else 0,
        prefetch_depth=(_PREFETCH_DEPTH if depth == "auto" else depth)
        if config.overlap.prefetch
        else 0,
    )


def _kept_bytes(config: OffloadConfig, device: DeviceTier) -> int:
    """What may stay on the device with `auto`."""
    asked = config.activations.device_memory
    if asked != "auto":
        return asked
    if device.host_addressable:
        return int(available_host_bytes() * (1 - HOST_SHARE) * _CPU_DEVICE_SHARE)
    free_bytes = torch.cuda.mem_get_info(device.device)[0]
    free_bytes -= device.budget_bytes - device.used_bytes
    return max(int(free_bytes * _DEVICE_SHARE), 0)
