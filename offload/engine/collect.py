"""What a module brings along: its parameters, ties resolved, as the layout needs to know them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from offload.engine.guards.composite import (
    Composite,
    NotPageableError,
    find_composites,
    is_wrapper,
    stored_bytes,
)
from offload.engine.guards.guard import guard_class_of
from offload.engine.paging.pages import find_paged
from offload.engine.paging.poison import is_poison
from offload.engine.tiling.tileable import tileable_parameters
from offload.errors import ConfigError, OffloadError, listed
from offload.partition.arrays import DTYPE_NAMES, TORCH_DTYPES
from offload.partition.layout import ParamSpec

# Frozen parameters of dtypes that nothing computes with here move as opaque bytes of their size.
_OPAQUE = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """One parameter that will be paged: every name it has, and its spec in the compute dtype.

    A part of a composite is an entry of its own, with its bytes as elements.
    """

    names: tuple[str, ...]
    parameter: torch.Tensor
    spec: ParamSpec
    dtype: torch.dtype
    stride: tuple[int, ...]
    composite: Composite | None = None


@dataclass(frozen=True, slots=True)
class Collection:
    """The parameters of a module.

    Attributes:
        paged: those that the engine moves, in registration order.
        resident: those that it cannot move (classes that cannot be guarded, tensors whose bytes
            cannot be found): they stay where the user put them, and count against the device
            budget.
        tileable: those of `paged` that linear and embedding modules alone use.
        kept: the names of parameters and buffers that stay in fp32.
    """

    paged: tuple[Collected, ...]
    resident: tuple[tuple[str, nn.Parameter], ...]
    tileable: frozenset[nn.Parameter] = frozenset()
    kept: frozenset[str] = frozenset()

    @property
    def composites(self) -> tuple[Composite, ...]:
        """The paged parameters that consist of several tensors."""
        every = (c.composite for c in self.paged if c.composite is not None)
        return tuple(dict.fromkeys(every))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters that stay."""
        return sum(stored_bytes(parameter) for _, parameter in self.resident)


def collect(
    module: nn.Module,
    compute: str,
    *,
    kept: frozenset[str] = frozenset(),
    allow_meta: bool = False,
) -> Collection:
    """Collect the parameters of `module`, which compute in the dtype called `compute`.

    Floating-point parameters get the compute dtype, or fp32 if one of their names is among `kept`;
    a complex64 one counts as pairs of fp32.

    Raises:
        OffloadError: a parameter is lazy, or (unless `allow_meta`) on the meta device, or of a
            dtype that cannot be trained, or an engine has it already; names it.
        ConfigError: the module has no parameters.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    if not names:
        raise ConfigError(problems=["the model has no parameters: there is nothing to place"])
    for parameter, known_as in names.items():
        _check(known_as[0], parameter, allow_meta=allow_meta)
    by_name = {known_as[0]: parameter for parameter, known_as in names.items()}
    _refuse_overlaps(by_name)
    composites, reasons = find_composites(by_name, module)
    paged: list[Collected] = []
    resident: list[tuple[str, nn.Parameter]] = []
    for parameter, known_as in names.items():
        composite = composites.get(id(parameter))
        _refuse_paged(known_as[0], parameter, composite)
        try:
            _check_pageable(parameter, composite, reasons.get(id(parameter)))
        except NotPageableError as reason:
            reasons[id(parameter)] = str(reason)
            resident.append((known_as[0], parameter))
            continue
        if composite is None:
            kind = "fp32" if any(name in kept for name in known_as) else compute
            paged.append(_collected(tuple(known_as), parameter, kind))
        else:
            paged.extend(_collected_parts(tuple(known_as), composite))
    if resident:
        name, parameter = resident[0]
        warnings.warn(
            f"{len(resident)} parameters stay on their device, because they cannot be paged: "
            f"{listed([name for name, _ in resident])} (the first, a {type(parameter).__name__}: "
            f"{reasons[id(parameter)]})",
            stacklevel=3,
        )
    tileable = frozenset(p for p in tileable_parameters(module) if id(p) not in composites)
    return Collection(tuple(paged), tuple(resident), tileable, kept)


def _refuse_overlaps(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that are tied by their memory: paging would untie them.

    Raises:
        OffloadError: two parameters share memory; names them.
    """
    places = []
    for name, parameter in parameters.items():
        plain = type(parameter.data) is torch.Tensor and parameter.layout is torch.strided
        if not plain or parameter.is_meta or not parameter.numel():
            continue
        reach = sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
        tensor: Any = parameter  # `const_data_ptr` is not in torch's stubs
        storage, start = 0, tensor.const_data_ptr()
        if is_poison(start):  # no memory of its own yet; what its storage has come to is its place
            start = parameter.storage_offset() * parameter.element_size()
            storage = parameter.untyped_storage()._cdata
        places.append((storage, start, start + (reach + 1) * parameter.element_size(), name))
    places.sort()
    for (storage, _, end, name), (same, start, _, other) in itertools.pairwise(places):
        if storage == same and start < end:
            raise OffloadError(
                f"parameters {name} and {other} are different objects over the same memory",
                expected="one nn.Parameter under both names where weights are tied",
                remedy="assign the parameter itself, e.g. head.weight = embedding.weight",
            )


def _check(name: str, parameter: nn.Parameter, *, allow_meta: bool) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise OffloadError(
            f"parameter {name} is lazy: it has no shape yet",
            remedy="run one forward pass before offload.initialize",
        )
    if parameter.is_meta and not allow_meta:
        raise OffloadError(
            f"parameter {name} is on the meta device: it has no values to train",
            remedy="build it under `with offload.deferred_init():`, which takes no memory either, "
            "or load it with offload.from_pretrained",
        )
    if is_wrapper(parameter) and parameter.requires_grad:
        raise OffloadError(
            f"parameter {name} is a {type(parameter).__name__} that requires gradients",
            expected="trained parameters that are plain tensors",
            remedy="freeze it with requires_grad_(False) and train adapters on top",
        )


def _refuse_paged(name: str, parameter: nn.Parameter, composite: Composite | None) -> None:
    """Refuse a parameter whose values are with another engine, open or closed.

    Raises:
        OffloadError: names it.
    """
    tensors = [parameter] if composite is None else [tensor for _, tensor in composite.parts]
    with torch._C.DisableTorchFunctionSubclass():
        is_paged = any(find_paged(tensor) is not None for tensor in tensors)
    if is_paged:
        raise OffloadError(
            f"parameter {name} belongs to an engine already, which has its values",
            expected="a module that no engine was made of",
            remedy="go on with that engine, or give this one a module of its own: a new one, or a "
            "copy.deepcopy that was made before the engine was closed",
        )


def _check_pageable(
    parameter: nn.Parameter, composite: Composite | None, reason: str | None
) -> None:
    """Refuse what has to stay where it is.

    Raises:
        NotPageableError: with the reason.
    """
    if reason is not None:
        raise NotPageableError(reason)
    if composite is None and (
        type(parameter.data) is not torch.Tensor or parameter.layout is not torch.strided
    ):
        raise NotPageableError("it does not say which tensors hold its bytes")
    for tensor in (parameter,) if composite is None else (*composite.wrappers, parameter):
        plain = type(tensor)
        try:
            tensor.__class__ = guard_class_of(plain)
            tensor.__class__ = plain
        except TypeError as error:
            raise NotPageableError(f"its class cannot be guarded, {error}") from error


def _collected(names: tuple[str, ...], parameter: nn.Parameter, compute: str) -> Collected:
    dtype = parameter.dtype
    numel = parameter.numel()
    if dtype.is_complex:
        if dtype is not torch.complex64:
            raise OffloadError(
                f"parameter {names[0]} is {dtype}", expected="complex64 among complex dtypes"
            )
        if compute != "fp32":
            raise OffloadError(
                f"parameter {names[0]} is complex, which has no {compute} form",
                remedy='set precision.compute = "fp32"',
            )
        kind, numel = "fp32", 2 * numel
    elif dtype.is_floating_point and dtype.itemsize > 1:
        kind, dtype = compute, TORCH_DTYPES[compute]
    else:
        kind = DTYPE_NAMES.get(dtype) or _OPAQUE[dtype.itemsize]
    trainable = parameter.requires_grad
    if trainable and kind not in ("fp32", "bf16", "fp16"):
        raise OffloadError(
            f"parameter {names[0]} of dtype {dtype} requires gradients",
            expected="a floating-point dtype of 16 bits or more",
        )
    itemsize = TORCH_DTYPES[kind].itemsize
    spec = ParamSpec(names[0], tuple(parameter.shape), numel, kind, itemsize, trainable)
    return Collected(names, parameter, spec, dtype, _dense_stride(parameter))


def _collected_parts(names: Sequence[str], composite: Composite) -> Iterator[Collected]:
    """The parts of a composite, as frozen bytes: no precision is another one of a code."""
    for path, tensor in composite.parts:
        known_as = tuple(f"{name}.{path}" if path else name for name in names)
        nbytes = tensor.numel() * tensor.element_size()
        spec = ParamSpec(known_as[0], tuple(tensor.shape), nbytes, "uint8", 1, trainable=False)
        yield Collected(known_as, tensor, spec, tensor.dtype, _dense_stride(tensor), composite)


def _dense_stride(parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's stride if its elements fill their memory, else the contiguous one."""
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    expected = 1
    for dimension in reversed(order):
        size = parameter.size(dimension)
        if size != 1 and parameter.stride(dimension) != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return tuple(parameter.stride())


def convert_buffers(
    module: nn.Module, compute: str, device: torch.device, *, kept: Container[str] = frozenset()
) -> None:
    """Move buffers to the device; floating ones that a state dict holds get the compute dtype.

    Those whose names are among `kept` get fp32 instead. Buffers that are not persistent (rotary
    frequencies, masks) are tables that modules compute in a precision of their own choice: they
    keep it.
    """
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is None:
                continue
            persistent = name not in owner._non_persistent_buffers_set
            wide = buffer.is_floating_point() and buffer.dtype.itemsize > 1
            is_kept = (f"{path}.{name}" if path else name) in kept
            dtype = TORCH_DTYPES["fp32" if is_kept else compute]
            owner._buffers[name] = buffer.to(
                device, dtype if wide and (persistent or is_kept) else buffer.dtype
            )
