"""DeepSpeed in an environment of its own: how it is installed, and how it trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _process import timed_steps

REQUIREMENTS = ("torch==2.13.0", "deepspeed==0.19.*", "ninja", "setuptools")
MODES = ("default", "pipelined", "parameters")


def python_of(venv: Path) -> str:
    """The interpreter of an environment that `install` has made.

    Raises:
        SystemExit: there is none.
    """
    python = venv / "bin" / "python"
    if not python.exists():
        sys.exit(f"error: {venv} has no DeepSpeed: make it with --install")
    return str(python)


def environment(venv: Path) -> dict[str, str]:
    """What DeepSpeed needs to find: the CPU, its compiled operations, libaio, one process."""
    found = {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(venv / "torch_extensions"),
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    extracted = venv / "libaio" / "usr"
    if extracted.exists():
        (library,) = {str(path.parent) for path in extracted.rglob("libaio.so")}
        include = str(extracted / "include")
        found |= {"CPATH": include, "LIBRARY_PATH": library, "LD_LIBRARY_PATH": library}
        found |= {"CFLAGS": f"-I{include}", "LDFLAGS": f"-L{library}"}
    return found


def install(venv: Path) -> None:
    """Make the environment, and compile what DeepSpeed compiles on first use; takes minutes.

    Raises:
        SystemExit: a compiler or libaio is missing and cannot be had; it says what to do.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        sys.exit("error: DeepSpeed compiles its operations: install a C++ compiler (g++)")
    _run([sys.executable, "-m", "venv", str(venv)], "make an environment")
    _have_libaio(venv)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet"]
    _run([*pip, *REQUIREMENTS, f"transformers=={version('transformers')}"], "install DeepSpeed")
    for stale in (venv / "torch_extensions").glob("*/lock"):
        stale.unlink()  # of a build that was interrupted: the next one would wait for it for ever
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder as C\n"
    build += "AsyncIOBuilder().load(); C().load()"
    _run([python_of(venv), "-c", build], "compile DeepSpeed's operations", environment(venv))


def _have_libaio(venv: Path) -> None:
    """Find the headers of libaio, install them, or extract them beside the environment."""
    if Path("/usr/include/libaio.h").exists() or (venv / "libaio").exists():
        return
    if shutil.which("apt-get") is None:
        sys.exit("error: DeepSpeed's NVMe engine needs the headers of libaio (libaio-dev)")
    if os.geteuid() == 0:
        _run(["apt-get", "install", "-y", "libaio-dev"], "install libaio-dev")
        return
    packages = venv / "libaio" / "packages"
    packages.mkdir(parents=True)
    names = ["libaio-dev", "libaio1t64"]
    if subprocess.run(["apt-cache", "show", names[1]], capture_output=True, check=False).returncode:
        names[1] = "libaio1"
    _run(["apt-get", "download", *names], "download libaio", folder=packages)
    for package in packages.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(venv / "libaio")], "extract libaio")


def _run(
    command: list[str],
    purpose: str,
    variables: dict[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    print(f"{purpose} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        env=os.environ | (variables or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        sys.exit(f"{tail}\nerror: could not {purpose}: {' '.join(command)}")


def settings(mode: str, path: str, sub_group_numel: int, buffers: int, lr: float) -> dict[str, Any]:
    """Its configuration: ZeRO-3 in bf16, optimizer state on NVMe.

    `sub_group_numel` parameters are swapped together. `pipelined` reads and writes beside the
    update, for which it needs more than its four `buffers`; `parameters` has weights on NVMe too.
    """
    swapped: dict[str, Any] = {"device": "nvme", "nvme_path": path}
    zero: dict[str, Any] = {
        "stage": 3,
        "sub_group_size": sub_group_numel,
        "offload_optimizer": swapped,
    }
    if mode == "pipelined":
        swapped |= {"pipeline_read": True, "pipeline_write": True, "buffer_count": buffers}
    elif mode == "parameters":
        zero["offload_param"] = {"device": "nvme", "nvme_path": path}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0}},
    }


def train(model: Any, configuration: dict[str, Any], batches: Iterator[Any]) -> dict[str, Any]:
    """Train on the batches; see `timed_steps`."""
    import deepspeed  # type: ignore[import-not-found,unused-ignore]

    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(model=model, config=configuration)

    def step(ids: Any) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return timed_steps(batches, step)
