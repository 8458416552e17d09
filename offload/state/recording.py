"""Recording: tensors without memory, and the dispatch mode that keeps what would be done to them.

[Note: Deferred tensor]
A deferred tensor is a CPU tensor of true dtype, shape and strides whose storage is poison (see
engine/paging/poison.py). The table of this module knows the version (see tape.py) that every
deferred storage has come to. An op that would write to one advances its version; an op that would
compute from one gives a deferred tensor; a view shares the storage, as views do; an op that needs
numbers (`item()`, a comparison in Python) gets them: the values are computed for it and thrown
away.

A random op on a deferred tensor runs at once on scratch memory of the same shape, because nothing
else advances the generator as it would; the values are thrown away, and the state before the op is
kept. So whatever else is drawn, in between and afterwards, is what it would have been.

A missed write is an error: the storage refuses to give out a pointer that can be written to.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from offload.engine.paging.poison import poison_storage
from offload.errors import OffloadError
from offload.state.tape import (
    Operation,
    RandomState,
    Version,
    View,
    blank_storage,
    materialize,
    passed_memory,
    view_of,
)

_NO_GUARD = torch._C.DisableTorchFunction
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
# Smaller tensors are real: code that builds a model looks into tables, rarely into weights.
THRESHOLD_ELEMENTS = 16_384
_CPU = torch.device("cpu")
REMEDY = "call offload.initialize(model) first, or compute inside `with offload.deferred_init():`"


@dataclass(slots=True)
class _Entry:
    alive: StorageWeakRef  # keeps the address from being used again
    version: Version
    recording: object


_table: dict[int, _Entry] = {}
_table_lock = threading.RLock()
_next_sweep = 1024


def version_of(tensor: torch.Tensor) -> Version | None:
    """What the storage of a deferred tensor has come to; None if the tensor is real."""
    with _NO_GUARD():
        try:
            entry = _table.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # no storage: sparse, wrappers, ...
            return None
    return None if entry is None else entry.version


def has_survivors(recording: object) -> bool:
    """Whether any deferred storage of a recording is still in use."""
    with _table_lock:
        return any(e.recording is recording and not e.alive.expired() for e in _table.values())


def recording_of(tensor: torch.Tensor) -> object:
    """The recording that made a deferred tensor."""
    with _NO_GUARD():
        return _table[tensor.untyped_storage()._cdata].recording


def deferred_view(tensor: torch.Tensor) -> View | None:
    """A deferred tensor as it stands on the tape; None if the tensor is real."""
    version = version_of(tensor)
    if version is None:
        return None
    with _NO_GUARD():
        return view_of(tensor, version)


def materialized(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Real tensors with the values of `tensors`; deferred ones that share memory still do.

    A tensor that is not deferred is returned itself.

    Raises:
        OffloadError: an op on the tape fails.
    """
    views = [deferred_view(tensor) for tensor in tensors]
    made = iter(materialize([view for view in views if view is not None]))
    return [
        tensor if view is None else next(made) for tensor, view in zip(tensors, views, strict=True)
    ]


def new_deferred(layout: View, recording: object) -> torch.Tensor:
    """A deferred tensor of its own storage that has come to `layout.version`."""
    storage = poison_storage(layout.version.nbytes, _CPU, enabled=True)
    tensor = layout.over(storage)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    _enter(tensor, layout.version, recording)
    return tensor


def _enter(tensor: torch.Tensor, version: Version, recording: object) -> None:
    global _next_sweep  # noqa: PLW0603
    storage = tensor.untyped_storage()
    with _table_lock:
        if len(_table) >= _next_sweep:
            forget_dead()
            _next_sweep = 2 * len(_table) + 1024
        _table[storage._cdata] = _Entry(StorageWeakRef(storage), version, recording)


def forget_dead() -> None:
    """Drop what is known of storages that are gone, and with it what their ops have kept.

    A version holds the arguments of its ops: copies of real tensors, readers of files.
    """
    with _table_lock:
        for address in [a for a, entry in _table.items() if entry.alive.expired()]:
            del _table[address]


def _advance(tensor: torch.Tensor, version: Version) -> None:
    _table[tensor.untyped_storage()._cdata].version = version


class _Kind(Enum):
    """What an op does with memory."""

    ALIAS = "returns views"
    WRITE = "writes to arguments"
    COMPUTE = "returns new tensors"
    ANSWER = "returns no tensor"
    RESIZE = "changes the memory of an argument"


@dataclass(frozen=True, slots=True)
class _Traits:
    kind: _Kind
    is_random: bool
    written: tuple[tuple[int, str], ...]  # positions and names of the arguments it writes to
    returned: tuple[tuple[int, str], ...]  # of the arguments that it returns
    overwrites: bool  # whatever the written tensor held before


_OVERWRITING = {
    f"aten::{name}"
    for name in (
        *("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_"),
        *("exponential_", "cauchy_", "log_normal_", "geometric_"),
    )
}
_RESIZING = {"aten::resize_", "aten::resize_as_"}
# Views, although their schemas do not say so.
_SILENT_VIEWS = {"aten::_unsafe_view"}


@cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    written, aliases = [], {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            for name in argument.alias_info.before_set:
                aliases[name] = (position, argument.name)
            if argument.alias_info.is_write:
                written.append((position, argument.name))
    returned = tuple(
        aliases[name]
        for result in schema.returns
        if result.alias_info is not None
        for name in result.alias_info.before_set
        if name in aliases
    )
    types = [str(result.type) for result in schema.returns]
    if schema.name in _RESIZING:
        kind = _Kind.RESIZE
    elif torch.Tag.inplace_view in func.tags or schema.name == "aten::set_":
        kind = _Kind.ALIAS  # `t_`, `squeeze_`: the tensor becomes another view
    elif written:
        kind = _Kind.WRITE
    elif not any("Tensor" in name for name in types):
        kind = _Kind.ANSWER
    elif schema.name in _SILENT_VIEWS or any(r.alias_info is not None for r in schema.returns):
        kind = _Kind.ALIAS
    else:
        kind = _Kind.COMPUTE
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    overwrites = schema.name in _OVERWRITING and len(written) == 1
    return _Traits(kind, is_random, tuple(written), returned, overwrites)


class Recorder(TorchDispatchMode):
    """Defers what is made and done inside it, in the thread that enters it.

    Args:
        recording: stands for the block; new deferred tensors belong to it.
        drawing: whether random ops advance the generator as they would have done. If not, they
            leave it alone, and what they would have drawn is drawn from a seed of their own.
    """

    def __init__(self, recording: object, *, drawing: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording
        self._drawing = drawing
        self._num_seeds = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record, answer or run an op; see [Note: Deferred tensor]."""
        with _NO_GUARD():
            return self._dispatch(func, types, args, dict(kwargs or {}))

    def _dispatch(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if any(kind.__torch_dispatch__ is not _NO_DISPATCH for kind in types):  # type: ignore[attr-defined]
            return NotImplemented  # a wrapper takes the op apart, and the parts come here
        tensors = [t for t in tree_leaves((args, kwargs)) if _is_tensor(t)]
        traits = _traits(func)
        if not any(version_of(tensor) is not None for tensor in tensors):
            if traits.kind is _Kind.COMPUTE and all(t.device == _CPU for t in tensors):
                return self._create(func, args, kwargs)
            return func(*args, **kwargs)
        if traits.kind is _Kind.ALIAS:
            return func(*args, **kwargs)
        if traits.kind is _Kind.RESIZE:
            raise _unsupported(func, "changes the memory of a deferred tensor")
        if traits.kind is _Kind.ANSWER:
            return _run_truly(func, args, kwargs)
        if traits.kind is _Kind.WRITE:
            return self._write(func, traits, args, kwargs)
        return self._compute(func, args, kwargs)

    # -- new tensors -------------------------------------------------------------------------------

    def _create(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op on real tensors, or on none: what it makes is deferred if it is large."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return func(*args, **kwargs)
        if not _traits(func).is_random:
            promised = _on_meta(func, args, kwargs)
            if promised is None or not _is_large(promised):
                return func(*args, **kwargs)
            return self._defer(func, args, kwargs, promised, None)
        if not self._drawing:
            bare = {k: v for k, v in kwargs.items() if k != "generator"}
            promised = _on_meta(func, args, bare)
            if promised is not None and _is_large(promised):
                return self._defer(func, args, bare, promised, self._own_seed())
        state = RandomState.now(kwargs.get("generator"))
        drawn = func(*args, **kwargs)
        if not _is_large(drawn):
            return drawn
        passed_memory.count(sum(t.nbytes for t in tree_leaves(drawn) if _is_tensor(t)))
        return self._defer(func, args, kwargs, drawn, state)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op on deferred tensors: what it makes is deferred."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            return func(*args, **kwargs)
        if _traits(func).is_random:
            state = RandomState.now(kwargs.get("generator"))
            drawn = _run_truly(func, args, kwargs)
            return self._defer(func, args, kwargs, drawn, state)
        promised = None
        if device is None or torch.device(device).type == "cpu":
            promised = _on_meta(func, args, kwargs)
        if promised is None:  # its shape depends on values, or it goes to another device
            return _run_truly(func, args, kwargs)
        return self._defer(func, args, kwargs, promised, None)

    def _defer(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        promised: Any,
        random: RandomState | None,
    ) -> Any:
        """Deferred tensors in place of `promised` ones, of which only the layout counts."""
        layouts = []
        for tensor in tree_leaves(promised):
            if isinstance(tensor, torch.Tensor):
                nbytes = tensor.untyped_storage().nbytes()
                layouts.append(view_of(tensor, Version(nbytes)))
        kept_args, kept_kwargs = _kept((args, kwargs), only_layout=takes_only_layout(func))
        operation = Operation(func, kept_args, kept_kwargs, random=random, layouts=layouts)
        for result, layout in enumerate(layouts):
            layout.version.origin = operation
            layout.version.result = result
        remaining = iter(layouts)
        return tree_map_only(
            torch.Tensor, lambda _: new_deferred(next(remaining), self._recording), promised
        )

    # -- writes ------------------------------------------------------------------------------------

    def _write(
        self, func: Any, traits: _Traits, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """An in-place op or one with `out=`, on at least one deferred tensor."""

        def argument(place: tuple[int, str]) -> Any:
            position, name = place
            return args[position] if position < len(args) else kwargs.get(name)

        written = [
            tensor
            for place in traits.written
            for tensor in tree_leaves(argument(place))
            if isinstance(tensor, torch.Tensor)
        ]
        is_deferred = [version_of(tensor) is not None for tensor in written]
        if not any(is_deferred):
            real_args, real_kwargs = _truly((args, kwargs))
            func(*real_args, **real_kwargs)
        elif not all(is_deferred):
            raise _unsupported(func, "writes to deferred and to other tensors at once")
        else:
            self._record_write(func, traits, args, kwargs, written)
        results = [argument(place) for place in traits.returned]
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def _record_write(
        self,
        func: Any,
        traits: _Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Sequence[torch.Tensor],
    ) -> None:
        forgets = traits.overwrites and _covers_its_storage(written[0])
        random = None
        if traits.is_random:
            random = self._draw(func, traits, args, kwargs, written)
        kept_args, kept_kwargs = _kept((args, kwargs), only_layout=False)
        if forgets:  # the first argument is the one that is written to
            before = kept_args[0].version
            blank = view_of(written[0], Version(before.nbytes))
            kept_args = (blank, *kept_args[1:])
            versions = [blank.version]
        else:
            versions = [v for v in map(version_of, written) if v is not None]
        operation = Operation(func, kept_args, kept_kwargs, writes=versions, random=random)
        place = {version: index for index, version in enumerate(operation.writes)}
        for tensor, version in zip(written, versions, strict=True):
            _advance(tensor, Version(version.nbytes, operation, place[version]))

    def _draw(
        self,
        func: Any,
        traits: _Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Sequence[torch.Tensor],
    ) -> RandomState:
        """The state before an in-place random op, which advances the generator as if it ran."""
        if not self._drawing:
            kwargs.pop("generator", None)
            return self._own_seed()
        state = RandomState.now(kwargs.get("generator"))
        if traits.overwrites:
            like = view_of(written[0], Version(0))
            steps = zip(like.size, like.stride, strict=True)
            reach = sum((n - 1) * step for n, step in steps) + 1 if like.numel else 0
            scratch = replace(like, offset=0).over(blank_storage(reach * like.dtype.itemsize))
            rest, named = _truly((args[1:], kwargs))
            func(scratch, *rest, **named)
        else:
            real_args, real_kwargs = _truly((args, kwargs))
            func(*real_args, **real_kwargs)
        return state

    def _own_seed(self) -> RandomState:
        self._num_seeds += 1
        seed = (torch.initial_seed() + self._num_seeds) % (1 << 63)
        return RandomState(None, torch.Generator().manual_seed(seed).get_state())


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _unsupported(func: Any, what: str) -> OffloadError:
    return OffloadError(
        f"{func} {what}, which cannot be deferred{_place()}",
        remedy="build that module outside offload.deferred_init(), and add it to the model",
    )


def _place() -> str:
    """The module whose code is running, for messages."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f" (in {type(owner).__name__})"
        frame = frame.f_back
    return ""


def _kept(tree: Any, *, only_layout: bool) -> Any:
    """The arguments as the tape keeps them: views, and copies of real tensors."""

    def keep(tensor: torch.Tensor) -> Any:
        version = version_of(tensor)
        if version is not None:
            return view_of(tensor, Version(version.nbytes) if only_layout else version)
        return tensor.detach().clone()

    return tree_map_only(torch.Tensor, keep, tree)


def _truly(tree: Any) -> Any:
    """The arguments with real values; what shared memory still does."""
    deferred = [t for t in tree_leaves(tree) if _is_tensor(t) and version_of(t) is not None]
    real = dict(zip(map(id, deferred), materialized(deferred), strict=True))
    return tree_map_only(torch.Tensor, lambda tensor: real.get(id(tensor), tensor), tree)


def _run_truly(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    real_args, real_kwargs = _truly((args, kwargs))
    return func(*real_args, **real_kwargs)


def _on_meta(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What the op would make, without values; None if only running it tells."""

    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    named = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, named)))
    if "device" in named or not has_tensors:
        named["device"] = torch.device("meta")
    try:
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, on_meta, (args, named))
        promised = func(*meta_args, **meta_kwargs)
    except Exception:  # noqa: BLE001  an op without a meta kernel raises whatever it likes
        return None
    tensors = [t for t in tree_leaves(promised) if _is_tensor(t)]
    return promised if tensors and all(t.layout is torch.strided for t in tensors) else None


def _is_large(result: Any) -> bool:
    tensors = [t for t in tree_leaves(result) if _is_tensor(t)]
    return all(
        t.layout is torch.strided and t.device.type in ("cpu", "meta") for t in tensors
    ) and any(t.numel() >= THRESHOLD_ELEMENTS for t in tensors)


def takes_only_layout(func: Any) -> bool:
    """Whether tensor arguments only say what the result looks like."""
    name: str = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def _covers_its_storage(tensor: torch.Tensor) -> bool:
    """Whether the tensor is every byte of its storage, each once."""
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class Editor(Recorder):
    """Records edits of deferred tensors after their block; computing with them is refused."""

    def _create(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if takes_only_layout(func):
            return func(*args, **kwargs)
        device = torch.device(kwargs.get("device") or "cpu")
        if func in _COPIES and device.type in ("cpu", "meta"):
            return super()._compute(func, args, kwargs)
        raise OffloadError(f"{func} needs values that are deferred{_place()}", remedy=REMEDY)
