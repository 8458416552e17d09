"""Set up the project and run its demo, tests, linters, benchmarks and fault suites.

    python3 tools/dev.py demo           train a small model with its state on disk, and export it
    python3 tools/dev.py test           the default tests        (--slow: the slow ones)
    python3 tools/dev.py lint           ruff, mypy, clang-format
    python3 tools/dev.py docs           build docs/ into build/docs, warnings as errors
    python3 tools/dev.py bench          list the benchmarks      (bench NAME: run one)
    python3 tools/dev.py faults         list the fault suites    (faults PART: run one)
    python3 tools/dev.py install        only set up

Needs only the standard library. Everything is installed into `.venv` in the project's root, and
reused until pyproject.toml, constraints.txt or the native sources change.

[Note: which torch]
Where the running interpreter can import torch >= 2.11, the environment sees that torch and what
was installed with it, and downloads neither. Else constraints.txt says which torch; on a machine
without an NVIDIA device it is the CPU build, where its index can be reached.

[Note: editable]
The project is installed editable: `import offload` finds this checkout from any directory, and a
plain installation could not be used from the root, where `./offload` hides it. The native library
is built by the installation; without a C++ compiler it is left out and Python does its work.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "offload-stamp.json"
MOST_TEST_PROCESSES = 4
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LINTERS = ("ruff", "mypy", "clang-format")  # their pins hold whatever the system has
CXX_SUFFIXES = {".cpp", ".hpp", ".h"}
NATIVE_SUFFIXES = {*CXX_SUFFIXES, ".txt", ".cmake"}
LIBRARY_CHECK = (
    "import importlib.resources as r, sys;"
    "sys.exit(not (r.files('offload.native') / 'liboffload_native.so').is_file())"
)


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (else the command line) name; return the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("[Note", maxsplit=1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a small model with its state on disk, and export it")
    test = commands.add_parser("test", help="run the tests; further arguments go to pytest")
    test.add_argument("--slow", action="store_true", help="run the slow tests instead")
    commands.add_parser("lint", help="ruff check, ruff format, mypy, clang-format")
    commands.add_parser("docs", help="build docs/ into build/docs; a warning is an error")
    bench = commands.add_parser("bench", help="list the benchmarks, or run one")
    bench.add_argument("name", nargs="?", help="name of a file in tools/bench, without .py")
    faults = commands.add_parser("faults", help="list the crash and fault suites, or run one")
    faults.add_argument("name", nargs="?", help="name of a file in tools/fault, without .py")
    commands.add_parser("install", help="only set up the environment")
    options, further = parser.parse_known_args(arguments)
    if further and options.command not in {"test", "bench", "faults"}:
        parser.error(f"unknown arguments: {' '.join(further)}")
    try:
        if options.command == "demo":
            return demo()
        if options.command == "test":
            return test_suite(slow=options.slow, further=further)
        if options.command == "lint":
            return lint()
        if options.command == "docs":
            return documentation()
        if options.command == "bench":
            return benchmark(options.name, further)
        if options.command == "faults":
            return fault_suite(options.name, further)
        set_up("hf", "test")
        say(f"ready: source {VENV.relative_to(ROOT)}/bin/activate")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def demo() -> int:
    """Train `configs/quickstart.toml`, which also exports the model and loads the export."""
    set_up("hf", "test")
    config = "configs/quickstart.toml"
    say(f"offload train {config}")
    return run("-m", "offload.cli.main", "train", config)


def test_suite(*, slow: bool, further: Sequence[str]) -> int:
    """Run pytest: the default set in several processes, or with `slow` the slow tests."""
    library = set_up("hf", "test")
    if not library and compiler():
        raise SetupError(
            "there is a C++ compiler but the native library was not built; the reason is in the "
            f"output of: {PYTHON} -m pip install -v --no-deps -e {ROOT}"
        )
    processes = str(min(os.cpu_count() or 1, MOST_TEST_PROCESSES))
    # Slow tests measure memory, or take all of the machine: one at a time.
    how = ["-m", "slow"] if slow else ["-n", processes]
    return run("-m", "pytest", *how, *further)


def lint() -> int:
    """Run every linter, also after one has failed; 0 when all are content."""
    set_up("hf", "test", "dev")
    sources = [str(path) for path in native_sources() if path.suffix in CXX_SUFFIXES]
    steps = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy"],
        "clang-format": ["clang-format", "--dry-run", "-Werror", *sources],
    }
    failed = []
    for name, (tool, *arguments) in steps.items():
        say(name)
        command = [str(VENV / "bin" / tool), *arguments]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "lint: all good")
    return 1 if failed else 0


def documentation() -> int:
    """Build the pages as a site."""
    set_up("hf", "test", "docs")
    site = ROOT / "build" / "docs"
    failed = run("-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(site))
    if not failed:
        say(f"docs: {(site / 'index.html').relative_to(ROOT)}")
    return failed


def benchmark(name: str | None, further: Sequence[str]) -> int:
    """List the benchmarks with their first lines, or run `name` with the `further` arguments."""
    scripts = {path.stem: path for path in sorted((ROOT / "tools" / "bench").glob("[!_]*.py"))}
    if name is None:
        for stem, path in scripts.items():
            first = path.read_text(encoding="utf-8").lstrip().lstrip('"').splitlines()[0]
            print(f"  {stem:24} {first.strip(chr(34))}")
        return 0
    if name not in scripts:
        raise SetupError(f"there is no benchmark {name!r}, but: {', '.join(scripts) or 'none'}")
    set_up("hf", "test")
    return run(str(scripts[name]), *further)


def fault_suite(name: str | None, further: Sequence[str]) -> int:
    """List the parts of tools/faults.py, or run `name` with the `further` arguments."""
    set_up("hf", "test")
    return run("tools/faults.py", *([] if name is None else [name]), *further)


def run(*command: str) -> int:
    """Run the environment's Python with `command` in the project's root; return its exit code."""
    return subprocess.run([str(PYTHON), *command], cwd=ROOT, check=False).returncode


def set_up(*extras: str) -> bool:
    """Make or reuse the environment with `extras`; return whether it has the native library."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"offload needs Python 3.11 or later, this is {found}: {sys.executable}")
    with one_at_a_time():
        digest = fingerprint()
        stamp = read_stamp()
        wanted = sorted({*extras, *stamp.get("extras", [])}) if stamp else sorted(extras)
        if stamp.get("digest") != digest or not set(extras) <= set(stamp.get("extras", [])):
            STAMP.unlink(missing_ok=True)
            install(wanted, fresh=not stamp or stamp.get("base") != base_interpreter())
            content = {"digest": digest, "extras": wanted, "base": base_interpreter()}
            STAMP.write_text(json.dumps(content), encoding="utf-8")
    library = run("-c", LIBRARY_CHECK) == 0
    if not library and not compiler():
        say(
            "warning: no C++ compiler found, so the native library was left out and disk I/O runs "
            "in Python. To build it: apt-get install g++, then run this again"
        )
    return library


def install(extras: Sequence[str], *, fresh: bool) -> None:
    """Install the project and `extras` into the environment, which is made anew if `fresh`."""
    system_torch = importable_torch()
    if (
        system_torch
        and subprocess.run([sys.executable, "-c", "import torch"], check=False).returncode
    ):
        say(f"the torch of {sys.executable} cannot be imported: installing another")
        system_torch = None
    if fresh:
        make_environment(with_system=system_torch is not None)
    constraints = VENV / "constraints.txt"
    kept = kept_constraints() if system_torch else read_constraints()
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    if system_torch:
        say(f"using the torch {system_torch} of {sys.executable}")
    elif not has_nvidia_device() and reachable(CPU_TORCH_INDEX):
        say("installing the CPU build of torch")
        pip("--constraint", str(constraints), "--extra-index-url", CPU_TORCH_INDEX, "torch")
    say("installing the project; the first time takes some minutes")
    pip("--constraint", str(constraints), "--editable", f"{ROOT}[{','.join(extras)}]")


def make_environment(*, with_system: bool) -> None:
    """Make an empty environment, which with `with_system` sees the running interpreter's."""
    say(f"making {VENV.relative_to(ROOT)} with {sys.executable}")
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            f"this Python has no {error.name}, which makes environments; on Debian and Ubuntu: "
            f"apt-get install python{version}-venv"
        ) from error
    if VENV.is_dir() and not (VENV / "pyvenv.cfg").exists():
        raise SetupError(f"{VENV} exists and is no environment: move it away")
    builder = venv.EnvBuilder(
        clear=True, symlinks=True, with_pip=True, system_site_packages=with_system
    )
    builder.create(VENV)
    if with_system and sys.prefix != sys.base_prefix:
        # The running interpreter is an environment itself, which system_site_packages leaves out.
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        target = VENV / "lib" / version / "site-packages" / "running_interpreter.pth"
        target.write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")


def pip(*arguments: str) -> None:
    """Run `pip install` in the environment.

    Raises:
        SetupError: pip has failed; its own output says why.
    """
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if run(*command):
        raise SetupError(f"pip has failed, see above: {PYTHON} {' '.join(command)}")


def fingerprint() -> str:
    """Return a digest of everything that the environment depends on."""
    digest = hashlib.sha256(f"{ROOT} {base_interpreter()} {compiler()}".encode())
    for path in [ROOT / "pyproject.toml", ROOT / "constraints.txt", *native_sources()]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def native_sources() -> list[Path]:
    """Return the sources of the native library, without build folders."""
    return sorted(
        path
        for path in (ROOT / "native").rglob("*")
        if path.suffix in NATIVE_SUFFIXES
        and not path.relative_to(ROOT).parts[1].startswith("build")
    )


def base_interpreter() -> str:
    """Return what identifies the running interpreter and the torch that it sees."""
    return f"{sys.executable} {sys.version_info[:3]} {importable_torch()}"


def read_stamp() -> dict[str, Any]:
    """Return what the environment was made for; empty where there is none that works."""
    try:
        content = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    works = PYTHON.exists() and run("-c", "") == 0
    return content if works and isinstance(content, dict) else {}


def importable_torch() -> str | None:
    """Return the version of torch that the running interpreter has, if it is new enough."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = re.findall(r"\d+", version)[:2]
    return version if tuple(map(int, numbers)) >= OLDEST_TORCH else None


def read_constraints() -> list[str]:
    """Return the pins of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def kept_constraints() -> list[str]:
    """Return the pins of packages that the running interpreter does not have, and of linters."""

    def is_there(name: str) -> bool:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return bool(importlib.metadata.version(name))
        return False

    pins = [(line.partition("==")[0], line) for line in read_constraints()]
    return [line for name, line in pins if name in LINTERS or not is_there(name)]


def compiler() -> str | None:
    """Return the path of a C++ compiler; None where there is none."""
    return next(
        filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None
    )


def has_nvidia_device() -> bool:
    """Whether the NVIDIA driver has a device here."""
    return Path("/dev/nvidiactl").exists()


def reachable(url: str) -> bool:
    """Whether `url` answers within five seconds."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock on the project's root; wait while another set-up runs."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"-- {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
