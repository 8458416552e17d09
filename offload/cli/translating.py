"""`offload translate`: a DeepSpeed configuration as TOML, with a note on every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offload.errors import ConfigError
from offload.integrations.deepspeed.translation import translate


def run(source: str, out: str | None, values: Mapping[str, str], world_size: int) -> str:
    """Translate the file; return the notes, and write the TOML to `out`, or return it as well.

    Args:
        source: a JSON file.
        out: a file that does not exist, or None.
        values: what `"auto"` stands for; each is read as JSON, or is a string.
        world_size: see `translate`.

    Raises:
        ConfigError: see `translate`; or `out` is there.
    """
    made = translate(
        source,
        values={key: _read(value) for key, value in values.items()},
        world_size=world_size,
    )
    text = f"# Translated from {Path(source).name}.\n\n{to_toml(made.plain)}"
    notes = f"{made}\n"
    if out is None:
        commented = "".join(f"# {line}\n" for line in notes.splitlines())
        return f"{commented}\n{text}"
    try:
        with Path(out).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError(problems=[problem], source=out) from error
    return notes


def to_toml(plain: Mapping[str, Any]) -> str:
    """A mapping of sections as TOML: scalars, lists of scalars, tables, lists of tables."""
    return "\n".join(_table(plain, "")).strip() + "\n"


def _table(table: Mapping[str, Any], name: str) -> Iterator[str]:
    scalars = {k: v for k, v in table.items() if not _is_table(v)}
    if name and scalars:
        yield f"[{name}]"
    yield from (f"{key} = {_value(value)}" for key, value in scalars.items())
    if scalars:
        yield ""
    for key, value in table.items():
        inner = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            yield from _table(value, inner)
        elif _is_table(value):
            for entry in value:
                yield f"[[{inner}]]"
                yield from (f"{k} = {_value(v)}" for k, v in entry.items())
                yield ""


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
