"""The data of a run as micro-batches: of a stream of text, or of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offload.cli.data import (
    Document,
    Problems,
    Tokenizer,
    Windows,
    documents,
    pack,
)
from offload.cli.examples import Encoder, Records
from offload.cli.rows import open_rows, refuse_empty, rows_of, to_batch, write_rows
from offload.cli.steps import MicroBatch
from offload.config import RunSection
from offload.errors import ConfigError, OffloadError


@dataclass(frozen=True, slots=True)
class Batches:
    """Windows of a token file as what the model takes."""

    windows: Windows
    form: Callable[[torch.Tensor], MicroBatch]

    def shuffled(self, number: int) -> MicroBatch:
        """Micro-batch `number` of the endless shuffled order; see `Windows.shuffled`."""
        return self.form(self.windows.shuffled(number))

    def spread(self, num_batches: int) -> Iterator[MicroBatch]:
        """See `Windows.spread`."""
        return map(self.form, self.windows.spread(num_batches))


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run.

    Attributes:
        held_out: None if nothing is held out.
        notes: what there is, and what was not taken as it was given; one line each.
        is_packed: whether sequences hold several examples that must not see each other.
    """

    train: Batches
    held_out: Batches | None
    notes: tuple[str, ...] = ()
    is_packed: bool = False


def prepare(section: RunSection, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Tokenize `run.data` into files in `folder`, with memory that does not grow with it.

    Raises:
        ConfigError: training and held-out data are not of one kind.
        OffloadError: data that cannot be used: lines are named, all at once.
    """
    source = str(section.data)
    records = Records(source, section.data_split)
    other = section.validation if isinstance(section.validation, str) else None
    held_out = Records(other, section.data_split) if other is not None else None
    if held_out is not None and held_out.is_text != records.is_text:
        raise ConfigError(
            problems=["run.validation and run.data are not both texts, or both examples"]
        )
    if records.is_text:
        return _text(section, tokenizer, folder, records, held_out)
    return _examples(section, tokenizer, folder, records, held_out)


def _text(
    section: RunSection,
    tokenizer: Tokenizer,
    folder: Path,
    records: Records,
    held_out: Records | None,
) -> Prepared:
    found = _documents(str(section.data), records)
    validation: Fraction | list[Document] = _share(section)
    if held_out is not None:
        validation = _documents(str(section.validation), held_out)
    split = pack(found, tokenizer, folder, validation)

    shape = {"batch": section.batch, "sequence_length": section.sequence_length}
    train = Windows(split.train, **shape, seed=section.seed, checks=split.train_checks)
    rest = None
    if section.validation:
        rest = Batches(
            Windows(split.held_out, **shape, seed=section.seed, checks=split.held_out_checks),
            _next_token,
        )
    return Prepared(Batches(train, _next_token), rest)


def _examples(
    section: RunSection,
    tokenizer: Tokenizer,
    folder: Path,
    records: Records,
    held_out: Records | None,
) -> Prepared:
    folder.mkdir(parents=True, exist_ok=True)
    encoder, problems, length = Encoder(tokenizer, section), Problems(), section.sequence_length
    train = open_rows(folder / "train.tokens", section)
    rest = open_rows(folder / "held_out.tokens", section)
    with train.writer, rest.writer:
        found = records.read(problems)
        write_rows(found, encoder, section, problems, (train, rest), _share(section))
        if held_out is not None:
            found = held_out.read(problems)
            write_rows(found, encoder, section, problems, (rest, None), Fraction(0))
    form = partial(to_batch, packing=section.packing)
    made, notes = [], []
    for what, writer in (("train", train), ("held out", rest)):
        if writer is train or section.validation:
            refuse_empty(writer.counts, what)
            notes.append(writer.counts.describe(what, length))
            batch = section.batch if writer is train else min(section.batch, writer.counts.rows)
            made.append(Batches(rows_of(writer, section, batch), form))
    return Prepared(
        made[0],
        made[1] if section.validation else None,
        notes=tuple(notes),
        is_packed=section.packing,
    )


def _share(section: RunSection) -> Fraction:
    """The share of the data that is held out, exactly as it is written in decimals."""
    validation = section.validation
    return Fraction(0) if isinstance(validation, str) else Fraction(str(validation))


def _documents(source: str, records: Records) -> list[Document]:
    table = records.table
    if table is None:
        return documents(source)
    return [partial(_row_text, table, number, source) for number in range(len(table))]


def _row_text(table: Any, number: int, source: str) -> bytes:
    text = table[number].get("text")
    if not isinstance(text, str):
        raise OffloadError(f"run.data = {source!r}, row {number}: has no field 'text'")
    return text.encode()


def _next_token(tokens: torch.Tensor) -> MicroBatch:
    return {"input_ids": tokens, "labels": tokens}
