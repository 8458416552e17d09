"""Everything that only a GPU can show, in one call under 10 minutes.

    python tools/gpu_check.py [--device cuda] [--out results.json] [--small]

1. builds the native library if the package has none, and prints what machine this is;
2. runs the tests that need a GPU (`pytest -m gpu`);
3. parity: a tiny Llama in bf16 under every placement gives the bits of the all-on-device run, and
   the losses of plain PyTorch on the same device within rounding;
4. speed: tokens/s of a larger Llama with its state on host and on NVMe, as a share of
   all-on-device, and the part of copy time that is not hidden;
5. size: a model at least 4 times larger than the device budget, and the driver's count of what it
   took.

`--device cpu --small` runs parts 3 to 5 without a GPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
PLACEMENTS = {
    "device": {"weights": "device", "gradients": "device", "optimizer": "device"},
    "host": {"weights": "host", "gradients": "host", "optimizer": "host"},
    "nvme": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
}


def build_library() -> str:
    """Build the native library into the package where it is missing; says what was done."""
    target = Path(str(importlib.resources.files("offload.native"))) / "liboffload_native.so"
    if target.exists():
        return "present"
    if not shutil.which("cmake"):
        return "absent: no cmake; Python I/O is used"
    with tempfile.TemporaryDirectory() as build:
        for command in (
            ["cmake", "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release"],
            ["cmake", "--build", build, "-j"],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(next(Path(build).rglob(target.name)), target)
    return "built"


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


def run(model: nn.Module, config: dict[str, Any], ids: torch.Tensor, steps: int) -> dict[str, Any]:
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
    results = {}
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
    return results


def speed(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """Tokens/s as a share of the all-on-device run."""
    hidden, layers, tokens = (256, 4, 256) if small else (2048, 16, 4096)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    results: dict[str, Any] = {}
    for placement in PLACEMENTS:
        memory: int | str = "auto" if placement == "device" else (64 if small else 4096) * MIB
        host = (512 if small else 24 * 1024) * MIB
        config = settings(device, placement, path, memory, host)
        done = run(make_llama(hidden, layers), config, ids, 6)
        results[placement] = {
            "tokens_per_second": tokens / done["seconds"],
            "efficiency": done["report"]["efficiency"],
            "lanes": done["report"]["lanes"],
        }
    base = results["device"]["tokens_per_second"]
    for placement in PLACEMENTS:
        results[placement]["share"] = results[placement]["tokens_per_second"] / base
    return results


def size(device: str, path: str, *, small: bool) -> dict[str, Any]:
    """A model whose weights are 4 times the device budget; peak of tier and driver."""
    hidden, layers = (256, 24) if small else (2048, 24)
    model = make_llama(hidden, layers)
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    budget = weight_bytes // 4
    ids = torch.randint(0, 4096, (1, 256), generator=torch.Generator().manual_seed(1)).to(device)
    before = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else 0
    done = run(model, settings(device, "host", path, budget, (1 if small else 40) << 30), ids, 4)
    after = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else 0
    return {
        "weight_bytes": weight_bytes,
        "device_budget_bytes": budget,
        "device_peak_bytes": done["report"]["tiers"]["device"]["peak_bytes"],
        "driver_bytes_left_behind": before - after,
        "losses": done["losses"],
    }


def main() -> int:
    """Run all parts; exit status 1 if a test or a parity check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", default=tempfile.gettempdir(), help="directory for NVMe state")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no CUDA device here; try --device cpu --small")
        return 2
    results: dict[str, Any] = {
        "library": build_library(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    if on_gpu:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
        results["tests_exit_status"] = subprocess.run(command, cwd=ROOT, check=False).returncode
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    with tempfile.TemporaryDirectory(dir=options.path) as path:
        results["parity"] = parity(options.device, path)
        torch.use_deterministic_algorithms(False)
        results["speed"] = speed(options.device, path, small=options.small)
        results["size"] = size(options.device, path, small=options.small)
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text)
    good = results["parity"]["host"] and results["parity"]["nvme"]
    return 0 if good and results.get("tests_exit_status", 0) in (0, 5) else 1


if __name__ == "__main__":
    sys.exit(main())
