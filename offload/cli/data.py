"""Training data: documents -> tokens in one file -> batches.

[Note: data order]
Documents are read in order of their names; every `HELD_OUT_EVERY`-th is held out (of fewer
documents, the last share of the tokens). The tokens of one split stand back to back in one
memory-mapped file, each document between a begin and an end token. A sequence is a window of that
file; windows do not overlap. Epoch by epoch they come in an order drawn from (seed, epoch), so
micro-batch number n is a function of n, and resuming needs no other position.

[Note: token checks]
Every run writes its token files anew, and keeps the CRC32C of each `CHECKED_BYTES` of them in
memory. What a batch is read from is checked against it: a bit that the disk has changed meanwhile
is an error, never another token.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from offload.errors import ChecksumError, OffloadError, StorageError
from offload.native import crc32c

HELD_OUT_EVERY = 20
CHECKED_BYTES = 64 << 10  # microseconds to check; a page fault reads as much ahead
STDLIB = "stdlib"
_SUFFIXES = (".txt", ".jsonl", ".py", ".md")
# Installed packages are no part of the library, and its tests are mostly tables.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Tokens = np.ndarray[tuple[int], np.dtype[Any]]
_Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Document = Callable[[], bytes]  # reads one document's text, UTF-8


class Tokenizer(Protocol):
    """Text to token ids and back; `end` is the id that ends a document, None if there is none."""

    vocab_size: int
    end: int | None

    def encode_document(self, text: bytes) -> Tokens:
        """Ids of a whole document, with its begin and end."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the start of a document."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids, special ones left out."""


class ByteTokenizer:
    """One token a byte; 256 begins a document, 257 ends it, 258 is reserved."""

    vocab_size = 259
    begin = 256
    end: int | None = 257

    def encode_document(self, text: bytes) -> Tokens:
        return np.concatenate([[self.begin], np.frombuffer(text, np.uint8), [self.end]])

    def encode_prompt(self, text: str) -> list[int]:
        return [self.begin, *text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < self.begin).decode(errors="replace")


class PretrainedTokenizer:
    """The tokenizer beside a Hugging Face model."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = len(self._tokenizer)
        self.end: int | None = self._tokenizer.eos_token_id

    def encode_document(self, text: bytes) -> Tokens:
        ends = [] if self.end is None else [self.end]
        return np.array([*self._ids(text.decode(errors="replace")), *ends], np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        begin = self._tokenizer.bos_token_id
        return [*([] if begin is None else [begin]), *self._ids(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files beside an export."""
        self._tokenizer.save_pretrained(folder)

    def _ids(self, text: str) -> list[int]:
        begin = self._tokenizer.bos_token_id
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[1:] if ids[:1] == [begin] else ids


@dataclass(frozen=True, slots=True)
class TokenChecks:
    """The checksums of a token file, see [Note: token checks]; `first` is a split's first token."""

    path: Path
    tokens: Tokens
    checksums: tuple[int, ...]
    first: int = 0

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the split, read and checked.

        Not from the mapping: a page of it that cannot be read would end the process.

        Raises:
            ChecksumError: they, or others of the same pieces, are not what was written.
            StorageError: the file cannot be read.
        """
        itemsize = self.tokens.itemsize
        first, last = (self.first + start) * itemsize, (self.first + stop) * itemsize
        low, high = first // CHECKED_BYTES, -(-last // CHECKED_BYTES)
        begin = low * CHECKED_BYTES
        nbytes = min(high * CHECKED_BYTES, self.tokens.nbytes) - begin
        try:
            with self.path.open("rb") as file:
                data = np.frombuffer(os.pread(file.fileno(), nbytes, begin), np.uint8)
        except OSError as error:
            raise StorageError(
                operation="read",
                path=self.path,
                offset=begin,
                nbytes=nbytes,
                errno=error.errno,
                what="tokens",
            ) from error
        for piece in range(low, high):
            at = (piece - low) * CHECKED_BYTES
            self._check(piece, data[at : at + CHECKED_BYTES])
        return data[first - begin : last - begin].view(self.tokens.dtype)

    def _check(self, piece: int, data: _Bytes) -> None:
        found = _checksum(data)
        if found != self.checksums[piece]:
            raise ChecksumError(
                operation="read",
                path=self.path,
                offset=piece * CHECKED_BYTES,
                nbytes=len(data),
                what="tokens",
                detail=f"CRC32C is {found:#010x}, of what was written "
                f"{self.checksums[piece]:#010x}",
                remedy="do not trust this disk (smartctl, memory test); start the run again: it "
                "writes the file anew",
            )


def _checksum(data: _Bytes) -> int:
    return crc32c(data.ctypes.data, data.nbytes)


@dataclass(frozen=True, slots=True)
class Split:
    """The tokens to train on and the held-out ones; 1-D, memory-mapped, read-only."""

    train: Tokens
    held_out: Tokens
    train_checks: TokenChecks
    held_out_checks: TokenChecks


def documents(source: str) -> list[Document]:
    """The documents of `source`, in order of their names (see `run.data`).

    Raises:
        OffloadError: there is none.
    """
    folder = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    else:
        paths = [folder] if folder.is_file() else []
    if source == STDLIB:
        paths = [p for p in paths if p.suffix == ".py" and _NOT_LIBRARY.isdisjoint(p.parts)]
    found = [document for path in paths for document in _in_file(path)]
    if not found:
        raise OffloadError(
            f"run.data = {source!r} has no text",
            expected=f"'{STDLIB}', a file or a folder of files ({', '.join(_SUFFIXES)})",
        )
    return found


def _in_file(path: Path) -> Iterator[Document]:
    if path.suffix != ".jsonl":
        yield path.read_bytes
        return
    with path.open("rb") as lines:
        offset = 0
        for line in lines:
            if line.strip():
                yield _JsonLine(path, offset)
            offset += len(line)


@dataclass(frozen=True, slots=True)
class _JsonLine:
    """The field `text` of the line that starts at `offset`, read when called."""

    path: Path
    offset: int

    def __call__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            try:
                return str(json.loads(file.readline())["text"]).encode()
            except (ValueError, KeyError, TypeError) as error:
                raise OffloadError(
                    f"{self.path}: the line at byte {self.offset} is no JSON object with a field "
                    f"'text' ({error!r})"
                ) from error


def pack(found: Sequence[Document], tokenizer: Tokenizer, folder: Path) -> Split:
    """Tokenize documents into files in `folder`, one document in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(found) < HELD_OUT_EVERY:
        every = _pack_file(found, tokenizer, folder / "all.tokens")
        tokens = every.tokens
        cut = len(tokens) - len(tokens) // HELD_OUT_EVERY
        return Split(tokens[:cut], tokens[cut:], every, replace(every, first=cut))
    held_out = found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [d for i, d in enumerate(found, start=1) if i % HELD_OUT_EVERY]
    packed = _pack_file(train, tokenizer, folder / "train.tokens")
    rest = _pack_file(held_out, tokenizer, folder / "held_out.tokens")
    return Split(packed.tokens, rest.tokens, packed, rest)


def _pack_file(found: Sequence[Document], tokenizer: Tokenizer, path: Path) -> TokenChecks:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    checksums = []
    piece = np.empty(0, np.uint8)  # the file's last bytes, which have no checksum yet
    with path.open("wb") as file:
        for document in found:
            tokens = tokenizer.encode_document(document()).astype(dtype)
            file.write(tokens.tobytes())
            piece = np.concatenate([piece, tokens.view(np.uint8)])
            while len(piece) >= CHECKED_BYTES:
                checksums.append(_checksum(piece[:CHECKED_BYTES]))
                piece = piece[CHECKED_BYTES:]
    if len(piece):
        checksums.append(_checksum(piece))
    return TokenChecks(path, np.memmap(path, dtype, mode="r"), tuple(checksums))


class Windows:
    """The sequences of a split as batches of shape (batch, sequence_length), int64.

    With `checks` it is read through them, and the methods raise what they do.

    Raises:
        OffloadError: the split is shorter than one batch.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch: int,
        sequence_length: int,
        seed: int,
        checks: TokenChecks | None = None,
    ) -> None:
        self.num_windows = len(tokens) // sequence_length
        if self.num_windows < batch:
            raise OffloadError(
                f"{len(tokens)} tokens make {self.num_windows} sequences of {sequence_length}",
                expected=f"at least one batch of {batch}",
                remedy="use more text, or lower run.batch or run.sequence_length",
            )
        self._read = checks.read if checks is not None else lambda low, high: tokens[low:high]
        self._batch = batch
        self._sequence_length = sequence_length
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def shuffled(self, number: int) -> torch.Tensor:
        """Batch `number` of the endless shuffled order; see [Note: data order]."""
        per_epoch = self.num_windows // self._batch
        epoch, place = divmod(number, per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(self.num_windows)
        return self._gather(self._order[place * self._batch : (place + 1) * self._batch])

    def spread(self, num_batches: int) -> Iterator[torch.Tensor]:
        """At most `num_batches` batches, spread evenly over the split; the same on every call."""
        count = min(num_batches, self.num_windows // self._batch) * self._batch
        chosen = np.arange(count) * self.num_windows // count
        for start in range(0, count, self._batch):
            yield self._gather(chosen[start : start + self._batch])

    def _gather(self, windows: Tokens) -> torch.Tensor:
        length = self._sequence_length
        read = self._read
        rows = [read(int(i) * length, (int(i) + 1) * length) for i in windows]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
