"""What would have been computed: the values of tensors as the ops that make them.

[Note: Tape]
  version     the bytes of one storage at one moment. A version is made by an operation, read from a
              file (a leaf), or blank: memory that nothing has written yet.
  view        a tensor over a version: dtype, size, stride and offset.
  operation   one op with its arguments: views in place of deferred tensors, copies of real ones.
              It reads versions, and makes one version for each storage it writes to and for each
              tensor it returns. A random operation knows the generator's state before it ran.
An in-place op makes a new version of the same storage from the old one, so versions never change,
and each holds exactly the operations that it needs: what is overwritten as a whole is forgotten.

`evaluate` runs those operations in the order in which they were recorded, each once, and frees a
version after its last use. In-place ops run in place: whatever needs the old version was recorded,
and so runs, before them.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from offload.errors import CheckpointError, OffloadError, StorageError
from offload.tiers.memory import HeapTrimmer

_moments = itertools.count()
# What ops allocate comes from the heap.
passed_memory = HeapTrimmer(32 << 20)
_Call = Callable[..., Any]


class Leaf(Protocol):
    """Values that are read, not computed: a dense row-major tensor somewhere else."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel), row-major: 1-D, newly allocated."""
        ...


class Version:
    """The bytes of one storage at one moment; see [Note: Tape].

    Attributes:
        nbytes: of the storage.
        origin: the operation or leaf that it comes from; None for blank memory.
        result: which of the operation's results it is: first those written, then those returned.
    """

    __slots__ = ("nbytes", "origin", "result")

    def __init__(
        self, nbytes: int, origin: Operation | Leaf | None = None, result: int = 0
    ) -> None:
        self.nbytes = nbytes
        self.origin = origin
        self.result = result


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor over a version; `offset`, `size` and `stride` in elements of `dtype`."""

    version: Version
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugated: bool = False
    negated: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor over real memory."""
        tensor = torch.empty(0, dtype=self.dtype)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conjugated:
            tensor = torch._conj(tensor)
        return torch._neg_view(tensor) if self.negated else tensor


def view_of(tensor: torch.Tensor, version: Version) -> View:
    """What `tensor`, whose storage has come to `version`, is."""
    return View(
        version,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        int(tensor.storage_offset()),
        tensor.is_conj(),
        tensor.is_neg(),
    )


@dataclass(frozen=True, slots=True)
class RandomState:
    """A CPU generator (None: the default one) and its state before an op drew from it."""

    generator: torch.Generator | None
    state: torch.Tensor

    @classmethod
    def now(cls, generator: torch.Generator | None) -> RandomState:
        """The state at this moment."""
        return cls(generator, (generator or torch.default_generator).get_state())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the generator is what it was; afterwards it is as if nothing had been drawn."""
        generator = self.generator or torch.default_generator
        present = generator.get_state()
        generator.set_state(self.state)
        try:
            yield
        finally:
            generator.set_state(present)


class Operation:
    """One recorded op; see [Note: Tape].

    Attributes:
        func: the aten overload.
        args, kwargs: its arguments, `View`s in place of deferred tensors.
        writes: the versions that it changes in place.
        reads: the other versions that it needs.
        random: the generator's state, of an op that draws.
        layouts: of each tensor that it returns, as deferred: its place in a storage of its own.
        moment: rises with every recorded op.
    """

    __slots__ = ("args", "func", "kwargs", "layouts", "moment", "random", "reads", "writes")

    def __init__(
        self,
        func: _Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        writes: Sequence[Version] = (),
        random: RandomState | None = None,
        layouts: Sequence[View] = (),
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.writes = tuple(dict.fromkeys(writes))
        self.random = random
        self.layouts = tuple(layouts)
        self.moment = next(_moments)
        used = dict.fromkeys(v.version for v in tree_leaves((args, kwargs)) if isinstance(v, View))
        self.reads = tuple(version for version in used if version not in self.writes)

    def run(self, memory: Mapping[Version, torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """Run on real memory, which holds `reads` and `writes`; the storages of all results."""
        args, kwargs = tree_map_only(
            View, lambda view: view.over(memory[view.version]), (self.args, self.kwargs)
        )
        state = self.random.restored() if self.random else contextlib.nullcontext()
        with state:
            returned = self.func(*args, **kwargs)
        results = [memory[version] for version in self.writes]
        if self.layouts:
            known = {storage._cdata for storage in memory.values()}
            tensors = [t for t in tree_leaves(returned) if isinstance(t, torch.Tensor)]
            for tensor, layout in zip(tensors, self.layouts, strict=True):
                results.append(_as_laid_out(tensor, layout, known))
        return results


def _as_laid_out(tensor: torch.Tensor, layout: View, known: set[int]) -> torch.UntypedStorage:
    """The storage of `tensor` if it lies as was promised, else a copy that does."""
    if tuple(tensor.shape) != layout.size or tensor.dtype is not layout.dtype:
        raise OffloadError(
            f"it gives {tensor.dtype} {tuple(tensor.shape)}, and {layout.dtype} {layout.size} was "
            "promised"
        )
    storage = tensor.untyped_storage()
    lies_so = (
        storage.nbytes() == layout.version.nbytes
        and tuple(tensor.stride()) == layout.stride
        and tensor.storage_offset() == layout.offset
        and not (tensor.is_conj() or tensor.is_neg())
    )
    if lies_so and storage._cdata not in known:
        return storage
    memory = blank_storage(layout.version.nbytes)
    layout.over(memory).copy_(tensor)
    return memory


def blank_storage(nbytes: int) -> torch.UntypedStorage:
    """Zeroed memory that goes back to the system with the storage.

    Not from the C library's heap: small allocations would settle in the hole that a large one
    leaves, the next large one would not fit, and the heap would grow to the size of the model.
    """
    if not nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).untyped_storage()


def evaluate(targets: Sequence[Version]) -> list[torch.UntypedStorage]:
    """The bytes of distinct versions, each what its storage has come to, in memory of their own.

    Raises:
        OffloadError: an op fails now although it was recorded; names the op.
    """
    operations = _needed_operations(targets)
    uses: dict[Version, int] = dict.fromkeys(targets, 1)
    made: dict[int, list[Version]] = {}
    for operation in operations:
        for version in (*operation.writes, *operation.reads):
            uses[version] = uses.get(version, 0) + 1
    for version in uses:
        if isinstance(version.origin, Operation):
            made.setdefault(version.origin.moment, []).append(version)
    memory: dict[Version, torch.UntypedStorage] = {}
    for operation in operations:
        _run(operation, memory, uses, made[operation.moment])
    return [_take(target, memory, uses) for target in targets]


def _run(
    operation: Operation,
    memory: dict[Version, torch.UntypedStorage],
    uses: dict[Version, int],
    made: Sequence[Version],
) -> None:
    given = {version: _take(version, memory, uses) for version in operation.writes}
    for version in operation.reads:
        if version not in memory:
            memory[version] = _source(version)
        given[version] = memory[version]
        uses[version] -= 1
        if not uses[version]:
            del memory[version]
    try:
        results = operation.run(given)
    except (StorageError, CheckpointError):
        raise
    except Exception as error:
        raise OffloadError(
            f"the deferred op {operation.func} fails: {error}",
            remedy="build this part of the model outside offload.deferred_init()",
        ) from error
    for version in made:
        memory[version] = results[version.result]
        passed_memory.count(version.nbytes)


def _take(
    version: Version, memory: dict[Version, torch.UntypedStorage], uses: dict[Version, int]
) -> torch.UntypedStorage:
    """The memory of a version at its last use, which may write to it.

    Whatever reads a version was recorded before the op that writes over it, and has run.
    """
    uses[version] -= 1
    assert not uses[version], "an old version is read after it was written over"
    return memory.pop(version) if version in memory else _source(version)


def _source(version: Version) -> torch.UntypedStorage:
    """The memory of a version that no operation makes."""
    assert not isinstance(version.origin, Operation), "operations run in order"
    if version.origin is None:
        return blank_storage(version.nbytes)
    leaf = version.origin
    return leaf.read(0, torch.Size(leaf.shape).numel()).untyped_storage()


def _needed_operations(targets: Sequence[Version]) -> list[Operation]:
    """Every operation that the targets depend on, in recorded order."""
    found: dict[int, Operation] = {}
    waiting = list(targets)
    while waiting:
        origin = waiting.pop().origin
        if isinstance(origin, Operation) and origin.moment not in found:
            found[origin.moment] = origin
            waiting.extend((*origin.writes, *origin.reads))
    return [found[moment] for moment in sorted(found)]


def depends_on_leaf(view: View) -> bool:
    """Whether any of the view's values is read, not computed."""
    versions = [view.version]
    for operation in _needed_operations(versions):
        versions += (*operation.writes, *operation.reads)
    return any(v.origin is not None and not isinstance(v.origin, Operation) for v in versions)


def materialize(views: Sequence[View]) -> list[torch.Tensor]:
    """Real tensors with the values of `views`; views of one version share memory as they did."""
    versions = list(dict.fromkeys(view.version for view in views))
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        memory = dict(zip(versions, evaluate(versions), strict=True))
        return [view.over(memory[view.version]) for view in views]
