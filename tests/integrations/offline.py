"""A tokenizer and texts that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SENTENCE = "the quick brown fox jumps over the lazy dog"


def tokenizer() -> Any:
    """A byte-level BPE of a few words, in transformers' class."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<eos>", "<pad>"]
    made.train_from_iterator(
        [SENTENCE] * 20,
        trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def texts(count: int = 24) -> Any:
    """A `datasets.Dataset` of texts of several lengths, in memory."""
    return datasets.Dataset.from_dict(
        {"text": [f"{SENTENCE} {number} " * (1 + number % 3) for number in range(count)]}
    )
