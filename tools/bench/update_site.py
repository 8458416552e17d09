"""The optimizer step by the CPU, by the device, and by both: AdamW in bf16, state in host memory.

    python tools/bench/update_site.py [--device cuda] [--parameters 200] [--threads 8]

The sites take turns in rounds; the medians are shown, with what the model says of each at the
speeds that `placement.update = "auto"` measures at the start, and the share that it chooses.
Without an accelerator (`--device cpu`) the device is another part of host memory and the same
cores: that tells that the tool works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack

import numpy as np
import torch
from _process import at_least, make_parser, print_table
from torch import nn

from offload.config import load_config
from offload.engine.update_site import blocks_of, measure_speeds, plan_with_update, scratch_of
from offload.native import IoEngine
from offload.optim.chunk_update import KernelUpdate, StepSettings
from offload.optim.device_rules import device_rule
from offload.optim.device_update import DeviceUpdate
from offload.optim.rules import make_rule
from offload.optim.streamed import StreamedStep
from offload.partition.blocks import BlockStore
from offload.partition.layout import ParamSpec
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import Machine
from offload.schedule.plan import Plan, plan_buckets
from offload.schedule.update_site import (
    SiteSpeeds,
    choose_on_device,
    first_on_device,
    lane_seconds,
    update_bytes,
)
from offload.telemetry import LaneMeter
from offload.tiers.cuda import open_device_tier
from offload.tiers.host import HostArena

LAYER_NUMEL = 1 << 22
DEPTH = 4
HOST = {"weights": "host", "gradients": "host", "optimizer": "host"}


class Step:
    """An optimizer step over parameters that each have a gradient."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        numel = max(1, options.parameters * 1_000_000 // LAYER_NUMEL) * LAYER_NUMEL
        specs = [
            ParamSpec(f"layer{i}", (LAYER_NUMEL,), LAYER_NUMEL, "bf16", 2, trainable=True)
            for i in range(numel // LAYER_NUMEL)
        ]
        self.numel = numel
        self.plan = _plan(specs)
        io = IoEngine()
        stack.callback(io.close)
        host = HostArena(self.plan.peak_bytes["host"])
        stack.callback(host.close)
        host.register_with(io)
        device = open_device_tier(options.device, self.plan.update_bytes, io)
        stack.callback(device.close)
        if device.device.type == "cuda":
            host.page_lock()
        self.store = BlockStore(host=host, device=device, nvme=None, deadline_seconds=60.0)
        for bucket in self.plan.buckets:
            for state_class, layout in self.plan.layouts[bucket.index].items():
                self.store.add(bucket, state_class, layout, "host")
        pool = ComputePool(options.threads)
        stack.callback(pool.close)
        parameters = _parameters(self.plan)
        rule = make_rule("adamw")
        ops = device_rule(rule)
        assert ops is not None
        kernel = KernelUpdate(parameters, self.store, rule, pool)
        self.updater = DeviceUpdate(parameters, self.store, ops, kernel, scratch_of(self.plan))
        stack.callback(self.updater.close)
        self.speeds = measure_speeds(self.updater, kernel, self.store, self.plan)
        self._fill()
        self._streamed = StreamedStep(
            buckets=self.plan.buckets,
            parameters=parameters,
            store=self.store,
            updater=self.updater,
            depth=DEPTH,
            meter=LaneMeter(),
        )
        self._settings = StepSettings({state.index: {} for state in parameters}, 1.0, 1)

    def _fill(self) -> None:
        """Give weights, gradients and state small positive values, in either format."""
        generator = torch.Generator().manual_seed(0)
        for block in self.store.blocks():
            for chunk in range(len(block.layout.chunk_nbytes)):
                staged = self.store.load(block, chunk)
                staged.tensor.view(torch.int16).random_(0x3000, 0x3100, generator=generator)

    def seconds(self, on_device: frozenset[int]) -> float:
        """Take a step with these buckets on the device."""
        self.updater.on_device = on_device
        started = time.perf_counter()
        self._streamed.run(self._settings)
        return time.perf_counter() - started


def _plan(specs: list[ParamSpec]) -> Plan:
    config = load_config({"placement": {**HOST, "update": "device"}})
    rule = make_rule("adamw")
    room = 1 << 50
    machine = Machine(room, room, host_addressable=False)
    return plan_with_update(
        lambda beside: plan_buckets(specs, config, machine=beside, moments=rule.state_specs),
        config,
        machine,
        rule,
        None,
    )


def _parameters(plan: Plan) -> list[ParameterState]:
    return [
        ParameterState(
            index=slot.param,
            names=(f"layer{slot.param}",),
            parameter=nn.Parameter(torch.zeros(0)),
            shape=torch.Size([slot.numel]),
            stride=(1,),
            numel=slot.numel,
            bucket=bucket.index,
            offset=slot.offset,
            gradient_sums=np.ones(1),
        )
        for bucket in plan.buckets
        for slot in bucket.slots
    ]


def model_seconds(plan: Plan, on_device: frozenset[int], speeds: SiteSpeeds) -> tuple[float, str]:
    """The busiest lane and its seconds."""
    buckets = update_bytes(plan.buckets, blocks_of(plan), plan.placement.tier_of)
    lanes = lane_seconds(buckets, on_device, speeds)
    lane = max(lanes, key=lambda each: lanes[each])
    return lanes[lane], lane


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--parameters", type=at_least(1), default=200, help="in millions")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--rounds", type=at_least(1), default=7)
    options = parser.parse_args()
    with ExitStack() as stack:
        step = Step(options, stack)
        buckets = update_bytes(step.plan.buckets, blocks_of(step.plan), step.plan.placement.tier_of)
        sites = {
            "cpu": frozenset[int](),
            "device": first_on_device(buckets, 1.0),
            "auto": choose_on_device(buckets, step.speeds),
        }
        rounds: dict[str, list[float]] = {name: [] for name in sites}
        for _ in range(1 + options.rounds):
            for name, on_device in sites.items():
                rounds[name].append(step.seconds(on_device))
        found = {name: statistics.median(seconds[1:]) for name, seconds in rounds.items()}
        rows = []
        for name, on_device in sites.items():
            modelled, lane = model_seconds(step.plan, on_device, step.speeds)
            share = len(on_device) / len(buckets)
            rows.append([name, f"{share:.2f}", f"{found[name]:.4f}", f"{modelled:.4f}", lane])
        print_table(["update", "share on the device", "step s", "model s", "busiest lane"], rows)
        speeds = {lane: getattr(step.speeds, lane) for lane in ("h2d", "d2h", "cpu", "device")}
        share = len(sites["auto"]) / len(buckets)
        numbers = {"parameters": step.numel, "seconds": found, "speeds": speeds, "share": share}
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
