"""DeepSpeed's schedules against what DeepSpeed's own code gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.integrations.deepspeed import translate
from offload.integrations.deepspeed.schedules import CourseLR

RECORDED = json.loads(
    (Path(__file__).parent / "foreign" / "deepspeed_schedules.json").read_text(encoding="utf-8")
)


def make(case: dict[str, Any]) -> CourseLR:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.003, 0.0005)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scheduler = {"type": case["name"], "params": case["params"]}
    course = translate({"train_batch_size": 1, "scheduler": scheduler}).course
    assert course is not None
    return CourseLR(optimizer, course)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_a_schedule_is_deepspeeds_number_for_number(case: dict[str, Any]) -> None:
    schedule = make(case)
    found = []
    for _ in case["course"]:
        found.append([[g["lr"], *g["betas"]] for g in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    for step, (one, other) in enumerate(zip(found, case["course"], strict=True)):
        for mine, theirs in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-14, abs=0), step


@pytest.mark.parametrize("case", RECORDED[::4], ids=lambda case: case["name"])
def test_a_schedule_goes_on_from_its_state(case: dict[str, Any]) -> None:
    first, second = make(case), make(case)
    for _ in range(9):
        first.optimizer.step()
        first.step()
    state = first.state_dict()
    json.dumps(state)  # plain values
    second.load_state_dict(state)
    for schedule in (first, second):
        schedule.optimizer.step()
        schedule.step()
    lrs = [[g["lr"] for g in s.optimizer.param_groups] for s in (first, second)]
    assert lrs[0] == lrs[1]
