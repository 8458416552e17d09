"""Examples in rows of one token file, and the batches that are made of them.

[Note: rows]
A row is `sequence_length` entries of 32 bits, and the sequence of one or, packed, of several
examples back to back. An entry is a token's id and three flags; 0 fills a row's end:
    PRESENT   there is a token
    TRAINED   the loss is of it
    FIRST     an example begins: its position is 0, nothing before predicts it or is seen by it
So a row is a window of the file, and what [Note: data order] says of order and resuming holds.

[Note: packing]
An example goes into the fullest of `_OPEN_ROWS` rows that has room for it; without one, the fullest
row is written and a new one begun. That depends on the examples and their order alone, and takes
the same memory whatever their number.

[Note: separation]
transformers takes positions that start anew as borders, where it has no attention mask and no
cache, and attention goes through its mask functions. Whether a model does is tried, not believed:
`check_separation` changes what stands before a border, and compares what is computed behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offload.cli.data import Problems, Tokens, TokenWriter, Windows, is_held_out
from offload.cli.examples import Encoder, Example, Record, no_example
from offload.cli.steps import MicroBatch, on_device_of
from offload.config import RunSection
from offload.errors import ConfigError, OffloadError
from offload.state.session import OffloadEngine

PRESENT, TRAINED, FIRST = 1 << 31, 1 << 30, 1 << 29
_IDS = FIRST - 1
_OPEN_ROWS = 64
_IGNORED = -100  # of torch's cross entropy
_WIDTH_MULTIPLE = 64  # a batch is cut to its longest row, in few different shapes
_PROBE_TOKENS = 8
_SEPARATE = 1e-3  # of the change before the border: far above rounding, far below attention


@dataclass(slots=True)
class Counts:
    """What became of the examples of one file."""

    examples: int = 0
    cut: int = 0
    dropped: int = 0
    untrained: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0

    def describe(self, what: str, length: int) -> str:
        """One line; everything that is not as it was given is in it."""
        text = (
            f"{what}: {self.examples:,} examples in {self.rows:,} sequences, {self.tokens:,} "
            f"tokens, the loss is of {self.trained:,}"
        )
        for number, fate in (
            (self.cut, f"cut to {length} tokens"),
            (self.dropped, f"longer than {length} tokens: dropped"),
            (self.untrained, "with nothing to train on: dropped"),
        ):
            if number:
                text += f"; {number:,} {fate}"
        return text


@dataclass(slots=True)
class RowWriter:
    """Writes examples as rows, see [Note: rows]; `counts` says what became of them."""

    writer: TokenWriter
    length: int
    packing: bool
    counts: Counts = field(default_factory=Counts)
    _open: list[list[Tokens]] = field(default_factory=list)

    def add(self, example: Example) -> None:
        """Add an example that is not longer than a row."""
        entries = example.tokens.astype(np.int64) | PRESENT
        entries[example.trained] |= TRAINED
        entries[0] |= FIRST
        self.counts.examples += 1
        self.counts.tokens += len(entries)
        self.counts.trained += int(example.trained[1:].sum())
        if not self.packing:
            self._write([entries])
            return
        fitting = [row for row in self._open if _filled(row) + len(entries) <= self.length]
        if fitting:
            max(fitting, key=_filled).append(entries)
            return
        if len(self._open) == _OPEN_ROWS:
            fullest = max(range(_OPEN_ROWS), key=lambda index: _filled(self._open[index]))
            self._write(self._open.pop(fullest))
        self._open.append([entries])

    def finish(self) -> None:
        """Write the rows that are not full."""
        for row in self._open:
            self._write(row)
        self._open.clear()

    def _write(self, row: list[Tokens]) -> None:
        entries = np.concatenate(row)
        self.writer.write(np.pad(entries, (0, self.length - len(entries))))
        self.counts.rows += 1


def _filled(row: list[Tokens]) -> int:
    return sum(map(len, row))


def write_rows(
    records: Iterable[Record],
    encoder: Encoder,
    section: RunSection,
    problems: Problems,
    writers: tuple[RowWriter, RowWriter | None],
    share: Fraction,
) -> None:
    """Encode every record into the first writer; the share of them that is held out, the second.

    Raises:
        OffloadError: records that make no example, all at once.
    """
    length = section.sequence_length
    train, held_out = writers
    for number, (where, fields) in enumerate(records, start=1):
        writer = held_out if held_out is not None and is_held_out(number, share) else train
        try:
            example = encoder.encode(fields)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        if len(example.tokens) > length:
            if section.too_long == "error":
                problems.add(where, f"has {len(example.tokens)} tokens, more than {length}")
                continue
            if section.too_long == "drop":
                writer.counts.dropped += 1
                continue
            writer.counts.cut += 1
            example = Example(example.tokens[:length], example.trained[:length])
        if no_example(example, length):
            writer.counts.untrained += 1
            continue
        writer.add(example)
    problems.raise_if_any()
    for each in writers:
        if each is not None:
            each.finish()


def open_rows(path: Path, section: RunSection) -> RowWriter:
    """A writer to `path`; enter its `writer`."""
    return RowWriter(TokenWriter(path, np.uint32), section.sequence_length, section.packing)


def rows_of(writer: RowWriter, section: RunSection, batch: int) -> Windows:
    """The rows that were written, in batches."""
    checks = writer.writer.checks()
    return Windows(
        checks.tokens,
        batch=batch,
        sequence_length=section.sequence_length,
        seed=section.seed,
        checks=checks,
    )


def to_batch(entries: torch.Tensor, *, packing: bool) -> MicroBatch:
    """What the model takes, from rows, (batch, sequence_length); cut where all rows have ended."""
    present = entries & PRESENT != 0
    used = int(present.any(0).nonzero().max()) + 1
    width = min(-(-used // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, entries.shape[1])
    entries, present = entries[:, :width], present[:, :width]
    first = entries & FIRST != 0
    trained = (entries & TRAINED != 0) & ~first
    ids = entries & _IDS
    batch = {"input_ids": ids, "labels": torch.where(trained, ids, _IGNORED)}
    if not packing:
        return {**batch, "attention_mask": present.long()}
    places = torch.arange(width).expand_as(entries)
    starts = torch.where(first, places, 0).cummax(1).values
    return {**batch, "position_ids": places - starts, "use_cache": False}


def refuse_unpackable(model: torch.nn.Module) -> None:
    """Raises ConfigError if the model takes no positions."""
    get_base: Any = getattr(model, "get_base_model", None)
    base: Any = model if get_base is None else get_base()
    if not {"position_ids", "use_cache"} <= inspect.signature(base.forward).parameters.keys():
        raise _unpackable(f"{type(base).__name__} takes no position_ids")


def check_separation(engine: OffloadEngine, vocab_size: int) -> None:
    """Try that no example of a sequence sees another, see [Note: separation].

    Raises:
        ConfigError: one does.
    """
    one = torch.arange(_PROBE_TOKENS)
    first = torch.cat([one, one]) % vocab_size
    second = torch.cat([(one * 3 + 1), one]) % vocab_size
    batch: MicroBatch = {
        "input_ids": torch.stack([first, second]),
        "position_ids": torch.cat([one, one]).expand(2, -1),
        "use_cache": False,
    }
    engine.eval()
    with torch.no_grad():
        logits = engine(**on_device_of(engine, batch)).logits.float()
    engine.train()
    change = (logits[0] - logits[1]).abs().amax(-1)
    before, behind = float(change[:_PROBE_TOKENS].max()), float(change[_PROBE_TOKENS:].max())
    if not behind <= _SEPARATE * before:
        raise _unpackable(
            f"{type(engine.module).__name__} attends across the border of packed examples"
        )


def _unpackable(why: str) -> ConfigError:
    return ConfigError(problems=[f"run.packing: {why}: set run.packing = false"])


def refuse_empty(counts: Counts, what: str) -> None:
    """Raises OffloadError if there is no row."""
    if not counts.rows:
        raise OffloadError(
            f"{what}: no example is left of {counts.dropped + counts.untrained} "
            "(too long, or nothing to train on)",
            remedy="use more data, raise run.sequence_length, or set run.validation to a larger "
            "share, to other data or to 0",
        )
