"""The weight files of a Hugging Face folder: safetensors, one file or shards with their index."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.errors import CheckpointError
from offload.state import durable
from offload.state.recording import new_deferred
from offload.state.safetensors_stream import SafetensorsReader
from offload.state.tape import Version, View

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in an open file, as the tape reads it."""

    reader: SafetensorsReader
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.entries[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.entries[self.name].shape

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel), row-major: 1-D."""
        return self.reader.read_range(self.name, start, numel)

    def deferred(self) -> torch.Tensor:
        """A deferred tensor with these values."""
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        version = Version(like.numel() * like.element_size(), self)
        view = View(version, self.dtype, self.shape, tuple(like.stride()), 0)
        return new_deferred(view, recording=self)


def open_files(root: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Open every weight file, and check that together they hold what the index says.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is not where it should be.
    """
    index = _read_index(root)
    names = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{root} lacks {', '.join(missing)}"
            + (f", which {INDEX_NAME} names" if index is not None else _other_files(root)),
            remedy="complete the folder: download or export it again",
        )
    stored: dict[str, StoredTensor] = {}
    for name in names:
        reader = files.enter_context(SafetensorsReader(root / name, follow_symlinks=True))
        for key in reader.entries:
            if key in stored:
                raise CheckpointError(f"{root}: two files hold a tensor {key!r}")
            stored[key] = StoredTensor(reader, key)
    for key, name in (index or {}).items():
        if key not in stored or stored[key].reader.path.name != name:
            raise CheckpointError(f"{INDEX_NAME} says that {name} holds {key!r}, and it does not")
    return stored


def _read_index(root: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if there is one file without an index."""
    if (root / SINGLE_NAME).is_file() or not (root / INDEX_NAME).is_file():
        return None
    path = (root / INDEX_NAME).resolve()  # a hub cache has links to the files
    try:
        content = json.loads(durable.read_small_file(path, limit_bytes=_MAX_INDEX_BYTES))
        index = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / INDEX_NAME} is no index of shards ({error})") from error
    for name in index.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{root / INDEX_NAME} names {name!r}, which is no file beside it")
    return index


def _other_files(root: Path) -> str:
    pickled = sorted(p.name for p in (*root.glob("*.bin"), *root.glob("*.pt"), *root.glob("*.pth")))
    if not pickled:
        return ""
    return (
        f" and has {pickled[0]}, which is pickled: loading it could run code; save it as "
        "safetensors once, with the model's own save_pretrained"
    )
