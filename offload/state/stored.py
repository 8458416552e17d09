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
        self._listed: list[dict[str, TensorRecord]] = [{} for _ in content.files]  # by key
        for record in content.tensors:
            self._listed[record.file][record.key] = record
        self._readers: OrderedDict[int, SafetensorsReader] = OrderedDict()  # last used last

    def records(self) -> list[TensorRecord]:
        """What it holds, file by file."""
        return [record for listed in self._listed for record in listed.values()]

    def verify(self) -> None:
        """Read everything once, one tensor at a time.

        Raises:
            CheckpointError: a file or a tensor is damaged; it is named.
            StorageError: a file cannot be read.
        """
        for index, listed in enumerate(self._listed):
            self._reader(index)  # also of a file without tensors
            for record in listed.values():
                self.read(record)

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
        reader = self._readers.get(index)
        if reader is not None:
            self._readers.move_to_end(index)
            return reader
        if len(self._readers) == _MAX_OPEN_FILES:
            self._readers.popitem(last=False)[1].close()
        reader = SafetensorsReader(self.folder / manifest.data_file_name(index))
        try:
            _check_header(reader, self.content.files[index], self._listed[index])
        except CheckpointError:
            reader.close()
            raise
        self._readers[index] = reader
        return reader

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
