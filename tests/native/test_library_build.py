"""The library's own tests: built plain and with sanitizers, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
SANITIZERS = ["address,undefined", "thread"]


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    result = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def compiles(cxx: str, folder: Path, *flags: str) -> bool:
    source = folder / "probe.cpp"
    source.write_text("#include <version>\nint main() { return 0; }\n")
    command = [cxx, "-std=c++20", *flags, str(source), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    cxx = compiler()
    if not compiles(cxx, tmp_path, f"-fsanitize={sanitizers}"):
        pytest.skip(f"{cxx} has no -fsanitize={sanitizers}")
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", "-fno-sanitize-recover=all"]
    flags += [f"-fsanitize={sanitizers}", f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'src'}"]
    constexpr = "-fconstexpr-ops-limit=1000000000"
    if compiles(cxx, tmp_path, constexpr):
        flags.append(constexpr)
    sources = [*(NATIVE / "src").glob("*.cpp"), *(NATIVE / "tests").glob("*.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run(cxx, *flags, "-c", source, cwd=tmp_path), sources))
    objects = [source.with_suffix(".o").name for source in sources]
    run(cxx, *flags, *objects, "-o", "tests", cwd=tmp_path)
    run(tmp_path / "tests", cwd=tmp_path, TMPDIR=str(tmp_path))


@pytest.mark.slow
def test_cmake_builds_and_installs_the_library_where_the_package_looks(tmp_path):
    compiler()
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    build, prefix = tmp_path / "build", tmp_path / "installed"
    run(
        cmake,
        "-S",
        NATIVE,
        "-B",
        build,
        "-DSKBUILD=ON",
        "-DOFFLOAD_WARNINGS_AS_ERRORS=ON",
        cwd=tmp_path,
    )
    run(cmake, "--build", build, "--parallel", "2", cwd=tmp_path)
    run(cmake, "--install", build, "--prefix", prefix, cwd=tmp_path)
    assert [path.name for path in prefix.iterdir()] == ["liboffload_native.so"]
