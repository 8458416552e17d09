"""What part `flips` breaks on purpose, see [Note: teeth] in result.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from offload.cli import data
from offload.errors import CheckpointError
from offload.state import data_file, folders, manifest, stored
from offload.tiers import nvme


@dataclass(frozen=True)
class Tooth:
    """One break, and the class of `flips` that must show it."""

    name: str
    broken: Callable[[], AbstractContextManager[object]]
    sees: str


class _Equal(int):
    """A checksum that is equal to every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _manifests_are_not_checked() -> AbstractContextManager[object]:
    return mock.patch.object(manifest, "_checksum", lambda data: _Equal(len(data)))


def _blocks_are_not_checked() -> AbstractContextManager[object]:
    original = data_file.Reading.finish

    def finish(reading: data_file.Reading) -> None:
        with contextlib.suppress(CheckpointError):
            original(reading)

    return mock.patch.object(data_file.Reading, "finish", finish)


def _extents_are_not_checked() -> AbstractContextManager[object]:
    return mock.patch.object(nvme, "checksum_error", return_value=None)


def _the_newest_is_taken_unread() -> AbstractContextManager[object]:
    return mock.patch.object(stored.StoredCheckpoint, "verify")


def _only_the_newest_is_looked_at() -> AbstractContextManager[object]:
    original = folders.candidates

    def candidates(*arguments: Any) -> Any:
        found, damaged = original(*arguments)
        return found[:1], damaged

    return mock.patch.object(folders, "candidates", candidates)


def _tokens_are_not_checked() -> AbstractContextManager[object]:
    return mock.patch.object(data.TokenChecks, "_check")


TEETH = (
    Tooth("the manifest's checksum is ignored", _manifests_are_not_checked, "checkpoint"),
    Tooth("the checksums of blocks are ignored", _blocks_are_not_checked, "checkpoint"),
    Tooth("the newest checkpoint is taken unread", _the_newest_is_taken_unread, "checkpoint"),
    Tooth("there is no way back to an older one", _only_the_newest_is_looked_at, "checkpoint"),
    Tooth("the checksums of extents are ignored", _extents_are_not_checked, "extents"),
    Tooth("the checksums of extents are ignored", _extents_are_not_checked, "training"),
    Tooth("the checksums of tokens are ignored", _tokens_are_not_checked, "tokens"),
)
