"""The decisions of tools/dev.py; the set-up itself runs wherever these tests do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev(tmp_path: Path) -> ModuleType:
    """tools/dev.py, looking at a small project in `tmp_path`."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "tools" / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "native" / "src").mkdir(parents=True)
    (tmp_path / "native" / "build").mkdir()
    (tmp_path / "native" / "src" / "a.cpp").write_text("int a;")
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "constraints.txt").write_text(
        "# a comment\ntorch==2.13.0\npytest==1\nmypy==2.4.1\nabsent-package==1.0\n"
    )
    module.ROOT, module.VENV = tmp_path, tmp_path / ".venv"
    module.STAMP = module.VENV / "stamp.json"
    module.PYTHON = Path(sys.executable)
    return module


def test_the_fingerprint_follows_what_the_environment_depends_on(
    dev: ModuleType, tmp_path: Path
) -> None:
    first = dev.fingerprint()
    (tmp_path / "native" / "build" / "generated.cpp").write_text("int b;")
    (tmp_path / "unrelated.py").write_text("")
    assert dev.fingerprint() == first
    seen = {first}
    for name in ("pyproject.toml", "constraints.txt", "native/src/a.cpp"):
        (tmp_path / name).write_text("changed")
        seen.add(dev.fingerprint())
    assert len(seen) == 4


def test_an_environment_is_reused_until_something_changes(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[tuple[list[str], bool]] = []

    def install(extras: list[str], *, fresh: bool) -> None:
        dev.VENV.mkdir(exist_ok=True)
        installed.append((extras, fresh))

    monkeypatch.setattr(dev, "install", install)
    dev.set_up("hf", "test")
    dev.set_up("hf")
    assert installed == [(["hf", "test"], True)]
    dev.set_up("dev")
    assert installed[1:] == [(["dev", "hf", "test"], False)]
    (tmp_path / "pyproject.toml").write_text("changed")
    dev.set_up("hf")
    assert installed[2:] == [(["dev", "hf", "test"], False)]
    dev.STAMP.write_text("not json")
    dev.set_up("hf")
    assert installed[3:] == [(["hf"], True)]
    assert json.loads(dev.STAMP.read_text())["extras"] == ["hf"]


def test_pins_of_what_the_system_has_are_dropped_but_not_of_linters(dev: ModuleType) -> None:
    assert dev.kept_constraints() == ["mypy==2.4.1", "absent-package==1.0"]


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.0+cpu", True), ("3.0.0a0", True), (None, False)],
)
def test_which_torch_is_used(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str | None, usable: bool
) -> None:
    def installed_version(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(dev.importlib.metadata, "version", installed_version)
    assert dev.importable_torch() == (version if usable else None)


def test_a_python_without_ensurepip_names_the_package(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(dev.SetupError, match=r"apt-get install python3\.\d+-venv"):
        dev.make_environment(with_system=False)


def test_a_folder_that_is_no_environment_is_left_alone(dev: ModuleType) -> None:
    dev.VENV.mkdir()
    (dev.VENV / "mine").write_text("")
    with pytest.raises(dev.SetupError, match="is no environment"):
        dev.make_environment(with_system=False)
    assert (dev.VENV / "mine").exists()


def test_benchmarks_are_listed_with_their_first_line(
    dev: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tools" / "bench"
    folder.mkdir(parents=True)
    (folder / "step.py").write_text('"""Seconds of one step."""\n')
    (folder / "_shared.py").write_text("")
    assert dev.main(["bench"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ["step", "Seconds of one step.\n"]
    assert dev.main(["bench", "absent"]) == 1
    assert "no benchmark 'absent', but: step" in capsys.readouterr().err


def test_a_fault_suite_gets_its_arguments(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "set_up", lambda *extras: True)
    script = tmp_path / "tools" / "faults.py"
    script.parent.mkdir()
    script.write_text("import sys\nsys.exit(sys.argv[1:] != ['kill', '--trials', '3'])\n")
    assert dev.main(["faults", "kill", "--trials", "3"]) == 0
    assert dev.main(["faults"]) == 1
