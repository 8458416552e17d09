"""Examples for fine-tuning: prompts with completions, and conversations.

[Note: what an example is]
text        a stretch of one stream of text; see [Note: data order] of `offload.cli.data`
completion  {"prompt", "completion"}: the two strings, back to back, as one document
chat        {"messages": [{"role", "content"}, ...]}: what the chat template makes of them

[Note: which tokens are trained]
With `train_on = "completion"` the loss is of the completion and the end behind it, or of what the
assistant says. A template that has `{% generation %}` blocks says itself what that is. Of another,
it is what a turn of the assistant adds to the rendered conversation before it, the prompt for that
turn included; a template that renders earlier turns otherwise than the last is refused, because no
one could tell then. The text is encoded as a whole; a token of which any character lies in such a
span counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offload.cli.data import STDLIB, TEXT_SUFFIXES, Marks, Problems, Tokenizer, Tokens, jsonl_lines
from offload.config import RunSection
from offload.errors import ConfigError, OffloadError

DATASETS_PREFIX = "datasets:"
_GENERATION = "generation"
# What `datasets.save_to_disk` writes beside its tables: of one data set, and of several.
_SAVED_ONE, _SAVED_MANY = "dataset_info.json", "dataset_dict.json"
_FORMS = "'text', 'prompt' and 'completion', or 'messages'"

Record = tuple[str, dict[str, Any]]  # what to call it, and its fields


class Example(NamedTuple):
    """Ids of a whole example, int64, and which of them the loss is of."""

    tokens: Tokens
    trained: Marks


class Records:
    """The records of a source, in their order, one in memory at a time; may be read again.

    Attributes:
        is_text: whether they are texts, by the first of them.
    """

    def __init__(self, source: str, split: str) -> None:
        self._table: Any = _table(source, split)
        self._paths: list[Path] = []
        if self._table is None and source != STDLIB:
            path = Path(source)
            self._paths = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
            self._paths = [each for each in self._paths if each.suffix == ".jsonl"]
        first = next(self.read(Problems()), None)
        self.is_text = first is None or not {"prompt", "messages"} & first[1].keys()
        others = [] if self.is_text else _other_texts(Path(source))
        if others and self._table is None:
            raise OffloadError(
                f"{source} holds examples, and {len(others)} other text(s), e.g. {others[0]}",
                remedy="name a folder, or a file, with examples alone",
            )

    @property
    def table(self) -> Any:
        """The data set of the datasets library, if the records are from one."""
        return self._table

    def read(self, problems: Problems) -> Iterator[Record]:
        """What can be read; what cannot is taken note of."""
        if self._table is not None:
            for number, fields in enumerate(self._table):
                yield f"row {number}:", fields
        for path in self._paths:
            if path.is_file():
                for line in jsonl_lines(path, problems):
                    yield line.where, line.fields


def _other_texts(folder: Path) -> list[Path]:
    """Files in a folder that are texts, and no records."""
    suffixes = set(TEXT_SUFFIXES) - {".jsonl"}
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def _table(source: str, split: str) -> Any:
    """The data set that `source` names, or None if it is for files.

    Raises:
        OffloadError: the datasets library is missing, or does not find it, or it has no such split.
    """
    folder = Path(source)
    is_saved = any((folder / name).is_file() for name in (_SAVED_ONE, _SAVED_MANY))
    name = source.removeprefix(DATASETS_PREFIX)
    if not is_saved and name == source:
        return None
    try:
        import datasets
    except ImportError as error:
        raise OffloadError(
            f"run.data = {source!r} needs the datasets library: {error}",
            remedy="pip install datasets, or write the data as .jsonl",
        ) from error
    try:
        if is_saved:
            found = datasets.load_from_disk(str(folder))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(
            name, split=split, download_config=datasets.DownloadConfig(local_files_only=True)
        )
    except (OSError, KeyError, ValueError) as error:
        raise OffloadError(
            f"run.data = {source!r}, split {split!r}: {error}",
            expected="a folder of datasets.save_to_disk, or a name or folder that "
            "datasets.load_dataset finds without network",
        ) from error


class Encoder:
    """Makes examples of records.

    Raises:
        ConfigError: the chat template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, section: RunSection) -> None:
        self._tokenizer = tokenizer
        self._is_all = section.train_on == "all"
        template, self._names = tokenizer.chat()
        self._template = template
        if section.chat_template is not None:
            self._template = _template_text(section.chat_template)

    def encode(self, fields: Mapping[str, Any]) -> Example:
        """The example of a record.

        Raises:
            ValueError: the record makes none; says why, as the end of a sentence about it.
            OffloadError: no record could make one.
        """
        if "messages" in fields:
            return self._chat(fields)
        lacking = {"prompt", "completion"} - fields.keys()
        if lacking:
            found = ", ".join(map(repr, fields)) or "none"
            raise ValueError(f"has the fields {found}: expected {_FORMS}")
        prompt, completion = fields["prompt"], fields["completion"]
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ValueError("has a prompt or a completion that is no string")
        text = prompt + completion
        first = 0 if self._is_all else len(prompt)
        return self._encoded(text, [(first, len(text))], whole=True)

    def _chat(self, fields: Mapping[str, Any]) -> Example:
        if self._template is None:
            raise OffloadError(
                "the data has messages, and the tokenizer has no chat template",
                remedy="set run.chat_template to a template or a file with one, or use the "
                "tokenizer of a chat model",
            )
        messages = fields["messages"]
        _check_messages(messages)
        text, spans = self._rendered(messages, fields.get("tools"))
        if self._is_all:
            spans = [(0, len(text))]
        return self._encoded(text, spans, whole=False)

    def _encoded(self, text: str, spans: list[tuple[int, int]], *, whole: bool) -> Example:
        try:
            return Example(*self._tokenizer.encode_marked(text, spans, whole=whole))
        except UnicodeEncodeError as error:
            raise ValueError(f"is no valid Unicode: {error.reason}") from error

    def _rendered(
        self, messages: list[dict[str, Any]], tools: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans of the assistant's turns in it."""
        assert self._template is not None
        if "{% " + _GENERATION in self._template or "{%- " + _GENERATION in self._template:
            text, spans = self._render(messages, tools, return_assistant_tokens_mask=True)
            return text, [(first, last) for first, last in spans]
        text, _ = self._render(messages, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or self._is_all:
                continue
            before, _ = self._render(messages[:number], tools, add_generation_prompt=True)
            after, _ = self._render(messages[: number + 1], tools)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"has an assistant's turn (message {number}) that the chat template renders "
                    "differently once more follows: give a template in run.chat_template that "
                    "marks it with {% generation %}, or set run.train_on = 'all'"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            from jinja2 import TemplateError
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError as error:
            raise OffloadError(
                f"chat templates need jinja2 and transformers: {error}",
                remedy="pip install jinja2 'offload[hf]'",
            ) from error

        try:
            render: Any = render_jinja_template
            texts, spans = render(
                [messages], tools=tools, chat_template=self._template, **options, **self._names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"is refused by the chat template: {error}") from error
        return texts[0], spans[0] if spans else []


def _check_messages(messages: object) -> None:
    """Raises ValueError."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("has messages that are no list of at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"has a message ({number}) without a role")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"has a message ({number}) without content")


def _template_text(given: str) -> str:
    """A template as it stands, or that of a file: what has no braces is the name of one."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            problems=[f"run.chat_template = {given!r} is neither a template nor a file: {error}"]
        ) from error


def no_example(example: Example, length: int) -> bool:
    """Whether the first `length` tokens hold nothing that the loss could be of.

    No token before the first predicts it.
    """
    return not np.any(example.trained[1:length])
