"""What part `errors` breaks on purpose, see [Note: teeth] in result.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from fault._os_layer import calls_in_place
from offload.native import fallback
from offload.optim import streamed
from offload.partition import late
from offload.state import durable
from offload.tiers import nvme


@dataclass(frozen=True)
class Tooth:
    """One break, and the class of faults that must show it: of the engine, or of files."""

    name: str
    broken: Callable[[], AbstractContextManager[object]]
    kind: str
    backend: str = ""
    home: str = ""


class _Os:
    """The module `os` as `durable` sees it, with other functions in places."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _durable_os(**functions: Callable[..., Any]) -> AbstractContextManager[object]:
    return mock.patch.object(durable, "os", _Os(**functions))


def _short_writes_are_whole() -> AbstractContextManager[object]:
    def write_all(descriptor: int, data: memoryview, offset: int) -> None:
        os.pwrite(descriptor, data, offset)

    return mock.patch.object(durable, "write_all", write_all)


def _fsync_is_passed_over() -> AbstractContextManager[object]:
    def fsync(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)

    return _durable_os(fsync=fsync)


def _fsync_is_repeated() -> AbstractContextManager[object]:
    def fsync(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError:
            os.fsync(descriptor)

    return _durable_os(fsync=fsync)


def _a_descriptor_is_left() -> AbstractContextManager[object]:
    failed: list[int] = []

    def fsync(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError:
            failed.append(descriptor)
            raise

    def close(descriptor: int) -> None:
        if descriptor not in failed:
            os.close(descriptor)

    return _durable_os(fsync=fsync, close=close)


def _errors_are_not_translated() -> AbstractContextManager[object]:
    @contextlib.contextmanager
    def storage_errors(*_: Any, **__: Any) -> Iterator[None]:
        yield

    return mock.patch.object(durable, "storage_errors", storage_errors)


def _interrupted_is_not_repeated() -> AbstractContextManager[object]:
    return mock.patch.object(fallback, "_RETRIED", ())


def _a_failed_write_is_committed() -> AbstractContextManager[object]:
    original = nvme.NvmeStore.finish

    def finish(store: Any, transfer: Any, checksum: int, failure: Any) -> Any:
        is_write = transfer.operation == "write"
        return original(store, transfer, checksum, None if is_write else failure)

    return mock.patch.object(nvme.NvmeStore, "finish", finish)


def _records_are_not_named() -> AbstractContextManager[object]:
    return mock.patch.object(nvme, "named_error", lambda error, *_: error)


def _a_step_forgets_what_it_has_updated() -> AbstractContextManager[object]:
    original = streamed.StreamedStep.run

    def run(step: Any, *arguments: Any, **options: Any) -> None:
        try:
            original(step, *arguments, **options)
        except BaseException:
            step._updated.clear()
            raise

    return mock.patch.object(streamed.StreamedStep, "run", run)


def _staging_is_not_given_back() -> AbstractContextManager[object]:
    return mock.patch.object(late.LateTransfers, "release")


TEETH = (
    Tooth("a short write counts as whole", _short_writes_are_whole, "half", home="host"),
    Tooth("a failed fsync is passed over", _fsync_is_passed_over, "EIO", home="host"),
    Tooth("a failed fsync is repeated", _fsync_is_repeated, "EIO", home="host"),
    Tooth("a descriptor is left open", _a_descriptor_is_left, "EIO", home="host"),
    Tooth("what hangs is waited for", calls_in_place, "hangs", home="host"),
    Tooth("errors are not translated", _errors_are_not_translated, "EIO", home="host"),
    Tooth("EINTR is not repeated", _interrupted_is_not_repeated, "EINTR", backend="python"),
    Tooth("a failed write is committed", _a_failed_write_is_committed, "EIO", backend="threads"),
    Tooth("errors do not name the record", _records_are_not_named, "EIO", backend="threads"),
    Tooth("a step updates twice", _a_step_forgets_what_it_has_updated, "EIO", backend="threads"),
    Tooth("staging is not given back", _staging_is_not_given_back, "EIO", backend="threads"),
)
