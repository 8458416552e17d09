"""Everything that only a GPU can show, in one call under 10 minutes.

    python tools/gpu_check.py [--device cuda] [--out results.json] [--small] [--parts NAME ...]

library    builds the native library if the package has none
parity     a tiny Llama in bf16 under every placement gives the bits of the all-on-device run, and
           the losses of plain PyTorch on the same device within rounding
trace      the share of copy time, by direction, in which kernels run (torch.profiler)
speed      tokens/s of a Llama of 1.1B parameters with its state on host and on NVMe, as a share of
           plain PyTorch with all of it on the device; bound / measured
versus     the same with its state on host, beside DeepSpeed's ZeRO-3 offload if that is installed
size       a model at least 4 times larger than the device budget, and the driver's count of what it
           took
features   tiny models with activations off the device, tiling, chunked loss, adapters, quantized
           bases and so on, each beside the run that it has to equal: see gpu_features.py
tests      runs the tests that need a GPU (`pytest -m gpu`); not with `--device cpu`

Each part runs in a process of its own, so that one that fails, hangs or breaks the device's context
does not stop the others. Results are written after every part: a run that is cut off leaves them.
At the end stands a table of what has a target, for docs/benchmarks.md. A target that is missed does
not fail the run.
`--device cpu --small` tries the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB = 1 << 20
PARTS = ("library", "parity", "trace", "speed", "versus", "size", "features", "tests")
# What is measured, and what it should be at least.
TARGETS = {
    ("trace", "h2d_hidden_share"): 0.9,
    ("trace", "d2h_hidden_share"): 0.9,
    ("speed", "host_share_of_plain"): 0.85,
    ("speed", "nvme_efficiency"): 0.8,
    ("versus", "times_deepspeed"): 1.5,
    ("size", "weights_over_budget"): 4.0,
}
_PART_SECONDS = 240
_ALL_SECONDS = 570
PLACEMENTS = {
    "device": {"weights": "device", "gradients": "device", "optimizer": "device"},
    "host": {"weights": "host", "gradients": "host", "optimizer": "host"},
    "nvme": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
}


class FailedError(Exception):
    """A part has run and found a fault."""


def build_library() -> dict[str, Any]:
    """Build the native library into the package where it is missing; says what was done."""
    target = Path(str(importlib.resources.files("offload.native"))) / "liboffload_native.so"
    if target.exists():
        return {"library": "present"}
    if not shutil.which("cmake"):
        return {"library": "absent: no cmake; Python I/O is used"}
    with tempfile.TemporaryDirectory() as build:
        for command in (
            ["cmake", "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release"],
            ["cmake", "--build", build, "-j"],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(next(Path(build).rglob(target.name)), target)
    return {"library": "built"}


def run_tests() -> dict[str, Any]:
    """The tests that need a GPU; pytest's status 5 says that there are none."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode not in (0, 5):
        raise FailedError(f"pytest -m gpu: {done.stdout[-4000:]}{done.stderr[-1000:]}")
    return {"exit_status": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}


def make_llama(hidden: int, layers: int) -> nn.Module:
    """A seeded Llama with gradient checkpointing off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
        )
    )
    return model.train()


def settings(
    device: str, placement: str, path: str, device_bytes: int | str, host_bytes: int | str
) -> dict[str, Any]:
    """A configuration with everything of one kind of placement."""
    return {
        "tiers": {
            "device": {"kind": device, "memory": device_bytes},
            "host": {"memory": host_bytes},
            "nvme": {"paths": [path]},
        },
        "placement": PLACEMENTS[placement],
        "precision": {"compute": "bf16"},
        "optimizer": {"lr": 1e-4},
        "training": {"max_grad_norm": 1.0},
    }


def run(
    model: nn.Module,
    config: dict[str, Any],
    ids: torch.Tensor,
    steps: int,
    *,
    with_weights: bool = True,
) -> dict[str, Any]:
    """Train; losses, seconds a step (the first two left out), the last report, the weights."""
    import offload

    seconds, losses = [], []
    with offload.initialize(model, config) as engine:
        for _ in range(steps):
            started = time.perf_counter()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
        report = engine.report()
        weights = {}
        if with_weights:
            weights = {name: state["master"] for name, state in engine.named_state()}
    return {
        "losses": losses,
        "seconds": statistics.median(seconds[2:]),
        "report": report.to_dict(),
        "weights": weights,
    }


def parity(device: str, path: str) -> dict[str, Any]:
    """Bits between placements; loss against plain PyTorch on the same device."""
    ids = torch.randint(0, 4096, (2, 128), generator=torch.Generator().manual_seed(1)).to(device)
    results: dict[str, Any] = {}
    reference = run(make_llama(256, 4), settings(device, "device", path, "2GiB", "1GiB"), ids, 6)
    for placement in ("host", "nvme"):
        other = run(make_llama(256, 4), settings(device, placement, path, "64MiB", "1GiB"), ids, 6)
        same = other["losses"] == reference["losses"] and all(
            torch.equal(other["weights"][name], weight)
            for name, weight in reference["weights"].items()
        )
        results[placement] = same
    plain = make_llama(256, 4).to(device, torch.bfloat16)
    first_loss = plain(input_ids=ids, labels=ids).loss.item()
    results["first_loss_difference"] = abs(first_loss - reference["losses"][0]) / first_loss
    if not (results["host"] and results["nvme"]):
        raise FailedError(f"placements do not give the same bits: {results}")
    return results


def features(device: str, path: str) -> dict[str, Any]:
    """Every check of gpu_features.py."""
    import gpu_features

    results = gpu_features.run_checks(device, path)
    failed = [name for name, result in results.items() if result["ok"] is False]
    if failed:
        raise FailedError(f"failed: {', '.join(failed)}", results)
    return results


def make_large(device: str, *, small: bool) -> tuple[nn.Module, torch.Tensor]:
    """The model and the batch whose speed is measured; made on the device, which is quicker."""
    hidden, layers, tokens = (128, 2, 64) if small else (2048, 16, 8192)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.device(device):
        return make_llama(hidden, layers), ids.to(device)


def large_settings(device: str, placement: str, path: str, *, small: bool) -> dict[str, Any]:
    """Room for a part of the weights on the device, and for all state on the host."""
    memory = (64 if small else 1024) * MIB
    return settings(device, placement, path, memory, (512 if small else 24 * 1024) * MIB)


def trace(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """The share of copies that run under kernels, in two steps with all state on the host."""
    import gpu_trace

    import offload

    on_gpu = device.startswith("cuda")
    model, ids = make_large(device, small=small)
    with offload.initialize(model, large_settings(device, "host", path, small=small)) as engine:

        def steps() -> None:
            for _ in range(2):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()

        steps()  # the first step is recorded, the second follows its trace
        events = gpu_trace.profiled(steps, on_gpu=on_gpu)
    shares = gpu_trace.hidden_shares(events)
    if on_gpu and not shares:
        raise FailedError("the trace has no copies: CUPTI does not work here")
    found: dict[str, Any] = {"events": len(events), "copies": shares}
    for direction, share in shares.items():
        found[f"{direction}_hidden_share"] = share["hidden_share"]
    return found


def speed(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """Tokens/s by placement, as a share of plain PyTorch with everything on the device."""
    import gpu_speed

    model, ids = make_large(device, small=small)
    tokens = ids.numel()
    plain = tokens / gpu_speed.plain_seconds(model, ids, 6)
    del model
    results: dict[str, Any] = {"plain_tokens_per_second": plain}
    for placement in ("host", "nvme"):
        model, ids = make_large(device, small=small)
        config = large_settings(device, placement, path, small=small)
        done = run(model, config, ids, 6, with_weights=False)
        results[placement] = {"tokens_per_second": tokens / done["seconds"], **done["report"]}
        results[f"{placement}_share_of_plain"] = tokens / done["seconds"] / plain
        results[f"{placement}_efficiency"] = done["report"]["efficiency"]
    return results


def versus(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """A step with all state on the host, beside DeepSpeed's ZeRO-3 with the same."""
    import gpu_speed

    model, ids = make_large(device, small=small)
    try:
        theirs = gpu_speed.deepspeed_seconds(model, ids, 6)
    except gpu_speed.SkippedError as reason:
        return {"skipped": str(reason)}
    model, ids = make_large(device, small=small)
    config = large_settings(device, "host", path, small=small)
    ours = run(model, config, ids, 6, with_weights=False)["seconds"]
    return {"seconds": ours, "deepspeed_seconds": theirs, "times_deepspeed": theirs / ours}


def size(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """A model whose weights are 4 times the device budget; peak of tier and driver."""
    import gpu_speed

    hidden, layers = (256, 24) if small else (2048, 24)
    on_gpu = device.startswith("cuda")
    model = make_llama(hidden, layers)
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    budget = weight_bytes // 4
    ids = torch.randint(0, 4096, (1, 256), generator=torch.Generator().manual_seed(1)).to(device)
    config = settings(device, "host", path, budget, (1 if small else 40) << 30)
    with gpu_speed.DriverPeak(on_gpu=on_gpu) as driver:
        done = run(model, config, ids, 4, with_weights=False)
    peak = done["report"]["tiers"]["device"]["peak_bytes"]
    # What torch has given out at most: the engine's, and activations beside it.
    allocated = torch.cuda.max_memory_allocated() if on_gpu else 0
    found = {
        "weight_bytes": weight_bytes,
        "device_budget_bytes": budget,
        "weights_over_budget": weight_bytes / budget,
        "device_peak_bytes": peak,
        "driver_peak_bytes": driver.peak_bytes,
        "allocated_peak_bytes": allocated,
        "driver_peak_without_activations_bytes": driver.peak_bytes - max(allocated - peak, 0),
        "losses": done["losses"],
    }
    if peak > budget:
        raise FailedError(f"the engine held {peak} bytes of a budget of {budget}", found)
    return found


def table(results: dict[str, Any]) -> str:
    """What has a target, as rows of Markdown."""
    rows = ["| part | measured | value | target |", "|---|---|---|---|"]
    for (part, name), target in TARGETS.items():
        found = results.get(part, {})
        missing = found.get("skipped") or found.get("error") or "not measured"
        value = f"{found[name]:.2f}" if name in found else str(missing).splitlines()[0]
        rows.append(f"| {part} | {name.replace('_', ' ')} | {value} | {target:.2f} |")
    return "\n".join(rows)


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a part: its results with "ok", or the text of its error."""
    try:
        return {"ok": True, **part()}
    except FailedError as failure:
        message, *found = failure.args
        return {"ok": False, "error": message, **(found[0] if found else {})}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        return {
            "ok": False,
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc().splitlines()[-12:],
        }


def run_part(name: str, device: str, folder: str, *, small: bool) -> dict[str, Any]:
    """Run one part in this process."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "library": build_library,
        "parity": lambda: parity(device, folder),
        "features": lambda: features(device, folder),
        "tests": run_tests,
        "trace": lambda: trace(device, folder, small=small),
        "speed": lambda: speed(device, folder, small=small),
        "versus": lambda: versus(device, folder, small=small),
        "size": lambda: size(device, folder, small=small),
    }
    # Where a device has kernels that give other bits each time, bits cannot be compared.
    torch.use_deterministic_algorithms(name in ("parity", "features"), warn_only=True)
    return attempt(parts[name])


def run_apart(
    name: str, options: argparse.Namespace, folder: Path, seconds: float
) -> dict[str, Any]:
    """Run one part in a process of its own, for so long at most."""
    limit = min(seconds, _PART_SECONDS)
    if limit <= 0:
        return {"ok": False, "error": f"not run: {_ALL_SECONDS} s are over"}
    found = folder / f"{name}.json"
    command = [sys.executable, __file__, "--run-part", name, "--out", str(found)]
    command += ["--device", options.device, "--path", str(folder)]
    command += ["--small"] if options.small else []
    started = time.perf_counter()
    fault = ""
    child = subprocess.Popen(command, start_new_session=True)
    try:
        status = child.wait(limit)
        if status not in (0, 1):
            fault = f"its process ended with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.wait()
        fault = f"not done after {limit:.0f} s"
    try:
        result = json.loads(found.read_text())
    except (OSError, ValueError):
        result = {"error": "it has left no results"}
        fault = fault or result["error"]
    if fault:
        result = {**result, "ok": False, "error": fault}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    """Run the parts; exit status 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", default=tempfile.gettempdir(), help="directory for NVMe state")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # determinism of matmul
    if options.run_part:
        done = run_part(options.run_part, options.device, options.path, small=options.small)
        options.out.write_text(json.dumps(done))
        return 0 if done["ok"] else 1
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device here; try --device cpu --small")
        return 2
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    failed = []
    deadline = time.monotonic() + _ALL_SECONDS
    with tempfile.TemporaryDirectory(dir=options.path) as folder:
        for name in options.parts:
            if name == "tests" and not on_gpu:
                continue
            print(f"{name} ...", flush=True)
            results[name] = run_apart(name, options, Path(folder), deadline - time.monotonic())
            failed += [] if results[name]["ok"] else [name]
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    print(table(results))
    print(f"failed: {', '.join(failed)}" if failed else "all parts are ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
