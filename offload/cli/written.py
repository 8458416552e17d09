"""Files that a command writes for the user."""

from __future__ import annotations

from pathlib import Path

from offload.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a file in place of what it was.

    Raises:
        StorageError: names the file and why.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            operation="write",
            path=path,
            errno=error.errno,
            remedy="name another file with -o",
        ) from error
