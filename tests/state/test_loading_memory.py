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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("small_memory.py")
CGROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20


@dataclass(frozen=True)
class Cgroup:
    """A folder of the cgroup file system, and what its version calls the limit and the peak."""

    path: Path
    limit: str
    peak: str

    def peak_bytes(self) -> int:
        """The most memory that its processes had, files that the kernel cached included."""
        return int((self.path / self.peak).read_text())


def write_folder(folder: Path, layers: int, width: int) -> None:
    spec = importlib.util.spec_from_file_location("small_memory", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.write_folder(folder, layers, width)


def run(how: str, folder: Path, *numbers: int, cgroup: Cgroup | None = None) -> Any:
    """The finished process; it is in `cgroup` from before Python starts."""
    (folder / "nvme").mkdir(exist_ok=True)
    command = [sys.executable, str(PROGRAM), how, str(folder), str(folder / "nvme")]
    command += [str(number) for number in numbers]
    if cgroup is not None:
        enter = f'echo $$ > {cgroup.path}/cgroup.procs && exec "$@"'
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
def limited(nbytes: int, root: Path = CGROUPS) -> Iterator[Cgroup]:
    """A new memory cgroup of that size, version 2 or 1; skips the test where there can be none."""
    name = f"offload-test-{os.getpid()}"
    if (root / "cgroup.controllers").exists():
        cgroup = Cgroup(root / name, "memory.max", "memory.peak")
    else:
        path = root / "memory" / name
        cgroup = Cgroup(path, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
    try:
        cgroup.path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        for file in (cgroup.limit, cgroup.peak):
            if not (cgroup.path / file).exists():
                pytest.skip(f"a new cgroup in {cgroup.path.parent} has no {file}")
        (cgroup.path / cgroup.limit).write_text(str(nbytes))
        swap = cgroup.path / "memory.swap.max"  # of version 2
        if swap.exists():
            swap.write_text("0")
        yield cgroup
    finally:
        cgroup.path.rmdir()


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
    for how in ("pretrained", "deferred"):
        with limited(nbytes // 4) as cgroup:  # a new one, with a peak of its own
            done = run(how, tmp_path, *sizes, cgroup=cgroup)
            peak = cgroup.peak_bytes()
        assert done.returncode == 0, (done.returncode, done.stderr)
        found = json.loads(done.stdout)
        assert found["loss"] > 0
        print(how, {**found, "limit": nbytes // 4, "cgroup_peak": peak})
    with limited(nbytes // 4) as cgroup:
        ordinary = run("ordinary", tmp_path, *sizes, cgroup=cgroup)
        assert ordinary.returncode == -9, "the limit ends a process that holds the model"
