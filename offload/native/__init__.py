"""Asynchronous file I/O with checksums; the only package that talks to the native library."""

from __future__ import annotations

from offload.native.disk_calls import DiskCalls, report_progress
from offload.native.engine import BACKENDS, IoEngine, Ticket
from offload.native.files import IoFile
from offload.native.library import LIBRARY_AVAILABLE, crc32c, crc32c_combine

__all__ = [
    "BACKENDS",
    "LIBRARY_AVAILABLE",
    "DiskCalls",
    "IoEngine",
    "IoFile",
    "Ticket",
    "crc32c",
    "crc32c_combine",
    "report_progress",
]
