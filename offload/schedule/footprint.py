"""The bytes that a placement takes of each tier: homes, and what moves between them.

[Note: Footprint]
  home      the block of a bucket's state class in its tier, from the start to the end of the run.
  device    homes + working set + gradients in flight. The working set are the paged weights: two
            buckets at least (one in use, one arriving), at most all of them. A tiled bucket takes
            no part: its tiles have slots of their own, which are off the budget before planning.
  host      homes + staging. The phases of a step do not overlap, so staging is their maximum:
    passes  (forward and backward) a ring of weight chunks on their way from nvme; the open gradient
            chunks whose home the cores do not reach; landing room for gradients that leave an
            accelerator, to which those go back that have their home there.
    update  as many chunks as are read ahead, computed and written behind, each with the blocks of
            the classes that the cores cannot update where they live.
  nvme      homes + spare extents, a few for each block size: new state goes to another extent than
            the one it came from; and the updated state once more for each checkpoint that pins it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from offload.partition.layout import UPDATED_CLASSES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    # Bytes of each chunk block of one bucket, by state class; frozen buckets have weights only.
    BlockBytes = Mapping[str, Sequence[int]]

STATE_CLASSES = ("weights", "gradients", "optimizer")
TIERS = ("device", "host", "nvme")

MIN_WORKING_BUCKETS = 2


@dataclass(frozen=True, slots=True)
class Staging:
    """How many buffers each flow may hold; the engine leases no more.

    Attributes:
        weights: chunk buffers of the ring nvme -> host -> device.
        update: chunks in flight in the optimizer step (read ahead, compute, write behind).
        gradients: open gradient chunk buffers when their home is nvme.
        landing: weight chunk buffers that the ring holds in which gradients leave an accelerator.
        spare_extents: spare nvme extents of each block size.
    """

    weights: int = 4
    update: int = 3
    gradients: int = 4
    landing: int = 2
    spare_extents: int = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """What the tiers offer.

    Attributes:
        device_bytes: hard budget of engine-held bytes.
        host_bytes: the same, staging included.
        nvme_bytes: room for extents; None when the tier is not used.
        host_addressable: the cores can update state on the device where it is.
        pinned_versions: of updated state on nvme, those that checkpoints keep beside the current.
        staging: buffer counts.
        device_held_bytes: what others hold of the device beside `device_bytes`; messages count it.
    """

    device_bytes: int
    host_bytes: int
    nvme_bytes: int | None = None
    host_addressable: bool = True
    pinned_versions: int = 0
    staging: Staging = Staging()
    device_held_bytes: int = 0

    def budget_bytes(self, tier: str) -> int:
        """The budget of a tier; 0 for nvme that is not used."""
        budgets = {"device": self.device_bytes, "host": self.host_bytes, "nvme": self.nvme_bytes}
        return budgets[tier] or 0

    def held_bytes(self, tier: str) -> int:
        """What others hold of a tier beside its budget here."""
        return self.device_held_bytes if tier == "device" else 0

    def is_staged(self, tier: str) -> bool:
        """Whether state that lives in `tier` comes to host memory for its update."""
        return tier == "nvme" or (tier == "device" and not self.host_addressable)


class OverlapRoom(NamedTuple):
    """What the overlapped step takes beside a placement; see [Note: Overlap room].

    Attributes:
        flow_bytes: host memory for what is on its way; 0: the step is not overlapped.
        held_bytes: host memory for held versions.
        held_share: of the chunks of weights and optimizer state on nvme, those that can be held.
        held_nvme_bytes: the extents that they take.
    """

    flow_bytes: int = 0
    held_bytes: int = 0
    held_share: float = 0.0
    held_nvme_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory of both kinds."""
        return self.flow_bytes + self.held_bytes


NO_OVERLAP = OverlapRoom()


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one placement; see [Note: Footprint].

    Attributes:
        homes: bytes[tier][state_class] of the homes.
        paged_bytes: weights without a home on the device, all of them.
        min_working_bytes: the least working set.
        gradient_bytes: gradients between their production and departure.
        passes_staging_bytes: host staging of forward and backward.
        update_staging_bytes: host staging of the optimizer step.
        spare_bytes: spare nvme extents.
    """

    homes: dict[str, dict[str, int]]
    paged_bytes: int
    min_working_bytes: int
    gradient_bytes: int
    passes_staging_bytes: int
    update_staging_bytes: int
    spare_bytes: int

    @property
    def staging_bytes(self) -> int:
        """Host staging: the phases do not overlap."""
        return max(self.passes_staging_bytes, self.update_staging_bytes)

    def home_bytes(self, tier: str) -> int:
        """Bytes of all homes in a tier."""
        return sum(self.homes[tier].values())

    def need_bytes(self, tier: str) -> int:
        """The least budget of a tier with which this placement runs."""
        extra = {
            "device": self.min_working_bytes + self.gradient_bytes,
            "host": self.staging_bytes,
            "nvme": self.spare_bytes,
        }
        return self.home_bytes(tier) + extra[tier]

    def working_bytes(self, device_bytes: int) -> int:
        """Room for paged weights under a device budget: what is left, at most all of them."""
        left = device_bytes - self.home_bytes("device") - self.gradient_bytes
        return min(self.paged_bytes, max(left, self.min_working_bytes))


def footprint(
    blocks: Sequence[BlockBytes],
    tier_of: Mapping[tuple[int, str], str],
    machine: Machine,
    *,
    gradient_bytes: int,
    tiled: Collection[int] = frozenset(),
) -> Footprint:
    """Counts what a placement takes.

    Args:
        blocks: the chunk block bytes of each bucket.
        tier_of: home tier by (bucket, state class), complete.
        machine: the tiers; only its staging, pins and addressability are read.
        gradient_bytes: gradients in flight on the device.
        tiled: the buckets that come to the device by tiles.
    """
    homes = {tier: dict.fromkeys(STATE_CLASSES, 0) for tier in TIERS}
    paged: list[int] = []
    for bucket, classes in enumerate(blocks):
        for state_class, sizes in classes.items():
            homes[tier_of[bucket, state_class]][state_class] += sum(sizes)
        if tier_of[bucket, "weights"] != "device" and bucket not in tiled:
            paged.append(sum(classes["weights"]))
    return Footprint(
        homes=homes,
        paged_bytes=sum(paged),
        min_working_bytes=sum(sorted(paged)[-MIN_WORKING_BUCKETS:]),
        gradient_bytes=gradient_bytes,
        passes_staging_bytes=_passes_staging_bytes(blocks, tier_of, machine),
        update_staging_bytes=_update_staging_bytes(blocks, tier_of, machine),
        spare_bytes=_spare_bytes(blocks, tier_of, machine),
    )


def _passes_staging_bytes(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str], machine: Machine
) -> int:
    weights = gradients = landing = 0
    for bucket, classes in enumerate(blocks):
        if tier_of[bucket, "weights"] == "nvme":
            weights = max(weights, *classes["weights"])
        gradient_tier = tier_of.get((bucket, "gradients"))
        if gradient_tier is not None and machine.is_staged(gradient_tier):
            gradients = max(gradients, *classes["gradients"])
        if gradient_tier is not None and not machine.host_addressable:
            # A gradient leaves the device in the dtype of the weights.
            landing = max(landing, *classes["weights"])
    staging = machine.staging
    return weights * staging.weights + gradients * staging.gradients + landing * staging.landing


def _update_staging_bytes(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str], machine: Machine
) -> int:
    largest = 0
    for bucket, classes in enumerate(blocks):
        if "optimizer" not in classes:
            continue
        staged = [
            sizes
            for state_class, sizes in classes.items()
            if machine.is_staged(tier_of[bucket, state_class])
        ]
        largest = max(largest, *(sum(chunk) for chunk in zip(*staged, strict=True)), 0)
    return largest * machine.staging.update


def _spare_bytes(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str], machine: Machine
) -> int:
    counts: Counter[int] = Counter()
    for bucket, classes in enumerate(blocks):
        for state_class, sizes in classes.items():
            if tier_of[bucket, state_class] == "nvme":
                counts.update(sizes)
    spare = sum(size * min(machine.staging.spare_extents, n) for size, n in counts.items())
    return spare + machine.pinned_versions * _updated_nvme_bytes(blocks, tier_of)


def _updated_nvme_bytes(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str]
) -> int:
    """Bytes on nvme of what an optimizer step writes."""
    return sum(
        sum(classes[state_class])
        for bucket, classes in enumerate(blocks)
        if "gradients" in classes
        for state_class in UPDATED_CLASSES
        if state_class in classes and tier_of[bucket, state_class] == "nvme"
    )
