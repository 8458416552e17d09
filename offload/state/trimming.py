"""What a killed process has left in the files that its checkpoints refer to.

A backing file holds more than a checkpoint needs: room for the next versions, and state that no
checkpoint has. A process that ends gives that back to the disk; of one that was killed it stays
until somebody else saves there. The file is locked as long as its process lives, and touched only
if every name that it has is known: other checkpoints may need other parts of it. The anchor of a
killed process ([Note: anchors]) is not known here, because no checkpoint says where it is: the next
run on the path of the tier has removed it before it saves. As long as nobody runs there, it stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from offload.state.manifest import Manifest, data_file_name
from offload.tiers.run_folder import keep_ranges

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def trim(checkpoints: Iterable[tuple[Path, Manifest]]) -> None:
    """Give back what none of these checkpoints, all of a directory, needs of its files.

    Raises nothing: where it is not possible, the bytes stay.
    """
    names: dict[tuple[int, int], int] = {}
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    paths: dict[tuple[int, int], Path] = {}
    for folder, content in checkpoints:
        for number in range(len(content.files)):
            path = folder / data_file_name(number)
            with contextlib.suppress(OSError):
                status = path.stat(follow_symlinks=False)
                file = (status.st_dev, status.st_ino)
                names[file] = names.get(file, 0) + 1
                paths[file] = path
                ranges.setdefault(file, []).extend(
                    (block.offset, block.nbytes) for block in content.blocks if block.file == number
                )
    for file, path in paths.items():
        with contextlib.suppress(OSError):
            _keep(path, file, names[file], ranges[file])


def _keep(path: Path, file: tuple[int, int], num_names: int, ranges: list[tuple[int, int]]) -> None:
    descriptor = os.open(path, _FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == file and status.st_nlink == num_names:
            keep_ranges(descriptor, ranges)
    finally:
        os.close(descriptor)
