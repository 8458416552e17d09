"""AdamW on split masters against the memory bound, torch's fused AdamW and DeepSpeedCPUAdam.

    python3 tools/dev.py bench kernels --numel 100000000

Every contestant updates as many elements, from bf16 gradients to bf16 weights, in interleaved
rounds; the medians of the times and of the per-round ratios are shown. The bound is a loop of one
integer operation a stream over the arrays of ours: five streams read, four of them written back.
The row of 8-bit moments moves 14.25 bytes an element instead of 26; its ratio tells whether the
bytes that it saves on every lane cost time of the cores.
Trust the ratios, not the rates: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types

from offload.optim.moments import encode
from offload.optim.rules import eight_bit_rule, make_rule, scale_field
from offload.schedule.executor import ComputePool

PIECE_NUMEL = 1 << 20  # elements of one kernel call
TARGET_OF_BOUND = 0.9
TARGET_OVER_TORCH = 1.5
HYPER: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
EIGHT_BIT = "offload, 8-bit moments"
OUR_BYTES = 26  # an element: gradient 2, weight, remainder 2 + 2 and moments 4 + 4, in and out


def touch_streams(
    weight: Any, master: Any, gradient: Any, exp_avg: Any, exp_avg_sq: Any, mask: Any
) -> None:
    """Read and write the streams of the AdamW kernel; with a mask of 0 they keep their values."""
    for i in range(len(weight)):
        bits = gradient[i] & mask
        weight[i] = weight[i] ^ bits
        master[i] = master[i] ^ bits
        exp_avg[i] = exp_avg[i] ^ np.uint32(bits)
        exp_avg_sq[i] = exp_avg_sq[i] ^ np.uint32(bits)


class Ours:
    """AdamW on weight, remainder and moments, in pieces on the engine's pool; and its bound."""

    def __init__(self, numel: int, pool: ComputePool, *, eight_bit: bool = False) -> None:
        self._pool = pool
        self._rule = make_rule("adamw")
        self._elements_per_value: dict[str, int] = {}
        rng = np.random.default_rng(0)
        words = rng.integers(0x3C00, 0x3F80, numel, dtype=np.uint16)  # bf16 from 0.008 to 1
        self._arrays: dict[str, np.ndarray[Any, Any]] = {
            "weight": words,
            "master": rng.integers(-30_000, 30_000, numel, dtype=np.int16),
            "gradient": np.roll(words, 1),
            "exp_avg": np.zeros(numel, np.float32),
            "exp_avg_sq": np.full(numel, 0.1, np.float32),
        }
        arrays = (types.uint16, types.uint16, types.uint16, types.uint32, types.uint32)
        signature = (*(types.Array(dtype, 1, "C") for dtype in arrays), types.uint16)
        self._touch: Any = njit(signature, nogil=True)(touch_streams)
        self._steps = 0
        if eight_bit:
            self._keep_8_bits()

    def _keep_8_bits(self) -> None:
        """Replace the moments by codes and scales of the same values."""
        self._rule = eight_bit_rule(self._rule)
        found = {name: self._arrays.pop(name) for name in ("exp_avg", "exp_avg_sq")}
        for name, values in found.items():
            codes, scales = encode(torch.from_numpy(values), signed=name == "exp_avg")
            self._arrays |= {name: codes.numpy(), scale_field(name): scales.numpy()}
        self._elements_per_value = {
            spec.name: spec.elements_per_value for spec in self._rule.state_specs
        }

    def _pieces(self) -> list[dict[str, np.ndarray[Any, Any]]]:
        pieces: list[dict[str, np.ndarray[Any, Any]]] = []
        for start in range(0, len(self._arrays["weight"]), PIECE_NUMEL):
            pieces.append({})
            for name, array in self._arrays.items():
                each = self._elements_per_value.get(name, 1)
                pieces[-1][name] = array[start // each : (start + PIECE_NUMEL) // each]
        return pieces

    def step(self) -> None:
        """Update every piece."""
        self._steps += 1
        self._pool.run([partial(self._update, piece) for piece in self._pieces()])

    def touch(self) -> None:
        """Move the same bytes; the values stay."""
        calls = []
        for piece in self._pieces():
            words = [piece[name].view(np.uint16) for name in ("weight", "master", "gradient")]
            moments = [piece[name].view(np.uint32) for name in ("exp_avg", "exp_avg_sq")]
            calls.append(partial(self._touch, *words, *moments, np.uint16(0)))
        self._pool.run(calls)

    def _update(self, piece: dict[str, np.ndarray[Any, Any]]) -> None:
        finite = self._rule.update(
            precision="bf16",
            weight=piece["weight"],
            master=piece["master"],
            gradient=piece["gradient"],
            state={name: piece[name] for name in self._rule.state_fields},
            hyper=HYPER,
            step=self._steps,
        )
        if not finite:
            raise ArithmeticError("the benchmark's values are no longer finite")


class Theirs:
    """An optimizer on fp32 masters, with the casts from the gradient and to the weight."""

    def __init__(self, numel: int, make: Callable[[Any], Any]) -> None:
        self._master = torch.nn.Parameter(torch.randn(numel))
        self._master.grad = torch.zeros(numel)
        self._weight = self._master.detach().to(torch.bfloat16)
        self._gradient = torch.randn(numel).to(torch.bfloat16)
        self._optimizer = make([self._master])

    def step(self) -> None:
        """Cast the gradient, update, cast the weight."""
        assert self._master.grad is not None
        self._master.grad.copy_(self._gradient)
        self._optimizer.step()
        self._weight.copy_(self._master.detach())


def contestants(numel: int, pool: ComputePool) -> dict[str, Callable[[], None]]:
    """Return what is timed by name; those that cannot be imported are left out."""
    ours = Ours(numel, pool)
    eight_bit = Ours(numel, pool, eight_bit=True)
    fused = Theirs(numel, partial(torch.optim.AdamW, fused=True, **HYPER))
    found = {
        "bound": ours.touch,
        "offload": ours.step,
        EIGHT_BIT: eight_bit.step,
        "torch fused + casts": fused.step,
    }
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # type: ignore[import-not-found]
    except ImportError:
        return found
    deepspeed = Theirs(numel, partial(DeepSpeedCPUAdam, adamw_mode=True, **HYPER))
    return {**found, "DeepSpeedCPUAdam + casts": deepspeed.step}


def measure(timed: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round; the first two rounds only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 2):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def main() -> int:
    """Run the benchmark; 1 if `--check` was given and a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pool = ComputePool(options.threads)
    seconds = measure(contestants(options.numel, pool), options.rounds)
    pool.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    over = {  # how many times as long as ours, by round
        name: statistics.median(t / o for t, o in zip(values, seconds["offload"], strict=True))
        for name, values in seconds.items()
    }
    if options.json:
        print(json.dumps({"numel": options.numel, "seconds": median, "time_over_ours": over}))
    else:
        rate = OUR_BYTES * options.numel / 1e9
        print(f"{options.numel:,} elements, {options.threads} threads, {options.rounds} rounds")
        print(f"{'':26}{'seconds':>9}{'our GB/s':>10}{'time / ours':>13}")
        for name, value in median.items():
            print(f"{name:26}{value:9.4f}{rate / value:10.1f}{over[name]:13.2f}")
        print(f"share of the bound: {over['bound']:.2f} (target {TARGET_OF_BOUND})")
        print(f"over torch fused + casts: {over['torch fused + casts']:.2f} ({TARGET_OVER_TORCH})")
        print(f"8-bit moments over fp32 moments, in time: {over[EIGHT_BIT]:.2f}")
    reached = over["bound"] >= TARGET_OF_BOUND and over["torch fused + casts"] >= TARGET_OVER_TORCH
    return 1 if options.check and not reached else 0


if __name__ == "__main__":
    raise SystemExit(main())
