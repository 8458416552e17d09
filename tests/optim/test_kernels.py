from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offload.optim import compilation, kernels
from offload.optim.compilation import compiled

SIGNATURE = ("uint16", "int16", "uint16", 3)  # of kernels.sgd

STEP = """
import numpy as np
from offload.optim.rules import make_rule
weight = np.zeros(5, np.float32)
rule = make_rule("sgd")
for _ in range(2):
    updated = rule.update(precision="fp32", weight=weight, master=None, state={},
                          gradient=np.ones(5, np.float32), hyper={"lr": 0.5}, step=1)
    assert updated
assert weight.tolist() == [-1.0] * 5
kernel = rule.compile("fp32", gradient_fp32=True)
print(sum(kernel.stats.cache_hits.values()))
"""


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache, and nothing compiled in this process."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "_compiled", {})
    return tmp_path


def run_step(**environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEP],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    assert run_step(NUMBA_CACHE_DIR=str(tmp_path)) == "0"
    assert run_step(NUMBA_CACHE_DIR=str(tmp_path)) == "1"


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compilation, "_compiled", {})
    monkeypatch.setattr("numba.core.dispatcher.FunctionCache", no_place)
    kernel = compiled(kernels.sgd, *SIGNATURE)
    empty = np.zeros(0, np.uint16)
    assert kernel(empty, empty.view(np.int16), empty, (np.float32(0),) * 3) == 0


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    obstacle = tmp_path / "a_file"
    obstacle.touch()
    run_step(NUMBA_CACHE_DIR=str(obstacle / "below"))


def test_a_cache_that_cannot_be_written(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert callable(compiled(kernels.sgd, *SIGNATURE))
    assert not list(fresh_cache.rglob("*.nb*"))


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_cache_file_that_was_cut_off(fresh_cache: Path, suffix: str) -> None:
    compiled(kernels.sgd, *SIGNATURE)
    files = list(fresh_cache.rglob(f"*.{suffix}"))
    assert len(files) == 1
    os.truncate(files[0], 20)
    compilation._compiled.clear()
    kernel = compiled(kernels.sgd, *SIGNATURE)
    empty = np.zeros(0, np.uint16)
    assert kernel(empty, empty.view(np.int16), empty, (np.float32(0),) * 3) == 0


def test_each_signature_has_an_index_of_its_own(fresh_cache: Path) -> None:
    compiled(kernels.merge, "uint16", "int16", "float32")
    compiled(kernels.merge, "int16", "float32", "float32")
    assert len(list(fresh_cache.rglob("*.nbi"))) == 2


@pytest.mark.usefixtures("fresh_cache")
def test_nothing_is_contracted() -> None:
    kernel = compiled(kernels.adam, "uint16", "int16", "uint16", "float32", "float32", 9)
    assembly = kernel.inspect_asm(kernel.signatures[0])
    assert "sqrt" in assembly
    assert not re.search(r"\bv?fn?m(add|sub|la|ls)", assembly)


def test_a_wrong_dtype_is_refused() -> None:
    kernel = compiled(kernels.sgd, *SIGNATURE)
    wrong = np.zeros(3, np.float64)
    with pytest.raises(TypeError):
        kernel(wrong, wrong, wrong, (np.float32(0),) * 3)
