from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.cli.data import (
    CHECKED_BYTES,
    STDLIB,
    ByteTokenizer,
    JsonText,
    Windows,
    documents,
    pack,
)
from offload.errors import ChecksumError, OffloadError, StorageError


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode_document(text.encode())
    assert tokens[0] == 256
    assert tokens[-1] == 257
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens.tolist()) == text


def test_documents_come_in_order_and_every_20th_is_held_out(tmp_path):
    for i in range(45):
        (tmp_path / f"{i:02d}.txt").write_bytes(bytes([i]))
    (tmp_path / "image.png").write_bytes(b"no text")
    split = pack(documents(str(tmp_path)), ByteTokenizer(), tmp_path / "packed")
    assert split.held_out.reshape(-1, 3)[:, 1].tolist() == [19, 39]
    rest = [i for i in range(45) if i not in {19, 39}]
    assert split.train.reshape(-1, 3)[:, 1].tolist() == rest
    assert split.train.dtype == np.uint16


def test_few_documents_are_split_by_tokens(tmp_path):
    lines = [{"text": "x" * 98}] * 10
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    split = pack(documents(str(tmp_path / "a.jsonl")), ByteTokenizer(), tmp_path / "packed")
    assert (len(split.train), len(split.held_out)) == (950, 50)


def test_a_line_that_is_no_document_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(OffloadError, match=r"a\.jsonl:2: has no field 'text'"):
        documents(str(tmp_path / "a.jsonl"))
    found = JsonText(tmp_path / "a.jsonl", 17)  # changed after it was listed
    with pytest.raises(OffloadError, match=r"a\.jsonl: the line at byte 17"):
        found()


def test_the_standard_library_is_found_without_packages():
    found = documents(STDLIB)
    assert len(found) > 300
    assert any(b"class JSONDecodeError" in document() for document in found)


@given(num=st.integers(4, 40), batch=st.integers(1, 4), seed=st.integers(0, 3))
def test_an_epoch_has_every_window_at_most_once_and_batches_depend_on_their_number(
    num, batch, seed
):
    tokens = np.arange(num * 2 + 1).astype(np.uint16)
    windows = Windows(tokens, batch=batch, sequence_length=2, seed=seed)
    per_epoch = num // batch
    epoch = [windows.shuffled(i) for i in range(2 * per_epoch)]
    for half in (epoch[:per_epoch], epoch[per_epoch:]):
        rows = torch.cat(half)
        assert rows.dtype == torch.int64
        assert (rows[:, 1] == rows[:, 0] + 1).all()
        assert len(rows[:, 0].unique()) == per_epoch * batch
    fresh = Windows(tokens, batch=batch, sequence_length=2, seed=seed)
    assert torch.equal(fresh.shuffled(per_epoch), epoch[per_epoch])
    assert torch.equal(fresh.shuffled(0), epoch[0])
    spread = list(windows.spread(3))
    assert len(spread) == min(3, per_epoch)
    assert all(torch.equal(a, b) for a, b in zip(spread, windows.spread(3), strict=True))
    assert len(torch.cat(spread)[:, 0].unique()) == len(spread) * batch


@pytest.mark.parametrize("count", [7, 45], ids=["one file", "two files"])
def test_a_changed_token_is_an_error(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i:02d}.txt").write_bytes(bytes([i]) * 30_001)
    split = pack(documents(str(tmp_path)), ByteTokenizer(), tmp_path / "packed")
    shape = {"batch": 2, "sequence_length": 16, "seed": 0}
    parts = ((split.train, split.train_checks), (split.held_out, split.held_out_checks))
    for tokens, checks in parts:
        checked = Windows(tokens, **shape, checks=checks)
        plain = Windows(tokens, **shape)
        for number in range(5):
            assert torch.equal(checked.shuffled(number), plain.shuffled(number))
        assert len(list(checked.spread(4))) == 4
        data = checks.path.read_bytes()
        last = len(tokens) // 16 * 16
        for damaged in (data[:-20] + bytes([data[-20] ^ 4]) + data[-19:], data[:-20]):
            checks.path.write_bytes(damaged)
            with pytest.raises(ChecksumError, match=r"tokens in .*\.tokens") as caught:
                checks.read(last - 16, len(tokens))
            assert caught.value.offset % CHECKED_BYTES == 0
            assert np.array_equal(split.train_checks.read(0, 16), split.train[:16]), "another piece"
        checks.path.unlink()
        with pytest.raises(StorageError, match="read of tokens"):
            checks.read(0, 16)
        checks.path.write_bytes(data)
