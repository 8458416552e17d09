"""The manifest of a checkpoint: what it holds, how large, with which checksums.

[Note: checkpoint folder]
    <directory>/<tag>/manifest.json    written last; a folder without a valid one is no checkpoint
    <directory>/<tag>/data-00000.bin   blocks of state. Either the checkpoint's own file, or a
                                       second name of a backing file of the nvme tier, of which it
                                       needs what the manifest lists
    <directory>/LATEST                 the last tag: a hint for people, never trusted
    <directory>/.tmp-*                 a save that has not ended; locked by its writer
    <directory>/.old-*                 what a save under an existing tag replaced, until that stands
Names of files follow from their index alone; no name in a manifest becomes a path.

[Note: manifest bytes]
    {"crc32c":"xxxxxxxx",
    "body":{...}}
The checksum is over the bytes of the body, so that any flipped bit is found before the JSON is
looked at. The body's "sequence" grows with every save in a directory: the newest manifest that
verifies wins, whatever clocks say.

[Note: manifest body]
    files     [bytes, ...]             lengths of the data files
    blocks    [[file, offset, bytes, seed, crc32c], ...]
                                       ranges of files; the CRC32C continues from the seed. A block
                                       of zeros has file -1, and is stored nowhere
    tensors   [[kind, name, field, dtype, shape, stride, [[block, offset, bytes], ...]], ...]
                                       pieces of blocks, in the order of the tensor's memory; stride
                                       null is row-major. kind: parameter, gradient or buffer
    values    plain values beside the tensors (see `checkpoint`)
Ranges of tensors and fields are as in [Note: State fields]; a buffer's field is "buffer".
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from offload.errors import CheckpointError
from offload.state import durable
from offload.state.safetensors_stream import MAX_DIMENSIONS, MAX_TENSORS, checksum_of

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
# 1e6 tensors at 512 bytes of JSON each.
MAX_MANIFEST_BYTES = 512 << 20
MAX_FILES = 100_000
MAX_BLOCKS = 4_000_000
ZEROS = -1  # the file of a block of zeros
_BODY_FIELDS = {
    "format_version", "tag", "sequence", "offload_version", "torch_version",
    "files", "blocks", "tensors", "values",
}  # fmt: skip
_KINDS = ("parameter", "gradient", "buffer")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED_TAGS = ("LATEST",)


class BlockRecord(NamedTuple):
    """One range of a data file, or zeros; see [Note: manifest body]."""

    file: int
    offset: int
    nbytes: int
    seed: int
    crc32c: int


class PieceRecord(NamedTuple):
    """Bytes [offset, offset + nbytes) of a block."""

    block: int
    offset: int
    nbytes: int


class TensorRecord(NamedTuple):
    """One tensor; see [Note: manifest body]. `dtype` is as torch prints it."""

    kind: str
    name: str
    field: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    pieces: tuple[PieceRecord, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest; `files` are the lengths of the data files in bytes."""

    tag: str
    sequence: int
    offload_version: str
    torch_version: str
    files: tuple[int, ...]
    blocks: tuple[BlockRecord, ...]
    tensors: tuple[TensorRecord, ...]
    values: dict[str, Any]

    def find(self, kind: str, name: str, field: str) -> TensorRecord:
        """One tensor.

        Raises:
            CheckpointError: it is not there.
        """
        for record in self.tensors:
            if (record.kind, record.name, record.field) == (kind, name, field):
                return record
        raise CheckpointError(f"the checkpoint has no {field} of {name!r}")


def data_file_name(index: int) -> str:
    """Name of a checkpoint's data file."""
    return f"data-{index:05d}.bin"


def check_tag(tag: str) -> str:
    """Return `tag` if it may name a folder.

    Raises:
        CheckpointError: it is empty, too long, reserved, or has characters outside letters, digits
            and ``._-``.
    """
    if not _TAG.fullmatch(tag) or tag in _RESERVED_TAGS:
        raise CheckpointError(
            f"{tag!r} cannot name a checkpoint",
            expected="1 to 128 letters, digits, dots, underscores or hyphens; none of ._- first",
        )
    return tag


def _checksum(data: bytes) -> int:
    return checksum_of(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def encode(manifest: Manifest) -> bytes:
    """The bytes of `MANIFEST_NAME` (see [Note: manifest bytes])."""
    body = {"format_version": FORMAT_VERSION, **_fields_of(manifest)}
    text = json.dumps(body, separators=(",", ":")).encode()
    return b'{"crc32c":"%08x",\n"body":' % _checksum(text) + text + b"}\n"


def _fields_of(manifest: Manifest) -> dict[str, Any]:
    # Records stay tuples, which JSON writes as lists.
    return {field.name: getattr(manifest, field.name) for field in fields(manifest)}


def read(folder: Path) -> Manifest:
    """Read and verify the manifest of one checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or of another format version; the message names the file.
    """
    path = folder / MANIFEST_NAME
    try:
        data = durable.read_small_file(path, limit_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: the manifest cannot be read ({error})") from error
    body = _verified_body(path, data)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}",
            expected=f"{FORMAT_VERSION}",
            remedy="load it with the version of offload that wrote it "
            f"({body.get('offload_version')!r})",
        )
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the manifest is malformed ({error})") from error


def _verified_body(path: Path, data: bytes) -> dict[str, Any]:
    match = re.match(rb'\{"crc32c":"([0-9a-f]{8})",\n"body":', data)
    if match is None or not data.endswith(b"}\n"):
        raise CheckpointError(f"{path}: damaged or truncated: this is no manifest")
    text = data[match.end() : -2]
    if not text or _checksum(text) != int(match[1], 16):
        raise CheckpointError(f"{path}: damaged: the body does not have the checksum it states")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the manifest is no valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: the manifest's body is no JSON object")
    return body


def _parse(body: dict[str, Any]) -> Manifest:
    if set(body) != _BODY_FIELDS:
        raise ValueError(f"fields {sorted(set(body) ^ _BODY_FIELDS)} are missing or unknown")
    counts = {"files": MAX_FILES, "blocks": MAX_BLOCKS, "tensors": MAX_TENSORS}
    for name, most in counts.items():
        if len(body[name]) > most:
            raise ValueError(f"more than {most} {name}")
    files = tuple(_count(nbytes) for nbytes in body["files"])
    blocks = tuple(_parse_block(record, files) for record in body["blocks"])
    tensors = tuple(_parse_tensor(record, blocks) for record in body["tensors"])
    if len({(record.kind, record.name, record.field) for record in tensors}) != len(tensors):
        raise ValueError("a tensor is listed twice")
    if not isinstance(body["values"], dict):
        raise TypeError("values is no object")
    return Manifest(
        tag=check_tag(body["tag"]),
        sequence=_count(body["sequence"]),
        offload_version=str(body["offload_version"]),
        torch_version=str(body["torch_version"]),
        files=files,
        blocks=blocks,
        tensors=tensors,
        values=body["values"],
    )


def _parse_block(record: list[Any], files: tuple[int, ...]) -> BlockRecord:
    block = BlockRecord(*record)
    if block.file == ZEROS and type(block.file) is int:
        _count(block.nbytes)
        return block
    for value in block:
        _count(value)
    if block.file >= len(files):
        raise ValueError(f"a block is in file {block.file} of {len(files)}")
    if block.offset + block.nbytes > files[block.file]:
        raise ValueError(f"a block ends at {block.offset + block.nbytes} of {files[block.file]}")
    return block


def _parse_tensor(record: list[Any], blocks: tuple[BlockRecord, ...]) -> TensorRecord:
    kind, name, field, dtype, shape, stride, pieces = record
    if not all(type(text) is str for text in (kind, name, field, dtype)):
        raise TypeError("a tensor's kind, name, field or dtype is no string")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    parsed = TensorRecord(
        kind,
        name,
        field,
        dtype,
        tuple(_count(d) for d in shape),
        None if stride is None else tuple(_count(step) for step in stride),
        tuple(PieceRecord(*map(_count, piece)) for piece in pieces),
    )
    for piece in parsed.pieces:
        if piece.block >= len(blocks) or piece.offset + piece.nbytes > blocks[piece.block].nbytes:
            raise ValueError(f"tensor {name!r} is outside of its blocks")
    _check_memory(parsed)
    return parsed


def _check_memory(tensor: TensorRecord) -> None:
    """Shape, dtype and stride are those of the bytes, with nothing outside of them."""
    dtype = getattr(torch, tensor.dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or str(dtype) != tensor.dtype:
        raise ValueError(f"tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
    numel = math.prod(tensor.shape)
    if len(tensor.shape) > MAX_DIMENSIONS or numel * dtype.itemsize != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} is not the bytes that it claims")
    if tensor.stride is not None and numel:
        if len(tensor.stride) != len(tensor.shape):
            raise ValueError(f"tensor {tensor.name!r} has no valid stride")
        steps = zip(tensor.shape, tensor.stride, strict=True)
        if sum((size - 1) * step for size, step in steps) != numel - 1:
            raise ValueError(f"tensor {tensor.name!r} has a stride that is not dense")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value
