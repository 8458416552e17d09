"""Every error that offload raises on purpose.

[Note: error tree]

    OffloadError                 root; every error below is one
    |- ConfigError               the configuration has problems; all are listed    (also ValueError)
    |- DoesNotFitError           the plan needs more than the tiers have; a table says what fits
    |- BudgetError               one request would exceed a tier's budget
    |- MemoryPressureError       the machine is running out of memory, and nothing can shrink
    |- StorageError              a file operation failed                           (also OSError)
    |  |- DiskFullError          no room to allocate
    |  |- ChecksumError          what was read is not what was written
    |  '- DeadlineError          an operation did not end in time
    |- UnsupportedPlatformError  this machine, interpreter or torch cannot do it
    |- EngineStateError          a call that is not legal in the engine's present state
    |- NonFiniteError            an update would write an infinity or a NaN
    |- GuardError                a use of an absent parameter that cannot be made to work
    '- CheckpointError           a checkpoint cannot be written, found or trusted

A message gives the fact, what was expected, the remedy and the names involved. Errors of the
system, of torch and of libraries are translated at the boundary with ``raise ... from exc``.
`assert` is for internal invariants only and is no part of this tree.
"""

from __future__ import annotations

import errno as errno_codes
import os
from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_UNIT_STEP = 1024


def format_bytes(nbytes: int) -> str:
    """Return `nbytes` as people read it, e.g. ``"1.50 GiB"``; below 1 KiB ``"12 B"``."""
    amount = float(nbytes)
    for unit in _UNITS[:-1]:
        if abs(amount) < _UNIT_STEP:
            return f"{nbytes} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= _UNIT_STEP
    return f"{amount:.2f} {_UNITS[-1]}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many more there are, e.g. ``"a, b, c and 2 more"``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class OffloadError(Exception):
    """Root of every error that offload raises on purpose.

    `fact` is what happened, `expected` what would have been right, `remedy` what to do now.
    """

    def __init__(
        self, fact: str, *, expected: str | None = None, remedy: str | None = None
    ) -> None:
        parts = [fact]
        if expected:
            parts.append(f"expected: {expected}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))


class ConfigError(OffloadError, ValueError):
    """The configuration has problems; `problems` lists all of them at once.

    Nothing has been allocated or changed: mend the configuration and call again.
    """

    problems: list[str]

    def __init__(self, *, problems: Sequence[str], source: str | None = None) -> None:
        self.problems = list(problems)
        where = f" in {source}" if source else ""
        count = len(self.problems)
        head = f"{count} problem{'' if count == 1 else 's'}{where}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DoesNotFitError(OffloadError):
    """The training state cannot be placed within the budgets; raised before weights are loaded.

    `table` lists tier, need and room, and what would fit. Nothing has been allocated.
    """

    table: str

    def __init__(self, *, table: str, fact: str | None = None) -> None:
        self.table = table
        super().__init__(f"{fact or 'the training state does not fit in its tiers'}\n{table}")


class BudgetError(OffloadError):
    """A request would exceed the budget of a tier.

    The tier is unchanged and stays usable; smaller requests may succeed.
    """

    tier: str
    requested_bytes: int
    free_bytes: int
    budget_bytes: int
    owner: str

    def __init__(
        self,
        *,
        tier: str,
        requested_bytes: int,
        free_bytes: int,
        budget_bytes: int,
        owner: str,
        remedy: str | None = None,
    ) -> None:
        self.tier = tier
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes
        self.budget_bytes = budget_bytes
        self.owner = owner
        super().__init__(
            f"{owner} needs {requested_bytes} bytes ({format_bytes(requested_bytes)}) of tier "
            f"{tier}, of whose budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) only "
            f"{free_bytes} bytes ({format_bytes(free_bytes)}) are free",
            remedy=remedy or f"raise tiers.{tier}.memory, or place more state on a slower tier",
        )


class MemoryPressureError(OffloadError):
    """Host memory is running out, and the engine has no more to give back.

    Raised between two steps, before the kernel ends the process. The state is unchanged: save a
    checkpoint, or make room and go on with the same call.

    `room_bytes` can still be allocated, `needed_bytes` are what a step has taken beside the tiers.
    """

    room_bytes: int
    needed_bytes: int

    def __init__(self, *, room_bytes: int, needed_bytes: int, why: str) -> None:
        self.room_bytes = room_bytes
        self.needed_bytes = needed_bytes
        super().__init__(
            f"host memory is running out: {format_bytes(room_bytes)} are left under the machine's "
            f"and its cgroup's limits, and a step takes {format_bytes(needed_bytes)} beside what "
            f"the engine holds; {why}",
            remedy="raise the limit, end other programs, or use smaller batches, and call again; "
            "or save a checkpoint, which works now",
        )


class StorageError(OffloadError, OSError):
    """A file operation failed.

    State: a failed read changed nothing but its target buffer; a failed write left the record's
    current extent intact. The buffer is free again. The store stays usable; the call may be
    repeated, except `fsync`, which is never repeated on the same data.

    `errno` is the system's error number; `what` the record's name, if it has one, with parameters
    that are in it; `offset` and `nbytes` are in bytes and None where the operation has none. `on`
    is the disk, with its device and mount point, where the system tells; `num_tries` how often the
    operation was made.
    """

    operation: str
    path: str
    offset: int | None
    nbytes: int | None
    what: str | None
    on: str | None
    num_tries = 1

    def __init__(
        self,
        *,
        operation: str,
        path: str | os.PathLike[str],
        offset: int | None = None,
        nbytes: int | None = None,
        errno: int | None = None,
        what: str | None = None,
        on: str | None = None,
        detail: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.on = on
        self.operation = operation
        self.path = os.fspath(path)
        self.offset = offset
        self.nbytes = nbytes
        self.what = what
        code = self._default_errno if errno is None else errno
        place = self.path
        if nbytes is not None:
            place += f", {nbytes} bytes"
        if offset is not None:
            place += f" at offset {offset}"
        name = errno_codes.errorcode.get(code, str(code))
        fact = f"{operation} of {what + ' in ' if what else ''}{place} failed: "
        fact += f"{detail} [{name}]" if detail else f"{os.strerror(code)} [{name}]"
        if on:
            fact += f"; disk: {on}"
        OffloadError.__init__(self, fact, remedy=remedy)
        self._message = str(self.args[0])
        OSError.__init__(self, code, self._message, self.path)

    _default_errno = errno_codes.EIO

    def __str__(self) -> str:
        return self._message


class DiskFullError(StorageError):
    """A path has too little room for what has to be allocated on it.

    Nothing was written and the blocks of the failed allocation were given back. `needed_bytes` is 0
    where the system has not said for what there was no room.
    """

    needed_bytes: int
    free_bytes: int
    _default_errno = errno_codes.ENOSPC

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        needed_bytes: int,
        free_bytes: int,
        operation: str = "allocate",
        errno: int | None = None,
        what: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        needs = f"needs {needed_bytes} bytes ({format_bytes(needed_bytes)}), "
        if not needed_bytes:
            needs = "there is no room; "
        super().__init__(
            operation=operation,
            path=path,
            nbytes=needed_bytes or None,
            errno=errno,
            what=what,
            detail=f"{needs}free are {free_bytes} bytes ({format_bytes(free_bytes)})",
            remedy=remedy or "free space there, or add a path to tiers.nvme.paths",
        )


class ChecksumError(StorageError):
    """What was read back is not what was written: a flip, a misdirected or a lost write.

    The bytes in the target buffer must not be used. Other records stay usable; the state of this
    one is lost unless a checkpoint holds it.
    """

    _default_errno = errno_codes.EBADMSG


class DeadlineError(StorageError):
    """An operation did not end within its deadline; it is still in flight.

    Its buffer still belongs to it: wait again, or close the engine. It may still succeed.
    """

    _default_errno = errno_codes.ETIMEDOUT


class UnsupportedPlatformError(OffloadError):
    """This machine, interpreter or torch cannot do what was asked. Nothing has been changed."""


class EngineStateError(OffloadError):
    """A call that is not legal in the engine's present state, e.g. any call after `close()`.

    The state is unchanged; the engine stays as usable as it was.
    """


class NonFiniteError(OffloadError):
    """An update would write an infinity or a NaN into the training state.

    The step has been taken, in every placement alike, and the parameters named in the message are
    not finite any more: load a checkpoint, and lower the learning rate.
    """


class GuardError(OffloadError):
    """A use of an absent parameter that cannot be made to work.

    Nothing was computed with wrong values and no state changed; wrap the use in
    `engine.gathered()`, or list the module under `guard.gather`.
    """


class CheckpointError(OffloadError):
    """A checkpoint cannot be written, found or trusted.

    The engine's own state is unchanged and older checkpoints are untouched.
    """
