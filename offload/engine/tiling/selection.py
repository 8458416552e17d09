"""Which parameters are tiled, and into how many tiles: decided before anything is allocated.

[Note: Tiling]
Of the tileable parameters, see tileable.py, are tiled

  named     in `tiling.modules`, in any case;
  by size   if the plan does not fit the device: the largest first, until it does. Only those whose
            page is their own, whatever the size of buckets.

With `tiles = "auto"` a tile and its gradient get half of the device budget that nothing else must
have, in two slots; a large tile gains nothing over a smaller one, and the room left holds pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from offload.engine.tiling.tiles import NUM_SLOTS
from offload.errors import ConfigError
from offload.partition.layout import MIN_BUCKET_ELEMENTS
from offload.tiers.extents import round_up_to_page

if TYPE_CHECKING:
    from offload.config import OffloadConfig
    from offload.engine.collect import Collected
    from offload.partition.layout import ParamSpec
    from offload.schedule.plan import Plan

PlanSpecs = Callable[[Sequence["ParamSpec"], int], "Plan"]

_MIN_TILES = 2


def plan_tiled(
    collected: Sequence[Collected],
    tileable: Collection[nn.Parameter],
    config: OffloadConfig,
    plan_specs: PlanSpecs,
) -> Plan:
    """The plan with the tiles that the configuration names, and those without which nothing fits.

    Args:
        collected: the paged parameters.
        tileable: those of them that may be tiled.
        config: reads `tiling`, `placement` and `guard.gather`, below which nothing is tiled.
        plan_specs: plans for specs beside so many device bytes of tile slots.

    Raises:
        ConfigError: a pattern of `tiling.modules` names no tileable module.
    """
    names = {
        index: each.names
        for index, each in enumerate(collected)
        if each.parameter in tileable and not _is_gathered(each.names, config)
    }
    chosen = set(_named(names, config.tiling.modules))
    planner = _Planner([each.spec for each in collected], config, plan_specs)
    planned = best = planner.plan(chosen)
    elements = config.partition.bucket_elements
    shared_numel = MIN_BUCKET_ELEMENTS if elements == "auto" else elements
    sizes = {
        index: collected[index].spec.nbytes
        for index in names
        if index not in chosen and collected[index].spec.numel > shared_numel
    }
    for size in sorted(set(sizes.values()), reverse=True):
        if not _is_short(best):
            return best
        chosen |= {index for index, nbytes in sizes.items() if nbytes == size}
        best = planner.plan(chosen)
    return planned if _is_short(best) else best


def known_tiles(specs: Sequence[ParamSpec], known: Plan) -> tuple[list[ParamSpec], int]:
    """The specs with the tiles that a plan of theirs has, and the device bytes of its slots."""
    specs = list(specs)
    for each in known.tiled:
        (slot,) = known.buckets[each.bucket].slots
        spec = specs[slot.param]
        specs[slot.param] = replace(spec, tile_numel=each.tile_rows * spec.shape[1])
    largest = max((each.tile_bytes for each in known.tiled), default=0)
    return specs, NUM_SLOTS * round_up_to_page(largest)


def _is_gathered(names: Sequence[str], config: OffloadConfig) -> bool:
    return any(name.startswith(f"{path}.") for name in names for path in config.guard.gather)


def _named(tileable: Mapping[int, Sequence[str]], patterns: Sequence[str]) -> Iterator[int]:
    unused = dict.fromkeys(patterns)
    for index, names in tileable.items():
        modules = [name.rpartition(".")[0] for name in names]
        matching = [p for p in patterns if any(fnmatchcase(m, p) for m in modules)]
        for pattern in matching:
            unused.pop(pattern, None)
        if matching:
            yield index
    if unused:
        raise ConfigError(
            problems=[
                f"tiling.modules: {pattern!r} names no module that can be tiled: an nn.Linear or "
                "nn.Embedding whose weight nothing else uses, of two rows or more, outside of "
                "fused, compiled and gathered modules, and without max_norm, sparse or "
                "scale_grad_by_freq"
                for pattern in unused
            ]
        )


def _is_short(plan: Plan) -> bool:
    return any(shortfall.tier == "device" for shortfall in plan.shortfalls)


class _Planner:
    """Plans for a choice of tiled parameters."""

    def __init__(
        self, specs: Sequence[ParamSpec], config: OffloadConfig, plan_specs: PlanSpecs
    ) -> None:
        self._specs = specs
        self._tiles = config.tiling.tiles
        self._placement = config.placement
        self._plan_specs = plan_specs

    def plan(self, chosen: Collection[int]) -> Plan:
        """The plan with tiles for the chosen parameters, by index."""
        if not chosen:
            return self._plan_specs(self._specs, 0)
        if self._tiles != "auto":
            return self._with_tiles(chosen, self._tiles, None)
        smallest = self._with_tiles(chosen, None, 0)
        if _is_short(smallest):
            return smallest
        room = self._room_bytes(smallest, chosen)
        planned = self._with_tiles(chosen, None, room)
        while _is_short(planned):
            room //= 2
            planned = self._with_tiles(chosen, None, room)
        return planned

    def _with_tiles(
        self, chosen: Collection[int], tiles: int | None, tile_bytes: int | None
    ) -> Plan:
        specs = list(self._specs)
        for index in chosen:
            spec = specs[index]
            rows, row_numel = spec.shape
            least = _MIN_TILES
            if tiles is not None:
                least = min(tiles, rows)
            tile_rows = math.ceil(rows / least)
            if tile_bytes is not None:
                fitting = max(tile_bytes // (row_numel * spec.itemsize), 1)
                tile_rows = math.ceil(rows / max(math.ceil(rows / fitting), least))
            specs[index] = replace(spec, tile_numel=tile_rows * row_numel)
        return self._plan_specs(specs, NUM_SLOTS * self._slot_bytes(specs))

    @staticmethod
    def _slot_bytes(specs: Sequence[ParamSpec]) -> int:
        return max(
            round_up_to_page(spec.tile_nbytes) for spec in specs if spec.tile_numel is not None
        )

    def _room_bytes(self, smallest: Plan, chosen: Collection[int]) -> int:
        """Bytes of one tile: half of what is free beside the smallest tiles, shared out.

        State that `auto` has put on the device gives way.
        """
        gives_way = sum(
            nbytes
            for state_class, nbytes in smallest.bytes["device"].items()
            if getattr(self._placement, state_class) == "auto"
        )
        free = smallest.budget_bytes["device"] - smallest.need_bytes["device"] + gives_way
        trained = any(self._specs[index].trainable for index in chosen)
        return free // 2 // (NUM_SLOTS + trained)
