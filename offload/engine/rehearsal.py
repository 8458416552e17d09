"""What forward and backward compute, found without weights; and how long that takes here.

[Note: Rehearsal]
A module is called with *fake* tensors, which have shapes, strides and a device but no memory; so is
backward. Every operation that would have run is noted with its arguments' shapes, and what autograd
saves is counted. A model has few different operations, for its layers are alike: each of them is
then run a few times on memory of its own, filled with small numbers, and its time counts as often
as it was noted. That takes the memory of about one layer, and a second or so.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload.errors import OffloadError, format_bytes

_LEAST_SWEEPS, _MOST_SWEEPS = 3, 20
_SWEEP_SECONDS = 1.0
_COPIES = 3  # of an operation's arguments: themselves, its result, and room for its work
_MOST_SECONDS = 30.0


class TensorSpec(NamedTuple):
    """A tensor's form: enough to make another one like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> torch.Tensor:
        """A tensor of this form, of small numbers."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.fill_(0.01) if self.dtype.is_floating_point else made.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation with the forms of its arguments; equal ones take equally long."""

    function: Any
    leaves: tuple[Hashable, ...]
    structure: Any = field(hash=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, TensorSpec))


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one forward and backward pass does.

    Attributes:
        operations: how often each one runs.
        activation_bytes: what autograd holds when forward has ended, parameters left out.
    """

    operations: Mapping[Operation, int]
    activation_bytes: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "prim":  # questions that only fake tensors are asked
            return func(*args, **(kwargs or {}))
        leaves, structure = pytree.tree_flatten((args, kwargs or {}))
        forms = tuple(
            TensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        )
        self.operations[Operation(func, forms, structure)] += 1
        return func(*args, **(kwargs or {}))


def rehearse(
    module: nn.Module,
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Rehearsal:
    """Find what a training step of `module` computes; nothing of its size is allocated.

    Args:
        module: on any device, also meta; it is not changed.
        inputs: shape and dtype of each keyword argument. It returns a loss, or what has one.
        device: that it will run on.
        dtype: of its floating-point parameters.

    Raises:
        OffloadError: it cannot be run so, e.g. because its control flow depends on values.
    """
    recorder, saved = _Recorder(), _Saved()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
            held = {name: _fake(each, dtype) for name, each in module.named_parameters()}
            saved.known = {each.untyped_storage()._cdata for each in held.values()}
            held |= {name: _fake(each, None) for name, each in module.named_buffers()}
            given = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in inputs.items()}
            with recorder, torch.enable_grad():
                with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept):
                    output = torch.func.functional_call(module, held, kwargs=given)
                loss = output if isinstance(output, torch.Tensor) else output.loss
                if not isinstance(loss, torch.Tensor):
                    raise TypeError("it returned no loss")
                held_bytes = saved.nbytes
                loss.backward()
    except Exception as error:
        raise OffloadError(
            f"{type(module).__name__} cannot be rehearsed without weights: {error}",
            remedy="its compute is predicted by its FLOPs, its activations are not counted",
        ) from error
    return Rehearsal(dict(recorder.operations), held_bytes)


def _fake(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    is_real_number = tensor.is_floating_point()
    made = torch.empty(
        tensor.shape, dtype=dtype if is_real_number and dtype is not None else tensor.dtype
    )
    return made.requires_grad_(tensor.requires_grad)


class _Saved:
    """Counts the storages that autograd saves, each once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.known: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no other storage gets the same address

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self._kept.append(tensor)
            self.nbytes += storage.nbytes()
        return tensor


def measure_operations(rehearsal: Rehearsal, *, device: torch.device, most_bytes: int) -> float:
    """Seconds of all operations of a rehearsal, from a few runs of each different one.

    They run one after the other, again and again, so that caches are as cold as in a model.

    Args:
        rehearsal: what is to be timed.
        device: where.
        most_bytes: of the operations' tensors that are held at once.

    Raises:
        OffloadError: an operation needs more, takes too long, or cannot run alone.
    """
    total, deadline = 0.0, time.perf_counter() + _MOST_SECONDS
    for group in _groups(rehearsal.operations, most_bytes):
        ready = [_ready(operation, device) for operation in group]
        runs: list[list[float]] = [[] for _ in group]
        end = time.perf_counter() + _SWEEP_SECONDS
        sweeps = 0
        while sweeps <= _LEAST_SWEEPS or (time.perf_counter() < end and sweeps < _MOST_SWEEPS):
            for operation, call, found in zip(group, ready, runs, strict=True):
                if time.perf_counter() > deadline:
                    raise OffloadError("its operations take too long to be measured")
                found.append(_seconds(operation, call, device))
            sweeps += 1
        total += sum(
            rehearsal.operations[operation] * statistics.median(found[1:])
            for operation, found in zip(group, runs, strict=True)
        )
    return total


def _groups(operations: Iterable[Operation], most_bytes: int) -> Iterator[list[Operation]]:
    """Operations in their order, as many at a time as there is memory for."""
    group: list[Operation] = []
    held_bytes = 0
    for operation in operations:
        if _COPIES * operation.nbytes > most_bytes:
            raise OffloadError(
                f"an operation on {format_bytes(operation.nbytes)} is too large to be measured in "
                f"{format_bytes(most_bytes)}"
            )
        if group and held_bytes + _COPIES * operation.nbytes > most_bytes:
            yield group
            group, held_bytes = [], 0
        group.append(operation)
        held_bytes += _COPIES * operation.nbytes
    if group:
        yield group


def _ready(operation: Operation, device: torch.device) -> tuple[Any, Any]:
    leaves = [
        leaf.make(device) if isinstance(leaf, TensorSpec) else leaf for leaf in operation.leaves
    ]
    args, kwargs = pytree.tree_unflatten(leaves, operation.structure)
    return args, kwargs


@torch.no_grad()
def _seconds(operation: Operation, call: tuple[Any, Any], device: torch.device) -> float:
    args, kwargs = call
    function = operation.function
    started = time.perf_counter()
    try:
        function(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise OffloadError(f"{operation.function} cannot be measured alone: {error}") from error
    return time.perf_counter() - started
