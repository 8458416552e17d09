"""What of another program's checkpoint goes where in an engine, and whether all of it fits.

See [Note: foreign checkpoint] in foreign.py and [Note: import] in importing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from offload.errors import CheckpointError
from offload.optim.rules import scale_field
from offload.state.checkpoint_keys import Problems
from offload.state.foreign import Foreign, ForeignTensor, Known, count_of
from offload.state.source import StateSource, persistent_buffers

STEP = "step"
_WEIGHT_FIELDS = ("weight", "master", "remainder")
_REMEDY = (
    "strict=False begins moments that are missing at zero and passes over what is in excess; "
    "optimizer=False takes weights only"
)
_HALVES = (torch.bfloat16, torch.float16)


class ImportTarget(StateSource, Protocol):
    """The part of the engine that an import uses."""

    def set_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace parts of a parameter's state; masters and weights follow each other."""

    def keeps_scalars(self) -> bool:
        """Whether the optimizer keeps values beside its tensors."""


@dataclass(slots=True)
class Fitting:
    """What goes where, by the engine's names; made by `fit`, and then complete.

    Attributes:
        weights, buffers: all that are brought.
        copies: of tied parameters, a name and another one, and the tensors of both.
        state: the optimizer's tensors; what lacks here begins at zero.
        scalars: what else the optimizer keeps of a parameter.
        steps: updates that each parameter has had.
        new: what of the optimizer's state begins at zero.
        passed_over: what has no place here.
    """

    weights: dict[str, ForeignTensor] = field(default_factory=dict)
    buffers: dict[str, ForeignTensor] = field(default_factory=dict)
    copies: list[tuple[str, str, ForeignTensor, ForeignTensor]] = field(default_factory=list)
    state: dict[str, dict[str, ForeignTensor]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def weight(self, engine: ImportTarget, name: str) -> torch.Tensor:
        """A parameter's values, in its shape."""
        dtype, shape = engine.state_fields(name)["weight"]
        tensor = self.weights[name].read().view(shape)
        return (
            tensor if dtype.is_floating_point or dtype.is_complex else _whole(tensor, dtype, name)
        )

    def moment(self, name: str, field_name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """A tensor of the optimizer's, in the shape of the field; None: it begins at zero."""
        found = self.state.get(name, {}).get(field_name)
        if found is None:
            return None
        tensor = found.read()
        return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(shape)

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A buffer's values, in its shape and of its kind of numbers."""
        tensor = self.buffers[name].read().view(like.shape)
        return tensor if like.is_floating_point() else _whole(tensor, like.dtype, name)


def known_of(engine: ImportTarget) -> Known:
    """The engine's names, for the readers of formats."""
    buffers = [name for name, _ in persistent_buffers(engine.module)]
    names = [*engine.parameter_names(), *engine.aliases(), *buffers]
    fields = {each for name in engine.parameter_names() for each in moments_of(engine, name)}
    return Known(frozenset(names), frozenset({*fields, STEP}))


def moments_of(engine: ImportTarget, name: str) -> dict[str, tuple[int, ...]]:
    """The optimizer's fields of a parameter and their shapes; 8-bit ones without their scales."""
    fields = engine.state_fields(name)
    scales = {scale_field(each) for each in fields}
    return {
        each: tuple(shape)
        for each, (_, shape) in fields.items()
        if each not in _WEIGHT_FIELDS and each not in scales
    }


def fit(engine: ImportTarget, foreign: Foreign, *, takes_state: bool, strict: bool) -> Fitting:
    """Find a place for everything, and something for every place; see `import_checkpoint`.

    Raises:
        CheckpointError: with everything that does not fit.
    """
    fitting, problems = Fitting(), Problems(engine.module)
    names_of = {name: [name] for name in engine.parameter_names()}
    for alias, name in engine.aliases().items():
        names_of[name].append(alias)
    buffers = dict(persistent_buffers(engine.module))
    own = {*buffers, *(each for names in names_of.values() for each in names)}
    excess = sorted(set(foreign.weights) - own)
    for names in names_of.values():
        _fit_weight(fitting, problems, foreign, names, engine)
    for name, buffer in buffers.items():
        tensor = foreign.weights.get(name)
        if tensor is not None and _fits(tensor, tuple(buffer.shape), buffer.dtype):
            fitting.buffers[name] = tensor
        elif tensor is not None:
            problems.add(
                f"is {_kind(tensor)}, expected {_shown(buffer.dtype, buffer.shape)}:", name
            )
        elif strict and name not in foreign.expected_missing:
            problems.add("missing: buffer", name, excess)
    if takes_state:
        excess += _fit_state(fitting, problems, foreign, names_of, engine, strict=strict)
    if strict:
        for name in excess:
            problems.add("in excess:", name, own)
    fitting.passed_over = excess
    problems.raise_if_any(foreign.path, remedy=_REMEDY if strict else None)
    return fitting


def _fit_weight(
    fitting: Fitting,
    problems: Problems,
    foreign: Foreign,
    names: Sequence[str],
    engine: ImportTarget,
) -> None:
    """One parameter, under any of its names."""
    dtype, shape = engine.state_fields(names[0])["weight"]
    given = [(name, foreign.weights[name]) for name in names if name in foreign.weights]
    if not given:
        problems.add("missing:", names[0], foreign.weights)
        return
    for name, tensor in given:
        if not _fits(tensor, tuple(shape), dtype):
            problems.add(f"is {_kind(tensor)}, expected {_shown(dtype, shape)}:", name)
            return
    # The name that has the optimizer's state has the master; another may be rounded.
    given.sort(key=lambda item: item[0] not in foreign.state)
    (name, tensor), *others = given
    fitting.weights[names[0]] = tensor
    fitting.copies += [(name, other, tensor, copy) for other, copy in others]


def _fit_state(
    fitting: Fitting,
    problems: Problems,
    foreign: Foreign,
    names_of: Mapping[str, Sequence[str]],
    engine: ImportTarget,
    *,
    strict: bool,
) -> list[str]:
    """Moments and step counts of every parameter; returns what is in excess."""
    excess = []
    unused = set(foreign.state)
    for name, names in names_of.items():
        found = next((each for each in names if each in foreign.state), name)
        unused.discard(found)
        fields = dict(foreign.state.get(found, {}))
        wanted = moments_of(engine, name)
        if not wanted and not engine.module.get_parameter(name).requires_grad:
            excess += [f"{each} of {name}, which is frozen here" for each in fields]
            continue
        if not fields and not strict:
            fitting.new.append(f"optimizer state of {name}")
            continue
        _fit_step(fitting, problems, name, fields, foreign, wanted=wanted, strict=strict)
        kept = fitting.state.setdefault(name, {})
        for each, shape in wanted.items():
            tensor = fields.pop(each, None)
            if isinstance(tensor, ForeignTensor) and _fits_moment(tensor, shape):
                kept[each] = tensor
            elif isinstance(tensor, ForeignTensor):
                problems.add(f"is {_kind(tensor)}, expected {[*shape]}: {each} of", name)
            elif strict:
                problems.add(f"missing: {each} of", name)
            else:
                fitting.new.append(f"{each} of {name}")
        for each, value in fields.items():
            is_tensor = isinstance(value, ForeignTensor) and prod(value.shape) != 1
            if is_tensor or not engine.keeps_scalars():
                excess.append(f"{each} of {name}")
            else:
                fitting.scalars.setdefault(name, {})[each] = _scalar(value)
    return [*excess, *(f"optimizer state of {name}" for name in sorted(unused))]


def _fit_step(
    fitting: Fitting,
    problems: Problems,
    name: str,
    fields: dict[str, Any],
    foreign: Foreign,
    *,
    wanted: Mapping[str, Any],
    strict: bool,
) -> None:
    """The step count of one parameter, which goes out of `fields`."""
    value = fields.pop(STEP, None)
    if isinstance(value, ForeignTensor):
        value = value.read().item() if prod(value.shape) == 1 else None
    if value is not None:
        steps = count_of(value, None, f"{foreign.path}: {name}")
        fitting.steps[name] = steps
        # What torch's optimizers keep; ours ignore it.
        fitting.scalars[name] = {STEP: {"tensor": float(steps), "dtype": "float32"}}
    elif wanted and strict:
        problems.add("missing: step of", name)
    elif wanted:
        fitting.new.append(f"step of {name}")


def _scalar(value: Any) -> Any:
    """What an optimizer keeps of a parameter beside tensors of its elements, as plain values."""
    if isinstance(value, ForeignTensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.read().item(), "dtype": dtype}
    return value


def _fits(tensor: ForeignTensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    flat = tensor.may_be_flat and tensor.shape == (prod(shape),)
    if tensor.shape != shape and not flat:
        return False
    wide = [d.is_floating_point and d.itemsize > 1 for d in (tensor.dtype, dtype)]
    whole = tensor.may_be_float and tensor.dtype == torch.float32 and not dtype.is_complex
    return all(wide) or tensor.dtype == dtype or (whole and not dtype.is_floating_point)


def _fits_moment(tensor: ForeignTensor, shape: tuple[int, ...]) -> bool:
    if tensor.dtype.is_complex:
        return (*tensor.shape, 2) == shape
    return tensor.dtype.is_floating_point and (
        tensor.shape == shape or (tensor.may_be_flat and tensor.shape == (prod(shape),))
    )


def _kind(tensor: ForeignTensor) -> str:
    return _shown(tensor.dtype, tensor.shape)


def _shown(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {[*shape]}"


# -- values ----------------------------------------------------------------------------------------


def check_values(engine: ImportTarget, fitting: Fitting) -> None:
    """Read everything once.

    Raises:
        CheckpointError: something is damaged, a value that training needs is not finite, or names
            of one parameter have other values.
        StorageError: it cannot be read.
    """
    for name in fitting.weights:
        tensor = fitting.weight(engine, name)
        if engine.module.get_parameter(name).requires_grad:
            _check_finite(tensor.to(engine.state_fields(name)["weight"][0]), name)
    for name, buffer in persistent_buffers(engine.module):
        if name in fitting.buffers:
            fitting.buffer(name, buffer)
    for name, fields in fitting.state.items():
        for field_name, shape in moments_of(engine, name).items():
            if field_name in fields:
                moment = fitting.moment(name, field_name, shape)
                _check_moment(moment, engine.state_fields(name)[field_name][0], name, field_name)
    for name, other, first, second in fitting.copies:
        _check_tied(name, first.read().flatten(), other, second.read().flatten())


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} is not finite in the compute dtype, {tensor.dtype}",
            remedy="import an earlier checkpoint, or compute in bf16 or fp32",
        )


def _check_moment(
    moment: torch.Tensor | None, dtype: torch.dtype, name: str, field_name: str
) -> None:
    assert moment is not None
    _check_finite(moment, f"{field_name} of {name}")
    if dtype == torch.uint8 and bool((moment < 0).any()):
        raise CheckpointError(f"{field_name} of {name} is negative, which no 8-bit code stands for")


def _check_tied(name: str, tensor: torch.Tensor, other: str, copy: torch.Tensor) -> None:
    """The tensors of two names are the same, or the second is the first one rounded to a half."""
    rounded = [tensor, *(tensor.to(half).to(copy.dtype) for half in _HALVES)]
    if not any(torch.equal(each.to(copy.dtype), copy) for each in rounded):
        raise CheckpointError(
            f"{name} and {other} are one tied parameter of the module, and differ in the files",
            remedy="build the module untied, e.g. with tie_word_embeddings = false in its "
            "config.json",
        )


def _whole(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Whole numbers, which may stand as floats."""
    converted = tensor.to(dtype)
    if not torch.equal(converted.to(tensor.dtype), tensor):
        raise CheckpointError(f"{name} does not have the whole numbers that {dtype} needs")
    return converted
