"""Cells of a notebook that run again, in IPython's own shell without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import offload

Cell = Callable[[str], Any]
ENGINE = "engine = offload.initialize(small_model(), SETTINGS)"


def namespace() -> dict[str, Any]:
    from tests.oracle import settings, small_loss, small_model

    return {
        "offload": offload,
        "small_model": small_model,
        "small_loss": small_loss,
        "SETTINGS": settings("host"),
    }


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    config = Config()
    config.HistoryManager.enabled = False
    made = InteractiveShell.instance(config=config)
    made.user_ns.update(namespace())
    yield made
    for value in list(made.user_ns.values()):
        if isinstance(value, offload.OffloadEngine):
            value.close()
    made.reset(new_session=False)
    InteractiveShell.clear_instance()


@pytest.fixture
def run(shell: Any) -> Cell:
    """Run a cell; what it raises is raised."""

    def cell(source: str) -> Any:
        result = shell.run_cell(source, store_history=False, silent=True)
        result.raise_error()
        return shell.user_ns

    return cell


def test_the_same_cell_again_closes_the_engine(run: Cell) -> None:
    first = run(ENGINE)["engine"]
    run("engine.backward(small_loss(engine, 0)); engine.step()")
    with pytest.warns(RuntimeWarning, match=r"'engine', at step 1, is closed"):
        second = run(ENGINE)["engine"]
    assert first.is_closed
    assert not second.is_closed
    run("engine.backward(small_loss(engine, 0)); assert engine.step()")


def test_an_edited_cell_closes_the_engine(run: Cell) -> None:
    first = run(ENGINE)["engine"]
    with pytest.warns(RuntimeWarning, match="is closed"):
        run("x = 1\nother = engine = offload.initialize(small_model(), SETTINGS)\ny = 2")
    assert first.is_closed


def test_other_names_are_left_alone(run: Cell) -> None:
    first = run(ENGINE)["engine"]
    found = run("critic = offload.initialize(small_model(), SETTINGS)")
    assert not first.is_closed
    assert not found["critic"].is_closed
    run("del critic\nengines = [offload.initialize(small_model(), SETTINGS)]\nengines[0].close()")
    assert not first.is_closed
    run("def build():\n    engine = offload.initialize(small_model(), SETTINGS)\n    return engine")
    run("second = build()")
    assert not first.is_closed


def test_the_same_module_is_refused_and_nothing_is_lost(run: Cell) -> None:
    run("model = small_model()")
    again = "engine = offload.initialize(model, SETTINGS)"
    engine = run(again)["engine"]
    run("engine.backward(small_loss(engine, 0)); engine.step()")
    with pytest.raises(offload.EngineStateError, match="trains this very module, at step 1"):
        run(again)
    assert not engine.is_closed
    run("engine.backward(small_loss(engine, 1)); assert engine.step()")


def test_a_wrong_configuration_closes_nothing(run: Cell) -> None:
    engine = run(ENGINE)["engine"]
    with pytest.raises(offload.ConfigError):
        run("engine = offload.initialize(small_model(), {'trainig': {}})")
    assert not engine.is_closed


def test_the_engine_of_a_trainer_is_closed(run: Cell, tmp_path: Path) -> None:
    from tests.integrations.test_transformers import Tokens, arguments
    from tests.oracle import small_llama

    names = run("")
    names.update(Tokens=Tokens, small_llama=small_llama, args=arguments(tmp_path, max_steps=1))
    cell = (
        "from offload.integrations.transformers import OffloadTrainer\n"
        "trainer = OffloadTrainer(model=small_llama(), args=args, train_dataset=Tokens())"
    )
    first = run(cell)["trainer"]
    run("trainer.train();")
    with pytest.warns(RuntimeWarning, match=r"'trainer', at step 1, is closed"):
        run(cell)
    assert first.offload_engine.is_closed


def test_outside_of_notebooks_nothing_is_closed() -> None:
    names = namespace()
    code = compile(ENGINE, "cell", "exec")
    exec(code, names)
    first = names["engine"]
    exec(code, names)
    assert not first.is_closed
    for engine in (first, names["engine"]):
        engine.close()
