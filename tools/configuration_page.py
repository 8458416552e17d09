"""Write docs/configuration.md from the configuration's JSON Schema; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.config import config_json_schema

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
Schema = dict[str, Any]
HEAD = """\
# Configuration

<!-- Written by tools/configuration_page.py from the schema; do not edit. -->

A configuration is a TOML or JSON file, or a dict with the same sections. Every field has a working
default. Sizes are written `"20GiB"` (powers of 1024), `"20GB"` (powers of 1000) or as a number of
bytes. Relative paths are relative to the current directory. Unknown keys, values out of range and
contradictions are errors, all reported at once, with the nearest valid key. `offload config-schema`
prints the schema for editors.
"""


def page() -> str:
    """Return the whole page."""
    schema = config_json_schema()
    return "\n".join([HEAD, *_sections(schema, schema, "")])


def _sections(schema: Schema, section: Schema, name: str) -> Iterator[str]:
    """Yield the lines of `section`, then those of the sections in it."""
    inner = {
        key: (field, found)
        for key, field in section["properties"].items()
        if (found := _referenced(schema, field)) is not None
    }
    keys = {key: field for key, field in section["properties"].items() if key not in inner}
    if name:
        brackets = "[[{}]]" if name.endswith("groups") else "[{}]"
        yield f"## `{brackets.format(name)}`\n"
        yield f"{_one_line(section['description'])}\n"
    if keys:
        yield "| key | value | default | meaning |\n|---|---|---|---|"
        for key, field in keys.items():
            required = key in section.get("required", [])
            default = "required" if required else _default(field.get("default"))
            meaning = _one_line(field["description"])
            yield f"| `{key}` | {_values(schema, field)} | {default} | {meaning} |"
        yield ""
    for key, (_, found) in inner.items():
        yield from _sections(schema, found, f"{name}.{key}".lstrip("."))


def _referenced(schema: Schema, field: Schema) -> Schema | None:
    """Return the section that `field` is or is a list of; None if it is a value."""
    for candidate in [field, field.get("items", {}), *field.get("anyOf", [])]:
        if "$ref" in candidate:
            found: Schema = schema["$defs"][candidate["$ref"].rpartition("/")[2]]
            return found
    return None


def _values(schema: Schema, field: Schema) -> str:
    if "x-type" in field:
        return str(field["x-type"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        choices = [choice for choice in field["anyOf"] if choice.get("type") != "null"]
        return " or ".join(_values(schema, choice) for choice in choices)
    if field["type"] == "array":
        items = field.get("items") or field["prefixItems"][0]
        return f"list of {_values(schema, items)}"
    names = {"number": "float", "integer": "int", "boolean": "bool", "object": "table"}
    kind = names.get(field["type"])
    kind = kind or ("path" if field.get("format") == "path" else "string")
    limits = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    bounds = [f"{sign} {field[key]}" for key, sign in limits.items() if key in field]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(value: object) -> str:
    return "none" if value is None else f"`{json.dumps(value)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write the page, or with `--check` return 1 when it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is out of date: run tools/configuration_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
