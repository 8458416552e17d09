"""What a step must cost: seconds of each lane, and the bound they set.

[Note: Cost model]
The lanes work at the same time, so a step takes at least as long as the busiest of them:

  h2d, d2h              bytes / lane speed; the two directions do not slow each other
  nvme_read, nvme_write bytes / lane speed; together at least (read + written) / mixed speed:
                        the two share the disk
  cpu                   bytes of state that the update touches, each counted once / kernels' speed
  compute               FLOPs / achieved FLOP/s; 2 a weight and token in forward, 2 more for the
                        gradient of the input, 2 more for that of the weight, 2 more to recompute

Without an accelerator compute and update share the cores, and their seconds add up.
Source: MECHANISMS.md, "Limits".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.telemetry import LaneReport

if TYPE_CHECKING:
    from collections.abc import Mapping

FORWARD_FLOPS = 2
INPUT_GRADIENT_FLOPS = 2
WEIGHT_GRADIENT_FLOPS = 2

# What a measurement of the lanes, or a step, shows of `LaneSpeeds`.
SHOWN = ("h2d", "d2h", "nvme_read", "nvme_write", "nvme_mixed", "cpu")


@dataclass(frozen=True, slots=True)
class LaneSpeeds:
    """Speeds in bytes/s, and FLOP/s.

    The defaults are low for any machine made in the last years, so that a plan made without
    measurements promises too little rather than too much: PCIe 3.0 x16, one consumer NVMe disk
    past its write cache, two channels of DDR4 (of which an update takes about two bytes for each
    of its state), and a small accelerator in half precision.
    """

    h2d: float = 10e9
    d2h: float = 10e9
    nvme_read: float = 2.0e9
    nvme_write: float = 1.0e9
    nvme_mixed: float = 1.2e9
    cpu: float = 8e9
    flops: float = 10e12


def compute_flops(
    *, tokens: int, trainable_numel: int, frozen_numel: int = 0, recompute: bool = False
) -> int:
    """FLOPs of the matrix products of forward and backward over `tokens` tokens."""
    frozen = FORWARD_FLOPS + INPUT_GRADIENT_FLOPS + (FORWARD_FLOPS if recompute else 0)
    trainable = frozen + WEIGHT_GRADIENT_FLOPS
    return tokens * (trainable * trainable_numel + frozen * frozen_numel)


def lane_seconds(
    lane_bytes: Mapping[str, int], speeds: LaneSpeeds, *, compute_seconds: float = 0.0
) -> dict[str, float]:
    """The least seconds each lane is busy.

    Args:
        lane_bytes: by lane: h2d, d2h, nvme_read, nvme_write, cpu (state bytes); absent is 0.
        speeds: measured or default.
        compute_seconds: of forward and backward.
    """
    read_bytes = lane_bytes.get("nvme_read", 0)
    written_bytes = lane_bytes.get("nvme_write", 0)
    seconds = {
        "h2d": lane_bytes.get("h2d", 0) / speeds.h2d,
        "d2h": lane_bytes.get("d2h", 0) / speeds.d2h,
        "nvme_read": read_bytes / speeds.nvme_read,
        "nvme_write": written_bytes / speeds.nvme_write,
        "cpu": lane_bytes.get("cpu", 0) / speeds.cpu,
        "compute": compute_seconds,
    }
    if read_bytes and written_bytes:
        busier = max("nvme_read", "nvme_write", key=seconds.__getitem__)
        mixed = (read_bytes + written_bytes) / speeds.nvme_mixed
        seconds[busier] = max(seconds[busier], mixed)
    return seconds


def bound_seconds(
    lane_bytes: Mapping[str, int],
    speeds: LaneSpeeds,
    compute_seconds: float = 0.0,
    *,
    shared_cores: bool = False,
) -> tuple[float, str]:
    """The least time that the work can take, and the lane that sets it.

    Args:
        lane_bytes: as of `lane_seconds`.
        speeds: measured or default.
        compute_seconds: of forward and backward.
        shared_cores: compute and update run on the same cores, so their seconds add up.
    """
    seconds = lane_seconds(lane_bytes, speeds, compute_seconds=compute_seconds)
    if shared_cores:
        busier = max("cpu", "compute", key=seconds.__getitem__)
        seconds[busier] = seconds["cpu"] + seconds["compute"]
    lane = max(seconds, key=seconds.__getitem__)
    return seconds[lane], lane


def bound_of_step(
    lanes: Mapping[str, LaneReport], shown: Mapping[str, float], *, shared_cores: bool
) -> tuple[float, str]:
    """`bound_seconds` of what the lanes of a step did.

    Args:
        lanes: of the step; compute took the time that it took.
        shown: bytes/s by lane, `nvme_mixed` included; what has not been measured is as `LaneSpeeds`
            has it.
        shared_cores: as of `bound_seconds`.
    """
    speeds = LaneSpeeds(**{name: shown[name] for name in SHOWN if name in shown})
    return bound_seconds(
        {name: lane.bytes for name, lane in lanes.items()},
        speeds,
        lanes.get("compute", LaneReport()).busy_seconds,
        shared_cores=shared_cores,
    )
