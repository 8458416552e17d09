"""Where each bucket's state lives.

[Note: Placement]
`auto` fills the fastest tier that has room, bucket by bucket: weights, then gradients, then
optimizer state on the device beside the working set; then the same on the host beside staging; the
rest on nvme. The cores do the updates, so for optimizer state an accelerator comes after the host:
from there it crosses twice a step.

The buckets of a class that get the faster tier are spread evenly over the model, so that between
two that have to be fetched there is work to hide the fetch behind. With weights that is a fixed
resident set, which for the cyclic accesses of training is as good as any policy. Tiled weights are
not given the device: they are tiled to be away.

A named tier is that tier for all buckets; what cannot fit there is refused, with a table of what
would fit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from offload.errors import DoesNotFitError, format_bytes
from offload.schedule.footprint import STATE_CLASSES, TIERS, Footprint, Machine, footprint

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from offload.schedule.footprint import BlockBytes

# With `auto` weights the device keeps room for one bucket in use, and three on their way.
AUTO_WORKING_BUCKETS = 4


class Home(NamedTuple):
    """The state of one class of one bucket."""

    bucket: int
    state_class: str


@dataclass(frozen=True, slots=True)
class PlacementChoice:
    """The tier asked for by each state class: auto, device, host or nvme.

    `off_device` are buckets to whose weights `auto` gives no home on the device, because what is
    there is never the home copy.
    """

    weights: str = "auto"
    gradients: str = "auto"
    optimizer: str = "auto"
    off_device: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A tier that has less than the placement needs, and what would change that."""

    tier: str
    need_bytes: int
    have_bytes: int
    remedy: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The home tier of everything, what it takes, and what is missing for it.

    Attributes:
        tier_of: tier by `Home`, for every class that a bucket has.
        footprint: the bytes it takes.
        shortfalls: the tiers whose budget is too small; empty when it fits.
    """

    tier_of: Mapping[tuple[int, str], str]
    footprint: Footprint
    shortfalls: tuple[Shortfall, ...]

    def tier(self, bucket: int, state_class: str) -> str:
        """The home tier of one class of one bucket."""
        return self.tier_of[bucket, state_class]

    def require_fit(self) -> None:
        """Does nothing when the placement fits.

        Raises:
            DoesNotFitError: with a row for each tier that is short, and what would make it fit.
        """
        if self.shortfalls:
            raise DoesNotFitError(table=shortfall_table(self.shortfalls))


def shortfall_table(shortfalls: Sequence[Shortfall]) -> str:
    """Tells what is missing: one row for each tier that is short, then one line for each remedy."""
    rows = [f"{'tier':<8}{'need':>14}{'have':>14}{'missing':>14}"]
    rows += [
        f"{short.tier:<8}{format_bytes(short.need_bytes):>14}{format_bytes(short.have_bytes):>14}"
        f"{format_bytes(short.need_bytes - short.have_bytes):>14}"
        for short in shortfalls
    ]
    rows += [f"{short.tier}: {short.remedy}" for short in shortfalls]
    return "\n".join(rows)


def place(
    blocks: Sequence[BlockBytes],
    machine: Machine,
    choice: PlacementChoice,
    *,
    gradient_bytes: int,
) -> Placement:
    """Finds every bucket's home tiers.

    Args:
        blocks: bytes of each chunk block, by bucket and state class.
        machine: the tiers and their budgets.
        choice: the tiers asked for.
        gradient_bytes: gradients in flight on the device: those of the largest parameter.

    Raises:
        DoesNotFitError: a tier is too small; the table says which, and what would fit.
    """
    placement = assign(blocks, machine, choice, gradient_bytes=gradient_bytes)
    placement.require_fit()
    return placement


def assign(
    blocks: Sequence[BlockBytes],
    machine: Machine,
    choice: PlacementChoice,
    *,
    gradient_bytes: int,
    tiled: Collection[int] = frozenset(),
    settled: Mapping[tuple[int, str], str] | None = None,
) -> Placement:
    """As `place`, but what does not fit is told in `shortfalls` instead of raised.

    `tiled` are the buckets that come to the device by tiles, `settled` the homes that stay where
    they are; the rest finds its place beside them.
    """
    settled = settled or {}
    tier_of = _Assignment(blocks, machine, choice, gradient_bytes, tiled, settled).tier_of
    taken = footprint(blocks, tier_of, machine, gradient_bytes=gradient_bytes, tiled=tiled)
    short = [tier for tier in TIERS if taken.need_bytes(tier) > machine.budget_bytes(tier)]
    shortfalls = tuple(
        Shortfall(
            tier,
            taken.need_bytes(tier) + machine.held_bytes(tier),
            machine.budget_bytes(tier) + machine.held_bytes(tier),
            _remedy(tier, taken, choice, machine)
            + _disk_remedy(tier, blocks, machine, choice, gradient_bytes, settled),
        )
        for tier in short
    )
    return Placement(tier_of, taken, shortfalls)


def spread_order(count: int) -> list[int]:
    """0..count-1 in bit-reversed order: any first part of it is spread evenly over the range."""
    bits = max(count - 1, 0).bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return [i for i in reversed_bits if i < count]


class _Assignment:
    """Fills the tiers, fastest first; the result is `tier_of`."""

    def __init__(
        self,
        blocks: Sequence[BlockBytes],
        machine: Machine,
        choice: PlacementChoice,
        gradient_bytes: int,
        tiled: Collection[int],
        settled: Mapping[tuple[int, str], str],
    ) -> None:
        self._blocks = blocks
        self._machine = machine
        self._tiled = tiled
        self._gradient_bytes = gradient_bytes
        asked = {"weights": choice.weights, "gradients": choice.gradients}
        asked["optimizer"] = choice.optimizer
        self.tier_of: dict[tuple[int, str], str] = dict(settled)
        self._free: list[Home] = []
        for state_class in STATE_CLASSES:
            for bucket in spread_order(len(blocks)):
                if state_class not in blocks[bucket] or (bucket, state_class) in settled:
                    continue
                if asked[state_class] == "auto":
                    self._free.append(Home(bucket, state_class))
                else:
                    self.tier_of[bucket, state_class] = asked[state_class]
        self._fill_device_with_weights(choice.off_device)
        early = ("gradients", "optimizer") if machine.host_addressable else ("gradients",)
        self._fill_device(early)
        self._fill_host()
        self._fill_device(("gradients", "optimizer"))
        last = "host" if machine.nvme_bytes is None else "nvme"
        self.tier_of.update((home, last) for home in self._free)

    def _nbytes(self, home: tuple[int, str]) -> int:
        return sum(self._blocks[home[0]][home[1]])

    def _taken_bytes(self, tier: str) -> int:
        return sum(self._nbytes(home) for home, placed in self.tier_of.items() if placed == tier)

    def _take(self, tier: str, candidates: Iterable[Home], room_bytes: int) -> None:
        """Gives `tier` to each candidate that still has room, in order."""
        taken = set()
        for home in candidates:
            nbytes = self._nbytes(home)
            if nbytes <= room_bytes:
                self.tier_of[home] = tier
                taken.add(home)
                room_bytes -= nbytes
        self._free = [home for home in self._free if home not in taken]

    def _device_room_bytes(self) -> int:
        taken_bytes = self._taken_bytes("device") + self._gradient_bytes
        return self._machine.device_bytes - taken_bytes

    def _fill_device_with_weights(self, off_device: frozenset[int]) -> None:
        room_bytes = self._device_room_bytes()
        weights = [home for home in self._free if home.state_class == "weights"]
        weights = [home for home in weights if home.bucket not in self._tiled]
        stay_off = [home for home in weights if home.bucket in off_device]
        weights = [home for home in weights if home.bucket not in off_device]
        if stay_off or sum(map(self._nbytes, weights)) > room_bytes:
            room_bytes -= self._working_bytes()
        self._take("device", weights, room_bytes)

    def _fill_device(self, state_classes: tuple[str, ...]) -> None:
        candidates = [home for home in self._free if home.state_class in state_classes]
        self._take("device", candidates, self._device_room_bytes() - self._working_bytes())

    def _working_bytes(self) -> int:
        """Device room that is kept free for paged weights."""
        paged = sorted(
            self._nbytes((bucket, "weights"))
            for bucket in range(len(self._blocks))
            if self.tier_of.get((bucket, "weights")) != "device" and bucket not in self._tiled
        )
        return sum(paged[-AUTO_WORKING_BUCKETS:])

    def _fill_host(self) -> None:
        room_bytes = self._machine.host_bytes - self._taken_bytes("host")
        free_bytes = sum(map(self._nbytes, self._free))
        if free_bytes + self._staging_bytes("host") <= room_bytes:
            self._take("host", self._free, room_bytes)
            return
        # Staging never grows when more comes to the host, so what fits beside it stays fitting.
        # The second round uses the room that the first has freed.
        for _ in range(2):
            room_bytes = self._machine.host_bytes - self._taken_bytes("host")
            self._take("host", self._free, room_bytes - self._staging_bytes("nvme"))

    def _staging_bytes(self, tier_of_free: str) -> int:
        """Host staging if all that is free went to one tier."""
        tier_of = self.tier_of | dict.fromkeys(self._free, tier_of_free)
        taken = footprint(self._blocks, tier_of, self._machine, gradient_bytes=0)
        return taken.staging_bytes


def _remedy(tier: str, taken: Footprint, choice: PlacementChoice, machine: Machine) -> str:
    """What would make a tier's share fit, in the config's own keys."""
    need = taken.need_bytes(tier) + machine.held_bytes(tier)
    asked = {name: getattr(choice, name) for name in STATE_CLASSES}
    named = [f"placement.{name}" for name, at in asked.items() if at == tier]
    release = f", or set {' and '.join(named)} to auto" if named else ""
    if tier == "device":
        # Two buckets of one parameter each are no larger than twice the largest gradient.
        splittable = taken.min_working_bytes > 2 * taken.gradient_bytes
        smaller = ", or lower partition.bucket_elements" if splittable else ""
        return f"tiers.device.memory of at least {need} bytes{release}{smaller}"
    if tier == "host":
        smaller = ", or lower partition.bucket_elements" if taken.staging_bytes else ""
        return f"tiers.host.memory of at least {need} bytes{release}{smaller}"
    if machine.nvme_bytes is None:
        return f"tiers.nvme.paths with {need} bytes free{release}"
    fewer = ", or fewer checkpoints (checkpoint.keep_last)" if machine.pinned_versions else ""
    return f"tiers.nvme.capacity and free space of at least {need} bytes{release}{fewer}"


def _disk_remedy(
    tier: str,
    blocks: Sequence[BlockBytes],
    machine: Machine,
    choice: PlacementChoice,
    gradient_bytes: int,
    settled: Mapping[tuple[int, str], str],
) -> str:
    """How much disk would relieve a host that has none; nothing for other tiers."""
    if tier != "host" or machine.nvme_bytes is not None:
        return ""
    with_disk = replace(machine, nvme_bytes=sys.maxsize)
    relieved = assign(
        blocks, with_disk, choice, gradient_bytes=gradient_bytes, settled=settled
    ).footprint
    if relieved.need_bytes("host") > machine.host_bytes:
        return ""
    return f", or tiers.nvme.paths with {relieved.need_bytes('nvme')} bytes free"
