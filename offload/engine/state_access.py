"""Reading and writing the training state of one parameter, wherever it is.

[Note: State fields]
    weight               the compute dtype, in the parameter's shape
    remainder | master   what completes it to fp32: int16 beside bf16, fp32 beside fp16
    exp_avg, ...         the optimizer's tensors, under the names that torch gives them
    gradient             what has arrived in this step; absent before
All tensors are full, on the CPU, and copies.

A moment with 8 bits a value (see [Note: 8-bit moments] in optim.moments) is two fields: its codes,
int8 or uint8 in the parameter's shape, and `exp_avg_scale`, fp32 and 1-D. Blocks follow the
parameter's memory, so the codes say nothing in another order: where that differs from the order of
the shape, and of a complex parameter, the field is the fp32 values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import WeightPage
from offload.errors import OffloadError
from offload.optim.chunk_update import OptimizerUpdate
from offload.optim.moments import EncodedMoment, decode, encode
from offload.optim.rules import scale_field
from offload.optim.split import merge_tensor, split_tensor
from offload.partition.arrays import TORCH_DTYPES, field_tensor, memory_order, module_order
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import Bucket, Field, segments
from offload.partition.parameters import ParameterState
from offload.partition.tensor_layout import TensorLayout

COMPLETIONS = ("remainder", "master")


class StateAccess:
    """The state of an engine's parameters by name; see [Note: State fields].

    Every call leaves the tiers within their budgets: one chunk is staged at a time.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        buckets: Sequence[Bucket],
        store: BlockStore,
        pager: Pager,
    ) -> None:
        self._parameters = parameters
        self._buckets = buckets
        self._store = store
        self._pager = pager
        self._by_name = {name: state for state in parameters for name in state.names}

    def parameter(self, name: str) -> ParameterState:
        """The parameter of that name; any of its names will do.

        Raises:
            OffloadError: there is none.
        """
        if name not in self._by_name:
            raise OffloadError(
                f"the model has no parameter {name}",
                remedy="see engine.parameter_names()",
            )
        return self._by_name[name]

    def fields(self, state: ParameterState) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every field of a parameter but its gradient."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (state.parameter.dtype, tuple(state.shape))
        }
        if not state.trainable or "optimizer" not in self._store.classes(state.bucket):
            return found
        layout = self._store.block(state.bucket, "optimizer").layout
        for field in layout.element_fields(0):
            found[field.name] = (TORCH_DTYPES[field.dtype], self._shape(state, field))
        for name in () if _in_shape_order(state) else self.eight_bit_moments(state):
            found[name] = (torch.float32, found[name][1])
            del found[scale_field(name)]
        if isinstance(layout, TensorLayout):
            for spec in layout.keys(state.index):
                found[spec.key] = (spec.dtype, spec.shape)
        return found

    def read(self, state: ParameterState, name: str) -> torch.Tensor:
        """A copy of one field.

        Raises:
            StorageError: it could not be read.
        """
        self._pager.flush()
        tensor = self._own_tensor(state, name)
        if tensor is not None:
            return tensor
        if name in self.eight_bit_moments(state) and not _in_shape_order(state):
            return self.read_moment(state, name)
        flat = self._read_elements(state, name)
        if state.edited and name in COMPLETIONS:
            flat = self._followed(state, name)
        return flat if self._is_scale(state, name) else self._shaped(state, flat, name)

    def _read_elements(self, state: ParameterState, name: str) -> torch.Tensor:
        """All values of a field, 1-D, in the order of the parameter's memory."""
        block = self._store.block(state.bucket, class_of(name))
        dtype = TORCH_DTYPES[_field(block, 0, name).dtype]
        flat = torch.empty(0, dtype=dtype)
        for chunk in self._buckets[state.bucket].chunks:
            field = _field(block, chunk.index, name)
            for segment in segments(self._buckets[state.bucket], chunk):
                if segment.param != state.index:
                    continue
                staged = self._store.load(block, chunk.index)
                part = field_tensor(staged.tensor, field, segment.start_in_chunk, segment.numel)
                if not flat.numel():
                    flat = torch.empty(field.values(0, state.numel).stop, dtype=dtype)
                flat[field.values(segment.start_in_param, segment.numel)] = part
                staged.release()
        return flat

    def eight_bit_moments(self, state: ParameterState) -> list[str]:
        """The names of the moments that are kept with 8 bits a value."""
        names = [field.name for field in self._optimizer_fields(state)]
        return [name for name in names if scale_field(name) in names]

    def is_converted(self, state: ParameterState, name: str) -> bool:
        """Whether a field is not the bytes that stand in the blocks, but made from them."""
        return name in self.eight_bit_moments(state) and not _in_shape_order(state)

    def gradient_dtype(self, state: ParameterState) -> torch.dtype:
        """The dtype that a trainable parameter's gradient has at home."""
        block = self._store.block(state.bucket, "gradients")
        return TORCH_DTYPES[_field(block, 0, "gradient").dtype]

    def write_gradient(self, state: ParameterState, tensor: torch.Tensor) -> None:
        """Replace the gradient at home, in the parameter's shape; its dtype is converted."""
        shape = tuple(state.shape)
        if state.parameter.dtype.is_complex:
            shape = (*shape, 2)
        self._check_shape(state, "gradient", tensor, shape)
        flat = self._memory_order(state, tensor.to(self.gradient_dtype(state)).cpu())
        self._write_elements(state, "gradient", flat)

    def read_moment(self, state: ParameterState, name: str) -> torch.Tensor:
        """The fp32 values of a moment that is kept with 8 bits a value."""
        self._pager.flush()
        codes = self._read_elements(state, name)
        scales = self._read_elements(state, scale_field(name))
        return self._shaped(state, decode(EncodedMoment(codes, scales)), name)

    def write_moment(self, state: ParameterState, name: str, tensor: torch.Tensor) -> None:
        """Replace a moment that is kept with 8 bits a value by what is next to these values.

        Raises:
            OffloadError: the shape is another, or the moment cannot have these values.
            StorageError: it could not be written.
        """
        self._pager.flush()
        field = self._codes_field(state, name)
        self._check_shape(state, name, tensor, self._shape(state, field))
        signed = field.dtype == "int8"
        if not bool(torch.isfinite(tensor).all()) or not (signed or bool((tensor >= 0).all())):
            raise OffloadError(
                f"{name} of parameter {state.name}: values that no code stands for",
                expected="finite ones" if signed else "finite ones, no less than 0",
            )
        self._encode(state, name, tensor)

    def _encode(self, state: ParameterState, name: str, tensor: torch.Tensor) -> None:
        values = self._memory_order(state, tensor.detach().float().cpu())
        encoded = encode(values, signed=self._codes_field(state, name).dtype == "int8")
        self._write_elements(state, name, encoded.codes)
        self._write_elements(state, scale_field(name), encoded.scales)

    def write(self, state: ParameterState, name: str, tensor: torch.Tensor) -> None:
        """Replace one field by a tensor of its shape; the dtype is converted.

        A new weight alone leaves what completes it as it is: write that too, or `set_master`. A
        floating-point tensor for the codes of a moment is its values.

        Raises:
            OffloadError: the shape is another.
            StorageError: it could not be written.
        """
        self._pager.flush()
        known = self.fields(state).get(name)
        self._check_shape(state, name, tensor, None if known is None else known[1])
        assert known is not None
        with torch.no_grad():
            if self._write_own_tensor(state, name, tensor):
                return
            if name in self.eight_bit_moments(state) and tensor.is_floating_point():
                self._encode(state, name, tensor)
                return
            flat = tensor.to(known[0]).cpu()
            if not self._is_scale(state, name):
                flat = self._memory_order(state, flat)
            self._write_elements(state, name, flat)
        if name == "weight":
            self._pager.drop_stale(self._page(state))
        elif name in COMPLETIONS:
            state.edited = False

    def master(self, state: ParameterState) -> torch.Tensor:
        """The fp32 values of a parameter, complex ones as they are: what the optimizer updates."""
        weight = self.read(state, "weight")
        for name in COMPLETIONS:
            if name in self.fields(state):
                rest = self.read(state, name)
                return rest if name == "master" else merge_tensor(weight, rest)
        return weight if weight.is_complex() else weight.float()

    def set_master(self, state: ParameterState, values: torch.Tensor) -> None:
        """Set the weight, and what completes it, from fp32 values of the parameter's shape."""
        values = values.detach().cpu()
        if not state.parameter.dtype.is_complex:
            values = values.float()
        fields = self.fields(state)
        if "remainder" in fields:
            high, low = split_tensor(values)
            self.write(state, "weight", high)
            self.write(state, "remainder", low)
            return
        self.write(state, "weight", values)
        if "master" in fields:
            self.write(state, "master", values)

    def _check_shape(
        self,
        state: ParameterState,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[int, ...] | None,
    ) -> None:
        if tuple(tensor.shape) != shape:
            raise OffloadError(
                f"{name} of parameter {state.name} with shape {tuple(tensor.shape)}",
                expected="a field of it" if shape is None else f"shape {shape}",
                remedy=f"its fields are {', '.join(self.fields(state))}",
            )

    def _optimizer_fields(self, state: ParameterState) -> Sequence[Field]:
        if not state.trainable or "optimizer" not in self._store.classes(state.bucket):
            return ()
        return self._store.block(state.bucket, "optimizer").layout.element_fields(0)

    def _codes_field(self, state: ParameterState, name: str) -> Field:
        (field,) = [field for field in self._optimizer_fields(state) if field.name == name]
        return field

    def _is_scale(self, state: ParameterState, name: str) -> bool:
        return any(
            f.name == name and f.elements_per_value > 1 for f in self._optimizer_fields(state)
        )

    def _page(self, state: ParameterState) -> WeightPage:
        return self._pager.pages[state.bucket]

    def _shape(self, state: ParameterState, field: Field) -> tuple[int, ...]:
        if field.elements_per_value > 1:
            return (field.values(0, state.numel).stop,)
        shape = tuple(state.shape)
        pairs = state.parameter.dtype.is_complex and field.name != "weight"
        return (*shape, 2) if pairs else shape

    def _shaped(self, state: ParameterState, flat: torch.Tensor, name: str) -> torch.Tensor:
        if state.parameter.dtype.is_complex:
            whole = module_order(flat, state).contiguous()
            return whole if name in ("weight", "gradient") else torch.view_as_real(whole).clone()
        if name == "weight" and flat.dtype != state.parameter.dtype:
            flat = flat.view(state.parameter.dtype)
        return flat.as_strided(state.shape, state.stride).contiguous()

    def _followed(self, state: ParameterState, name: str) -> torch.Tensor:
        """What completes an edited weight: nothing, or the weight itself."""
        if name == "remainder":
            return torch.zeros(state.numel, dtype=torch.int16)
        return memory_order(self.read(state, "weight"), state).float()

    def _memory_order(self, state: ParameterState, tensor: torch.Tensor) -> torch.Tensor:
        if state.parameter.dtype.is_complex and not tensor.is_complex():
            tensor = torch.view_as_complex(tensor.contiguous())
        return memory_order(tensor, state)

    def _write_elements(self, state: ParameterState, name: str, flat: torch.Tensor) -> None:
        """Replace all values of a field; 1-D, in the order of the parameter's memory."""
        bucket = self._buckets[state.bucket]
        block = self._store.block(state.bucket, class_of(name))
        for chunk in bucket.chunks:
            for segment in segments(bucket, chunk):
                if segment.param != state.index:
                    continue
                staged = self._store.load(block, chunk.index)
                field = _field(block, chunk.index, name)
                part = field_tensor(staged.tensor, field, segment.start_in_chunk, segment.numel)
                values = flat[field.values(segment.start_in_param, segment.numel)]
                part.copy_(values if values.dtype == part.dtype else values.view(part.dtype))
                self._store.start_store(block, chunk.index, staged)
        self._store.drain()

    def _own_tensor(self, state: ParameterState, name: str) -> torch.Tensor | None:
        """A field of an arbitrary optimizer; None if `name` has the weight's elements."""
        if class_of(name) != "optimizer" or name in COMPLETIONS:
            return None
        block = self._store.block(state.bucket, "optimizer")
        if not isinstance(block.layout, TensorLayout):
            return None
        staged = self._store.load(block, 0)
        tensor = block.layout.tensors(state.index, staged.tensor)[name].clone()
        staged.release()
        return tensor

    def _write_own_tensor(self, state: ParameterState, name: str, tensor: torch.Tensor) -> bool:
        if class_of(name) != "optimizer" or name in COMPLETIONS:
            return False
        block = self._store.block(state.bucket, "optimizer")
        if not isinstance(block.layout, TensorLayout):
            return False
        staged = self._store.load(block, 0)
        block.layout.tensors(state.index, staged.tensor)[name].copy_(tensor)
        self._store.start_store(block, 0, staged)
        self._store.drain()
        return True


def scalar_state(
    updater: object, parameters: Sequence[ParameterState]
) -> dict[str, dict[str, Any]]:
    """The optimizer's values that are no tensors, by parameter name; plain numbers."""
    if not isinstance(updater, OptimizerUpdate):
        return {}
    return {
        parameters[index].name: {key: _plain(value) for key, value in scalars.items()}
        for index, scalars in updater.scalars.items()
    }


def load_scalar_state(
    updater: object,
    parameters: Sequence[ParameterState],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Undo `scalar_state`."""
    if not isinstance(updater, OptimizerUpdate):
        return
    updater.scalars.clear()
    for state in parameters:
        if state.name in values:
            updater.scalars[state.index] = {
                key: _revived(value) for key, value in values[state.name].items()
            }


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _revived(value: Any) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def _in_shape_order(state: ParameterState) -> bool:
    """Whether the order of the parameter's memory is that of its shape, element by element."""
    if state.parameter.dtype.is_complex:
        return False
    return torch.empty(state.shape, device="meta").stride() == tuple(state.stride)


def class_of(name: str) -> str:
    """The state class that a field belongs to."""
    return {"weight": "weights", "gradient": "gradients"}.get(name, "optimizer")


def _field(block: Block, chunk: int, name: str) -> Field:
    fields: Iterator[Field] = (f for f in block.layout.element_fields(chunk) if f.name == name)
    return next(fields)
