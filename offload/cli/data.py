"""Training data: documents -> tokens in one file -> batches.

[Note: data order]
Documents are read in order of their names; a share of them is held out, at even distances (of too
few documents, the last share of the tokens). The tokens of one split stand back to back in one
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
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from offload.errors import ChecksumError, OffloadError, StorageError
from offload.native import crc32c

MOST_PROBLEMS = 10
CHECKED_BYTES = 64 << 10  # microseconds to check; a page fault reads as much ahead
STDLIB = "stdlib"
HELD_OUT_SHARE = Fraction(1, 20)
TEXT_SUFFIXES = (".txt", ".jsonl", ".py", ".md")
# Installed packages are no part of the library, and its tests are mostly tables.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Tokens = np.ndarray[tuple[int], np.dtype[Any]]
_Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Document = Callable[[], bytes]  # reads one document's text, UTF-8
Marks = np.ndarray[tuple[int], np.dtype[np.bool_]]  # one a token
Spans = Sequence[tuple[int, int]]  # of characters: first, one past the last


class Tokenizer(Protocol):
    """Text to token ids and back; `end` is the id that ends a document, None if there is none."""

    vocab_size: int
    end: int | None

    def encode_document(self, text: bytes) -> Tokens:
        """Ids of a whole document, with its begin and end."""

    def encode_marked(self, text: str, spans: Spans, *, whole: bool) -> tuple[Tokens, Marks]:
        """Ids of a text, and which of them lie in one of the spans.

        With `whole`, a begin and an end are added, as of a document; the end counts with the last
        character. Else the text has them.

        Raises:
            ValueError: it cannot be encoded.
        """

    def chat(self) -> tuple[str | None, dict[str, Any]]:
        """The chat template, if it has one, and what templates may name: special tokens."""

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

    def encode_marked(self, text: str, spans: Spans, *, whole: bool) -> tuple[Tokens, Marks]:
        del whole  # no text can have this tokenizer's begin and end
        tokens = self.encode_document(text.encode())
        marks = np.zeros(len(tokens), np.bool_)
        for first, last in spans:
            start, stop = len(text[:first].encode()), len(text[:last].encode())
            marks[1 + start : 1 + stop + (last == len(text))] = True
        return tokens, marks

    def chat(self) -> tuple[str | None, dict[str, Any]]:
        return None, {}

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

    def encode_marked(self, text: str, spans: Spans, *, whole: bool) -> tuple[Tokens, Marks]:
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{type(self._tokenizer).__name__} does not say which characters a token is of: "
                "run.train_on needs a fast tokenizer (tokenizer.json)"
            )
        text.encode()  # what is no Unicode would end in the tokenizer's own kind of error
        encoded = self._tokenizer(
            text, add_special_tokens=whole, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        marks = [
            any(start < last and stop > first for first, last in spans)
            for start, stop in encoded["offset_mapping"]
        ]
        if whole and self.end is not None:
            if ids[-1:] != [self.end]:
                ids, marks = [*ids, self.end], [*marks, False]
            marks[-1] = any(last == len(text) for _, last in spans)
        return np.array(ids, np.int64), np.array(marks, np.bool_)

    def chat(self) -> tuple[str | None, dict[str, Any]]:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # several, by purpose
            template = template.get("default")
        return template, dict(self._tokenizer.special_tokens_map)

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
        paths = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES)
    else:
        paths = [folder] if folder.is_file() else []
    if source == STDLIB:
        paths = [p for p in paths if p.suffix == ".py" and _NOT_LIBRARY.isdisjoint(p.parts)]
    problems = Problems()
    found = [document for path in paths for document in _in_file(path, problems)]
    problems.raise_if_any()
    if not found:
        raise OffloadError(
            f"run.data = {source!r} has no text",
            expected=f"'{STDLIB}', a file or a folder of files ({', '.join(TEXT_SUFFIXES)})",
        )
    return found


def _in_file(path: Path, problems: Problems) -> Iterator[Document]:
    if path.suffix != ".jsonl":
        yield path.read_bytes
        return
    for line in jsonl_lines(path, problems):
        if isinstance(line.fields.get("text"), str):
            yield JsonText(path, line.offset)
        else:
            problems.add(line.where, "has no field 'text' with a string")


@dataclass(slots=True)
class Problems:
    """What is wrong with lines of the data: all is said at once, up to `MOST_PROBLEMS`."""

    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Take note. Raises OffloadError when there are enough."""
        self.found.append(f"{where} {what}")
        if len(self.found) == MOST_PROBLEMS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise OffloadError with what was found."""
        if self.found:
            many = f"{MOST_PROBLEMS} or more" if len(self.found) == MOST_PROBLEMS else ""
            raise OffloadError(
                f"the data has {many or len(self.found)} bad line(s):\n  "
                + "\n  ".join(self.found),
                remedy="mend or remove them; nothing has been trained",
            )


class JsonLine(NamedTuple):
    """A line's object, what to call it, and the byte of the file at which it starts."""

    where: str
    fields: dict[str, Any]
    offset: int


def jsonl_lines(path: Path, problems: Problems) -> Iterator[JsonLine]:
    """The objects of a file, one a line, one in memory at a time; empty lines are passed over."""
    with path.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}:"
            if line.strip():
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problems.add(where, f"is no JSON: {error}")
                else:
                    if isinstance(fields, dict):
                        yield JsonLine(where, fields, offset)
                    else:
                        problems.add(where, f"is no JSON object but {type(fields).__name__}")
            offset += len(line)


@dataclass(frozen=True, slots=True)
class JsonText:
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


def is_held_out(number: int, share: Fraction) -> bool:
    """Whether document or example `number`, counted from 1, is one of the share to hold out."""
    return number * share // 1 > (number - 1) * share // 1


def pack(
    found: Sequence[Document],
    tokenizer: Tokenizer,
    folder: Path,
    validation: Fraction | Sequence[Document] = HELD_OUT_SHARE,
) -> Split:
    """Tokenize documents into files in `folder`, one document in memory at a time.

    `validation` is the share of them to hold out, or the documents that are the held-out ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(validation, Fraction):
        if len(found) * validation < 1:
            every = _pack_file(found, tokenizer, folder / "all.tokens")
            tokens = every.tokens
            cut = len(tokens) - int(len(tokens) * validation)
            return Split(tokens[:cut], tokens[cut:], every, replace(every, first=cut))
        held_out = [d for i, d in enumerate(found, start=1) if is_held_out(i, validation)]
        train = [d for i, d in enumerate(found, start=1) if not is_held_out(i, validation)]
    else:
        train, held_out = list(found), list(validation)
    packed = _pack_file(train, tokenizer, folder / "train.tokens")
    rest = _pack_file(held_out, tokenizer, folder / "held_out.tokens")
    return Split(packed.tokens, rest.tokens, packed, rest)


def _pack_file(found: Sequence[Document], tokenizer: Tokenizer, path: Path) -> TokenChecks:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with TokenWriter(path, dtype) as writer:
        for document in found:
            writer.write(tokenizer.encode_document(document()))
    return writer.checks()


class TokenWriter:
    """Writes a token file anew, and takes its checksums; see [Note: token checks]."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._path, self._dtype = path, dtype
        self._checksums: list[int] = []
        self._piece = np.empty(0, np.uint8)  # the file's last bytes, which have no checksum yet

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, tokens: Tokens) -> None:
        """Add tokens at the end."""
        data = tokens.astype(self._dtype)
        self._file.write(data.tobytes())
        piece = np.concatenate([self._piece, data.view(np.uint8)])
        while len(piece) >= CHECKED_BYTES:
            self._checksums.append(_checksum(piece[:CHECKED_BYTES]))
            piece = piece[CHECKED_BYTES:]
        self._piece = piece

    def checks(self) -> TokenChecks:
        """What was written, once the file is closed."""
        rest = [_checksum(self._piece)] if len(self._piece) else []
        checksums = (*self._checksums, *rest)
        # An empty file cannot be mapped.
        tokens = (
            np.memmap(self._path, self._dtype, mode="r") if checksums else np.empty(0, self._dtype)
        )
        return TokenChecks(self._path, tokens, checksums)


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
