"""How much of the copies runs under kernels: from traces whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import gpu_check, gpu_speed, gpu_trace


def event(cat: str, name: str, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}


def kernel(start: float, end: float) -> dict[str, Any]:
    return event("kernel", "gemm", start, end)


def fetch(start: float, end: float) -> dict[str, Any]:
    return event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", start, end)


def departure(start: float, end: float) -> dict[str, Any]:
    return event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start, end)


def test_each_direction_has_a_share_of_its_own() -> None:
    shares = gpu_trace.hidden_shares(
        [
            *(kernel(0, 100), kernel(90, 150), kernel(200, 300)),  # 0..150 and 200..300
            *(fetch(140, 160), fetch(160, 240)),  # 10 and 40 of 100 under kernels
            departure(210, 290),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 400, 500),
            event("cpu_op", "aten::mm", 0, 1000),
            {"ph": "i", "cat": "kernel", "name": "a mark", "ts": 150},
        ]
    )
    assert shares == {
        "h2d": {"seconds": pytest.approx(100e-6), "hidden_share": pytest.approx(0.5)},
        "d2h": {"seconds": pytest.approx(80e-6), "hidden_share": pytest.approx(1.0)},
    }


def test_a_trace_without_copies_has_no_shares() -> None:
    assert gpu_trace.hidden_shares([kernel(0, 10)]) == {}


@settings(max_examples=200, deadline=None)
@given(
    *2 * [st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)],
)
def test_what_is_covered_is_what_both_take(
    copies: list[tuple[int, int]], kernels: list[tuple[int, int]]
) -> None:
    def ticks(spans: list[tuple[int, int]]) -> set[int]:
        return {tick for start, length in spans for tick in range(start, start + length)}

    mine = gpu_trace.union((float(s), float(s + n)) for s, n in copies)
    others = gpu_trace.union((float(s), float(s + n)) for s, n in kernels)
    assert sum(end - start for start, end in mine) == len(ticks(copies))
    assert gpu_trace.covered(mine, others) == len(ticks(copies) & ticks(kernels))


def test_a_trace_of_the_cpu_can_be_read() -> None:
    def multiply(x: torch.Tensor) -> None:
        x @ x

    x = torch.ones(8, 8)
    events = gpu_trace.profiled(lambda: multiply(x), on_gpu=False)
    assert any(each.get("name") == "aten::mm" for each in events)
    assert gpu_trace.hidden_shares(events) == {}


def test_the_table_shows_what_was_measured_and_why_not() -> None:
    lines = gpu_check.table(
        {
            "trace": {"ok": True, "h2d_hidden_share": 0.934},
            "versus": {"ok": True, "skipped": "deepspeed is not installed"},
            "speed": {"ok": False, "error": "RuntimeError: no\nmore"},
        }
    ).splitlines()
    assert lines[2] == "| trace | h2d hidden share | 0.93 | 0.90 |"
    assert lines[3] == "| trace | d2h hidden share | not measured | 0.90 |"
    assert "| speed | host share of plain | RuntimeError: no | 0.85 |" in lines
    assert "| versus | times deepspeed | deepspeed is not installed | 1.50 |" in lines


def test_a_step_is_the_median_of_those_after_the_first_two() -> None:
    steps: list[int] = []
    seconds = gpu_speed.seconds_a_step(lambda: steps.append(len(steps)), 5, on_gpu=False)
    assert len(steps) == 5
    assert seconds >= 0
