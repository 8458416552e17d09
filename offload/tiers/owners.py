"""Who holds how much of a tier."""

from __future__ import annotations

from collections import Counter

from offload.errors import format_bytes

_OWNERS_IN_MESSAGE = 8


class OwnerBytes:
    """Who holds how much of a tier, for the messages of BudgetError. Not thread-safe."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._leases: Counter[str] = Counter()

    def add(self, owner: str, nbytes: int) -> None:
        """Count one lease."""
        self._bytes[owner] += nbytes
        self._leases[owner] += 1

    def remove(self, owner: str, nbytes: int) -> None:
        """Uncount one lease."""
        self._bytes[owner] -= nbytes
        self._leases[owner] -= 1
        if not self._leases[owner]:
            del self._bytes[owner], self._leases[owner]

    def table(self) -> str:
        """One clause an owner, the largest first: ``"staging 3 x (24.00 MiB in all)"``."""
        rows = [
            f"{owner} {self._leases[owner]} x ({format_bytes(nbytes)} in all)"
            for owner, nbytes in self._bytes.most_common(_OWNERS_IN_MESSAGE)
        ]
        left_out = len(self._bytes) - len(rows)
        if left_out > 0:
            rows.append(f"{left_out} more owners")
        return ", ".join(rows) or "nobody"
