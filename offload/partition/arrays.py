"""Views between torch tensors, the bytes of chunk blocks and the arrays that kernels take."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload.partition.layout import Field
from offload.partition.parameters import ParameterState

# Number formats by their short name. 16-bit floats reach kernels as their bits, uint16.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ARRAY_DTYPES: dict[str, Any] = {
    "fp32": np.float32,
    "bf16": np.uint16,
    "fp16": np.uint16,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
}


def field_tensor(chunk: torch.Tensor, field: Field, start: int, numel: int) -> torch.Tensor:
    """The values of `numel` elements from element `start` of a chunk; 1-D, of the field's dtype.

    `chunk` is the chunk block: uint8, 1-D.
    """
    return chunk[_bytes(field, start, numel)].view(TORCH_DTYPES[field.dtype])


def field_array(
    chunk: torch.Tensor, field: Field, start: int, numel: int
) -> npt.NDArray[np.generic]:
    """As `field_tensor`, as the array a kernel takes: 16-bit floats as their bits."""
    raw: npt.NDArray[np.generic] = chunk[_bytes(field, start, numel)].numpy()
    return raw.view(_ARRAY_DTYPES[field.dtype])


def _bytes(field: Field, start: int, numel: int) -> slice:
    values = field.values(start, numel)
    return slice(
        field.offset_bytes + values.start * field.itemsize,
        field.offset_bytes + values.stop * field.itemsize,
    )


def tensor_bits(flat: torch.Tensor) -> npt.NDArray[np.generic]:
    """A 1-D contiguous CPU tensor as the array a kernel takes."""
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.view(torch.uint16)
    array: npt.NDArray[np.generic] = flat.numpy()
    return array


def memory_order(tensor: torch.Tensor, state: ParameterState) -> torch.Tensor:
    """The elements, 1-D, of a tensor of the parameter's shape in the order of its memory.

    A view if the tensor lies in memory as the parameter does, else a copy. A sparse gradient
    becomes dense, a complex one the pairs of its parts, a part of a composite its bytes.
    """
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tuple(tensor.stride()) != state.stride and tensor.numel():
        ordered = torch.empty_strided(
            state.shape, state.stride, dtype=tensor.dtype, device=tensor.device
        )
        tensor = ordered.copy_(tensor)
    flat = tensor.as_strided((tensor.numel(),), (1,))
    if flat.is_complex():
        return torch.view_as_real(flat).flatten()
    return flat if flat.numel() == state.numel else flat.view(torch.uint8)


def module_order(flat: torch.Tensor, state: ParameterState) -> torch.Tensor:
    """The inverse of `memory_order`: a view, in the parameter's shape, of its elements."""
    if state.parameter.dtype.is_complex:
        flat = torch.view_as_complex(flat.view(-1, 2))
    return flat.as_strided(state.shape, state.stride)
