"""The Trainer's tests with an older accelerate, installed beside the one that is pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDER = "1.10.1"
_ASSERT_OLDER = "import accelerate; assert accelerate.__version__ == {!r}, accelerate.__version__"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_an_older_accelerate(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*install, "--target", str(packages), f"accelerate=={OLDER}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"accelerate {OLDER} cannot be installed here: {done.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}
    tests = str(ROOT / "tests" / "integrations" / "test_transformers.py")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    for command in ([sys.executable, "-c", _ASSERT_OLDER.format(OLDER)], run):
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
