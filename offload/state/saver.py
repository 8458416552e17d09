"""The checkpoints that an engine writes: one at a time, beside the training that goes on.

[Note: Saving]
    call      what is cheap to refuse is refused; plain values, small tensors and the snapshot are
              taken; room is allocated. From here on the state may change.
    capture   each block of the snapshot is linked or copied ([Note: Snapshot]): an extent on the
              file system of the checkpoint is pinned and its backing file gets a name in the
              pending folder; what is in memory is written to the checkpoint's own data file
    copy      pinned extents elsewhere, or all of them in a portable checkpoint
    durable   data synced, folder synced, manifest, rename, directory synced; then the checkpoint is
              acknowledged ([Note: durable order])
    retire    checkpoints that retention gives up are removed, and what only they had pinned is free

A checkpoint that refers to extents keeps them pinned while the process lives, or until it is
removed. Whether it is gone is told by the number of names that its backing files have: a folder
that was moved away, or copied by hard links, keeps its extents.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from offload.errors import OffloadError
from offload.native import IoEngine
from offload.schedule.executor import Background
from offload.state import folders, manifest
from offload.state.manifest import Manifest
from offload.state.saving import CheckpointWriter, Linked, Request
from offload.state.source import SnapshotSource
from offload.state.trimming import trim
from offload.tiers import pins

# Who chose that a checkpoint is saved under this name: nobody, the one who called, or that too
# under a tag of his own.
ORIGINS = ("engine", "call", "tag")


@dataclass(frozen=True, slots=True)
class Retention:
    """Of checkpoints of these origins the newest `most` stay; 0: all."""

    origins: Collection[str] = ()
    most: int = 0


_living: weakref.WeakSet[Saver] = weakref.WeakSet()


def wait_for_saves(root: Path) -> None:
    """Wait for the checkpoints that this process is writing to a directory; raises nothing."""
    for saver in list(_living):
        if saver.path is not None and saver.path.parent == root.absolute():
            saver.wait_quietly()


class Saver:
    """See [Note: Saving]. For one user thread.

    Args:
        io: writes.
        deadline_seconds: how long one write, or a wait for host memory, may take.
    """

    def __init__(self, io: IoEngine, deadline_seconds: float) -> None:
        self._io = io
        self._deadline_seconds = deadline_seconds
        self._background = Background("offload-checkpoint")
        self._known: dict[Path, dict[Path, tuple[int, str]]] = {}  # sequence and origin
        self._linked: list[Linked] = []
        self.path: Path | None = None  # of the last checkpoint
        _living.add(self)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._background.is_busy

    def raise_error(self) -> None:
        """Raises, once, why the last checkpoint has failed; nothing of it is left."""
        self._background.raise_error()

    def wait(self) -> None:
        """Wait until the last checkpoint is durable, and `raise_error`."""
        self._background.wait()

    def wait_quietly(self) -> None:
        """Wait until the last checkpoint is durable or has failed; its user is told of that."""
        self._background.join()

    def next_sequence(self, root: Path) -> int:
        """A number greater than that of every checkpoint in a directory."""
        known = self._known_in(root)
        return 1 + max((sequence for sequence, _ in known.values()), default=0)

    def num_linked(self, retention: Retention) -> int:
        """How many checkpoints refer to extents when there is one more."""
        count = len(self._linked) + 1
        return min(count, retention.most) if retention.most else count

    def save(
        self,
        snapshot: SnapshotSource,
        request: Request,
        retention: Retention,
        *,
        asynchronous: bool,
    ) -> Path:
        """Write a checkpoint; the one before has ended. Returns its path.

        Raises:
            BudgetError, CheckpointError, DiskFullError, StorageError: nothing of it is left.
        """
        self._forget_removed()
        writer = CheckpointWriter(self._io, snapshot, request, self._deadline_seconds)
        writer.begin()
        self.path = request.root / request.tag

        def run() -> None:
            ends_pins = retention.most > 0 or request.portable
            with snapshot.unpinning() if ends_pins else contextlib.nullcontext():
                try:
                    linked = writer.run()
                except OffloadError as error:
                    error.add_note(f"while checkpoint {request.root / request.tag} was written")
                    raise
                self._note(request, linked)
                self._retire(request.root, retention)

        if asynchronous:
            self._background.start(run)
        else:
            run()
        return self.path

    def _known_in(self, root: Path) -> dict[Path, tuple[int, str]]:
        if root not in self._known:
            found, damaged = folders.candidates(root, None) if root.is_dir() else ([], [])
            if not damaged:  # one that cannot be read now may be readable one day
                trim(found)
            self._known[root] = {
                folder: (content.sequence, origin_of(content)) for folder, content in found
            }
        return self._known[root]

    def _note(self, request: Request, linked: Linked | None) -> None:
        folder = request.root / request.tag
        known = self._known_in(request.root)
        known[folder] = (request.sequence, str(request.values["origin"]))
        if linked is not None:
            self._linked.append(linked)

    def _retire(self, root: Path, retention: Retention) -> None:
        known = self._known_in(root)
        if retention.most:
            counted = [
                folder for folder, (_, origin) in known.items() if origin in retention.origins
            ]
            counted.sort(key=lambda folder: known[folder][0], reverse=True)
            for folder in counted[retention.most :]:
                folders.retire(folder)
                del known[folder]
        self._forget_removed()

    def _forget_removed(self) -> None:
        """Let go of the extents of checkpoints that are gone."""
        latest = {link.folder: link for link in self._linked}
        there = [
            link for link in latest.values() if (link.folder / manifest.MANIFEST_NAME).exists()
        ]
        names = Counter(pins.file_identity(file) for link in there for file in link.files)
        for link in [link for link in self._linked if link not in there]:
            if any(
                os.fstat(file.fd).st_nlink > names[pins.file_identity(file)] for file in link.files
            ):
                there.append(link)  # it has another name somewhere
            else:
                link.release()
        self._linked = there


def origin_of(content: Manifest) -> str:
    """One of `ORIGINS`."""
    origin = content.values.get("origin")
    return origin if origin in ORIGINS else "tag"
