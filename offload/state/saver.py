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
removed. Whether it is gone is told by the number of names that its backing files have beside their
anchors ([Note: anchors]): a folder that was moved away, or copied by hard links, keeps its extents.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from offload.errors import CheckpointError, OffloadError
from offload.native import DiskCalls, IoEngine, report_progress
from offload.schedule.executor import Background
from offload.state import durable, folders, manifest
from offload.state.manifest import Manifest
from offload.state.saving import CheckpointWriter, Linked, Request
from offload.state.source import SnapshotSource
from offload.state.trimming import trim
from offload.tiers.run_folder import disk_of

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
        path = saver.under_way
        if path is not None and path.parent.resolve() == root.resolve():
            saver.wait_quietly()


class Saver:
    """See [Note: Saving]. For one user thread.

    Args:
        io: writes.
        deadline_seconds: how long one write, or a wait for host memory, may take.

    Attributes:
        under_way: where the checkpoint is that is being written; None: none is.
        path: where the last one is that is durable; None: there is none.
    """

    def __init__(self, io: IoEngine, deadline_seconds: float) -> None:
        self._io = io
        self._deadline_seconds = deadline_seconds
        self._background = Background("offload-checkpoint")
        self._disk = DiskCalls(deadline_seconds)
        self._known: dict[Path, _Known] = {}  # by the folder of the checkpoint
        self._trimmed: set[Path] = set()  # directories that have been looked at for leftovers
        self._linked: list[Linked] = []  # touched by calls of `_disk` only
        self.under_way: Path | None = None
        self.path: Path | None = None
        _living.add(self)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._background.is_busy

    def raise_error(self) -> None:
        """Raises, once, why the last checkpoint has failed."""
        self._background.raise_error()

    def keep_error(self, error: OffloadError) -> None:
        """Let `raise_error` raise this: the step before it counts all the same."""
        self._background.keep(error)

    def wait(self) -> None:
        """Wait until the last checkpoint is durable, and `raise_error`."""
        self._background.wait()

    def wait_quietly(self) -> None:
        """Wait until the last checkpoint is durable or has failed; its user is told of that."""
        self._background.join()

    def device_of(self, root: Path) -> int:
        """`st_dev` of the disk of a directory, which may be missing.

        Raises:
            OSError: the system does not tell.
        """
        return self._disk.make("stat", root, partial(disk_of, root))

    def close(self) -> None:
        """Wait for the last checkpoint, and end the threads.

        Raises:
            BudgetError, CheckpointError, StorageError: it could not be saved.
        """
        try:
            self.wait()
        finally:
            self._disk.close()

    def next_sequence(self, root: Path) -> int:
        """A number greater than that of every checkpoint in a directory.

        Raises:
            OSError: it cannot be read.
        """
        found = self._disk.make("list", root, partial(self._look, root))
        return 1 + max((known.sequence for known in found.values()), default=0)

    def num_linked(self, root: Path, retention: Retention) -> int:
        """How many checkpoints refer to extents when there is one more in a directory.

        Lets go of the extents of those that are gone.
        """
        self._disk.make("look at", root, self._forget_removed)
        counted = [
            link
            for link in self._linked
            if link.folder.parent == root and link.origin in retention.origins
        ]
        count = len(counted) + 1
        others = len(self._linked) - len(counted)
        return others + (min(count, retention.most) if retention.most else count)

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
            BudgetError, CheckpointError, DiskFullError, StorageError: nothing of it is left, unless
                it was the very last sync that failed.
        """
        self._disk.make("look at", request.root, self._forget_removed)
        writer = CheckpointWriter(
            *(self._io, snapshot, request, self._disk, self._deadline_seconds),
            self._linked.append,
        )
        writer.begin()
        path = self.under_way = request.root / request.tag

        def run() -> None:
            with contextlib.ExitStack() as unpinning:
                ends_pins = retention.most > 0 or request.portable
                after_capture = partial(_enter, unpinning, snapshot) if ends_pins else _nothing
                try:
                    with durable.storage_errors("save", request.root, what=request.tag):
                        writer.run(after_capture)
                    self.path = path
                except OffloadError as error:
                    error.add_note(f"while checkpoint {path} was written")
                    raise
                finally:
                    self.under_way = None
                self._retire(request.root, retention)

        if asynchronous:
            try:
                self._background.start(run)
            except BaseException:
                if self.under_way is not None:  # it has not run
                    self.under_way = None
                    writer.give_up()
                raise
        else:
            run()
        return path

    def _look(self, root: Path) -> dict[Path, _Known]:
        """The checkpoints in a directory, by folder; each manifest is read once."""
        found: dict[Path, _Known] = {}
        if not root.is_dir():
            return found
        if root not in self._trimmed:
            self._trimmed.add(root)
            contents, damaged = folders.candidates(root, None)
            if not damaged:  # one that cannot be read now may be readable one day
                trim(contents)
        for folder in folders.subfolders(root):
            if folder.name.startswith("."):
                continue  # on its way in or out
            with contextlib.suppress(OSError, CheckpointError):
                status = (folder / manifest.MANIFEST_NAME).stat()
                stamp = (status.st_dev, status.st_ino, status.st_mtime_ns)
                known = self._known.get(folder)
                if known is None or known.stamp != stamp:
                    content = manifest.read(folder)
                    known = _Known(stamp, content.sequence, origin_of(content))
                found[folder] = self._known[folder] = known
            report_progress()
        return found

    def _retire(self, root: Path, retention: Retention) -> None:
        """Remove what retention gives up. The new checkpoint stands, whatever happens here."""
        try:
            if retention.most:
                known = self._disk.make("list", root, partial(self._look, root))
                counted = [f for f, each in known.items() if each.origin in retention.origins]
                counted.sort(key=lambda folder: known[folder].sequence, reverse=True)
                for folder in counted[retention.most :]:
                    self._disk.make("remove", folder, partial(folders.retire, folder))
            self._disk.make("look at", root, self._forget_removed)
        except OSError as error:
            warnings.warn(
                f"an old checkpoint could not be removed yet: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _forget_removed(self) -> None:
        """Let go of the extents of checkpoints that are gone."""
        there = [link for link in self._linked if link.is_there()]
        names = Counter(file.identity for link in there for file in link.files)
        for link in [link for link in self._linked if link not in there]:
            if any(file.num_names() > names[file.identity] for file in link.files):
                there.append(link)  # it has another name somewhere
            else:
                link.release()
        self._linked[:] = there


@dataclass(frozen=True, slots=True)
class _Known:
    """A checkpoint in a directory; `stamp` changes with its manifest."""

    stamp: tuple[int, int, int]
    sequence: int
    origin: str


def origin_of(content: Manifest) -> str:
    """One of `ORIGINS`."""
    origin = content.values.get("origin")
    return origin if origin in ORIGINS else "tag"


def _enter(stack: contextlib.ExitStack, snapshot: SnapshotSource) -> None:
    stack.enter_context(snapshot.unpinning())


def _nothing() -> None:
    pass
