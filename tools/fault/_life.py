"""The life of one tiny training in which every call is repeated after its error.

[Note: life] Build, two steps with a checkpoint after each, a third step, back to the newest
checkpoint, and on. The one fault of a trial may come anywhere. A caller who simply repeats what has
failed must end with the bits of a run without a fault, and find every error in `Life.errors`.

As a script it lives once in the folder named, for use under strace, and prints what it found.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault import _tiny
from fault._os_layer import calls_in_place
from offload.errors import CheckpointError, OffloadError
from offload.state import folders, stored

_R = TypeVar("_R")
Checking = Callable[[], AbstractContextManager[object]]  # the trial's own reads are not disturbed
_MOST_TRIES = 4
NUM_STEPS = 3


def _nothing() -> None:
    pass


@dataclass
class Life:
    """What one life left behind.

    Attributes:
        errors: (the call, its error) of every call that raised.
        problems: what must not be, in words.
        losses: of every step taken, by its number; a step taken twice must give its loss again.
        fingerprint: of the state at the end.
        saved: the fingerprint of the checkpoint of each step, as its file has it.
        warned: every warning.
        leases: what is held at the end, before and after the engine is closed.
    """

    errors: list[tuple[str, BaseException]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    fingerprint: str = ""
    saved: dict[int, str] = field(default_factory=dict)
    warned: list[warnings.WarningMessage] = field(default_factory=list)
    leases: dict[str, dict[str, int]] = field(default_factory=dict)
    checking: Checking = nullcontext
    after_error: Callable[[], None] = _nothing

    def attempt(self, name: str, call: Callable[[], _R]) -> _R:
        """Make the call until it succeeds; what it raises must be an `OffloadError`."""
        for left in reversed(range(_MOST_TRIES)):
            try:
                return call()
            except Exception as error:
                _forget_frames(error)
                self.errors.append((name, error))
                self.after_error()
                if not isinstance(error, OffloadError):
                    self.problems.append(f"{name} raised {error!r}, which is no OffloadError")
                if left == 0:
                    raise
        raise AssertionError("unreachable")


def live(
    make: Callable[[], Any],
    folder: Path,
    *,
    checking: Checking = nullcontext,
    after_error: Callable[[], None] = _nothing,
) -> Life:
    """Live through [Note: life] with checkpoints in `folder`, which does not exist afterwards."""
    life = Life(checking=checking, after_error=after_error)
    files, tasks = _tiny.open_files(), _tiny.num_threads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        life.warned = caught
        try:
            engine = life.attempt("build", make)
            try:
                _train(life, engine, folder)
            finally:
                with suppress(OffloadError):  # an engine must close, whatever was
                    engine.close()
                engine.close()
                life.leases["after"] = _tiny.held(engine)
        except Exception as error:  # noqa: BLE001  the end of the trial, and its result
            life.problems.append(f"it came to an end: {error!r}")
        with checking():
            shutil.rmtree(folder, ignore_errors=True)
    _compare_held(life, files, tasks)
    return life


def _train(life: Life, engine: Any, folder: Path) -> None:
    while engine.global_steps < NUM_STEPS:
        _step(life, engine)
        if engine.global_steps < NUM_STEPS:
            _save(life, engine, folder)
    life.attempt("load", lambda: engine.load_checkpoint(folder))
    if engine.global_steps < NUM_STEPS - 1:
        # Legal for a checkpoint that could not be read, if a warning names it.
        if not any("passed over" in str(each.message) for each in life.warned):
            life.problems.append(f"step {engine.global_steps} was loaded without a word")
        life.attempt("load", lambda: engine.load_checkpoint(folder))
    if engine.global_steps != NUM_STEPS - 1:
        life.problems.append(f"loading goes back to step {engine.global_steps}")
    _step(life, engine)
    life.after_error()  # what nobody was told of has passed as well
    with life.checking():
        folders.sweep(folder)  # as the next save does
        left = [path.name for path in folder.glob(".*")]
    if left:
        life.problems.append(f"left behind: {left}")
    life.fingerprint = life.attempt("read", lambda: _tiny.fingerprint(engine))
    _tiny.settle(engine)
    life.leases = {"before": _tiny.held(engine)}


def _step(life: Life, engine: Any) -> None:
    """One step as a user takes it who repeats what has failed."""
    number = engine.global_steps

    def micro_batch() -> float:
        value = _tiny.loss(engine, number)
        engine.backward(value)
        return value.item()

    value = life.attempt("forward or backward", micro_batch)
    life.attempt("step", engine.step)
    if engine.global_steps != number + 1 or engine.micro_steps != number + 1:
        life.problems.append(f"step {number} counts as {engine.global_steps}")
    if life.losses.setdefault(number, value) != value:
        life.problems.append(f"step {number} has loss {value}, and had {life.losses[number]}")


def _save(life: Life, engine: Any, folder: Path) -> None:
    """Save; after an error there is the checkpoint before, or this one whole."""

    def save() -> None:
        try:
            _tiny.save(engine, folder)
        except OffloadError:
            with life.checking():
                _check_stored(life, folder, at_least=engine.global_steps - 1)
            raise

    life.attempt("save", save)
    with life.checking():
        _check_stored(life, folder, at_least=engine.global_steps)


def _check_stored(life: Life, folder: Path, *, at_least: int) -> None:
    """The newest checkpoint is of that step or later, and has the bits of its step."""
    try:
        found = stored.find(folder, None)
    except CheckpointError as error:
        if at_least > 0:
            life.problems.append(f"step {at_least} was saved and cannot be found: {error}")
        return
    with found:
        number = found.content.values["global_steps"]
        bits = _tiny.fingerprint_of_checkpoint(found)
    if number < at_least:
        life.problems.append(f"step {at_least} was saved, and step {number} found")
    if life.saved.setdefault(number, bits) != bits:
        life.problems.append(f"the checkpoint of step {number} has changed")


def _forget_frames(error: BaseException | None) -> None:
    """An error that is kept keeps no files open."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _compare_held(life: Life, files: list[str], tasks: int) -> None:
    left = [name for name in _tiny.open_files() if name not in files]
    if left:
        life.problems.append(f"left open: {left}")
    now = _tiny.num_threads()
    if now > tasks:
        life.problems.append(f"{now - tasks} threads are left")


def differences(life: Life, calm: Life) -> list[str]:
    """What is otherwise than in the life without a fault; bits, and what is held."""
    found = []
    if life.fingerprint != calm.fingerprint:
        found.append("the state differs")
    if life.losses != calm.losses:
        found.append(f"losses {life.losses} instead of {calm.losses}")
    found += [
        f"the checkpoint of step {number} differs"
        for number, bits in life.saved.items()
        if calm.saved.get(number) != bits
    ]
    for when, leases in calm.leases.items():
        for tier, nbytes in leases.items():
            held = life.leases.get(when, {}).get(tier, 0)
            # Extents are reserved beside those that checkpoints pin: more or fewer of them, if one
            # was saved late or is known to be gone late.
            if held != nbytes and (tier != "nvme" or held > 1.25 * nbytes):
                found.append(f"{when} the end {held} bytes of {tier} are held, not {nbytes}")
    return found


def main() -> None:
    """Live once; arguments: the folder, and where the state is at home."""
    folder, home = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    # All in one thread: a fault comes once in each.
    alone: dict[str, Any] = {"io": {"backend": "threads"}, "checkpoint": {"asynchronous": False}}
    config = _tiny.settings(folder / "nvme", home=home, **alone)
    with calls_in_place():
        life = live(lambda: _tiny.engine(config), folder / "checkpoints")
    errors = [
        {"call": name, "type": type(error).__name__, "message": str(error)}
        for name, error in life.errors
    ]
    result = {"fingerprint": life.fingerprint, "errors": errors, "problems": life.problems}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
