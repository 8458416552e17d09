"""A checkpoint on disk, read: which one, and its tensors, each after its checksum has matched."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from offload.errors import CheckpointError
from offload.state import folders, manifest
from offload.state.manifest import FileRecord, Manifest, TensorRecord
from offload.state.safetensors_stream import SafetensorsReader, checksum_of

# Fields of one parameter stand in few files; a process may open 1024 by default.
_MAX_OPEN_FILES = 16


class StoredCheckpoint:
    """The tensors of one checkpoint folder. A context manager: it keeps some of its files open.

    Attributes:
        folder: the checkpoint's own folder.
        content: its manifest.
    """

    def __init__(self, folder: Path, content: Manifest) -> None:
        self.folder = folder
        self.content = content
        self._readers: OrderedDict[int, SafetensorsReader] = OrderedDict()

    def records(self) -> list[TensorRecord]:
        """What it holds, file by file."""
        return sorted(self.content.tensors, key=lambda record: record.file)

    def verify(self) -> None:
        """Read everything once, one tensor at a time.

        Raises:
            CheckpointError: a file or a tensor is damaged; it is named.
            StorageError: a file cannot be read.
        """
        for record in self.records():
            self.read(record)
        for index in range(len(self.content.files)):  # also those without tensors
            self._reader(index)

    def read(self, record: TensorRecord) -> torch.Tensor:
        """One tensor, newly allocated, on the CPU.

        Raises:
            CheckpointError: its file or the tensor itself is damaged.
            StorageError: the file cannot be read.
        """
        reader = self._reader(record.file)
        tensor = reader.read(record.key)
        if checksum_of(tensor) != record.crc32c:
            raise CheckpointError(
                f"{reader.path}: damaged: {record.field} of {record.name!r} does not have "
                f"the checksum {record.crc32c:08x} of the manifest"
            )
        return tensor

    def dtype(self, record: TensorRecord) -> torch.dtype:
        """The dtype of a tensor, from the verified header of its file."""
        return self._reader(record.file).entries[record.key].dtype

    def _reader(self, index: int) -> SafetensorsReader:
        if index not in self._readers:
            if len(self._readers) == _MAX_OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
            self._readers[index] = SafetensorsReader(self.folder / manifest.data_file_name(index))
            listed = {r.key: r for r in self.content.tensors if r.file == index}
            _check_header(self._readers[index], self.content.files[index], listed)
        return self._readers[index]

    def close(self) -> None:
        """Close its files."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def find(root: Path, tag: str | None) -> StoredCheckpoint:
    """The newest checkpoint in `root` (of that tag) of which every byte verifies.

    Each newer, damaged one is named in a warning.

    Raises:
        CheckpointError: there is none; or the one of the tag is damaged.
        StorageError: the one of the tag cannot be read.
    """
    found, damaged = folders.candidates(root, tag) if root.is_dir() else ([], [])
    for folder, content in found:
        stored = StoredCheckpoint(folder, content)
        try:
            stored.verify()
        except (CheckpointError, OSError) as error:
            stored.close()
            if tag is not None:
                raise
            damaged.append(str(error))
            continue
        for line in damaged:
            warnings.warn(f"passed over a damaged checkpoint: {line}", RuntimeWarning, stacklevel=4)
        return stored
    wanted = f"checkpoint {tag!r}" if tag is not None else "checkpoint"
    raise CheckpointError(
        "\n  ".join([f"no undamaged {wanted} in {root}", *damaged]),
        remedy="name a directory that save_checkpoint wrote to",
    )


def _check_header(
    reader: SafetensorsReader, expected: FileRecord, listed: dict[str, TensorRecord]
) -> None:
    if (reader.nbytes, reader.header_checksum) != (expected.nbytes, expected.header_crc32c):
        raise CheckpointError(
            f"{reader.path}: damaged: length or header differ from the manifest",
            expected=f"{expected.nbytes} bytes, header CRC32C {expected.header_crc32c:08x}",
        )
    if set(reader.entries) != set(listed):
        raise CheckpointError(f"{reader.path}: holds other tensors than the manifest lists")
    for key, record in listed.items():
        entry = reader.entries[key]
        if (str(entry.dtype), entry.shape) != (record.dtype, record.shape):
            raise CheckpointError(
                f"{reader.path}: {record.field} of {record.name!r} is {entry.dtype} {entry.shape}",
                expected=f"{record.dtype} {record.shape}",
            )
