"""The code blocks of a page of docs/."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block, in order."""
    return _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def after(diff: str) -> str:
    """What a diff makes of the text before it."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
