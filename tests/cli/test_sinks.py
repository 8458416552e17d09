"""Sinks: TensorBoard for real; wandb and trackio as modules that keep the calls they get."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offload.cli import train
from offload.cli.sinks import MetricsWriter, require_sinks, scalars
from offload.config import load_config
from offload.errors import ConfigError
from offload.telemetry import read_jsonl
from tests.cli.test_train import text, tiny_config  # noqa: F401 - a fixture

STEP = {
    "kind": "step",
    "step": 3,
    "loss": 2.5,
    "taken": True,
    "grad_norm": None,
    "report": {"critical": "cpu", "lanes": {"cpu": {"bytes": 7}}, "update": {"on_device": [1]}},
}
EVAL = {"kind": "eval", "step": 3, "held_out_loss": 2.0}


class StandIn(ModuleType):
    """A module that keeps the calls it gets; `log` fails from its nth call on."""

    def __init__(self, name: str, fails_at: int = 0) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self._left = fails_at

    def init(self, **settings: Any) -> None:
        self.calls.append(("init", None, settings))

    def log(self, found: dict[str, float], **settings: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise ConnectionError("the network is away")
        self.calls.append(("log", found, settings))

    def finish(self) -> None:
        self.calls.append(("finish", None, {}))


def put(monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int = 0) -> StandIn:
    module = StandIn(name, fails_at)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_the_numbers_of_an_entry_have_their_path() -> None:
    assert dict(scalars(STEP)) == {
        "step": 3.0,
        "loss": 2.5,
        "taken": 1.0,
        "report/lanes/cpu/bytes": 7.0,
    }


def test_absent_packages_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        require_sinks(["wandb", "trackio"])
    assert len(caught.value.problems) == 2
    assert "pip install wandb" in caught.value.problems[0]
    require_sinks([])


def test_training_does_not_begin_without_them(
    tmp_path: Path,
    text: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        train.run(tiny_config(tmp_path, text, sinks=["wandb"]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="sinks"):
        load_config({"run": {"sinks": ["mlflow"]}})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = put(monkeypatch, name)
    with MetricsWriter(tmp_path / "a-run" / "metrics.jsonl", [name], {"seed": 0}) as metrics:
        for entry in ({"kind": "start", "step": 0}, STEP, EVAL, {"kind": "summary", "steps": 3}):
            metrics.write(entry)
    place = {"dir": str(tmp_path / "a-run")} if name == "wandb" else {}
    expected = dict(scalars(STEP))
    del expected["step"]
    assert module.calls == [
        ("init", None, {"project": "offload", "name": "a-run", "config": {"seed": 0}, **place}),
        ("log", expected, {"step": 3}),
        ("log", {"held_out_loss": 2.0}, {"step": 3}),
        ("finish", None, {}),
    ]
    assert len(read_jsonl(tmp_path / "a-run" / "metrics.jsonl")) == 4


def test_one_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = put(monkeypatch, "wandb", fails_at=2), put(monkeypatch, "trackio")
    with MetricsWriter(tmp_path / "metrics.jsonl", ["wandb", "trackio"], {}) as metrics:
        metrics.write(STEP)
        with pytest.warns(RuntimeWarning, match="wandb gets no more .*the network is away"):
            metrics.write(STEP)
        metrics.write(STEP)
    assert [call for call, _, _ in broken.calls] == ["init", "log"]
    assert [call for call, _, _ in whole.calls] == ["init", "log", "log", "log", "finish"]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_a_run_has_written(
    tmp_path: Path,
    text: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train.run(tiny_config(tmp_path, text, steps=3, sinks=["tensorboard"])) == 0
    entries = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    steps = [entry for entry in entries if entry["kind"] == "step"]
    for key in ("loss", "tokens_per_second", "report/lanes/nvme_read/bytes"):
        assert [event.step for event in read.Scalars(key)] == [1, 2, 3]
        for event, entry in zip(read.Scalars(key), steps, strict=True):
            assert event.value == pytest.approx(dict(scalars(entry))[key], rel=1e-6)
    assert [event.step for event in read.Scalars("held_out_loss")] == [0, 3]
