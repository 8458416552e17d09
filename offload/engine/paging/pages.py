"""The pages of an engine: parameters whose storage comes and goes, and the buckets they move in.

[Note: Page]
A *page* is a bucket of weights. Its parameters stay the module's own objects; each has a storage of
its own, so that raw access, deep copies and version counters are as in plain PyTorch. While the
page is on the device, every storage points into the page's device lease. While it is away, every
storage points at *poison*: memory of NaNs that can be read and not written, so that a touch that no
guard has seen gives NaN instead of a dead process.

Moving a storage is `UntypedStorage._swap_data_ptr_`: views of the parameter that autograd holds are
revived with it, because they share the storage.

[Note: Parameter classes]
  plain    the class the user gave the parameter. Ops on it cost nothing extra, and nothing watches
           them: it is worn only while the page is held (a window, `gathered`, or a home on the
           device). A view made meanwhile that outlives the holder keeps its page on the device
           until the step ends.
  guarded  a subclass with `__torch_function__`, see guard.py: ops fault the page in and pin it.
Changing `__class__` keeps the object, so ties, optimizers and `named_parameters()` never notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from offload.errors import listed
from offload.native import crc32c
from offload.partition.residency import Residency, check_transition

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from offload.engine.guards.composite import Composite
    from offload.engine.tiling.tiled import TiledParameter
    from offload.partition.blocks import Block
    from offload.partition.parameters import ParameterState
    from offload.tiers.device import DeviceLease


# Private, and not in torch's stubs; `build` refuses a torch that lacks it.
_swap: Any = getattr(torch.UntypedStorage, "_swap_data_ptr_", None)


def _num_uses(storage: torch.UntypedStorage) -> int:
    """Tensors that share the storage; what autograd saves of it is none, see saved.py."""
    return int(torch._C._storage_Use_Count(storage._cdata))


class PageHolder(Protocol):
    """What a guard needs of the pager that owns a page."""

    @property
    def device(self) -> torch.device:
        """Where the parameters say they are."""
        ...

    def pin(self, pages: Sequence[WeightPage], user: str) -> None:
        """Bring the pages to the device and keep them there; `user` is named in errors."""
        ...

    def unpin(self, pages: Sequence[WeightPage]) -> None:
        """Take one pin off each of the pages."""
        ...

    def pin_for_node(self, page: WeightPage) -> None:
        """Bring the page to the device and keep it until the running autograd node has ended."""
        ...

    def keep_until_step(self, page: WeightPage) -> None:
        """Keep a pinned page until the step ends: a raw pointer to it has been given away."""
        ...


class PagedParameter:
    """One parameter's storage, as it moves with its page.

    Attributes:
        state: what is true of the parameter wherever it is.
        page: the bucket it moves in.
        storage: the storage object that its tensor and all views of it share.
        composite: what it is a part of; None for a parameter that is one tensor.
        plain_class, guard_class: see [Note: Parameter classes]; `view_class` is worn by guarded
            views.
        version: the tensor's version counter when the home copy was last known to be equal.
        home_is_stale: the device copy was edited and not written home yet.
        plain_depth: how many holders want the plain class at present.
        proven: the grad modes in which its module has run once under guard and nothing escaped it.
        needs_guard: in its module's forward an alias of it was made, or an op on it was saved by
            somebody else's saved-tensor hooks: the plain class would hide what the guard must see.
        raw_checksum: CRC32C of the bytes when a raw pointer was given away; None if none is out.
        tiles: how it comes to the device by tiles, see tiles.py; None: with its page.
    """

    __slots__ = (
        "_elsewhere",
        "_itemsize",
        "_plain_uses",
        "composite",
        "guard_class",
        "home_is_stale",
        "needs_guard",
        "page",
        "plain_class",
        "plain_depth",
        "proven",
        "raw_checksum",
        "state",
        "storage",
        "tiles",
        "version",
        "view_class",
    )

    def __init__(
        self,
        state: ParameterState,
        page: WeightPage,
        *,
        guard_class: type[torch.Tensor],
        view_class: type[torch.Tensor],
        composite: Composite | None = None,
    ) -> None:
        self.state = state
        self.page = page
        self.composite = composite
        self.storage = state.parameter.untyped_storage()
        self.plain_class = type(state.parameter)
        self.guard_class = guard_class
        self.view_class = view_class
        self.version = self.current_version
        self.home_is_stale = False
        self.plain_depth = 0
        self.proven: set[bool] = set()
        self.needs_guard = False
        self.raw_checksum: int | None = None
        self.tiles: TiledParameter | None = None
        self._plain_uses = 0
        self._itemsize = page.block.bucket.itemsize
        self._elsewhere: torch.UntypedStorage | None = None

    @property
    def owner(self) -> torch.Tensor:
        """The module's own parameter: itself, or the composite of which it is a part."""
        return self.state.parameter if self.composite is None else self.composite.parameter

    @property
    def offset_bytes(self) -> int:
        """Where the parameter's bytes start in the page."""
        return self.state.offset * self._itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter, without padding."""
        return self.state.numel * self._itemsize

    def checksum(self) -> int:
        """CRC32C of the bytes that the storage points at; 0 where the CPU does not reach them."""
        if self.state.parameter.device.type != "cpu" or not self.nbytes:
            return 0
        return crc32c(self.storage.data_ptr(), self.nbytes)

    def is_in_place(self) -> bool:
        """Whether the tensor still has the memory that it had; with guards off."""
        return bool(self.state.parameter.untyped_storage()._cdata == self.storage._cdata)

    @property
    def current_version(self) -> int:
        """What grows with every edit that autograd sees: of a wrapper, only itself sees some."""
        own = self.state.parameter._version
        return own if self.composite is None else own + self.composite.version

    def void_saved(self) -> None:
        """The values are others now, and that is no edit: what autograd has saved is void."""
        wrappers = () if self.composite is None else self.composite.wrappers
        for tensor in (self.state.parameter, *wrappers):
            torch.autograd.graph.increment_version(tensor)
        self.version = self.current_version

    def mark_edited(self) -> None:
        """The user has changed the values: home and master follow before it leaves."""
        self.state.edited = True
        self.home_is_stale = True

    def point_at(self, memory: torch.UntypedStorage) -> None:
        """Let the storage, and with it every view, use `memory` instead of what it used."""
        _swap(self.storage, memory)
        self._elsewhere = memory

    def point_away(self) -> None:
        """Undo `point_at`."""
        assert self._elsewhere is not None, "point_at comes first"
        _swap(self.storage, self._elsewhere)
        self._elsewhere = None

    def wear(self, parameter_class: type[torch.Tensor]) -> None:
        """Change the parameter's class; its identity and everything else stay."""
        self.state.parameter.__class__ = parameter_class
        if self.composite is not None:
            self.composite.follow()

    def wear_plain(self) -> None:
        """One more holder vouches that the page stays: ops need no guard while it is there.

        A window of many pages may have lost its first when its last arrives: that one stays
        guarded.
        """
        self.plain_depth += 1
        if self.plain_depth == 1 and self.page.residency is Residency.ON_DEVICE:
            self.wear(self.plain_class)
            self._plain_uses = _num_uses(self.storage)

    @property
    def has_escaped(self) -> bool:
        """Whether the last holder leaves views behind; they may be the work of other holders."""
        return self.plain_depth == 1 and self.has_plain_views

    @property
    def has_plain_views(self) -> bool:
        """Whether views made since the plain class was put on are alive: no guard watches them."""
        if type(self.state.parameter) is not self.plain_class:
            return False
        if self.page.pins:
            return False  # what a running node has unpacked shares the storage too
        return _num_uses(self.storage) > self._plain_uses

    def wear_guard(self) -> None:
        """One holder less; without any, ops are guarded again."""
        self.plain_depth -= 1
        assert self.plain_depth >= 0, f"{self.state.name}: guarded more often than freed"
        if self.plain_depth == 0:
            self.wear(self.guard_class)


class WeightPage:
    """The weights of one bucket, as the device tier sees them.

    Attributes:
        block: the weights at their home.
        parameters: in slot order.
        residency: see [Note: Residency]; changed only by `move`.
        lease: the device memory, while LOADING or ON_DEVICE.
        pins: ops and autograd nodes that use the page at this moment; a pinned page is never
            evicted.
        windows: modules whose forward is running and that use the page.
        kept: a raw pointer to the page is out: not evicted before the step ends.
        last_use: the pager's clock when the page was last touched.
        is_tiled: linear and embedding ops take its one parameter by tiles, only others the page.
    """

    __slots__ = (
        "block",
        "holder",
        "is_tiled",
        "kept",
        "last_use",
        "lease",
        "parameters",
        "pins",
        "residency",
        "windows",
    )

    def __init__(self, block: Block, holder: PageHolder) -> None:
        self.block = block
        self.holder = holder
        self.parameters: tuple[PagedParameter, ...] = ()
        on_device = block.home == "device"
        self.residency = Residency.ON_DEVICE if on_device else Residency.HOME
        self.lease: DeviceLease | None = block.device_lease
        self.pins = 0
        self.windows = 0
        self.kept = False
        self.last_use = 0
        self.is_tiled = False

    def __repr__(self) -> str:
        """The bucket's number, `-` away, `~` loading, `+` there; then pins, windows, kept."""
        where = {Residency.HOME: "-", Residency.LOADING: "~", Residency.ON_DEVICE: "+"}
        held = "p" * self.pins + "w" * self.windows + "k" * self.kept
        return f"{self.index}{where[self.residency]}{held}"

    @property
    def index(self) -> int:
        """The number of the bucket."""
        return self.block.bucket.index

    @property
    def nbytes(self) -> int:
        """Device bytes of the page."""
        return self.block.layout.nbytes

    @property
    def held_lease(self) -> DeviceLease:
        """The device memory, which the page has."""
        assert self.lease is not None
        return self.lease

    @property
    def is_paged(self) -> bool:
        """Whether the page comes and goes, i.e. has its home below the device."""
        return self.block.home != "device"

    def move(self, residency: Residency) -> None:
        """Change the residency along the transition table."""
        check_transition(self.index, self.residency, residency)
        self.residency = residency

    def point_parameters_at_lease(self) -> None:
        """Give every parameter its part of the device lease."""
        assert self.lease is not None
        for parameter in self.parameters:
            if parameter.nbytes:
                parameter.point_at(self.lease.storage_at(parameter.offset_bytes, parameter.nbytes))

    def note_edits(self) -> bool:
        """Mark the parameters that the user has changed; whether the home copy is older now."""
        for parameter in self.parameters:
            version = parameter.current_version
            raw = parameter.raw_checksum
            if version != parameter.version or (raw is not None and raw != parameter.checksum()):
                parameter.mark_edited()
            parameter.version = version
            if raw is not None:
                parameter.raw_checksum = parameter.checksum()
        return any(parameter.home_is_stale for parameter in self.parameters)

    def point_parameters_away(self) -> None:
        """Give every parameter back what it had before: poison."""
        for parameter in self.parameters:
            if parameter.nbytes:
                parameter.point_away()


def names_of(pages: Sequence[WeightPage]) -> str:
    """The parameters of the pages, for messages."""
    return listed([paged.state.name for page in pages for paged in page.parameters], most=4)


def paged_by_owner(parameters: Sequence[PagedParameter]) -> Mapping[int, list[PagedParameter]]:
    """What is paged of each parameter of the module, by its id: itself, or its parts."""
    found: dict[int, list[PagedParameter]] = {}
    for paged in parameters:
        found.setdefault(id(paged.owner), []).append(paged)
    return found


# Every paged parameter of every engine of this process, by the address of its storage object. A
# tensor is a view of a parameter exactly if its storage is found here.
_PAGED: dict[int, PagedParameter] = {}


def register(parameter: PagedParameter) -> None:
    """Make the parameter and all its views known to the guards."""
    _PAGED[parameter.storage._cdata] = parameter


def forget(parameter: PagedParameter) -> None:
    """Undo `register`."""
    _PAGED.pop(parameter.storage._cdata, None)


def find_paged(tensor: torch.Tensor) -> PagedParameter | None:
    """The paged parameter that `tensor` is or is a view of; to be called with guards off."""
    try:
        return _PAGED.get(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # no storage: sparse, functorch wrappers, ...
        return None


def come_and_go(
    parameters: Iterator[torch.nn.Parameter], by_owner: Mapping[int, Sequence[PagedParameter]]
) -> list[PagedParameter]:
    """What is paged of the parameters, as whole pages that leave the device."""
    found = (paged for parameter in parameters for paged in by_owner.get(id(parameter), ()))
    return [paged for paged in found if paged.page.is_paged and not paged.tiles]
