"""Saves with one thing left out or in the wrong order, for --teeth; each is called in a life."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from offload.native import IoEngine, IoFile
from offload.state import durable, folders, saver
from offload.state.session import OffloadEngine
from offload.tiers.nvme import NvmeStore
from offload.tiers.pins import Pin
from offload.tiers.records import Record


def _sync_only(wanted: Callable[[int], bool]) -> None:
    """Let fsync do nothing for descriptors that are not `wanted`."""
    honest, honest_engine = os.fsync, IoEngine.fsync

    def fsync(descriptor: int) -> None:
        if wanted(descriptor):
            honest(descriptor)

    def engine_fsync(self: IoEngine, file: IoFile) -> None:
        if wanted(file.fd):
            honest_engine(self, file)

    os.fsync = fsync  # type: ignore[assignment]
    IoEngine.fsync = engine_fsync  # type: ignore[method-assign]


def _is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _name(descriptor: int) -> str:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name


def nothing_is_synced() -> None:
    """No fsync at all."""
    _sync_only(lambda _descriptor: False)


def data_is_not_synced() -> None:
    """Of files, only manifest and hint are synced."""
    _sync_only(lambda fd: _is_folder(fd) or "manifest" in _name(fd) or "LATEST" in _name(fd))


def manifest_is_not_synced() -> None:
    """Everything else is."""
    _sync_only(lambda fd: "manifest" not in _name(fd))


def folders_are_not_synced() -> None:
    """Names may be lost; the hint, whose sync would commit them as well, is not written."""
    _sync_only(lambda fd: not _is_folder(fd))

    def write_hint(root: Path, tag: str) -> None:  # noqa: ARG001
        return

    folders.write_hint = write_hint


def old_one_goes_first() -> None:
    """What is replaced is removed before its successor has its name."""

    def publish(pending: Path, root: Path, tag: str) -> Path:
        shutil.rmtree(root / tag, ignore_errors=True)
        pending.rename(root / tag)
        durable.sync_folder(root)
        return root / tag

    folders.publish = publish


def written_in_place() -> None:
    """Files are written under the tag itself, over those of the old checkpoint."""
    honest = folders.pending_folder

    @contextlib.contextmanager
    def pending_folder(root: Path, tag: str) -> Iterator[Path]:
        if tag == folders.HINT_NAME:
            with honest(root, tag) as folder:
                yield folder
            return
        shutil.rmtree(root / tag, ignore_errors=True)
        durable.make_folder(root / tag)
        yield root / tag

    folders.pending_folder = pending_folder

    def publish(pending: Path, root: Path, tag: str) -> Path:  # noqa: ARG001
        return pending

    folders.publish = publish


def acknowledged_too_early() -> None:
    """Nobody waits until a checkpoint is durable."""

    def wait_for_checkpoint(self: OffloadEngine) -> Path | None:
        return self._saver.path

    OffloadEngine.wait_for_checkpoint = wait_for_checkpoint  # type: ignore[method-assign]


def pins_are_ignored() -> None:
    """What a checkpoint refers to is written over by later steps."""
    honest_pin = NvmeStore.pin

    def pin(self: NvmeStore, record: Record) -> Pin | None:
        pinned = honest_pin(self, record)
        if pinned is not None:
            self._pools[pinned.extent.nbytes].end_read(pinned.extent)
        return pinned

    def unpin(self: NvmeStore, pin: Pin) -> None:
        with self._lock:
            self._pins[pin.extent] -= 1

    NvmeStore.pin = pin  # type: ignore[method-assign]
    NvmeStore.unpin = unpin  # type: ignore[method-assign]


def old_ones_go_first() -> None:
    """Retention removes what it gives up before the new one is there."""
    honest = saver.Saver.save

    def save(self: saver.Saver, *arguments: Any, **options: Any) -> Path:
        root = arguments[1].root
        for folder in folders.subfolders(root) if root.exists() else []:
            folders.retire(folder)
        return honest(self, *arguments, **options)

    saver.Saver.save = save  # type: ignore[method-assign]


def nothing_is_swept() -> None:
    """What killed saves have left stays."""

    def sweep(root: Path) -> None:  # noqa: ARG001
        return

    folders.sweep = sweep
