"""A source of initial weights: the engine starts from its values, not from the module's memory."""

from __future__ import annotations

import torch
from torch import nn

from offload.config import load_config
from offload.engine.build import build
from offload.engine.engine import Engine
from offload.optim.split import split_tensor
from offload.partition.arrays import memory_order
from offload.partition.parameters import ParameterState


class OfAnotherModule:
    """The values of a module of the same structure; remembers the ranges that were read."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def read(self, state: ParameterState, start: int, numel: int) -> torch.Tensor:
        self.ranges.setdefault(state.name, []).append((start, numel))
        return memory_order(self.parameters[state.name], state)[start : start + numel].clone()


def network() -> nn.Module:
    module = nn.Sequential(nn.Linear(300, 500), nn.LayerNorm(500), nn.Conv2d(3, 5, 3))
    module[2].to(memory_format=torch.channels_last)
    module[1].requires_grad_(False)
    return module


def test_the_engine_starts_from_the_sources_values() -> None:
    torch.manual_seed(0)
    wanted, module = network(), network()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    source = OfAnotherModule(wanted)
    # A home below the device cuts the large weight into chunks.
    config = load_config(
        {
            "tiers": {"device": {"memory": "2MiB"}, "host": {"memory": "64MiB"}},
            "placement": {"weights": "host", "gradients": "host", "optimizer": "host"},
            "partition": {"bucket_elements": 65536},
            "precision": {"compute": "bf16"},
        }
    )
    with Engine(build(module, config, None, source), None) as engine:
        for name, state in engine.named_state():
            expected = wanted.get_parameter(name).detach()
            if "master" in state:
                assert torch.equal(state["master"], expected)
                assert torch.equal(state["weight"], split_tensor(expected)[0])
            else:
                assert torch.equal(state["weight"], expected.bfloat16())
    ends = dict.fromkeys(source.ranges, 0)
    for name, ranges in source.ranges.items():
        for start, numel in ranges:
            assert start == ends[name]
            ends[name] += numel
        assert ends[name] == wanted.get_parameter(name).numel()
    assert len(source.ranges["0.weight"]) > 1
