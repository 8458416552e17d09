"""The random generators of the process as plain values: torch, `random`, numpy."""

from __future__ import annotations

import base64
import binascii
import random
from typing import Any

import numpy as np
import torch

from offload.errors import CheckpointError


def capture() -> dict[str, Any]:
    """The state of every generator, JSON-ready; of torch those of the CPU and every CUDA device."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is what users seed
    state = {
        "torch_cpu": _pack(torch.get_rng_state()),
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "key": legacy["state"]["key"].tolist(),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["torch_cuda"] = [_pack(one) for one in torch.cuda.get_rng_state_all()]
    return state


def restore(state: dict[str, Any]) -> None:
    """Put every generator back; those of CUDA where the machine has as many devices.

    Raises:
        CheckpointError: a state is malformed; generators before it in the order torch, CUDA,
            `random`, numpy are already set.
    """
    try:
        torch.set_rng_state(_unpack(state["torch_cpu"]))
        stored = state.get("torch_cuda", [])
        if stored and torch.cuda.is_available() and torch.cuda.device_count() == len(stored):
            torch.cuda.set_rng_state_all([_unpack(one) for one in stored])
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        saved = state["numpy"]
        key = np.array(saved["key"], dtype=np.uint32)
        np.random.set_state(  # noqa: NPY002
            ("MT19937", key, saved["position"], saved["has_gauss"], saved["gauss"])
        )
    except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
        raise CheckpointError(f"the stored random state is malformed ({error})") from error


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _unpack(text: str) -> torch.Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(data, dtype=torch.uint8).clone()
