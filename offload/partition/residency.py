"""Where the newest copy of a bucket's weights is, and how that may change.

[Note: Residency]
The weights of a bucket have a home tier. Above it the device is a cache; the three residencies say
which copies are valid and what memory they hold:

    HOME  --start-->  LOADING  --bind-->  ON_DEVICE
     ^                   |                    |
     +------abandon------+      evict         |
     +----------------------------------------+

A bucket whose home is the device is ON_DEVICE for good. Copies on the way (host staging of an NVMe
read) belong to the transfer, not to the bucket.
"""

from __future__ import annotations

from enum import Enum


class Residency(Enum):
    """Where the newest copy of one bucket's weights is.

    HOME: the home copy is valid; no device memory is held.
    LOADING: the home copy is valid; a device lease is held; one transfer is pending.
    ON_DEVICE: the device lease is valid; the home copy is as new unless a parameter was edited.
    """

    HOME = "home"
    LOADING = "loading"
    ON_DEVICE = "on_device"


TRANSITIONS: frozenset[tuple[Residency, Residency]] = frozenset(
    {
        (Residency.HOME, Residency.LOADING),
        (Residency.LOADING, Residency.ON_DEVICE),
        (Residency.LOADING, Residency.HOME),
        (Residency.ON_DEVICE, Residency.HOME),
    }
)


def check_transition(bucket: int, old: Residency, new: Residency) -> None:
    """Assert that a bucket may go from `old` to `new`."""
    assert (old, new) in TRANSITIONS, f"bucket {bucket}: illegal transition {old} -> {new}"
