"""How the elements of a saved tensor lie in memory, and how they get there again.

[Note: Views]
Only the elements that a view covers move, and they come back with the same strides and at the same
address modulo 64: kernels choose their way by both, and another way gives other bits.

  dense      the elements are one range of the storage, in whatever order of dimensions: its bytes
  broadcast  dimensions of stride 0 have one element each
  gapped     elements that others lie between (a slice of a fused projection): they are compacted on
             the device, and spread again when they come back
  overlapping (a sliding window) stays where it is
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class View:
    """The geometry of one tensor over its bytes.

    Attributes:
        dtype, size, stride: of the tensor.
        distinct: the size without broadcast dimensions, which are 1 here.
        numel: elements of `distinct`.
        span: elements from the first to the last in memory.
        misalignment: bytes of the first element's address beyond a multiple of 64.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    distinct: tuple[int, ...]
    numel: int
    span: int
    misalignment: int

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements."""
        return self.numel * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the distinct elements are one range of memory."""
        return self.span == self.numel

    def bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The distinct elements as uint8, 1-D: an alias of a dense tensor, of another a copy."""
        if self.is_dense:
            first = int(tensor.storage_offset()) * self.dtype.itemsize
            return _over(tensor.untyped_storage(), torch.uint8, first, (self.nbytes,), (1,))
        compact = tensor.as_strided(self.distinct, self.stride).contiguous()
        return compact.view(-1).view(torch.uint8)

    def new_bytes(self, device: torch.device) -> torch.Tensor:
        """New memory for the bytes, uint8, 1-D, aligned as those of the tensor are."""
        return _aligned(self.nbytes, self.misalignment, device)

    def tensor_over(self, bytes_: torch.Tensor) -> torch.Tensor:
        """The tensor over its bytes: an alias of them if it is dense, else spread in new memory."""
        if not self.is_dense:
            spread = _aligned(self.span * self.dtype.itemsize, self.misalignment, bytes_.device)
            self._over(spread, self.distinct).copy_(bytes_.view(self.dtype).view(self.distinct))
            bytes_ = spread
        return self._over(bytes_, self.size)

    def _over(self, bytes_: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        first = int(bytes_.storage_offset()) // self.dtype.itemsize
        return _over(bytes_.untyped_storage(), self.dtype, first, size, self.stride)


def view_of(tensor: torch.Tensor) -> View | None:
    """The geometry of a strided tensor; None if elements overlap or its address is odd."""
    size, stride = tuple(tensor.size()), tuple(tensor.stride())
    numel = span = 1
    for step, count in sorted(zip(stride, size, strict=True)):
        if step == 0 or count == 1:
            continue
        if step < span:
            return None
        numel *= count
        span += step * (count - 1)
    address = tensor.data_ptr()
    if address % tensor.dtype.itemsize:
        return None
    return View(
        tensor.dtype,
        size,
        stride,
        tuple(1 if step == 0 else count for step, count in zip(stride, size, strict=True)),
        numel,
        span,
        address % _ALIGNMENT_BYTES,
    )


def _aligned(nbytes: int, misalignment: int, device: torch.device) -> torch.Tensor:
    memory = torch.empty(nbytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    return memory.narrow(0, (misalignment - memory.data_ptr()) % _ALIGNMENT_BYTES, nbytes)


def _over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    first: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, first, size, stride)
