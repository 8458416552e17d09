"""A DeepSpeed configuration while it is being read: every key gets a note, every problem is kept.

[Note: Notes]
A note stands for one leaf of the JSON, named by its dotted key:

    translated      the same here, exactly
    approximated    something near it; the note says what and why
    ignored         nothing here; the note says why

Every leaf has exactly one, also unknown keys: `close` sees to that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from offload.integrations.deepspeed.keys import IGNORED

Verdict = Literal["translated", "approximated", "ignored"]
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Note:
    """What became of one key; see [Note: Notes]."""

    key: str
    value: Any
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.verdict}: {self.text}"


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything that is no filled section."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Reading:
    """The leaves of a configuration, the notes on them, and what is wrong with it.

    Args:
        config: the DeepSpeed configuration.
        values: what `"auto"` stands for, by dotted key.

    Attributes:
        problems: one message for each.
    """

    def __init__(self, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._leaves = dict(leaves(config))
        self._values = dict(values)
        self._notes: dict[str, Note] = {}
        self.problems: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the key, or a section of that name, is given and not null."""
        return self._leaves.get(key) is not None or any(
            leaf.startswith(f"{key}.") for leaf in self._leaves
        )

    def keys_below(self, section: str) -> list[str]:
        """The keys of a section, without its name."""
        prefix = f"{section}."
        return [leaf[len(prefix) :] for leaf in self._leaves if leaf.startswith(prefix)]

    def raw(self, key: str) -> Any:
        """The value as it stands in the JSON, or None."""
        return self._leaves.get(key)

    def note(self, key: str, verdict: Verdict, text: str) -> None:
        """Say what became of a key, if it is there; the first note counts."""
        if key in self._leaves and key not in self._notes:
            self._notes[key] = Note(key, self._leaves[key], verdict, text)

    def boolean(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self._resolved(key, default)
        if isinstance(value, bool):
            return value
        return bool(self._wrong(key, value, "true or false", default))

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number; JSON's 1e9 is one."""
        value = self._resolved(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        self._wrong(key, value, "a whole number", default)
        return default

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number."""
        value = self._resolved(key, default)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        self._wrong(key, value, "one number", default)
        return default

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string. `"auto"` is looked up as everywhere."""
        value = self._resolved(key, default)
        if value is None or isinstance(value, str):
            return value
        self._wrong(key, value, "a string", default)
        return default

    def pair(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """Two numbers."""
        value = self._resolved(key, default)
        if isinstance(value, (list, tuple)) and len(value) == 2:
            first, second = value
            if all(isinstance(v, (int, float)) for v in (first, second)):
                return float(first), float(second)
        self._wrong(key, value, "two numbers", default)
        return default

    def close(self) -> tuple[Note, ...]:
        """Every leaf's note, in the order of the JSON; what nobody has read is ignored."""
        for key in self._leaves:
            if key not in self._notes:
                self.note(key, "ignored", self._why_ignored(key))
        return tuple(self._notes[key] for key in self._leaves)

    def _why_ignored(self, key: str) -> str:
        for pattern, reason in IGNORED:
            if fnmatchcase(key, pattern):
                return reason
        known = [pattern for pattern, _ in IGNORED if "*" not in pattern]
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        return "no key that is known here" + (f"; did you mean {nearest[0]}?" if nearest else "")

    def _resolved(self, key: str, default: Any) -> Any:
        value = self._leaves.get(key)
        if value is None:
            return default
        if value != AUTO:
            return value
        if key in self._values:
            return self._values[key]
        self.problems.append(
            f"{key} = 'auto': give its value, values={{{key!r}: ...}} (on the command line --set "
            f"{key}=...), or write it into the file"
        )
        return default

    def _wrong(self, key: str, value: Any, expected: str, default: Any) -> Any:
        self.problems.append(f"{key} = {value!r} must be {expected}")
        return default
