"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: of which page, the how manieth of its language there, its line."""

    page: str
    language: str
    number: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Every block of one of these languages ("" is none), page by page."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        counts = dict.fromkeys(languages, 0)
        for match in _BLOCK.finditer(text):
            language = match[1]
            if language in counts:
                line = text.count("\n", 0, match.start()) + 1
                page = path.relative_to(ROOT).as_posix()
                found.append(Block(page, language, counts[language], line, match[2]))
                counts[language] += 1
    return found
