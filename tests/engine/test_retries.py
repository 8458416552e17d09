"""Disks that fail for a moment, and for good, while training."""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.engine import build
from offload.errors import StorageError
from offload.native import IoEngine
from offload.tiers import retrying
from tests.oracle import (
    assert_identical,
    continue_engine,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
)

STEPS = 3
RETRIES = 3


class FailedRequest:
    """A request that has ended with an error."""

    def __init__(self, operation: str, path: str, offset: int, nbytes: int, code: int) -> None:
        self._arguments: dict[str, Any] = {
            "operation": operation,
            "path": path,
            "offset": offset,
            "nbytes": nbytes,
            "errno": code,
        }

    def expedite(self, urgency: int) -> None:
        pass

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> int:
        del timeout
        raise StorageError(**self._arguments)


class FlakyIo(IoEngine):
    """Fails every `every`-th request, once: made again it succeeds; or what is `broken`, always."""

    def __init__(self) -> None:
        super().__init__(backend="threads", threads=2)
        self.every = 0
        self.broken = ""
        self.num_failed = 0
        self._num_requests = 0
        self._to_succeed: set[tuple[object, ...]] = set()
        self._lock = threading.Lock()

    def start_read(self, file: Any, offset: int, address: int, nbytes: int, **options: Any) -> Any:
        return self._fail("read", file, offset, address, nbytes) or super().start_read(
            file, offset, address, nbytes, **options
        )

    def start_write(self, file: Any, offset: int, address: int, nbytes: int, **options: Any) -> Any:
        return self._fail("write", file, offset, address, nbytes) or super().start_write(
            file, offset, address, nbytes, **options
        )

    def _fail(
        self, operation: str, file: Any, offset: int, address: int, nbytes: int
    ) -> FailedRequest | None:
        key = (operation, id(file), offset, address)
        with self._lock:
            if self.broken != operation:
                if key in self._to_succeed:
                    self._to_succeed.remove(key)
                    return None
                self._num_requests += 1
                if not self.every or self._num_requests % self.every:
                    return None
                self._to_succeed.add(key)
            self.num_failed += 1
        return FailedRequest(operation, file.path, offset, nbytes, errno.EIO)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes engines on disks that fail; `engine.io` is what they fail in."""
    monkeypatch.setattr(retrying, "_FIRST_PAUSE_SECONDS", 1e-4)
    monkeypatch.setattr(retrying, "_PAUSE_GROWTH", 2.0)
    monkeypatch.setattr(build, "open_io", lambda config: FlakyIo())
    engines = []

    def make(path: Path, **sections: Any) -> Any:
        engines.append(make_engine(small_model(), configured(path, **sections)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def configured(path: Path, **sections: Any) -> dict[str, Any]:
    return settings(
        "nvme",
        path,
        **{
            "bucket_elements": 1024,
            "device": 1 << 20,
            "host": 4 << 20,
            "io": {"retries": RETRIES},
            **sections,
        },
    )


PLACEMENTS: dict[str, dict[str, Any]] = {
    "nvme": {},
    "activations": {
        "placement": {"activations": "nvme"},
        "activations": {"min_bytes": 1, "host_memory": 64 << 10},
    },
    "accumulating": {"training": {"gradient_accumulation_steps": 3}},
    "bf16": {"compute": "bf16"},
}


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("every", [1, 7])
def test_every_request_that_fails_once_is_made_again_and_nobody_is_told_but_by_a_count(
    every: int,
    placement: str,
    overlapped: bool,
    flaky: Callable[..., Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Page-ins, gradients, saved tensors and the step: each n-th request fails, once."""
    if not overlapped:
        request.getfixturevalue("by_itself")
    sections = PLACEMENTS[placement]
    calm = train_engine(small_model(), configured(tmp_path, **sections), small_loss, steps=STEPS)
    engine = flaky(tmp_path, **sections)
    engine._parts.io.every = every
    reports = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = continue_engine(engine, small_loss, steps=0)
        for _ in range(STEPS):
            step = continue_engine(engine, small_loss, steps=1)
            run.losses += step.losses
            run.norms += step.norms
            reports.append(engine.report().retries)
        run.state, run.steps = step.state, step.steps
    assert_identical(run, calm)
    assert engine._parts.io.num_failed > 20
    assert engine._parts.updates.retries.report().count == engine._parts.io.num_failed
    assert all(each.count > 0 for each in reports)
    (warning,) = told
    assert warning.category is RuntimeWarning
    assert "is made again" in str(warning.message)
    assert "EIO" in str(warning.message)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("broken", ["read", "write"])
@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
def test_a_disk_that_breaks_ends_the_step_with_everything_intact(
    broken: str,
    overlapped: bool,
    flaky: Callable[..., Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if not overlapped:
        request.getfixturevalue("by_itself")
    calm = train_engine(small_model(), configured(tmp_path), small_loss, steps=STEPS)
    engine = flaky(tmp_path)
    run = continue_engine(engine, small_loss, steps=1)
    before = {name: dict(tensors) for name, tensors in run.state.items()}
    engine.save_checkpoint(tmp_path / "checkpoints")
    engine.wait_for_checkpoint()
    io = engine._parts.io
    loss = small_loss(engine, engine.micro_steps)
    engine.backward(loss)
    io.broken = broken
    errors: list[StorageError] = []
    while len(errors) < 3:  # for as long as it is broken
        try:
            if engine.global_steps < 2:
                engine.step()
            small_loss(engine, engine.micro_steps)
            next(engine.named_state())  # what is pending is made, or says why not
        except StorageError as error:
            errors.append(error)
    for error in errors:
        text = str(error)
        assert (error.errno, error.num_tries) == (errno.EIO, 1 + RETRIES)
        assert error.what is not None
        assert " of bucket " in error.what
        assert ".weight" in error.what or ".bias" in error.what
        assert error.offset is not None
        assert error.nbytes
        for part in (str(tmp_path), "disk: ", "mounted at ", "backing file number "):
            assert part in text
    # What was committed is there, for another engine on a disk that works.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_io", lambda config: IoEngine(backend="threads"))
        (tmp_path / "other").mkdir()
        with make_engine(small_model(), configured(tmp_path / "other")) as other:
            other.load_checkpoint(tmp_path / "checkpoints")
            for name, tensors in other.named_state():
                for key, tensor in tensors.items():
                    assert torch.equal(tensor, before[name][key]), (name, key)
    # And the disk works again: the step is completed, with nothing applied twice.
    io.broken = ""
    if engine.global_steps < 2:
        taken = engine.step()
        assert taken
    rest = continue_engine(engine, small_loss, steps=STEPS - engine.global_steps)
    rest.losses = [*run.losses, loss.item(), *rest.losses]
    rest.norms = calm.norms
    assert_identical(rest, calm)


@pytest.mark.usefixtures("by_itself")
@pytest.mark.filterwarnings("ignore:an I/O error, after which:RuntimeWarning")
def test_without_retries_the_same_run_ends_at_the_first_error(
    flaky: Callable[..., Any], tmp_path: Path
) -> None:
    engine = flaky(tmp_path, io={"retries": 0})
    engine._parts.io.every = 50
    with pytest.raises(StorageError):
        continue_engine(engine, small_loss, steps=STEPS)
