"""Reading and writing the training state of one parameter, wherever it is.

[Note: State fields]
    weight               the compute dtype, in the parameter's shape
    remainder | master   what completes it to fp32: int16 beside bf16, fp32 beside fp16
    exp_avg, ...         the optimizer's tensors, under the names that torch gives them
    gradient             what has arrived in this step; absent before
All tensors are full, on the CPU, and copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from offload.engine.paging.pager import Pager
from offload.engine.paging.pages import WeightPage
from offload.errors import OffloadError
from offload.optim.chunk_update import OptimizerUpdate
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
        state_class = _class_of(name)
        flat: torch.Tensor | None = None
        for chunk in self._buckets[state.bucket].chunks:
            block = self._store.block(state.bucket, state_class)
            field = _field(block, chunk.index, name)
            for segment in segments(self._buckets[state.bucket], chunk):
                if segment.param != state.index:
                    continue
                staged = self._store.load(block, chunk.index)
                part = field_tensor(staged.tensor, field, segment.start_in_chunk, segment.numel)
                if flat is None:
                    flat = torch.empty(state.numel, dtype=part.dtype)
                flat[segment.start_in_param : segment.start_in_param + segment.numel] = part
                staged.release()
        if flat is None:
            flat = torch.empty(0, dtype=state.parameter.dtype)
        if state.edited and name in COMPLETIONS:
            flat = self._followed(state, name)
        return self._shaped(state, flat, name)

    def write(self, state: ParameterState, name: str, tensor: torch.Tensor) -> None:
        """Replace one field by a tensor of its shape; the dtype is converted.

        A new weight alone leaves what completes it as it is: write that too, or `set_master`.

        Raises:
            OffloadError: the shape is another.
            StorageError: it could not be written.
        """
        self._pager.flush()
        known = self.fields(state).get(name)
        if known is None or tuple(tensor.shape) != known[1]:
            expected = "a field of it" if known is None else f"shape {known[1]}"
            raise OffloadError(
                f"{name} of parameter {state.name} with shape {tuple(tensor.shape)}",
                expected=expected,
                remedy=f"its fields are {', '.join(self.fields(state))}",
            )
        with torch.no_grad():
            if self._write_own_tensor(state, name, tensor):
                return
            self._write_elements(state, name, tensor.to(known[0]).cpu())
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

    def _page(self, state: ParameterState) -> WeightPage:
        return self._pager.pages[state.bucket]

    def _shape(self, state: ParameterState, field: Field) -> tuple[int, ...]:
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

    def _write_elements(self, state: ParameterState, name: str, tensor: torch.Tensor) -> None:
        if state.parameter.dtype.is_complex and not tensor.is_complex():
            tensor = torch.view_as_complex(tensor.contiguous())
        flat = memory_order(tensor, state)
        bucket = self._buckets[state.bucket]
        block = self._store.block(state.bucket, _class_of(name))
        for chunk in bucket.chunks:
            for segment in segments(bucket, chunk):
                if segment.param != state.index:
                    continue
                staged = self._store.load(block, chunk.index)
                field = _field(block, chunk.index, name)
                part = field_tensor(staged.tensor, field, segment.start_in_chunk, segment.numel)
                values = flat[segment.start_in_param : segment.start_in_param + segment.numel]
                part.copy_(values if values.dtype == part.dtype else values.view(part.dtype))
                self._store.start_store(block, chunk.index, staged)
        self._store.drain()

    def _own_tensor(self, state: ParameterState, name: str) -> torch.Tensor | None:
        """A field of an arbitrary optimizer; None if `name` has the weight's elements."""
        if _class_of(name) != "optimizer" or name in COMPLETIONS:
            return None
        block = self._store.block(state.bucket, "optimizer")
        if not isinstance(block.layout, TensorLayout):
            return None
        staged = self._store.load(block, 0)
        tensor = block.layout.tensors(state.index, staged.tensor)[name].clone()
        staged.release()
        return tensor

    def _write_own_tensor(self, state: ParameterState, name: str, tensor: torch.Tensor) -> bool:
        if _class_of(name) != "optimizer" or name in COMPLETIONS:
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


def _class_of(name: str) -> str:
    return {"weight": "weights", "gradient": "gradients"}.get(name, "optimizer")


def _field(block: Block, chunk: int, name: str) -> Field:
    fields: Iterator[Field] = (f for f in block.layout.element_fields(chunk) if f.name == name)
    return next(fields)
