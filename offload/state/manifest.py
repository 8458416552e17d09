"""The manifest of a checkpoint: what it holds, how large, with which checksums.

[Note: checkpoint folder]
    <directory>/<tag>/manifest.json    written last; a folder without a valid one is no checkpoint
    <directory>/<tag>/state-00000.safetensors
                                       tensors of [Note: state] and buffers, keyed "<field>|<name>"
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
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.state import durable
from offload.state.safetensors_stream import MAX_TENSORS, checksum_of

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# 1e6 tensors at 512 bytes of JSON each.
MAX_MANIFEST_BYTES = 512 << 20
MAX_FILES = 100_000
_BODY_FIELDS = {
    "format_version", "tag", "sequence", "offload_version", "torch_version",
    "files", "tensors", "values",
}  # fmt: skip
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED_TAGS = ("LATEST",)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One data file: its length, and the CRC32C of its header with length prefix and padding."""

    nbytes: int
    header_crc32c: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor: `kind` is "parameter" or "buffer"; a buffer's field is "buffer"; `file` indexes
    `Manifest.files`.
    """

    kind: str
    name: str
    field: str
    file: int
    dtype: str
    shape: tuple[int, ...]
    crc32c: int

    @property
    def key(self) -> str:
        """The tensor's name inside its file."""
        return f"{self.field}|{self.name}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest; `values` are the plain values beside the tensors (see `checkpoint`)."""

    tag: str
    sequence: int
    offload_version: str
    torch_version: str
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    values: dict[str, Any]


def data_file_name(index: int) -> str:
    """Name of a checkpoint's data file."""
    return f"state-{index:05d}.safetensors"


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
    body = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps(body, separators=(",", ":")).encode()
    return b'{"crc32c":"%08x",\n"body":' % _checksum(text) + text + b"}\n"


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
    if len(body["files"]) > MAX_FILES or len(body["tensors"]) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_FILES} files or {MAX_TENSORS} tensors")
    files = tuple(FileRecord(**_counts(record)) for record in body["files"])
    tensors = tuple(_parse_tensor(record, len(files)) for record in body["tensors"])
    if len({(record.file, record.key) for record in tensors}) != len(tensors):
        raise ValueError("a tensor is listed twice")
    if not isinstance(body["values"], dict):
        raise TypeError("values is no object")
    return Manifest(
        tag=check_tag(body["tag"]),
        sequence=_count(body["sequence"]),
        offload_version=str(body["offload_version"]),
        torch_version=str(body["torch_version"]),
        files=files,
        tensors=tensors,
        values=body["values"],
    )


def _parse_tensor(record: dict[str, Any], num_files: int) -> TensorRecord:
    parsed = TensorRecord(**{**record, "shape": tuple(_count(d) for d in record["shape"])})
    texts = (parsed.kind, parsed.name, parsed.field, parsed.dtype)
    if not all(type(text) is str for text in texts):
        raise TypeError("a tensor's kind, name, field or dtype is no string")
    if parsed.kind not in {"parameter", "buffer"}:
        raise ValueError(f"unknown kind {parsed.kind!r}")
    if _count(parsed.file) >= num_files:
        raise ValueError(f"tensor {parsed.name!r} is in file {parsed.file} of {num_files}")
    _count(parsed.crc32c)
    return parsed


def _counts(record: dict[str, Any]) -> dict[str, int]:
    return {name: _count(value) for name, value in record.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value
