"""Every message of docs/troubleshooting.md is one that the program gives: here it gives it."""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import errors
from offload.config import OffloadConfig, load_config
from offload.engine import build, pressure
from offload.native import IoEngine, library
from offload.native import engine as native_engine
from offload.state import folders
from offload.tiers import run_folder
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
MIB = 1 << 20
SHORT_DEADLINE = {"deadline_seconds": 0.5}


class Bench:
    """What a producer of a message works with."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.patch = patch
        self.nvme = path / "nvme"
        self.nvme.mkdir()
        self.engines: list[Any] = []

    def engine(self, home: str = "host", model: nn.Module | None = None, **sections: Any) -> Any:
        """Of a tiny model, with all state on one tier."""
        torch.manual_seed(0)
        config: dict[str, Any] = {
            "tiers": {
                "device": {"kind": "cpu", "memory": MIB},
                "host": {"memory": 4 * MIB},
                "nvme": {"paths": [str(self.nvme)]},
            },
            "placement": dict.fromkeys(("weights", "gradients", "optimizer"), home),
            "precision": {"compute": "fp32"},
            "partition": {"bucket_elements": 4096},
            "overlap": {"optimizer": False},
            "io": {"backend": "threads", "retries": 0},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section}
        made = offload.initialize(model or network(), config)
        self.engines.append(made)
        return made

    def faulty(self, fault: str) -> None:
        """Engines made from here on have this fault in their I/O."""

        def open_io(config: OffloadConfig) -> IoEngine:
            del config
            return IoEngine(backend="threads", threads=2, fault=fault)

        self.patch.setattr(build, "open_io", open_io)


def network(width: int = 64) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


def batch(engine: Any) -> torch.Tensor:
    width = engine.module[0].in_features
    loss: torch.Tensor = engine(torch.ones(2, width)).float().square().mean()
    return loss


def step(engine: Any) -> None:
    engine.backward(batch(engine))
    engine.step()


def config_error(_: Bench) -> None:
    load_config({"optimizer": {"lrr": 1.0}, "tier": {}, "io": {"backend": "fast"}})


def does_not_fit(bench: Bench) -> None:
    bench.engine(tiers={"host": {"memory": 4096}})


def unfrozen_does_not_fit(bench: Bench) -> None:
    model = network(256)
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    engine = bench.engine(model=model, tiers={"host": {"memory": "1.3MiB"}})
    model[1].weight.requires_grad_(True)
    step(engine)


def path_is_missing(bench: Bench) -> None:
    bench.nvme.rmdir()
    bench.engine("nvme")


def disk_is_full(bench: Bench) -> None:
    def allocate(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.patch.setattr(run_folder, "allocate", allocate)
    bench.engine("nvme")


def tmpfs(bench: Bench) -> None:
    bench.patch.setattr(run_folder, "_file_system", lambda _: "tmpfs")
    bench.engine("nvme")


def no_library(bench: Bench) -> None:
    bench.patch.setattr(library, "LIBRARY_AVAILABLE", False)
    bench.patch.setattr(native_engine, "_missing_library_was_told", False)
    bench.engine("nvme", io={"backend": "auto"})


def too_many_gathered(bench: Bench) -> None:
    engine = bench.engine(
        model=network(256), tiers={"device": {"memory": "640KiB"}, "host": {"memory": "16MiB"}}
    )
    with engine.gathered():
        pass


def memory_is_short(bench: Bench) -> None:
    press(bench, swing_bytes=0, room_bytes=MIB // 32)


def memory_is_too_short(bench: Bench) -> None:
    press(bench, swing_bytes=MIB, room_bytes=MIB // 2, homes={})


def press(bench: Bench, *, swing_bytes: int, room_bytes: int, homes: Any = None) -> None:
    """A step on a machine that has so little left, with state on the host where `auto` put it."""
    placement = homes if homes is not None else dict.fromkeys(("gradients", "optimizer"), "auto")
    sizes = {"device": {"kind": "cpu", "memory": "256KiB"}}
    engine = bench.engine(model=network(128), placement=placement, tiers=sizes)
    step(engine)
    engine._pressure._swing_bytes = swing_bytes
    engine._pressure._look_seconds = 0.0  # so that it looks again
    bench.patch.setattr(pressure, "free_swap_bytes", lambda: 0)
    bench.patch.setattr(pressure, "_anonymous_bytes", lambda: 0)
    bench.patch.setattr(pressure, "MARGIN_BYTES", MIB // 16)
    bench.patch.setattr(pressure, "_MOST_SHARE", 1.0)
    bench.patch.setattr(pressure, "_LEAST_SECONDS", 0.0)
    bench.patch.setattr(pressure, "host_room_bytes", lambda: room_bytes)
    step(engine)


def to_half(bench: Bench) -> None:
    bench.engine().module.half()


def passing_error(bench: Bench) -> None:
    bench.faulty("op=read,nth=3,errno=5")
    engine = bench.engine("nvme", io={"retries": 3})
    step(engine)
    step(engine)


def error_in_forward(bench: Bench) -> None:
    bench.faulty("op=read,nth=1,count=0,errno=5")
    batch(bench.engine("nvme"))


def error_in_step(bench: Bench) -> None:
    engine = failing_step(bench)
    engine.step()


def forward_while_pending(bench: Bench) -> None:
    engine = failing_step(bench)
    with pytest.raises(errors.StorageError):
        engine.step()
    batch(engine)


def failing_step(bench: Bench) -> Any:
    """An engine of which the next optimizer step cannot read its state."""
    bench.faulty("op=read,nth=1,count=0,errno=5")
    engine = bench.engine(placement={"optimizer": "nvme"})
    step(engine)  # reads nothing: moments begin at zero
    engine.backward(batch(engine))
    return engine


def flipped(bench: Bench) -> None:
    bench.faulty("op=read,nth=1,count=0,corrupt=1")
    batch(bench.engine("nvme"))


def hanging(bench: Bench) -> None:
    bench.faulty("op=read,nth=1,delay=1500")
    batch(bench.engine("nvme", io=SHORT_DEADLINE))


def infinite_weight(bench: Bench) -> None:
    engine = bench.engine(optimizer={"name": "sgd", "lr": 1e38})
    engine.backward(batch(engine) * 1e6)
    engine.step()


def void_state(bench: Bench) -> None:
    engine = bench.engine()
    with pytest.raises(ZeroDivisionError), engine.replacing_state():
        raise ZeroDivisionError
    batch(engine)


def unscaled_loss(bench: Bench) -> None:
    engine = bench.engine(precision={"compute": "fp16"})
    engine(torch.ones(2, 64, dtype=torch.float16)).float().square().mean().backward()


def added_gradients(bench: Bench) -> None:
    engine = bench.engine()
    for _ in range(2):
        batch(engine).backward()
        engine.optimizer.step()


def no_checkpoint(bench: Bench) -> None:
    (bench.path / "empty").mkdir()
    bench.engine().load_checkpoint(bench.path / "empty")


def other_engine(bench: Bench) -> None:
    first = bench.engine()
    first.save_checkpoint(bench.path / "checkpoints")
    first.close()
    bench.engine(model=network(32)).load_checkpoint(bench.path / "checkpoints")


def hanging_save(bench: Bench) -> None:
    engine = bench.engine(io=SHORT_DEADLINE)
    pause = threading.Event()
    bench.patch.setattr(folders, "sweep", lambda _: pause.wait(5))
    try:
        engine.save_checkpoint(bench.path / "checkpoints")
    finally:
        pause.set()


# What the page names -> the class, and who gives it. A class of None is a warning.
MESSAGES: dict[str, list[tuple[type[Exception] | None, str, Callable[[Bench], None]]]] = {
    "ConfigError: 3 problems": [(errors.ConfigError, "3 problems", config_error)],
    "DoesNotFitError: the training state does not fit in its tiers": [
        (errors.DoesNotFitError, "does not fit", does_not_fit)
    ],
    "DoesNotFitError: parameter ...: unfrozen, but there is no room for gradients and optimizer "
    "state": [
        (
            errors.DoesNotFitError,
            r"parameter .*unfrozen, but there is no room",
            unfrozen_does_not_fit,
        )
    ],
    "StorageError: open of /mnt/nvme failed ... [ENOENT]": [
        (errors.StorageError, r"open of .* failed.*\[ENOENT\]", path_is_missing)
    ],
    "DiskFullError": [(errors.DiskFullError, "free are", disk_is_full)],
    "Warning: tmpfs is memory": [(None, "tmpfs is memory", tmpfs)],
    "Warning: offload does its I/O in Python": [(None, "does its I/O in Python", no_library)],
    "BudgetError: ... needs ... of tier device": [
        (errors.BudgetError, r"needs .* of tier device", too_many_gathered)
    ],
    "Warning: host memory runs short": [(None, "host memory runs short", memory_is_short)],
    "MemoryPressureError": [(errors.MemoryPressureError, "", memory_is_too_short)],
    "GuardError": [(errors.GuardError, "remedy", to_half)],
    "Warning: an I/O error, after which the operation is made again": [
        (None, "an I/O error, after which the operation is made again", passing_error)
    ],
    "StorageError in forward or backward": [
        (errors.StorageError, "read of weights", error_in_forward)
    ],
    "StorageError in step()": [(errors.StorageError, "read of optimizer", error_in_step)],
    "EngineStateError: ... while optimizer step N is pending": [
        (errors.EngineStateError, r"while optimizer step \d+ is pending", forward_while_pending)
    ],
    "ChecksumError": [(errors.ChecksumError, "CRC32C", flipped)],
    "DeadlineError": [
        (errors.DeadlineError, "not done after", hanging),
        (errors.DeadlineError, "it hangs", hanging_save),
    ],
    "NonFiniteError": [(errors.NonFiniteError, "", infinite_weight)],
    "EngineStateError: the state is void": [
        (errors.EngineStateError, "the state is void", void_state)
    ],
    "EngineStateError: the fp16 gradient of ... comes from a loss without its scale": [
        (
            errors.EngineStateError,
            r"the fp16 gradient of .* comes from a loss without",
            unscaled_loss,
        )
    ],
    "clip_grad_norm_ returns 0; a warning that gradients are added to those that a step has used": [
        (None, "gradients are added to those that an optimizer step has used", added_gradients)
    ],
    "CheckpointError: no undamaged checkpoint in ...": [
        (errors.CheckpointError, "no undamaged checkpoint in", no_checkpoint)
    ],
    "CheckpointError: ... was saved by another kind of engine": [
        (errors.CheckpointError, "was saved by another kind of engine", other_engine)
    ],
}


def headings() -> list[str]:
    """What the page has in bold at the start of a paragraph, entry by entry."""
    text = PAGE.read_text(encoding="utf-8")
    found: list[str] = []
    for match in re.finditer(r"^\*\*(.+?)\*\*", text, flags=re.DOTALL | re.MULTILINE):
        entry = " ".join(match[1].split()).replace("`", "")
        entries = [entry] if entry.startswith("clip") else entry.split("; ")
        found += entries
    return found


def test_every_entry_of_the_page_has_its_message() -> None:
    assert headings() == list(MESSAGES)


@pytest.mark.parametrize(
    ("kind", "words", "give"),
    [each for several in MESSAGES.values() for each in several],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_the_program_gives_the_message(
    kind: type[Exception] | None,
    words: str,
    give: Callable[[Bench], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        bench = Bench(tmp_path, patch)
        if kind is None:
            with pytest.warns(Warning, match=words):
                give(bench)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(kind, match=words):
                    give(bench)
    for engine in bench.engines:
        try:
            engine.close()
        except errors.OffloadError:
            engine.close()
