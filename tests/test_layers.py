"""The architecture, read from the sources: layers, names, sizes, threads, no pickle.

Imports are found wherever they stand, also inside functions and under TYPE_CHECKING. Only
`offload/__init__.py` is free: it exports lazily from everywhere.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "offload"

LAYERS = [
    "errors",
    "config",
    "timeline",
    "telemetry",
    "native",
    "tiers",
    "partition",
    "schedule",
    "optim",
    "engine",
    "state",
    "integrations",
    "cli",
]
WITHOUT_TORCH = [
    "errors.py",
    "config/",
    "timeline.py",
    "telemetry.py",
    "native/",
    "partition/layout.py",
    "schedule/",
    "cli/main.py",
]
MAY_START_THREADS = ["native/", "schedule/executor.py", "engine/accumulation/coroutines.py"]
FORBIDDEN_WORDS = {
    *("manager", "managers", "helper", "helpers", "util", "utils", "info", "infos"),
    *("swapper", "swappers", "handler", "handlers", "common"),
}
MOST_LINES = 600
PICKLING_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_CALLS = re.compile(r"torch\.(load|save)|.*_object(s|_list)?")
THREAD_NAMES = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "ThreadPool"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the dotted name of every module or name that is imported; `package` resolves dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def layer_violations(tree: ast.Module, file: str) -> list[str]:
    """Return the imports in `file` (relative to the package) that go against the layers."""
    own = file.split("/")[0].removesuffix(".py")
    package = ".".join(["offload", *file.split("/")[:-1]])
    found = []
    for name in imported_modules(tree, package):
        parts = name.split(".")
        if parts[0] != "offload" or own == "__init__":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target == "__version__" or target == own:
            continue
        if target not in LAYERS:
            found.append(f"{file} imports {name}: import it from the module that defines it")
        elif LAYERS.index(target) > LAYERS.index(own):
            found.append(f"{file} imports {name}, which is in a later layer than {own}")
    return found


def forbidden_names(tree: ast.Module, file: str) -> list[str]:
    names = [part.removesuffix(".py") for part in file.split("/")]
    names += [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [
        f"{file}: {name}"
        for name in names
        if FORBIDDEN_WORDS
        & {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    ]


def pickling(tree: ast.Module, file: str) -> list[str]:
    found = [
        f"{file} imports {name}"
        for name in imported_modules(tree, "offload")
        if name.split(".")[0] in PICKLING_MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name.startswith("torch") and PICKLING_CALLS.fullmatch(name):
            found.append(f"{file}:{node.lineno} calls {name}")
        for keyword in node.keywords:
            allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not allowed:
                found.append(f"{file}:{node.lineno} allows pickle")
    return found


def thread_starts(tree: ast.Module, file: str) -> list[str]:
    used = [name.rpartition(".")[2] for name in imported_modules(tree, "offload")]
    used += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"{file} uses {name}"
        for name in used
        if name in THREAD_NAMES or name in {"start_new_thread", "multiprocessing"}
    ]


def found_in_sources(check: object, paths: list[Path] = SOURCES) -> list[str]:
    assert callable(check)
    return [problem for path in paths for problem in check(parse(path), inside(path))]


def test_every_module_belongs_to_a_layer() -> None:
    tops = {inside(path).split("/")[0].removesuffix(".py") for path in SOURCES}
    assert tops - {"__init__"} <= set(LAYERS)


def test_imports_go_one_way() -> None:
    assert found_in_sources(layer_violations) == []


def test_names_are_the_glossarys() -> None:
    assert found_in_sources(forbidden_names) == []


def test_modules_are_short() -> None:
    lengths = {inside(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {file: length for file, length in lengths.items() if length > MOST_LINES} == {}


def test_no_pickle() -> None:
    assert found_in_sources(pickling) == []


def test_threads_start_in_few_places_only() -> None:
    others = [
        path
        for path in SOURCES
        if not any(inside(path).startswith(place) for place in MAY_START_THREADS)
    ]
    assert found_in_sources(thread_starts, others) == []


def test_pure_modules_do_not_import_torch() -> None:
    pure = [
        path for path in SOURCES if any(inside(path).startswith(place) for place in WITHOUT_TORCH)
    ]
    assert [
        f"{inside(path)}: {name}"
        for path in pure
        for name in imported_modules(top_level(parse(path)), "offload")
        if name.split(".")[0] == "torch"
    ] == []


def top_level(tree: ast.Module) -> ast.Module:
    """Return `tree` without function bodies, where imports are lazy."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    stripped = WithoutFunctions().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


@pytest.mark.parametrize(
    ("file", "source", "bad"),
    [
        ("tiers/a.py", "import offload.errors", False),
        ("tiers/a.py", "from offload.tiers import b", False),
        ("tiers/a.py", "from . import b", False),
        ("tiers/a.py", "from offload import __version__", False),
        ("tiers/a.py", "import offload.engine.guards.guard", True),
        ("tiers/a.py", "from offload.schedule.plan import Plan", True),
        ("tiers/a.py", "from offload import engine", True),
        ("tiers/a.py", "from offload import OffloadConfig", True),
        ("tiers/a.py", "from ..engine import guard", True),
        ("tiers/a.py", "def f():\n    from offload import cli", True),
        ("tiers/a.py", "if TYPE_CHECKING:\n    import offload.optim", True),
        ("tiers/a.py", "importlib.import_module('offload.state')", True),
        ("errors.py", "import offload.config", True),
        ("config/a.py", "import offload.errors", False),
    ],
)
def test_the_layer_check_finds_violations(file: str, source: str, bad: bool) -> None:
    assert bool(layer_violations(ast.parse(source), file)) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("def information(): ...", False),
        ("def build_info(): ...", True),
        ("class PageManager: ...", True),
        ("class IOHandler: ...", True),
        ("async def common_part(): ...", True),
        ("class A:\n    def helper(self): ...", True),
    ],
)
def test_the_name_check_finds_violations(source: str, bad: bool) -> None:
    assert bool(forbidden_names(ast.parse(source), "tiers/a.py")) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("torch.tensor(1)", False),
        ("np.load(path, allow_pickle=False)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("torch.load(path)", True),
        ("torch.distributed.all_gather_object(a, b)", True),
        ("import pickle", True),
        ("from pickle import loads", True),
    ],
)
def test_the_pickle_check_finds_violations(source: str, bad: bool) -> None:
    assert bool(pickling(ast.parse(source), "tiers/a.py")) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("threading.Lock()", False),
        ("threading.Thread(target=f)", True),
        ("from threading import Thread", True),
        ("from concurrent.futures import ThreadPoolExecutor", True),
        ("import multiprocessing", True),
    ],
)
def test_the_thread_check_finds_violations(source: str, bad: bool) -> None:
    assert bool(thread_starts(ast.parse(source), "tiers/a.py")) is bad
