"""The guard: a class that faults a parameter's page in before any op that takes it runs.

[Note: Guard]
An op with a guarded parameter, or a guarded view of one, arrives at `_run_guarded` instead of
torch's dispatcher:

  metadata     shape, dtype, hooks, grad, ...          answered at once, nothing moves
  alias        detach, .data                           answered at once; the result is guarded
  raw access   numpy, data_ptr, untyped_storage, ...   the page comes and stays until the step ends
  tiled        linear, embedding with a tiled weight   tiles of it come, one after the other
  refused      set_, resize_, share_memory_, .data = of another kind: GuardError
  anything     every paged tensor among the arguments is pinned, the op runs, the pins are taken off

A result that shares a paged storage becomes guarded itself. An op that changed the version of a
paged argument has edited it. torch.func transforms and jit tracing see through Python subclasses to
memory that may be absent, so under them a guarded op is refused; inside `gathered()` it is not.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from offload.engine.guards.composite import (
    guard_classes,
    has_dispatch,
    is_wrapper,
    leaves,
    plain_class_of,
    plain_classes,
    plain_wrappers,
    run_plain,
)
from offload.engine.guards.saved import hooks_are_ours, page_hooks
from offload.engine.guards.transforms import active_transform
from offload.engine.paging.pages import PagedParameter, WeightPage, find_paged
from offload.engine.tiling.ops import TILED_OPS, is_tiled_weight
from offload.errors import GuardError

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_preserve_version = torch.autograd.grad_mode._unsafe_preserve_version_counter
_Call = Callable[..., Any]

_METADATA_PROPERTIES = [
    "shape",
    "dtype",
    "device",
    "requires_grad",
    "grad",
    "grad_fn",
    "is_leaf",
    "layout",
    "ndim",
    "names",
    "is_sparse",
    "is_sparse_csr",
    "is_quantized",
    "is_meta",
    "is_cuda",
    "is_cpu",
    "is_mps",
    "is_xpu",
    "is_nested",
    "is_mkldnn",
    "_version",
    "output_nr",
    "itemsize",
    "nbytes",
    "retains_grad",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "grad_dtype",
]
_METADATA_METHODS = [
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "storage_offset",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "__hash__",
    "__len__",
    "requires_grad_",
    "register_hook",
    "dim_order",
    "is_conj",
    "is_neg",
    "register_post_accumulate_grad_hook",
    "retain_grad",
    "get_device",
    "is_inference",
    "has_names",
    "is_signed",
]
_METADATA_FUNCTIONS = ["is_floating_point", "is_complex", "numel", "is_inference", "is_signed"]
_RAW_METHODS = [
    "data_ptr",
    "const_data_ptr",
    "mutable_data_ptr",
    "numpy",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__dlpack__",
    "__array__",
    "is_set_to",
]
_REFUSED_METHODS = ["set_", "resize_", "resize_as_", "share_memory_", "__cuda_array_interface__"]


def _members(names: Iterable[str]) -> Iterator[object]:
    for name in names:
        member = getattr(torch.Tensor, name, None)
        if member is not None:
            yield member


def _metadata() -> frozenset[object]:
    found = set(_members(_METADATA_METHODS))
    found.update(getattr(torch, name) for name in _METADATA_FUNCTIONS)
    for member in _members(_METADATA_PROPERTIES):
        found.update(getattr(member, name) for name in ("__get__",))
    for name in ("grad", "requires_grad"):
        member = getattr(torch.Tensor, name)
        found.update({member.__set__, member.__delete__})
    return frozenset(found)


METADATA = _metadata()
RAW = frozenset(_members(_RAW_METHODS))
REFUSED = frozenset(_members(_REFUSED_METHODS))
_FOREACH = frozenset(getattr(torch, name) for name in dir(torch) if name.startswith("_foreach_"))
_DATA: Any = torch.Tensor.data
_SET_DATA = _DATA.__set__
_ALIASES = frozenset(
    {torch.Tensor.detach, torch.detach, _DATA.__get__, torch.ops.aten.detach.default}
)
# These run a whole backward, in which guards must be on: guarded inputs become gradient edges.
_BACKWARDS = frozenset({torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward})


class Guarded:
    """Mixin of every guarded class."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls,
        func: _Call,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` with every paged argument on the device."""
        if func in _BACKWARDS:
            return _run_backward(func, args, kwargs or {})
        with _NO_GUARD():
            if func in METADATA:
                return func(*args, **(kwargs or {}))
            return _run_guarded(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A plain copy with memory of its own, which no engine moves."""
        assert isinstance(self, torch.Tensor)
        known = memo.get(id(self))
        if known is None:
            known = memo[id(self)] = plain_copy(self, memo)
        return known

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a plain copy: true values, and no trace of the engine."""
        assert isinstance(self, torch.Tensor)
        return plain_copy(self).__reduce_ex__(protocol)


def _plain_repr(tensor: torch.Tensor, **_: Any) -> str:
    """What the user's own class shows of the values."""
    return repr(plain_copy(tensor))


class GuardedTensor(Guarded, torch.Tensor):
    """A view of a paged parameter."""

    __repr__ = _plain_repr  # type: ignore[assignment]


guard_classes[torch.Tensor] = GuardedTensor
plain_classes[GuardedTensor] = torch.Tensor


def guard_class_of(plain: type[torch.Tensor]) -> type[torch.Tensor]:
    """The guarded subclass of a parameter class; the same each time.

    Raises:
        TypeError: the class cannot be subclassed.
    """
    known = guard_classes.get(plain)
    if known is None:
        body: dict[str, object] = {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__repr__": _plain_repr,
        }
        if has_dispatch(plain):
            body["__torch_dispatch__"] = classmethod(_dispatch_guarded)
        make: Callable[..., type[torch.Tensor]] = type(plain)
        known = guard_classes[plain] = make(plain.__name__, (Guarded, plain), body)
        plain_classes[known] = plain
    return known


def _dispatch_guarded(
    cls: type[torch.Tensor],
    func: _Call,
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """`__torch_dispatch__` of a guarded wrapper: ops that no `__torch_function__` has seen."""
    plain = plain_class_of(cls)
    plain_types = tuple(plain_class_of(kind) for kind in types)

    def run(*args: Any, **kwargs: Any) -> Any:
        with plain_wrappers(_tensors((*args, *kwargs.values()))):
            return plain.__torch_dispatch__(func, plain_types, args, kwargs)

    with _NO_GUARD():
        touched = _paged_arguments(args, kwargs or {})
        if not touched or func in _ALIASES:
            return _guard_views(run(*args, **(kwargs or {})), touched)
        return _run_pinned(func, args, kwargs or {}, touched, run)


def _copied_attributes(tensor: torch.Tensor, memo: dict[int, Any]) -> dict[str, Any]:
    """What a parameter class of the user's keeps on its objects; a module stays the same one."""
    return {
        name: memo.get(id(value), value)
        if isinstance(value, nn.Module)
        else copy.deepcopy(value, memo)
        for name, value in vars(tensor).items()
    }


def plain_copy(tensor: torch.Tensor, memo: dict[int, Any] | None = None) -> torch.Tensor:
    """A copy of a guarded tensor or parameter with memory of its own and the user's class."""
    with torch.no_grad():
        values = tensor.clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        copied: torch.Tensor = nn.Parameter(values, requires_grad=tensor.requires_grad)
        plain = plain_class_of(type(tensor))
        if plain is not nn.Parameter and not is_wrapper(copied):
            copied.__class__ = plain
            copied.__dict__.update(_copied_attributes(tensor, {} if memo is None else memo))
        return copied
    return values.requires_grad_(tensor.requires_grad)


def _run_backward(func: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if not kwargs.get("materialize_grads"):
        return func(*_as_edges(args), **_as_edges(kwargs))
    # torch refuses it for gradient edges.
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    wanted = given["inputs"] if isinstance(given["inputs"], (tuple, list)) else (given["inputs"],)
    found = func(**_as_edges({**given, "materialize_grads": False, "allow_unused": True}))
    with _NO_GUARD():
        return tuple(
            torch.zeros_like(tensor, requires_grad=given.get("create_graph", False))
            if gradient is None
            else gradient
            for tensor, gradient in zip(wanted, found, strict=True)
        )


def _as_edges(value: Any) -> Any:
    if isinstance(value, Guarded):
        assert isinstance(value, torch.Tensor)
        with _NO_GUARD():
            return torch.autograd.graph.get_gradient_edge(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_as_edges(item) for item in value)
    if isinstance(value, dict):
        return {key: _as_edges(item) for key, item in value.items()}
    return value


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _paged_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[torch.Tensor, PagedParameter]]:
    found = []
    for tensor in _tensors((*args, *kwargs.values())):
        for leaf in leaves(tensor):
            paged = find_paged(leaf)
            if paged is not None:
                found.append((tensor, paged))
                if leaf is not tensor:
                    found.append((leaf, paged))
    return found


def refuse_transforms(what: str) -> None:
    """Refuse torch.func transforms and jit tracing over absent parameters.

    Raises:
        GuardError: one is active.
    """
    active = active_transform()
    if active is not None:
        raise GuardError(
            f"{what} is used under {active}, which reads memory that may be absent",
            remedy="wrap the call in `with engine.gathered():`",
        )


@_disable_dynamo
def _run_guarded(func: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    touched = _paged_arguments(args, kwargs)
    if not touched:
        return _run(func, args, kwargs)
    if func in _ALIASES:
        return _guard_views(_run(func, args, kwargs), touched)
    if func in REFUSED:
        raise GuardError(
            f"{getattr(func, '__name__', func)} of parameter {touched[0][1].state.name}: its "
            "memory belongs to the engine",
            remedy="use `engine.gathered(writable=True)`, or work on a clone",
        )
    if func == _SET_DATA and touched[0][0] is args[0]:
        return _replace_data(args[0], args[1], touched[0][1])
    refuse_transforms(f"parameter {touched[0][1].state.name}")
    if func in TILED_OPS and is_tiled_weight(args, kwargs, touched):
        others = [(tensor, paged) for tensor, paged in touched if paged.tiles is None]
        return _run_pinned(TILED_OPS[func], args, kwargs, others)
    if func in _FOREACH and len(args[0]) > 1:
        return _run_each(func, args, kwargs)
    return _run_pinned(func, args, kwargs, touched)


def _run_each(func: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an op on lists of tensors element by element: together they may exceed the budget."""
    count = len(args[0])

    def element(value: Any, index: int) -> Any:
        is_list = isinstance(value, (tuple, list)) and len(value) == count
        return [value[index]] if is_list else value

    results: list[Any] = []
    for index in range(count):
        chosen = {name: element(value, index) for name, value in kwargs.items()}
        result = _run_guarded(func, tuple(element(arg, index) for arg in args), chosen)
        results.extend(result or ())
    return results or None


def _run_pinned(
    func: _Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    touched: Sequence[tuple[torch.Tensor, PagedParameter]],
    run: _Call | None = None,
) -> Any:
    pages = list(dict.fromkeys(paged.page for _, paged in touched))
    holders = _by_holder(pages)
    name = getattr(func, "__qualname__", None) or repr(func)
    with contextlib.ExitStack() as stack:
        for holder, theirs in holders:
            holder.pin(theirs, name)
            stack.callback(holder.unpin, theirs)
        if not hooks_are_ours():
            stack.enter_context(page_hooks())
            for _, paged in touched:
                _disprove(paged)
        versions = [_version_of(tensor) for tensor, _ in touched]
        with _running:
            result = _run(func, args, kwargs) if run is None else run(*args, **kwargs)
        for (tensor, paged), version in zip(touched, versions, strict=True):
            if _version_of(tensor) != version:
                paged.mark_edited()
        if func in RAW:
            for holder, theirs in holders:
                for page in theirs:
                    holder.keep_until_step(page)
        return _guard_views(result, touched)


def _run(func: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors = tuple(_tensors((*args, *kwargs.values())))
    with plain_wrappers(tensors):
        return run_plain(func, tensors, args, kwargs)


def _by_holder(pages: Sequence[WeightPage]) -> list[tuple[Any, list[WeightPage]]]:
    holders: dict[int, tuple[Any, list[WeightPage]]] = {}
    for page in pages:
        holders.setdefault(id(page.holder), (page.holder, []))[1].append(page)
    return list(holders.values())


class _Running(threading.local):
    """How many guarded ops this thread is inside of: those of a user's class run others."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


_running = _Running()


def _disprove(paged: PagedParameter) -> None:
    """The plain class would hide this use in its module's next forward: keep the guard there.

    What an op makes inside itself does not matter: the op is guarded, and its result is looked at.
    """
    if paged.page.windows and not _running.depth:
        paged.needs_guard = True


def _version_of(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _guard_views(result: Any, touched: Sequence[tuple[torch.Tensor, PagedParameter]]) -> Any:
    arguments = [tensor for tensor, _ in touched]
    for tensor in _tensors((result,)):
        if any(tensor is argument for argument in arguments):
            continue
        if is_wrapper(tensor):
            _guard_wrapper(tensor)
        elif not isinstance(tensor, Guarded):
            paged = find_paged(tensor)
            if paged is not None:
                tensor.__class__ = GuardedTensor
                _disprove(paged)
    return result


def _guard_wrapper(wrapper: torch.Tensor) -> None:
    """Guard the result of an op if it has memory of a page inside, else let it be plain."""
    shares = False
    for leaf in leaves(wrapper):
        paged = find_paged(leaf)
        if paged is None:
            continue
        if paged.composite is not None and wrapper in paged.composite:
            return  # an op in place, on the parameter itself
        shares = True
        if leaf is not paged.state.parameter:
            leaf.__class__ = GuardedTensor
        _disprove(paged)
    plain = plain_class_of(type(wrapper))
    wrapper.__class__ = guard_class_of(plain) if shares else plain


def _replace_data(parameter: torch.Tensor, values: torch.Tensor, paged: PagedParameter) -> None:
    same_kind = (
        not is_wrapper(parameter)
        and values.shape == parameter.shape
        and values.dtype == parameter.dtype
        and values.device == parameter.device
    )
    if not same_kind:
        raise GuardError(
            f"the data of parameter {paged.state.name} cannot become another class, shape, dtype "
            "or device: the engine has laid out its memory",
            remedy="convert the model before offload.initialize, or change precision.compute",
        )
    if find_paged(values) is paged:
        return
    with torch.no_grad(), _preserve_version(parameter):
        _run_pinned(torch.Tensor.copy_, (parameter, values), {}, [(parameter, paged)])
    paged.mark_edited()
