"""`offload import CONFIG SOURCE OUT`: another program's checkpoint becomes one of offload's."""

from __future__ import annotations

import os
from pathlib import Path

from offload.cli.models import opened_model
from offload.cli.trainable import trainable
from offload.config import load_config
from offload.errors import ConfigError
from offload.state.importing import Imported
from offload.state.session import initialize


def run(
    config: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    optimizer: bool | None,
    strict: bool,
) -> tuple[Imported, Path]:
    """Import into the model of the config's `[run]`, and save that; returns what came, and where.

    Raises:
        ConfigError: the config has no model.
        CheckpointError, StorageError: as of `import_checkpoint` and `save_checkpoint`.
    """
    loaded = load_config(config)
    if loaded.run is None:
        raise ConfigError(problems=["[run] is missing: it says which model the checkpoint is of"])
    with opened_model(loaded.run) as model:
        engine = initialize(trainable(model, loaded), loaded)
    with engine:
        imported = engine.import_checkpoint(source, optimizer=optimizer, strict=strict)
        saved = engine.save_checkpoint(out)
    return imported, saved
