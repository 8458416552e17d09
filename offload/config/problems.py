"""Turns pydantic's errors into messages that name the key, the value and the nearest valid one."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from pydantic_core import ErrorDetails, ValidationError

_QUOTED = re.compile(r"'([^']*)'")


def describe_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one message for each problem in `error`, which validating `model` has raised."""
    return [_describe(details, model) for details in error.errors(include_url=False)]


def valid_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every field of `model` that is not a section."""
    for name, field in model.model_fields.items():
        section = section_class(field.annotation)
        if section is None:
            yield f"{prefix}{name}"
        else:
            yield from valid_keys(section, f"{prefix}{name}.")


def section_class(annotation: object) -> type[BaseModel] | None:
    """Return the section class that `annotation` is, or holds a tuple of; else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = section_class(argument)
        if found is not None:
            return found
    return None


def _describe(details: ErrorDetails, model: type[BaseModel]) -> str:
    location = [str(part) for part in details["loc"]]
    name = ".".join(location)
    value, context = details["input"], details.get("ctx", {})
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(location, model)
    if kind == "missing":
        return f"{name} is missing"
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        return f"{name} = {value!r} is not one of {expected}{_did_you_mean(value, expected)}"
    if kind == "model_type":
        return f"{name} must be a table (section), not {value!r}"
    if kind == "value_error":
        return f"{name} {context['error']}"
    message = details["msg"].removeprefix("Input ").removeprefix("Value ")
    return f"{name} = {value!r}: {message}"


def _did_you_mean(value: object, expected: str) -> str:
    if not isinstance(value, str):
        return ""
    choices = _QUOTED.findall(expected)
    nearest = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def _unknown_key(location: Sequence[str], model: type[BaseModel]) -> str:
    *parents, key = location
    section: type[BaseModel] = model
    for part in parents:
        field = section.model_fields.get(part)
        inner = section_class(field.annotation) if field is not None else None
        section = inner or section  # an index into a tuple of sections keeps the section
    prefix = "".join(f"{part}." for part in parents)
    name = f"{prefix}{key}"
    everywhere = list(valid_keys(model))
    by_last = {dotted.rpartition(".")[2]: dotted for dotted in reversed(everywhere)}
    siblings = difflib.get_close_matches(key.lower(), section.model_fields, n=1, cutoff=0.6)
    if siblings and key.lower() not in by_last:
        return f"unknown key {name}: did you mean {prefix}{siblings[0]}?"
    elsewhere = difflib.get_close_matches(key.lower(), by_last, n=1, cutoff=0.8)
    if elsewhere:
        return f"unknown key {name}: did you mean {by_last[elsewhere[0]]}?"
    nearest = difflib.get_close_matches(name.lower(), everywhere, n=1, cutoff=0.0)[0]
    keys = ", ".join(section.model_fields)
    return f"unknown key {name}: the nearest valid key is {nearest}; valid here: {keys}"
