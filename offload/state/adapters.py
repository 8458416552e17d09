"""Saving a model of the peft library: its adapters, in peft's own format.

[Note: Adapters]
A peft model is a base model whose weights are frozen, and adapters beside them. What its owner
wants to keep is the adapters: a folder that `PeftModel.from_pretrained(base, folder)` and
`load_adapter` read, next to a base that has not changed. The base is in a checkpoint, and in no
adapter folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.state.source import StateSource


def has_adapters(module: nn.Module) -> bool:
    """Whether this is a model of peft; asked without importing peft."""
    return isinstance(getattr(module, "peft_config", None), dict) and callable(
        getattr(module, "get_base_model", None)
    )


def save_adapters(engine: StateSource, directory: Path) -> Path:
    """Write every adapter of the engine's peft model to `directory`, and return that.

    As `PeftModel.save_pretrained`: the adapter called "default" into the folder itself, others into
    folders of their names. What is written are copies, taken one tensor at a time, so nothing stays
    on the device afterwards.

    Raises:
        StorageError: an adapter could not be read from its tier.
        OSError: peft could not write.
    """
    from peft import get_peft_model_state_dict

    module: Any = engine.module
    with torch.no_grad():
        present = module.state_dict()  # nothing moves: what is away stays away until it is copied
    wanted = {
        id(tensor)
        for name in module.peft_config
        for tensor in get_peft_model_state_dict(module, present, adapter_name=name).values()
    }
    names = {**{name: name for name in engine.parameter_names()}, **engine.aliases()}
    copied = {
        key: engine.read_state(names[key], "weight") if id(tensor) in wanted else tensor
        for key, tensor in present.items()
        if key in names
    }
    module.save_pretrained(str(directory), state_dict={**present, **copied})
    return directory
