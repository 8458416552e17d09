"""Memory of loading: a model larger than memory is built, loaded and trained in a part of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("small_memory.py")
CGROUPS = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20


def write_folder(folder: Path, layers: int, width: int) -> None:
    spec = importlib.util.spec_from_file_location("small_memory", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.write_folder(folder, layers, width)


def run(how: str, folder: Path, *numbers: int, cgroup: Path | None = None) -> Any:
    """The finished process; it is in `cgroup` from before Python starts."""
    (folder / "nvme").mkdir(exist_ok=True)
    command = [sys.executable, str(PROGRAM), how, str(folder), str(folder / "nvme")]
    command += [str(number) for number in numbers]
    if cgroup is not None:
        enter = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


@pytest.mark.parametrize("how", ["pretrained", "deferred"])
def test_memory_grows_by_less_than_a_quarter_of_the_model(how: str, tmp_path: Path) -> None:
    layers, width = 96, 1024
    if how == "pretrained":
        write_folder(tmp_path, layers, width)
    done = run(how, tmp_path, layers, width, 16, 32)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == 4 * layers * width**2
    assert max(found["loading"], found["training"]) < found["weights"] / 4
    assert found["loss"] > 0


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A memory cgroup (v1) of that size."""
    cgroup = CGROUPS / f"offload-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        (cgroup / "memory.limit_in_bytes").write_text(str(nbytes))
        yield cgroup
    finally:
        cgroup.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_model_of_four_times_the_memory_limit(tmp_path: Path) -> None:
    """4.8 GB of fp32 weights, their gradients and optimizer on NVMe, under a limit of 1.2 GB."""
    layers, width = 288, 2048
    nbytes = 4 * layers * width**2
    if shutil.disk_usage(tmp_path).free < 6 * nbytes:
        pytest.skip("not enough disk")
    write_folder(tmp_path, layers, width)
    sizes = (layers, width, 128, 256)
    with limited(nbytes // 4) as cgroup:
        for how in ("pretrained", "deferred"):
            done = run(how, tmp_path, *sizes, cgroup=cgroup)
            assert done.returncode == 0, (done.returncode, done.stderr)
            found = json.loads(done.stdout)
            assert found["loss"] > 0
            peak = int((cgroup / "memory.max_usage_in_bytes").read_text())
            print(how, {**found, "limit": nbytes // 4, "cgroup_peak": peak})
        ordinary = run("ordinary", tmp_path, *sizes, cgroup=cgroup)
        assert ordinary.returncode == -9, "the limit ends a process that holds the model"
