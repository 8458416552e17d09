"""Checkpoint folders: created hidden, published by one rename, swept when their writer died.

[Note: publishing a checkpoint] A save writes into `.tmp-*`, holding that folder's flock. When all
of it is synced, the folder gets its tag by rename and the parent is synced; only then is the save
acknowledged. Where the tag exists already, the old checkpoint steps aside to `.old-*` first:
killed between the two renames, there is still the old one, and loading finds it by the tag in its
manifest. A later save removes what killed writers left: `.tmp-*` whose lock is free, `.old-*` whose
successor stands, and `.gone-*`, which were being removed.
Source: RELIABILITY promises P1, P2, P8.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from offload.errors import CheckpointError, StorageError
from offload.native import report_progress
from offload.state import durable, manifest

PENDING_PREFIX = ".tmp-"
REPLACED_PREFIX = ".old-"
RETIRED_PREFIX = ".gone-"
HINT_NAME = "LATEST"
_SUFFIX_BYTES = 4  # of randomness behind a name, as hexadecimal digits


@contextlib.contextmanager
def pending_folder(root: Path, tag: str) -> Iterator[Path]:
    """A locked, empty, private folder in `root`, removed at the end unless it was published.

    Raises:
        StorageError: it cannot be created.
    """
    with durable.storage_errors("create", root, what=tag):
        folder, lock = _create_locked(root, tag)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # what stays is swept by a later save
            if folder.exists():
                _remove_tree(folder)
        os.close(lock)


def _create_locked(root: Path, tag: str) -> tuple[Path, int]:
    while True:
        folder = root / f"{PENDING_PREFIX}{tag}-{os.getpid()}-{secrets.token_hex(_SUFFIX_BYTES)}"
        folder.mkdir(mode=durable.PRIVATE_FOLDER_MODE)
        # A sweep of another process may remove the folder before the lock is held: then make
        # another.
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                folder.stat()
            except BaseException:
                os.close(lock)
                raise
            return folder, lock


def _lock(folder: Path) -> int | None:
    """Descriptor that holds the folder's lock, or None where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def publish(pending: Path, root: Path, tag: str) -> Path:
    """Give a complete, synced folder its tag, durably; see [Note: publishing a checkpoint].

    Raises:
        CheckpointError: something that is no checkpoint has that name.
        StorageError: a rename or sync failed; what the tag named before is intact, under the tag
            or aside.
    """
    final = root / tag
    if final.is_symlink() or (final.exists() and not (final / manifest.MANIFEST_NAME).exists()):
        raise CheckpointError(
            f"{final} exists and is no checkpoint", remedy="save under another tag, or move it away"
        )
    with durable.storage_errors("rename", pending, what=tag):
        if final.exists():
            final.rename(root / f"{REPLACED_PREFIX}{tag}-{secrets.token_hex(_SUFFIX_BYTES)}")
        pending.rename(final)
    durable.sync_folder(root)
    with contextlib.suppress(StorageError):  # the checkpoint stands; a later sweep does it
        for folder in subfolders(root):
            if _replaced_tag(folder) == tag:  # also one that a killed save had moved aside
                _remove(folder)
    return final


def _replaced_tag(folder: Path) -> str | None:
    """The tag of a checkpoint that was moved aside for its successor."""
    if not folder.name.startswith(REPLACED_PREFIX):
        return None
    return folder.name[len(REPLACED_PREFIX) : -1 - 2 * _SUFFIX_BYTES]


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: killed half-way, what is left is no checkpoint."""
    with contextlib.suppress(OSError):
        (folder / manifest.MANIFEST_NAME).unlink(missing_ok=True)
        _remove_tree(folder)


def _remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it, as far as that is possible: file by file."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                path.unlink()
            report_progress()
    shutil.rmtree(folder, ignore_errors=True)


def retire(folder: Path) -> None:
    """Remove a checkpoint: first, durably, its name, so that it is never there in part.

    Raises:
        StorageError: a rename or sync failed; the checkpoint is whole under one of its names.
    """
    suffix = secrets.token_hex(_SUFFIX_BYTES)
    gone = folder.with_name(f"{RETIRED_PREFIX}{folder.name}-{suffix}")
    with (
        durable.storage_errors("rename", folder, what=folder.name),
        contextlib.suppress(FileNotFoundError),  # the user was faster
    ):
        folder.rename(gone)
    durable.sync_folder(folder.parent)
    _remove_tree(gone)


def write_hint(root: Path, tag: str) -> None:
    """Name the newest checkpoint in ``LATEST``; a hint, which is not synced.

    Raises:
        StorageError: it cannot be replaced; the checkpoint itself stands.
    """
    with (
        pending_folder(root, HINT_NAME) as pending,
        durable.storage_errors("write", root / HINT_NAME, what=HINT_NAME),
    ):
        (pending / HINT_NAME).write_text(f"{tag}\n")
        (pending / HINT_NAME).chmod(durable.PRIVATE_FILE_MODE)
        (pending / HINT_NAME).rename(root / HINT_NAME)


def sweep(root: Path) -> None:
    """Remove what killed saves left in `root`; what another process is writing stays."""
    for folder in subfolders(root):
        if folder.name.startswith(PENDING_PREFIX):
            with contextlib.suppress(OSError):
                lock = _lock(folder)
                if lock is not None:
                    _remove_tree(folder)
                    os.close(lock)
        elif folder.name.startswith(RETIRED_PREFIX):
            _remove_tree(folder)
        elif (tag := _replaced_tag(folder)) is not None:
            with contextlib.suppress(CheckpointError):
                manifest.read(root / tag)
                _remove(folder)


def subfolders(root: Path) -> list[Path]:
    """The folders in `root`, by name; symbolic links are not followed."""
    with (
        durable.storage_errors("list", root, what="checkpoint directory"),
        os.scandir(root) as entries,
    ):
        return sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False))


def candidates(
    root: Path, tag: str | None
) -> tuple[list[tuple[Path, manifest.Manifest]], list[str]]:
    """Checkpoints whose manifest verifies, newest first, and a line about each other one.

    With a tag: that folder, or what a killed save under that tag had moved aside.
    """
    found: list[tuple[Path, manifest.Manifest]] = []
    damaged: list[str] = []
    for folder in subfolders(root):
        if folder.name.startswith((PENDING_PREFIX, RETIRED_PREFIX)):
            continue
        aside = folder.name.startswith(REPLACED_PREFIX)
        if tag is not None and folder.name != tag and not aside:
            continue
        if not (folder / manifest.MANIFEST_NAME).exists():
            continue
        try:
            parsed = manifest.read(folder)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        finally:
            report_progress()
        if tag is None or tag in {folder.name, parsed.tag}:
            found.append((folder, parsed))
    if tag is not None and any(folder.name == tag for folder, _ in found):
        found = [(folder, parsed) for folder, parsed in found if folder.name == tag]
    found.sort(key=lambda item: (item[1].sequence, item[0].name), reverse=True)
    return found, damaged
