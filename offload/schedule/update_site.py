"""Which buckets the CPU updates and which the device; and the device memory that this takes. Pure.

[Note: Update site]
The *site* of a bucket's update is the CPU or the device. On the CPU, state crosses DRAM: with AdamW
in bf16 28 bytes a parameter. On the device it crosses the link instead, 14 bytes in and 12 out, and
the rule itself costs next to nothing. So a host with few cores is faster with the device's help,
and fastest when both work at once (Deep Optimizer States, Maurya et al. 2410.21316):

    cpu        state bytes / rate of the kernels, of the buckets at the CPU
    device     state bytes / rate of the rule,    of the buckets at the device
    h2d, d2h   what is not where it is updated, on its way there and back

The lanes work at the same time, so the update takes as long as the busiest of them. State whose
home is the device does not travel at all when it is updated there; so those buckets come first.
The others follow spread evenly over the model, so that both sites are busy all the time. Buckets of
many small parameters come last: the device is started once for each piece, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.partition.layout import BLOCK_ALIGNMENT_BYTES, round_up, segments
from offload.schedule.placement import spread_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from offload.partition.layout import Bucket, Chunk
    from offload.schedule.footprint import BlockBytes

# Chunks that are on the device at once: one arrives, one is updated, one leaves.
NUM_SLOTS = 3
# `auto` gives the update at most this share of the device's budget.
MAX_SCRATCH_SHARE = 1 / 8
# State bytes a piece for which a start of the device's kernels is worth its while.
MIN_PIECE_BYTES = 1 << 20
# Elements that are computed at once: enough to hide the launches, little enough to hold.
PIECE_NUMEL = 1 << 20

_PATTERN_BYTES = 4


@dataclass(frozen=True, slots=True)
class UpdateBytes:
    """What the update of one bucket touches, in bytes.

    Attributes:
        bucket: its index.
        state: weights, gradients and optimizer state.
        host_read: the part of it whose home is not the device.
        host_written: the same without gradients, which are not written.
        device_read: the part of it whose home is the device.
        device_written: the same without gradients.
        pieces: in which the device computes it.
    """

    bucket: int
    state: int
    host_read: int
    host_written: int
    device_read: int
    device_written: int
    pieces: int = 1

    @property
    def is_small_cut(self) -> bool:
        """Whether its pieces are too small for the device to be quick with them."""
        return self.state < self.pieces * MIN_PIECE_BYTES


@dataclass(frozen=True, slots=True)
class SiteSpeeds:
    """Bytes/s: of the two directions of the link, and of state that each site updates."""

    h2d: float
    d2h: float
    cpu: float
    device: float


def update_bytes(
    buckets: Sequence[Bucket],
    blocks: Sequence[BlockBytes],
    tier_of: Mapping[tuple[int, str], str],
) -> list[UpdateBytes]:
    """What the update of each trainable bucket touches.

    Args:
        buckets: all of them.
        blocks: the chunk block bytes of each bucket, by state class.
        tier_of: home tier by (bucket, state class).
    """
    found = []
    for bucket, classes in zip(buckets, blocks, strict=True):
        if "gradients" not in classes:
            continue
        read = {"host": 0, "device": 0}
        written = dict(read)
        for state_class, sizes in classes.items():
            side = "device" if tier_of[bucket.index, state_class] == "device" else "host"
            read[side] += sum(sizes)
            written[side] += sum(sizes) if state_class != "gradients" else 0
        found.append(
            UpdateBytes(
                bucket.index,
                read["host"] + read["device"],
                read["host"],
                written["host"],
                read["device"],
                written["device"],
                sum(num_pieces(bucket, chunk, PIECE_NUMEL) for chunk in bucket.chunks),
            )
        )
    return found


def lane_seconds(
    buckets: Iterable[UpdateBytes], on_device: Collection[int], speeds: SiteSpeeds
) -> dict[str, float]:
    """Seconds that each lane is busy with the update; see [Note: Update site]."""
    total = dict.fromkeys(("cpu", "device", "h2d", "d2h"), 0.0)
    for each in buckets:
        for lane, seconds in _seconds(each, speeds, on_device=each.bucket in on_device).items():
            total[lane] += seconds
    return total


def _seconds(each: UpdateBytes, speeds: SiteSpeeds, *, on_device: bool) -> dict[str, float]:
    site, arrives, leaves = ("cpu", each.device_written, each.device_read)
    if on_device:
        site, arrives, leaves = ("device", each.host_read, each.host_written)
    return {
        site: each.state / getattr(speeds, site),
        "h2d": arrives / speeds.h2d,
        "d2h": leaves / speeds.d2h,
    }


def device_order(buckets: Sequence[UpdateBytes]) -> list[int]:
    """The buckets in the order in which they get the device; see [Note: Update site]."""
    homed = [each.bucket for each in buckets if each.device_written]
    away = [each for each in buckets if not each.device_written]
    small = [each.bucket for each in away if each.is_small_cut]
    others = [each.bucket for each in away if not each.is_small_cut]
    return homed + [each[i] for each in (others, small) for i in spread_order(len(each))]


def first_on_device(buckets: Sequence[UpdateBytes], share: float) -> frozenset[int]:
    """The buckets that are updated on the device when a `share` of all is (0 to 1)."""
    return frozenset(device_order(buckets)[: round(share * len(buckets))])


def choose_on_device(buckets: Sequence[UpdateBytes], speeds: SiteSpeeds) -> frozenset[int]:
    """The buckets to update on the device, so that the busiest lane is least busy.

    Of all first parts of `device_order`; the shortest of several that are as good. With buckets of
    one kind that is the best choice of all.
    """
    of = {each.bucket: each for each in buckets}
    lanes = lane_seconds(buckets, (), speeds)
    order = device_order(buckets)
    least, chosen = max(lanes.values(), default=0.0), 0
    for count, bucket in enumerate(order, start=1):
        for lane, seconds in _seconds(of[bucket], speeds, on_device=False).items():
            lanes[lane] -= seconds
        for lane, seconds in _seconds(of[bucket], speeds, on_device=True).items():
            lanes[lane] += seconds
        if max(lanes.values()) < least:
            least, chosen = max(lanes.values()), count
    return frozenset(order[:chosen])


@dataclass(frozen=True, slots=True)
class UpdateScratch:
    """Device memory of the update, in bytes: `NUM_SLOTS` chunks on their way, and one workspace.

    Attributes:
        slot: what the largest chunk block of each state class takes together.
        patterns: a slot's results: one int32 for each piece of its largest chunk.
        piece_numel: elements that are computed at once.
        workspace: the arithmetic of one piece.
    """

    slot: int
    patterns: int
    piece_numel: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes of all of it, in whole pages."""
        return NUM_SLOTS * (self.slot + self.patterns) + self.workspace

    def covers(self, other: UpdateScratch) -> bool:
        """Whether what takes `other` has room here."""
        return self.slot >= other.slot and self.patterns >= other.patterns


def update_scratch(
    buckets: Sequence[Bucket], blocks: Sequence[BlockBytes], rows_bytes: Callable[[int], int]
) -> UpdateScratch:
    """What the update of any trainable bucket takes, wherever the state of the buckets is at home.

    Args:
        buckets: all of them.
        blocks: the chunk block bytes of each bucket, by state class.
        rows_bytes: bytes of the arithmetic of a piece, by its elements.
    """
    trained = [bucket for bucket in buckets if "gradients" in blocks[bucket.index]]
    chunks = [(bucket, chunk) for bucket in trained for chunk in bucket.chunks]
    piece_numel = min(PIECE_NUMEL, max((chunk.numel for _, chunk in chunks), default=0))
    slot = max(
        (
            sum(sizes[chunk.index] for sizes in blocks[bucket.index].values())
            for bucket, chunk in chunks
        ),
        default=0,
    )
    pieces = max((num_pieces(bucket, chunk, piece_numel) for bucket, chunk in chunks), default=0)
    return UpdateScratch(
        slot,
        round_up(_PATTERN_BYTES * pieces, BLOCK_ALIGNMENT_BYTES),
        piece_numel,
        round_up(rows_bytes(piece_numel), BLOCK_ALIGNMENT_BYTES) if chunks else 0,
    )


def num_pieces(bucket: Bucket, chunk: Chunk, piece_numel: int) -> int:
    """Pieces of at most `piece_numel` elements into which the segments of a chunk are cut."""
    return sum(-(-segment.numel // piece_numel) for segment in segments(bucket, chunk))
