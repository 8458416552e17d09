"""The fault hook of tests: what to do to which operation.

[Note: fault specification]
``rule;rule;...`` with ``rule`` = ``key=value,...``: which operations, then one action.

    op=read|write|fsync|copy|any   which (any)
    nth=N                          the first affected attempt of them, from 1 (1)
    count=N                        how many from there on; 0 = all (1)

    errno=N          the attempt fails with errno N; 4 (EINTR) and 11 (EAGAIN) are retried
    short=BYTES      at most so many bytes are moved (at least 1)
    delay=MS         the completion comes so much later
    corrupt=1        one byte is flipped: of the buffer after a read, of the file after a write
    lost=1           reported as done, but nothing is moved
    misdirect=BYTES  done at an offset that is so many bytes off
    drop=1           the completion never comes: the request stays in flight for ever

An attempt is one block, or its resubmission after a short, interrupted or refused one. The first
rule that matches acts; all matching rules count. The C++ library reads the same language.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

OPERATIONS = ("read", "write", "fsync", "copy", "any")
ACTIONS = ("errno", "short", "delay", "corrupt", "lost", "misdirect", "drop")


@dataclass(frozen=True, slots=True)
class FaultAction:
    """One action of a rule and its value (an errno, bytes, milliseconds or 1)."""

    kind: str
    value: int


@dataclass(slots=True)
class _Rule:
    operation: str
    nth: int
    count: int
    action: FaultAction
    seen: int = 0


class FaultSpec:
    """A parsed specification with its counters; see [Note: fault specification]."""

    def __init__(self, text: str) -> None:
        """Parse `text`; raises ValueError that names the part that is wrong."""
        self._rules = [_parse_rule(part) for part in text.split(";") if part.strip()]
        self._lock = threading.Lock()

    def next(self, operation: str) -> FaultAction | None:
        """Count one attempt of `operation`; return what to do to it."""
        found: FaultAction | None = None
        with self._lock:
            for rule in self._rules:
                if rule.operation not in ("any", operation):
                    continue
                rule.seen += 1
                past = rule.seen - rule.nth
                if found is None and past >= 0 and (rule.count == 0 or past < rule.count):
                    found = rule.action
        return found


def _parse_rule(text: str) -> _Rule:
    rule = _Rule("any", 1, 1, FaultAction("", 0))
    for pair in text.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key == "op":
            if value not in OPERATIONS:
                raise ValueError(f"fault: op={value} is none of {', '.join(OPERATIONS)}")
            rule.operation = value
            continue
        if not value.isdigit():
            raise ValueError(f"fault: {key}={value!r} is not a number")
        number = int(value)
        if key == "nth" and number >= 1:
            rule.nth = number
        elif key == "count":
            rule.count = number
        elif key in ACTIONS and not rule.action.kind:
            rule.action = FaultAction(key, number)
        else:
            raise ValueError(f"fault: {pair.strip()!r} is unknown or a second action")
    if not rule.action.kind:
        raise ValueError(f"fault: {text.strip()!r} has no action ({', '.join(ACTIONS)})")
    return rule
