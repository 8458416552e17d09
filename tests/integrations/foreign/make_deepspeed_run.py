"""Writes deepspeed_run.json: losses, norms and rates of DeepSpeed itself on a small model in fp32.

python make_deepspeed_run.py       # where deepspeed 0.19.8 is installed, on the CPU
"""

import json
import os
from pathlib import Path

import torch
from torch import nn

CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.05,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True},
    },
    "scheduler": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3},
    },
    "zero_optimization": {"stage": 0},
}
BATCHES = 16


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def batches(count):
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=drawn) for _ in range(count)]


def main():
    import deepspeed

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    model = small()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=CONFIG
    )
    run = {"config": CONFIG, "losses": [], "rates": [], "steps": []}
    for batch in batches(BATCHES):
        loss = (engine(batch) - batch).square().mean()
        run["losses"].append(loss.item())
        run["rates"].append(engine.get_lr()[0])
        engine.backward(loss)
        engine.step()
        run["steps"].append(engine.global_steps)
    run["weight_norms"] = [p.double().square().sum().sqrt().item() for p in model.parameters()]
    target = Path(__file__).with_name("deepspeed_run.json")
    target.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
