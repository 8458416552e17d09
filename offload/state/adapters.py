"""Saving a model of the peft library: its adapters, in peft's own format.

[Note: Adapters]
A peft model is a base model whose weights are frozen, and adapters beside them. What its owner
wants to keep is the adapters: a folder that `PeftModel.from_pretrained(base, folder)` and
`load_adapter` read, next to a base that has not changed. The base is in a checkpoint, and in no
adapter folder.

[Note: Adapters in a checkpoint]
So that `offload export` needs no model, a checkpoint of one with plain LoRA holds:
    adapter.config   text of adapter_config.json
    adapter.keys     parameter -> its key in adapter_model.safetensors
    adapter.names    parameter of the base -> its name in the base without adapters
    adapter.pairs    adapted weight -> [lora_A, lora_B, scaling, whether it is transposed]
    adapter.base     class of the base
Of others (DoRA, IA3, several adapters, ...) it holds nothing of this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.state.source import StateSource

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the base's names in a model of peft
_NAME = "default"


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


def description(engine: StateSource) -> dict[str, Any]:
    """What a checkpoint holds of plain LoRA, see [Note: Adapters in a checkpoint]; else {}."""
    module: Any = engine.module
    if not has_adapters(module) or list(module.peft_config) != [_NAME]:
        return {}
    config = module.peft_config[_NAME]
    if config.peft_type != "LORA" or config.use_dora or config.lora_bias or config.bias != "none":
        return {}
    pairs: dict[str, list[Any]] = {}
    for path, layer in module.named_modules():
        if not hasattr(layer, "lora_A") or _NAME not in layer.lora_A:
            continue
        pairs[f"{path}.base_layer.weight"] = [
            f"{path}.lora_A.{_NAME}.weight",
            f"{path}.lora_B.{_NAME}.weight",
            float(layer.scaling[_NAME]),
            bool(getattr(layer, "fan_in_fan_out", False)),
        ]
    parameters = engine.parameter_names()
    adapter = {name for a, b, *_ in pairs.values() for name in (a, b)}
    others = {name for name in parameters if "lora_" in name} - adapter
    if others or not {*pairs, *adapter} <= set(parameters) or config.modules_to_save:
        return {}  # embeddings, experts, or a base of tensor subclasses
    base = module.get_base_model()
    tied = set(getattr(base, "all_tied_weights_keys", None) or ())
    names = {}
    for name in parameters:
        if name not in adapter:
            aliases = [alias for alias, first in engine.aliases().items() if first == name]
            plain = [without_adapters(each) for each in (name, *aliases)]
            names[name] = next((each for each in plain if each not in tied), plain[0])
    made = {**config.to_dict(), "inference_mode": True}
    text = json.dumps(made, indent=2, sort_keys=True, default=_plain) + "\n"
    keys = {name: name.replace(f".{_NAME}.", ".") for name in adapter}
    content = {"config": text, "keys": keys, "names": names, "pairs": pairs}
    return {"adapter": {**content, "base": type(base).__name__}}


def without_adapters(name: str) -> str:
    """What a parameter or buffer of the base is called in the base alone."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
