"""Saving a checkpoint of an engine that is none: with a saver of its own, until it is durable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offload.native import IoEngine
from offload.state import checkpoint
from offload.state.saver import Saver


def save_checkpoint(engine: Any, *arguments: Any, **options: Any) -> Path:
    with IoEngine() as io:
        saver = Saver(io, 60.0)
        path = checkpoint.save_checkpoint(engine, saver, *arguments, **options)
        saver.wait()
        return path
