"""Deferred initialization: a model that is built without memory and made bucket by bucket.

[Note: Deferred initialization]
    inside the block    tensors of 16,384 elements and more are recorded, see recording.py; to the
                        code that builds the model they look like any other CPU tensor
    at its end          parameters stay deferred, and get a class that records what is done to them
                        from now on; every other tensor (buffers, tables) becomes real
    offload.initialize  each parameter's values are made when its bucket moves to its home, and
                        freed: the whole model is never in memory
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from offload.engine.guards.guard import METADATA, RAW, REFUSED
from offload.errors import CheckpointError, OffloadError, StorageError
from offload.partition.arrays import memory_order
from offload.partition.parameters import ParameterState
from offload.state.ranges import read_range
from offload.state.recording import (
    REMEDY,
    Editor,
    Recorder,
    deferred_view,
    forget_dead,
    has_survivors,
    materialized,
    recording_of,
    version_of,
)
from offload.state.tape import depends_on_leaf, materialize, passed_memory

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_DATA: Any = torch.Tensor.data
_SET_DATA = _DATA.__set__
# These show values to Python without any op.
_SHOWN = frozenset({torch.Tensor.tolist, torch.Tensor.__repr__})
# Of what `RAW` has, these give out no pointer by themselves; a storage asked for one raises.
_STORAGES = frozenset(
    {torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage}
)


class _Block(threading.local):
    """The block that this thread is in."""

    recording: object | None = None


_block = _Block()


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Inside, models are built without memory for their parameters.

    ```
    with offload.deferred_init():
        model = Model(config)
    engine = offload.initialize(model, "offload.toml")
    ```

    The weights are those of an ordinary build with the same seed, bit for bit, and so is what the
    default generator draws afterwards. The host holds the largest parameter while it is drawn, and
    buffers. The block counts for the thread that enters it; blocks may be nested.

    After the block a parameter has its shape, dtype and device, and no values: edits are recorded
    (`nn.init`, `copy_`, `model.half()`), computing with it is an error until `initialize`.

    Raises:
        OffloadError: in the block, for what cannot be recorded: raw pointers, `resize_`.
    """
    with building(drawing=True):
        yield


@contextlib.contextmanager
def building(*, drawing: bool) -> Iterator[None]:
    """As `deferred_init`; without `drawing`, random ops leave the generator alone."""
    if _block.recording is not None:
        yield
        return
    recording = _block.recording = object()
    try:
        with _ValuesShown(), Recorder(recording, drawing=drawing):
            yield
    except BaseException:
        _block.recording = None
        _settle(recording, failed=True)
        raise
    _block.recording = None
    _settle(recording, failed=False)


def refuse_inside(what: str) -> None:
    """Refuse to build an engine from inside a block, where its own memory would be deferred.

    Raises:
        OffloadError: this thread is in a block.
    """
    if _block.recording is not None:
        raise OffloadError(
            f"{what} inside `with offload.deferred_init():`", remedy="leave the block first"
        )


class _ValuesShown(TorchFunctionMode):
    """What reads memory without an op: answered with true values, or refused."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SHOWN or (func in RAW and func not in _STORAGES):
            return _show(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _show(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if version_of(args[0]) is None:
        return func(*args, **kwargs)
    if func not in _SHOWN:
        raise OffloadError(
            f"{getattr(func, '__name__', func)} of a tensor whose values are deferred",
            remedy=REMEDY,
        )
    return func(*materialized(args[:1]), *args[1:], **kwargs)


# -- after the block -------------------------------------------------------------------------------


class Deferred:
    """Mixin of the classes of deferred parameters and their aliases."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer questions about the layout, record edits, refuse to compute."""
        with _NO_GUARD():
            if func in METADATA:
                return func(*args, **(kwargs or {}))
            return _record_edit(func, args, kwargs or {})

    def __repr__(self) -> str:
        assert isinstance(self, torch.Tensor)
        if version_of(self) is None:
            return repr(self.detach())
        return f"{type(self).__name__}(deferred, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        assert isinstance(self, torch.Tensor)
        known = memo.get(id(self))
        if known is None:
            known = memo[id(self)] = _deferred_copy(self)
        return known

    def __reduce_ex__(self, protocol: Any) -> Any:
        assert isinstance(self, torch.Tensor)
        if version_of(self) is None:
            undress(self)
            return super().__reduce_ex__(protocol)
        raise OffloadError(f"{_described([self])} is saved before it has values", remedy=REMEDY)


class DeferredTensor(Deferred, torch.Tensor):
    """An alias of a deferred parameter."""

    __repr__ = Deferred.__repr__  # type: ignore[assignment]


_deferred_classes: dict[type, type] = {torch.Tensor: DeferredTensor}
_plain_classes: dict[type, type] = {DeferredTensor: torch.Tensor}


def _deferred_class_of(plain: type) -> type:
    known = _deferred_classes.get(plain)
    if known is None:
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        make: Callable[..., type] = type(plain)
        known = _deferred_classes[plain] = make(plain.__name__, (Deferred, plain), body)
        _plain_classes[known] = plain
    return known


def dress(tensor: torch.Tensor) -> bool:
    """Let the class of a deferred tensor watch over it; whether its class allows that."""
    if isinstance(tensor, Deferred):
        return True
    try:
        tensor.__class__ = _deferred_class_of(type(tensor))
    except TypeError:
        return False
    return True


def undress(tensor: torch.Tensor) -> None:
    """Undo `dress`."""
    plain = _plain_classes.get(type(tensor))
    if plain is not None:
        tensor.__class__ = plain


def _record_edit(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    touched = []
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Deferred):
            assert isinstance(tensor, torch.Tensor)
            if version_of(tensor) is None:
                undress(tensor)  # `p.data = values` has made it real
            else:
                touched.append(tensor)
    if not touched:
        return func(*args, **kwargs)
    if func in _SHOWN:
        return _show(func, args, kwargs)
    if func in RAW or func in REFUSED:
        raise OffloadError(
            f"{getattr(func, '__name__', func)} of {_described(touched)}, whose values are "
            "deferred",
            remedy=REMEDY,
        )
    if _block.recording is not None:
        result = func(*args, **kwargs)
    else:
        try:
            with Editor(recording_of(touched[0])):
                result = func(*args, **kwargs)
        except OffloadError as error:
            raise OffloadError(f"{error} ({_described(touched)})") from error
    if func == _SET_DATA and version_of(args[0]) is None:
        undress(args[0])
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor) and version_of(tensor) is not None:
            dress(tensor)
    return result


def _deferred_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy: torch.Tensor = tensor.detach().clone()
    undress(copy)
    if isinstance(tensor, nn.Parameter):
        parameter = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        plain = _plain_classes.get(type(tensor), nn.Parameter)
        if plain is not nn.Parameter:
            parameter.__class__ = plain
        parameter.__dict__.update(tensor.__dict__)
        copy = parameter
    if version_of(copy) is not None:
        dress(copy)
    return copy


def _described(tensors: Sequence[torch.Tensor]) -> str:
    """The parameter of a module that one of the tensors is, or is an alias of; for messages."""
    with _NO_GUARD():
        wanted = {tensor.untyped_storage()._cdata for tensor in tensors}
        for thing in gc.get_objects():
            if not issubclass(type(thing), nn.Module):
                continue
            for name, parameter in thing.__dict__.get("_parameters", {}).items():
                is_deferred = parameter is not None and version_of(parameter) is not None
                if is_deferred and parameter.untyped_storage()._cdata in wanted:
                    return f"parameter {name} of a {type(thing).__name__}"
    return "a tensor"


def _settle(recording: object, *, failed: bool) -> None:
    """Dress the parameters that a block leaves behind, and make everything else real.

    After a failed block nothing is worth making: everything is dressed.
    """
    if has_survivors(recording):
        _settle_survivors(recording, failed=failed)
    forget_dead()


def _settle_survivors(recording: object, *, failed: bool) -> None:
    found: dict[int, list[torch.Tensor]] = {}
    with _NO_GUARD():
        for thing in gc.get_objects():
            if not issubclass(type(thing), torch.Tensor) or isinstance(thing, Deferred):
                continue
            if version_of(thing) is not None and recording_of(thing) is recording:
                found.setdefault(thing.untyped_storage()._cdata, []).append(thing)
        for tensors in found.values():
            kept = failed or any(isinstance(t, nn.Parameter) for t in tensors)
            if not (kept and all(dress(tensor) for tensor in tensors)):
                _make_real(tensors)


def _make_real(tensors: Sequence[torch.Tensor]) -> None:
    """Give tensors over one storage memory, and its values."""
    for tensor, real in zip(tensors, materialized(tensors), strict=True):
        undress(tensor)
        tensor.data = real


# -- into the engine -------------------------------------------------------------------------------


class DeferredWeights:
    """The initial weights of a module of which some parameters are deferred.

    Ranges come from files where the values do; else one parameter is in memory at a time.
    """

    def __init__(self) -> None:
        self._parameter: torch.Tensor | None = None
        self._values = torch.empty(0)

    def read(self, state: ParameterState, start: int, numel: int) -> torch.Tensor:
        """As `InitialWeights.read`.

        Raises:
            OffloadError: an op on the parameter's tape fails; names both.
            CheckpointError: a trainable weight in a file is not finite.
        """
        parameter = state.parameter
        view = deferred_view(parameter)
        if view is None:
            return memory_order(parameter, state)[start : start + numel]
        try:
            if not parameter.is_complex() and tuple(parameter.stride()) == state.stride:
                values = read_range(view, start, numel)
                if values is not None:
                    passed_memory.count(values.nbytes)
                    return _finite(values, state, start)
            if self._parameter is not parameter:
                self._values = torch.empty(0)
                self._values = memory_order(materialize([view])[0], state)
                self._parameter = parameter
                if depends_on_leaf(view):
                    _finite(self._values, state, 0)
        except (CheckpointError, StorageError):
            raise
        except OffloadError as error:
            raise OffloadError(f"parameter {state.name}: {error}") from error
        values = self._values[start : start + numel]
        if start + numel == state.numel:
            self._parameter, self._values = None, torch.empty(0)
        return values


def _finite(values: torch.Tensor, state: ParameterState, start: int) -> torch.Tensor:
    if state.parameter.requires_grad and values.is_floating_point():
        # One value that is not finite makes the sum so; of finite ones it may overflow.
        if torch.isfinite(values.sum(dtype=torch.float32)):
            return values
        wrong = ~torch.isfinite(values)
        if wrong.any():
            index = start + int(wrong.nonzero()[0])
            raise CheckpointError(
                f"parameter {state.name}: element {index} of its file is not finite "
                f"({values[index - start].item()})",
                expected="finite weights, because they are to be trained",
            )
    return values


@contextlib.contextmanager
def placing(module: nn.Module) -> Iterator[DeferredWeights | None]:
    """Inside, deferred parameters wear their own classes, as the engine has to see them.

    Yields where their values come from; None if none is deferred. Those that are still deferred at
    the end, because of an error, are guarded again.
    """
    deferred = [p for p in module.parameters() if version_of(p) is not None]
    for parameter in deferred:
        undress(parameter)
    try:
        yield DeferredWeights() if deferred else None
    finally:
        for parameter in deferred:
            if version_of(parameter) is not None:
                dress(parameter)
        forget_dead()
