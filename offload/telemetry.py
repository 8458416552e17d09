"""What a step did: bytes and busy time of each lane, memory of each tier, and the log of it.

[Note: busy time]
A lane is busy while at least one operation is in flight on it. Its busy seconds are the length of
the union of those spans, so two overlapping operations count their common time once, and
bytes / busy_seconds is the lane's achieved bandwidth.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from offload.timeline import NEVER, Timeline

LANES = ("h2d", "d2h", "nvme_read", "nvme_write", "cpu", "compute")


@dataclass(frozen=True, slots=True)
class TierReport:
    """Memory of one tier, in bytes.

    `peak_bytes` is over the life of the engine, `step_peak_bytes` that of the last step; 0 where
    it was not recorded.
    """

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    step_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LaneReport:
    """Work of one lane; see [Note: busy time]. Differences of two reports are reports."""

    bytes: int = 0
    busy_seconds: float = 0.0

    def __sub__(self, earlier: LaneReport) -> LaneReport:
        return LaneReport(self.bytes - earlier.bytes, self.busy_seconds - earlier.busy_seconds)

    def __add__(self, other: LaneReport) -> LaneReport:
        return LaneReport(self.bytes + other.bytes, self.busy_seconds + other.busy_seconds)


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """What autograd has saved off the device, in bytes. Differences of two reports are reports.

    `moved_bytes` have left the device, and `deduplicated_bytes` would have left it again.
    `kept_bytes` have stayed there, or come back, because they had room there or no other.
    `forwarded_bytes` were wanted back while they were on their way out. The peaks are over the life
    of the engine.
    """

    moved_bytes: int = 0
    deduplicated_bytes: int = 0
    forwarded_bytes: int = 0
    kept_bytes: int = 0
    host_peak_bytes: int = 0
    nvme_peak_bytes: int = 0

    def __sub__(self, earlier: ActivationReport) -> ActivationReport:
        return ActivationReport(
            self.moved_bytes - earlier.moved_bytes,
            self.deduplicated_bytes - earlier.deduplicated_bytes,
            self.forwarded_bytes - earlier.forwarded_bytes,
            self.kept_bytes - earlier.kept_bytes,
            self.host_peak_bytes,
            self.nvme_peak_bytes,
        )


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Where the optimizer step updates: the buckets on the device, and why it is those.

    `num_cpu` counts the buckets that the CPU updates.
    """

    on_device: tuple[int, ...] = ()
    num_cpu: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RetryReport:
    """I/O errors that nobody was told of, because what has failed is made again.

    Whoever needs it is told if that fails, too. `last` is the message of the last one; "" if there
    was none.
    """

    count: int = 0
    last: str = ""

    def __sub__(self, earlier: RetryReport) -> RetryReport:
        count = self.count - earlier.count
        return RetryReport(count, self.last if count else "")


@dataclass(frozen=True, slots=True)
class ShrinkReport:
    """How often the host's budget has shrunk under memory pressure. Differences are reports.

    `moved_bytes` of state have left the host for NVMe, `given_back_bytes` have gone back to the
    system. `last` says in words what was moved the last time, and why; "" if it never was.
    """

    count: int = 0
    moved_bytes: int = 0
    given_back_bytes: int = 0
    last: str = ""

    def __sub__(self, earlier: ShrinkReport) -> ShrinkReport:
        count = self.count - earlier.count
        return ShrinkReport(
            count,
            self.moved_bytes - earlier.moved_bytes,
            self.given_back_bytes - earlier.given_back_bytes,
            self.last if count else "",
        )


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, from the end of the one before.

    `bound_seconds` is the least time the step could take at measured lane speeds; 0.0 where it is
    not known yet, and `critical` the lane that sets it. `faults` counts demand fetches.
    `activations` is all zeros where they stay on the device. `retries` are I/O errors after which
    something was made again: they have cost time and nothing else, but the disk may be failing.
    `shrinks` are those of the host's budget, before the step began.
    """

    step: int
    tiers: Mapping[str, TierReport]
    lanes: Mapping[str, LaneReport]
    bound_seconds: float
    measured_seconds: float
    faults: int
    activations: ActivationReport = ActivationReport()
    update: UpdateReport = UpdateReport()
    critical: str = "none"
    retries: RetryReport = RetryReport()
    shrinks: ShrinkReport = ShrinkReport()

    @property
    def efficiency(self) -> float:
        """bound_seconds / measured_seconds; 0.0 before the first step."""
        return self.bound_seconds / self.measured_seconds if self.measured_seconds > 0 else 0.0

    @property
    def bottleneck(self) -> str:
        """The lane that was busy longest; ``"none"`` before the first step."""
        if not any(lane.busy_seconds > 0 for lane in self.lanes.values()):
            return "none"
        return max(self.lanes, key=lambda name: self.lanes[name].busy_seconds)

    @property
    def idle_shares(self) -> dict[str, float]:
        """By lane: the share of the step in which nothing was in flight on it; 0.0 to 1.0."""
        if self.measured_seconds <= 0:
            return {}
        return {
            name: max(0.0, 1.0 - lane.busy_seconds / self.measured_seconds)
            for name, lane in self.lanes.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, with what is derived from it."""
        return {
            "step": self.step,
            "measured_seconds": self.measured_seconds,
            "bound_seconds": self.bound_seconds,
            "efficiency": self.efficiency,
            "bottleneck": self.bottleneck,
            "critical": self.critical,
            "idle_shares": self.idle_shares,
            "faults": self.faults,
            "tiers": {name: dataclasses.asdict(tier) for name, tier in self.tiers.items()},
            "lanes": {name: dataclasses.asdict(lane) for name, lane in self.lanes.items()},
            "activations": dataclasses.asdict(self.activations),
            "update": {**dataclasses.asdict(self.update), "on_device": list(self.update.on_device)},
            "retries": dataclasses.asdict(self.retries),
            "shrinks": dataclasses.asdict(self.shrinks),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` has turned into `entry`."""
        return cls(
            step=entry["step"],
            tiers={name: TierReport(**tier) for name, tier in entry["tiers"].items()},
            lanes={name: LaneReport(**lane) for name, lane in entry["lanes"].items()},
            bound_seconds=entry["bound_seconds"],
            measured_seconds=entry["measured_seconds"],
            faults=entry["faults"],
            activations=ActivationReport(**entry.get("activations", {})),
            update=_update_report(entry.get("update", {})),
            critical=entry.get("critical", "none"),
            retries=RetryReport(**entry.get("retries", {})),
            shrinks=ShrinkReport(**entry.get("shrinks", {})),
        )


def _update_report(entry: Mapping[str, Any]) -> UpdateReport:
    return UpdateReport(**{**entry, "on_device": tuple(entry.get("on_device", ()))})


def lanes_between(
    earlier: Mapping[str, LaneReport], later: Mapping[str, LaneReport]
) -> dict[str, LaneReport]:
    """Return what each lane of `later` did since the snapshot `earlier`."""
    return {name: lane - earlier.get(name, LaneReport()) for name, lane in later.items()}


def note_speeds(best: dict[str, float], lanes: Mapping[str, LaneReport]) -> None:
    """Raise `best`, bytes/s by lane, where the lanes of a step have shown more."""
    for name, lane in lanes.items():
        if lane.bytes and lane.busy_seconds > 0:
            best[name] = max(best.get(name, 0.0), lane.bytes / lane.busy_seconds)


@dataclass(slots=True)
class _Lane:
    nbytes: int = 0
    closed_seconds: float = 0.0  # length of the spans that have ended
    in_flight: int = 0
    busy_since: float = 0.0  # start of the span that is open while in_flight > 0


@dataclass(slots=True)
class LaneMeter:
    """Bytes and busy time of lanes, accumulated by any number of threads.

    `clock` returns seconds; a virtual clock gives exact times in tests. `timeline` is told when
    what was counted has run, while it is on.
    """

    clock: Callable[[], float] = time.perf_counter
    timeline: Timeline = NEVER
    _lanes: dict[str, _Lane] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def busy(self, lane: str, nbytes: int = 0, *, what: str = "") -> Iterator[None]:
        """Count `lane` as busy while the body runs, and `nbytes` when it ends without an error.

        `what` it is busy with, for the timeline.
        """
        began = self.clock()
        with self._lock:
            entry = self._lanes.setdefault(lane, _Lane())
            if entry.in_flight == 0:
                entry.busy_since = self.clock()
            entry.in_flight += 1
        moved_bytes = 0
        try:
            yield
            moved_bytes = nbytes
        finally:
            with self._lock:
                entry.in_flight -= 1
                entry.nbytes += moved_bytes
                if entry.in_flight == 0:
                    entry.closed_seconds += self.clock() - entry.busy_since
            if self.timeline.is_on:
                self.timeline.span(lane, what, began, self.clock(), nbytes=moved_bytes)

    def add(self, lane: str, nbytes: int, seconds: float) -> None:
        """Count an operation that someone else has timed; its time must not overlap others'."""
        with self._lock:
            entry = self._lanes.setdefault(lane, _Lane())
            entry.nbytes += nbytes
            entry.closed_seconds += seconds

    def snapshot(self) -> dict[str, LaneReport]:
        """Return each lane's totals until now, open spans included."""
        with self._lock:
            now = self.clock()
            return {
                name: LaneReport(
                    entry.nbytes,
                    entry.closed_seconds + (now - entry.busy_since if entry.in_flight else 0.0),
                )
                for name, entry in self._lanes.items()
            }


class RetryLog:
    """Errors of work that is made again. Thread-safe.

    The first one is worth a warning, which `warn_once` gives in a thread of the user.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = RetryReport()
        self._has_warned = False

    def note(self, error: Exception) -> None:
        """Something has failed and is, or will be, made again."""
        with self._lock:
            self._report = RetryReport(self._report.count + 1, str(error))

    def report(self) -> RetryReport:
        """All of them since the start."""
        with self._lock:
            return self._report

    def warn_once(self) -> None:
        """Warn of the first error, once: a RuntimeWarning."""
        with self._lock:
            if self._has_warned or not self._report.count:
                return
            self._has_warned = True
        warnings.warn(
            f"an I/O error, after which the operation is made again: {self._report.last}; further "
            "ones are counted in StepReport.retries",
            RuntimeWarning,
            stacklevel=3,
        )


class JsonlWriter:
    """Appends one JSON object a line to a file; a line is in the file when `write` returns.

    Raises OSError as the file does. A killed process leaves at most one partial last line, which
    `read_jsonl` leaves out and the next writer removes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append `entry`; it must hold JSON types only."""
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, without a partial last line."""
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines() if line]
