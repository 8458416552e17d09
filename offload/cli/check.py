"""One finding of `offload doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `status` is OK, WARNING or FAILED; `remedy` is empty when OK."""

    name: str
    status: str
    fact: str
    remedy: str = ""
