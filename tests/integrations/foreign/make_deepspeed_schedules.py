"""Writes deepspeed_schedules.json with what DeepSpeed's own schedulers and loss scaler do.

python make_deepspeed_schedules.py       # where deepspeed 0.19.8 is installed
"""

import json
from pathlib import Path

import torch
from deepspeed.runtime import lr_schedules

CASES = [
    ("WarmupLR", {"warmup_max_lr": 0.01, "warmup_num_steps": 7}),
    ("WarmupLR", {"warmup_min_lr": 1e-4, "warmup_num_steps": 5, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_num_steps": 1}),
    ("WarmupDecayLR", {"total_num_steps": 20, "warmup_num_steps": 6}),
    (
        "WarmupDecayLR",
        {
            "total_num_steps": 12,
            "warmup_min_lr": 1e-4,
            "warmup_max_lr": 3e-3,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
        },
    ),
    ("WarmupDecayLR", {"total_num_steps": 3, "warmup_num_steps": 6}),
    ("WarmupCosineLR", {"total_num_steps": 20, "warmup_num_steps": 5}),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 15,
            "warmup_min_ratio": 0.1,
            "warmup_num_steps": 4,
            "cos_min_ratio": 0.05,
            "warmup_type": "linear",
        },
    ),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 8}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.004,
            "cycle_max_lr": 0.015,
            "cycle_first_step_size": 10,
            "cycle_second_step_size": 7,
            "cycle_first_stair_count": 5,
            "cycle_second_stair_count": 3,
            "decay_step_size": 4,
            "decay_lr_rate": 0.1,
            "cycle_min_mom": 0.85,
            "cycle_max_mom": 0.99,
            "decay_mom_rate": -0.01,
        },
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.001,
            "cycle_max_lr": 0.01,
            "cycle_first_step_size": 6,
            "cycle_momentum": False,
            "cycle_first_stair_count": 2,
        },
    ),
    ("LRRangeTest", {"lr_range_test_step_size": 5}),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 1e-5,
            "lr_range_test_step_size": 4,
            "lr_range_test_step_rate": 3.0,
            "lr_range_test_staircase": True,
        },
    ),
]
STEPS = 40


def record(name, params):
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.003, 0.0005)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scheduler = getattr(lr_schedules, name)(optimizer, **params)
    courses = []
    for _ in range(STEPS):
        courses.append([[g["lr"], *g["betas"]] for g in optimizer.param_groups])
        scheduler.step()
    return {"name": name, "params": params, "course": courses}


if __name__ == "__main__":
    target = Path(__file__).with_name("deepspeed_schedules.json")
    cases = [record(*case) for case in CASES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    target.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
