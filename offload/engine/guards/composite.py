"""Composite parameters: quantized weights, whose bytes lie in several plain tensors.

[Note: Composite]
  wrapper     a tensor subclass without memory of its own. Its bytes are in inner tensors, which its
              `__tensor_flatten__` names (torchao and the like), at any depth.
  companion   a plain tensor that hangs on a frozen parameter with memory of its own and is of no
              use without it (bitsandbytes: absmax and SCB, the scales of the parameter's bytes).
  part        a plain tensor of a composite: the inner tensors of a wrapper, or a parameter and its
              companions. Parts are what the engine moves: each has a name (`layer.weight.qdata`,
              `layer.weight.quant_state.absmax`), a slot and a storage, as a parameter has. They
              move as the bytes they are, in no other precision, and lie next to each other.
  alias       another tensor object over a part's memory (bitsandbytes: CB). It goes where the part
              goes, and is always guarded.

Parts are guarded like parameters, and that is all that companions need. A wrapper wears a guard
class as well, because its own `__torch_function__` and `__torch_dispatch__` run their ops on the
inner tensors where torch calls no guard. Its guard pins every part first, and then runs what the
user's class would run; see `run_plain`. A wrapper wears its plain class while all its parts do, and
while an op on it runs.

What several composites share (a lookup table for all layers) stays where it is, as buffers do.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_NO_FUNCTION = torch._C._disabled_torch_function_impl
# The attribute of bitsandbytes' modules that lets them repack.
_REPACKS = "support_avx512bf16_for_cpu"
_NO_DISPATCH: Any = torch._C._disabled_torch_dispatch_impl

# The guarded class of each class of the user, and back; filled by `guard_class_of`.
guard_classes: dict[type, type[torch.Tensor]] = {}
plain_classes: dict[type, type] = {}


class NotPageableError(Exception):
    """Why a parameter cannot be paged; the collection makes a warning of it."""


class Part(NamedTuple):
    """A plain tensor of a composite and its name below the parameter's; "" is the parameter."""

    name: str
    tensor: torch.Tensor


@dataclass(slots=True, eq=False)
class Composite:
    """One parameter of the module that consists of parts.

    Attributes:
        parameter: the module's own object.
        wrappers: the tensors without memory of their own, inner ones before outer ones.
        parts: what is paged, in the order of its memory.
        aliases: other tensors over the memory of the parameter itself.
        tables: tensors that other composites use too: they stay, on the device.
    """

    parameter: nn.Parameter
    wrappers: tuple[torch.Tensor, ...]
    parts: tuple[Part, ...]
    aliases: tuple[torch.Tensor, ...] = ()
    tables: tuple[torch.Tensor, ...] = ()
    _plain: tuple[type[torch.Tensor], ...] = field(init=False)

    def __post_init__(self) -> None:
        self._plain = tuple(type(wrapper) for wrapper in self.wrappers)

    def follow(self) -> None:
        """Let the wrappers wear their plain classes if all parts do, else their guards."""
        guarded = any(type(part.tensor) in plain_classes for part in self.parts)
        for wrapper, plain in zip(self.wrappers, self._plain, strict=True):
            wrapper.__class__ = guard_classes[plain] if guarded else plain

    def settle(self, device: torch.device) -> None:
        """The parts say that they are on `device` now: what depends on them follows."""
        for table in self.tables:
            if table.device != device:
                table.data = table.to(device)
        for wrapper in self.wrappers:
            if wrapper.device != device:
                _rebuild(wrapper)
        for alias in self.aliases:
            with torch.no_grad():
                alias.data = self.parameter.detach()
            alias.__class__ = guard_classes[torch.Tensor]
        self.follow()

    @property
    def version(self) -> int:
        """The version counters of the wrappers: an op on one edits parts below autograd."""
        return sum(wrapper._version for wrapper in self.wrappers)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return any(tensor is wrapper for wrapper in self.wrappers)

    def is_whole(self) -> bool:
        """Whether the wrappers still hold the parts that they were collected with."""
        if not self.wrappers:
            return True
        held = {id(leaf) for leaf in leaves(self.parameter)}
        return all(id(part.tensor) in held for part in self.parts)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes are in inner tensors that it can name."""
    return hasattr(type(tensor), "__tensor_flatten__")


def inner_tensors(wrapper: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors directly inside a wrapper, by attribute; it may name what is no tensor, too."""
    return [
        (name, inner)
        for name, inner in unwrapped(wrapper)[0].items()
        if isinstance(inner, torch.Tensor)
    ]


def unwrapped(wrapper: Any) -> tuple[dict[str, Any], Any]:
    """What a wrapper's `__tensor_unflatten__` takes: what is inside it, and the context."""
    names, context = wrapper.__tensor_flatten__()
    return {name: getattr(wrapper, name) for name in names}, context


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's bytes: itself, unless it is a wrapper."""
    if is_wrapper(tensor):
        for _, inner in inner_tensors(tensor):
            yield from leaves(inner)
    else:
        yield tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes, which are those of its parts if it is a wrapper."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tensor))


def plain_class_of(kind: type) -> Any:
    """The user's class behind a class, which may be a guard."""
    return plain_classes.get(kind, kind)


def run_plain(
    func: Callable[..., Any],
    tensors: Iterable[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run an op whose guarded arguments are present as torch would for their plain classes.

    To be called with guards off. They are on again inside a `__torch_function__` of the user's.
    """
    kinds: tuple[Any, ...] = tuple(
        kind
        for kind in dict.fromkeys(plain_class_of(type(tensor)) for tensor in tensors)
        if kind is not torch.Tensor and kind.__torch_function__ is not _NO_FUNCTION
    )
    for kind in kinds:
        with torch._C._EnableTorchFunction():
            result = kind.__torch_function__(func, kinds, args, dict(kwargs))
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


_in_use: Counter[int] = Counter()  # guarded ops that run on a wrapper, by its id
_use_lock = threading.Lock()


@contextlib.contextmanager
def plain_wrappers(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Guarded wrappers wear their plain classes in the block: an op that compares classes runs.

    Their parts are pinned, or not looked at, and are guarded on their own meanwhile.
    """
    guarded = [
        tensor
        for tensor in tensors
        if is_wrapper(tensor) and (type(tensor) in plain_classes or id(tensor) in _in_use)
    ]
    if not guarded:
        yield
        return
    with _use_lock:
        worn = [(wrapper, plain_class_of(type(wrapper))) for wrapper in guarded]
        for wrapper, plain in worn:
            _in_use[id(wrapper)] += 1
            wrapper.__class__ = plain
    try:
        yield
    finally:
        with _use_lock:
            for wrapper, plain in worn:
                _in_use[id(wrapper)] -= 1
                if not _in_use[id(wrapper)]:
                    del _in_use[id(wrapper)]
                    wrapper.__class__ = guard_classes[plain]


def has_dispatch(kind: type[torch.Tensor]) -> bool:
    """Whether the class decides what ops on it do, below autograd."""
    return kind.__torch_dispatch__ is not _NO_DISPATCH


def find_composites(
    parameters: Mapping[str, nn.Parameter], module: nn.Module
) -> tuple[dict[int, Composite], dict[int, str]]:
    """The composites of a module by the id of their parameter, and why others cannot be paged."""
    owners: dict[int, list[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            owners.setdefault(id(parameter), []).append(owner)
    found: dict[int, Composite] = {}
    refused: dict[int, str] = {}
    with _NO_GUARD():
        for parameter in parameters.values():
            try:
                composite = _composite(parameter, owners.get(id(parameter), []))
            except NotPageableError as error:
                refused[id(parameter)] = str(error)
            else:
                if composite is not None:
                    found[id(parameter)] = composite
        _leave_tables(found.values(), parameters.values())
    for key, composite in list(found.items()):
        if not composite.parts:
            refused[key] = "its memory is shared with other tensors"
            del found[key]
    return found, refused


def settle_composites(
    composites: Iterable[Composite], module: nn.Module, device: torch.device
) -> None:
    """The parts of the composites of `module` have been paged: let the rest of them follow.

    bitsandbytes repacks weights in evaluation on CPUs that have avx512_bf16, into another layout
    with scales of fewer bits. The layout is the engine's now, so that is switched off.
    """
    known = set()
    with _NO_GUARD():
        for composite in composites:
            known.add(id(composite.parameter))
            composite.settle(device)
    for owner in module.modules():
        repacks = getattr(owner, _REPACKS, False)
        if repacks and any(id(p) in known for p in owner._parameters.values()):
            setattr(owner, _REPACKS, False)


def _composite(parameter: nn.Parameter, owners: list[nn.Module]) -> Composite | None:
    if is_wrapper(parameter):
        wrappers: list[torch.Tensor] = []
        parts = list(_parts_of(parameter, "", wrappers))
        return Composite(parameter, tuple(wrappers), tuple(parts))
    if parameter.requires_grad or not _is_bitsandbytes(parameter):
        return None
    own = parameter.untyped_storage()._cdata
    parts, aliases = [Part("", parameter)], []
    for name, tensor in _companions(parameter, owners):
        _check_part(name, tensor)
        if tensor.untyped_storage()._cdata != own:
            parts.append(Part(name, tensor))
        elif _lies_like(tensor, parameter):
            aliases.append(tensor)
        else:
            raise NotPageableError(f"{name} is a part of its memory")
    if not _is_quantized(parameter, len(parts) + len(aliases)):
        return None
    return Composite(parameter, (), tuple(parts), tuple(aliases))


def _parts_of(wrapper: torch.Tensor, path: str, wrappers: list[torch.Tensor]) -> Iterator[Part]:
    if wrapper.is_inference():
        raise NotPageableError("it was made under inference_mode, which fixes its memory")
    known = dict(inner_tensors(wrapper))
    for name, inner in inner_tensors(wrapper):
        where = f"{path}.{name}" if path else name
        if inner is not known[name]:
            raise NotPageableError(f"{where} is another tensor each time")
        if is_wrapper(inner):
            yield from _parts_of(inner, where, wrappers)
        else:
            _check_part(where, inner)
            yield Part(where, inner)
    wrappers.append(wrapper)


def _check_part(name: str, tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        raise NotPageableError(f"{name} is a {type(tensor).__name__}, whose bytes cannot be found")
    if tensor.is_inference():
        raise NotPageableError(f"{name} was made under inference_mode, which fixes its memory")


def _is_bitsandbytes(parameter: nn.Parameter) -> bool:
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(parameter).__mro__)


def _is_quantized(parameter: nn.Parameter, num_tensors: int) -> bool:
    """Whether the parameter's elements are codes, not values: then they are never converted."""
    return num_tensors > 1 or not parameter.is_floating_point()


def _companions(
    parameter: nn.Parameter, owners: list[nn.Module]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that hang on a parameter of bitsandbytes, or on the state of its module."""
    holders: list[tuple[str, object]] = [("", parameter)]
    holders += [("state.", owner.state) for owner in owners if hasattr(owner, "state")]
    seen = {id(parameter)}
    while holders:
        path, holder = holders.pop(0)
        for name, value in vars(holder).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                yield path + name, value
            elif type(value).__module__.startswith("bitsandbytes.") and not isinstance(
                value, nn.Module
            ):
                holders.append((f"{path}{name}.", value))


def _lies_like(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return (
        tensor.dtype == parameter.dtype
        and tensor.shape == parameter.shape
        and tensor.stride() == parameter.stride()
        and tensor.storage_offset() == parameter.storage_offset()
    )


def _leave_tables(composites: Iterable[Composite], parameters: Iterable[nn.Parameter]) -> None:
    """Take what several tensors share out of the parts."""
    uses: Counter[int] = Counter()
    composites = list(composites)
    own = {id(part.tensor) for composite in composites for part in composite.parts}
    everything = [part.tensor for composite in composites for part in composite.parts]
    everything += [p for p in parameters if not is_wrapper(p) and id(p) not in own]
    for tensor in everything:
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            uses[tensor.untyped_storage()._cdata] += 1
    for composite in composites:
        shared = [
            part
            for part in composite.parts
            if not part.tensor.is_meta
            and part.tensor.numel()
            and uses[part.tensor.untyped_storage()._cdata] > 1
        ]
        composite.parts = tuple(part for part in composite.parts if part not in shared)
        composite.tables = tuple(part.tensor for part in shared)


def _rebuild(wrapper: Any) -> None:
    """Let a wrapper say that it is where its inner tensors are; the object stays."""
    inner, context = unwrapped(wrapper)
    plain: Any = plain_class_of(type(wrapper))
    rebuilt = plain.__tensor_unflatten__(inner, context, wrapper.size(), wrapper.stride())
    if isinstance(wrapper, nn.Parameter):
        rebuilt._is_param = True  # as nn.Parameter does, which would detach the inner tensors
    torch.utils.swap_tensors(wrapper, rebuilt)
