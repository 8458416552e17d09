"""Damages every file that a training writes: flipped bits, truncation, zeroed and swapped pages.

    checkpoint   each file of a checkpoint. Asked for by its name it is refused, and the file is
                 named; else it is passed over with a warning that names the file, and the one
                 before is loaded. Bytes of no record may change: gaps between blocks, and of a
                 backing file that an instant checkpoint refers to, extents that are not its own.
    LATEST       a hint for people: the newest checkpoint is found whatever it says
    extents      the backing file of the NVMe tier, under a living engine: whatever is read of it is
                 an error that names the record, or has its true bits (what is read from memory,
                 and extents that nobody reads)
    training     the same, and the next step is taken: an error, or the bits of a run without
                 damage; then a checkpoint replaces all state, and training goes on
    tokens       data/ of `offload train`, under a run: what a batch is read from is checked; and
                 between two runs: made anew from the text by each run
    metrics      metrics.jsonl: a log that training never reads. `offload report` shows it or says
                 what is wrong with it; a changed digit is not detected

A wrong bit that nobody was told of is `undetected`. Exports are not ours to check: safetensors has
no checksums.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fault import _damage, _flip_teeth, _tiny
from fault.result import Row
from offload.cli import data, train
from offload.cli.report import read_outcome
from offload.errors import CheckpointError, ChecksumError, OffloadError, StorageError
from offload.state import stored
from offload.state.folders import HINT_NAME

CLASSES = ("checkpoint", "extents", "training", "tokens", "metrics")
TRIALS = 1000  # flipped bits of each class of files; of each other kind of damage a tenth
# The share of these in which an engine is made, or a whole run.
_ENGINE_SHARE, _RUN_SHARE = 0.1, 0.01
_OLDER, _NEWER = "step-00000001", "step-00000002"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to damage, and where to work."""
    parser.add_argument("--only", choices=CLASSES, nargs="+", default=list(CLASSES))
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="a folder")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """See `fault.result`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "an I/O error, after which the operation is made again")
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-faults-") as name:
        flips = _Flips(Path(name), random.Random(options.seed), options.trials or TRIALS)
        if options.teeth:
            for tooth in _flip_teeth.TEETH:
                with tooth.broken():
                    rows = list(flips.rows(tooth.sees))
                yield _joined(rows, tooth.name)
            return
        for each in options.only:
            yield from flips.rows(each)


def _joined(rows: list[Row], broken: str) -> Row:
    """The rows of a class as one: a break need not show in each kind of file."""
    found = Row(rows[0].name.split(":")[0], broken=broken)
    for row in rows:
        found.trials += row.trials
        found.undetected += row.undetected
        found.seconds += row.seconds
        found.problems += row.problems
    return found


class _Flips:
    """Trials in one folder; `trials` flipped bits of each class."""

    def __init__(self, folder: Path, draw: random.Random, trials: int) -> None:
        self.folder, self.draw, self.trials = folder, draw, trials
        (folder / "nvme").mkdir()
        self.config = _tiny.settings(folder / "nvme", io={"backend": "threads"})

    def rows(self, name: str) -> Iterator[Row]:
        """The rows of one of `CLASSES`."""
        classes: dict[str, Callable[[], Iterator[Row]]] = {
            "checkpoint": self._checkpoint,
            "extents": self._extents,
            "training": self._training,
            "tokens": self._tokens,
            "metrics": self._metrics,
        }
        yield from classes[name]()

    def _row(self, name: str, trial: Callable[[str], str], share: float = 1.0) -> Row:
        """A row of trials of every kind of damage; a trial returns what became of it.

        It raises `_UndetectedError` for wrong bits, and `_Problem` for everything else.
        """
        row = Row(name)
        began, outcomes = time.perf_counter(), Counter[str]()
        for kind in _damage.KINDS:
            count = self.trials if kind == _damage.KINDS[0] else self.trials / 10
            for number in range(max(1, round(count * share))):
                row.trials += 1
                try:
                    outcomes[trial(kind)] += 1
                except _UndetectedError as error:
                    row.undetected += 1
                    row.details.append(f"{kind} {number}: {error}")
                except Exception as error:  # noqa: BLE001  of every kind but those that are wanted
                    row.problems.append(f"{kind} {number}: {error!r}")
        row.remark = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        row.seconds = time.perf_counter() - began
        return row

    def _checkpoint(self) -> Iterator[Row]:
        """Every file of the newer of two checkpoints, and LATEST."""
        for kind, portable in (("portable", True), ("instant", False)):
            good = _Checkpoints(self.folder, self.config, portable=portable)
            for path in sorted((good.root / _NEWER).iterdir()):
                if not path.stat().st_size:
                    continue  # an instant checkpoint may have no block of its own
                name = f"checkpoint, {kind}: {path.name}"
                yield self._row(name, partial(self._file, good, path))
            if portable:
                yield self._row("checkpoint: LATEST", partial(self._hint, good))
            shutil.rmtree(good.root)

    def _file(self, good: _Checkpoints, path: Path, kind: str) -> str:
        intact = path.read_bytes()
        copy, place = _damage.damaged(kind, intact, self.draw)
        path.write_bytes(copy)
        try:
            outcome = good.look(path.name, place)
            if outcome == "refused" and self.draw.random() < _ENGINE_SHARE:
                good.load(path.name)
            return outcome
        finally:
            path.write_bytes(intact)

    def _hint(self, good: _Checkpoints, kind: str) -> str:
        path = good.root / HINT_NAME
        intact = path.read_bytes()
        path.write_bytes(_damage.damaged(kind, intact, self.draw)[0])
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bits = good.bits_of(None)
            if bits != good.bits[_NEWER] or caught:
                raise _UndetectedError(f"it leads to another checkpoint: {caught}")
        finally:
            path.write_bytes(intact)
        return "harmless: a hint"

    def _extents(self) -> Iterator[Row]:
        """The backing file of the NVMe tier, under an engine that only reads."""
        with _tiny.engine(self.config) as engine:
            _tiny.step(engine)
            _tiny.step(engine)
            bits = _tiny.fingerprint(engine)
            yield self._row("extents", partial(self._extent, engine, bits))

    def _extent(self, engine: Any, bits: str, kind: str) -> str:
        descriptor, intact = _backing_file(engine, self.draw)
        copy, place = _damage.damaged(kind, intact, self.draw)
        _overwrite(descriptor, copy)
        try:
            found = _tiny.fingerprint(engine)
        except (ChecksumError, StorageError) as error:
            return _check_extent_error(error, kind, place)
        finally:
            _overwrite(descriptor, intact)
        if found != bits:
            raise _UndetectedError(f"damage at {place} changes what is read")
        return "harmless: not read from there"

    def _training(self) -> Iterator[Row]:
        """The same before a step, which is then taken."""
        root = self.folder / "before"
        with _tiny.engine(self.config) as engine:
            _tiny.step(engine)
            _tiny.save(engine, root, portable=True)
            _tiny.step(engine)
            bits = _tiny.fingerprint(engine)
        yield self._row("training", partial(self._step, root, bits), _ENGINE_SHARE)
        shutil.rmtree(root)

    def _step(self, root: Path, bits: str, kind: str) -> str:
        outcome = "harmless: not read from there"
        with contextlib.suppress(OffloadError), _tiny.engine(self.config) as engine:
            engine.load_checkpoint(root)
            descriptor, intact = _backing_file(engine, self.draw)
            copy, place = _damage.damaged(kind, intact, self.draw)
            _overwrite(descriptor, copy)
            try:
                _tiny.step(engine)
                found = _tiny.fingerprint(engine)
            except (ChecksumError, StorageError) as error:
                outcome = _check_extent_error(error, kind, place)
                os.ftruncate(descriptor, len(intact))  # the disk is mended, not its bytes
                with contextlib.suppress(OffloadError):
                    engine._parts.store.drain()  # what failed beside it has been told
                engine.load_checkpoint(root)
                _tiny.step(engine)
                found = _tiny.fingerprint(engine)
            if found != bits:
                raise _UndetectedError(f"damage at {place} changes the training")
        return outcome

    def _tokens(self) -> Iterator[Row]:
        """Token files under a run of `offload train`, and between two."""
        folder = self.folder / "packed"
        folder.mkdir()
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 4000)
        split = data.pack(data.documents(str(folder)), data.ByteTokenizer(), folder / "data")
        yield self._row("tokens, under a run", partial(self._batch, split))
        shutil.rmtree(folder)
        runs = _Runs(self.folder / "tokens")
        yield self._row("tokens, between runs", partial(self._token_file, runs), _RUN_SHARE)
        shutil.rmtree(runs.folder)

    def _batch(self, split: data.Split, kind: str) -> str:
        """Two batches have every token of the split, but for a few at its end."""
        path = split.train_checks.path
        good = path.read_bytes()
        shape: dict[str, Any] = {"batch": 4, "sequence_length": len(split.train) // 8, "seed": 0}
        true = data.Windows(np.frombuffer(good, split.train.dtype)[: len(split.train)], **shape)
        path.write_bytes(_damage.damaged(kind, good, self.draw)[0])
        try:
            found = data.Windows(split.train, checks=split.train_checks, **shape)
            for number in range(2):
                if not torch.equal(found.shuffled(number), true.shuffled(number)):
                    raise _UndetectedError("other tokens")
        except ChecksumError as error:
            if str(path) not in str(error):
                raise _ProblemError(f"the error does not name the file: {error}") from error
            return "refused"
        finally:
            path.write_bytes(good)
        return "harmless: not read"

    def _token_file(self, runs: _Runs, kind: str) -> str:
        (path,) = (runs.output / "data").iterdir()
        path.write_bytes(_damage.damaged(kind, path.read_bytes(), self.draw)[0])
        if runs.again() != runs.bits:
            raise _UndetectedError("the run that is resumed learns something else")
        return "harmless: made anew"

    def _metrics(self) -> Iterator[Row]:
        """The log of a run, as `offload report` reads it; and a run that is resumed."""
        runs = _Runs(self.folder / "metrics")
        path = runs.output / train.METRICS_NAME
        intact = path.read_bytes()
        yield self._row("metrics", partial(self._log, path, intact))
        yield self._row("metrics, resumed", partial(self._resumed, runs, intact), _RUN_SHARE)
        shutil.rmtree(runs.folder)

    def _log(self, path: Path, intact: bytes, kind: str) -> str:
        path.write_bytes(_damage.damaged(kind, intact, self.draw)[0])
        try:
            read_outcome(path.parent)
        except OffloadError as error:
            if str(path) not in str(error):
                raise _ProblemError(f"the error does not name the file: {error}") from error
            return "refused by the report"
        except Exception as error:
            raise _ProblemError(f"the report raised {error!r}") from error
        finally:
            path.write_bytes(intact)
        return "shown: a log"

    def _resumed(self, runs: _Runs, intact: bytes, kind: str) -> str:
        path = runs.output / train.METRICS_NAME
        path.write_bytes(_damage.damaged(kind, intact, self.draw)[0])
        if runs.again() != runs.bits:
            raise _UndetectedError("the run that is resumed learns something else")
        return "harmless: training does not read it"


class _UndetectedError(Exception):
    """Wrong bits, and nobody was told."""


class _ProblemError(Exception):
    """Something else that must not be; so is every other exception."""


class _Checkpoints:
    """Two checkpoints of a tiny training, with copies of their own of every file."""

    def __init__(self, folder: Path, config: dict[str, Any], *, portable: bool) -> None:
        self.root, self.config = folder / "checkpoints", config
        made = folder / "made"
        self.bits: dict[str, str] = {}
        with _tiny.engine(config) as engine:
            for _ in range(2):
                _tiny.step(engine)
                _tiny.save(engine, made, portable=portable)
        shutil.copytree(made, self.root)  # no links to the backing file
        shutil.rmtree(made)
        self.bits = {tag: self.bits_of(tag) for tag in (_OLDER, _NEWER)}

    def bits_of(self, tag: str | None) -> str:
        """The bits of the checkpoint that is found."""
        with stored.find(self.root, tag) as found:
            return _tiny.fingerprint_of_checkpoint(found)

    def look(self, name: str, place: int) -> str:
        """What becomes of the newer checkpoint when its file `name` is damaged at `place`."""
        try:
            bits = self.bits_of(_NEWER)
        except (CheckpointError, StorageError) as error:
            if name not in str(error):
                raise _ProblemError(f"{name} is not named: {error}") from error
        else:
            if bits != self.bits[_NEWER]:
                raise _UndetectedError(f"{name} at byte {place}: other bits")
            return "harmless: of no record"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bits = self.bits_of(None)
        if bits != self.bits[_OLDER]:
            raise _UndetectedError(f"{name} at byte {place}: not the one before is used")
        if not any(name in str(each.message) for each in caught):
            raise _ProblemError(f"{name} at byte {place}: no warning names it")
        return "refused"

    def load(self, name: str) -> None:
        """Load into an engine: refused by name, which changes nothing; else the one before."""
        with _tiny.engine(self.config) as engine, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _tiny.step(engine)
            before = _tiny.fingerprint(engine)
            try:
                engine.load_checkpoint(self.root, _NEWER)
            except (CheckpointError, StorageError):
                if _tiny.fingerprint(engine) != before:
                    raise _ProblemError(f"damage of {name}: a refused load changes state") from None
            else:
                raise _UndetectedError(f"damage of {name} is loaded")
            engine.load_checkpoint(self.root)
            if engine.global_steps != 1:
                raise _ProblemError(f"damage of {name}: step {engine.global_steps} is loaded")


class _Runs:
    """`offload train` on a tiny model, which has taken half of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "run"
        (folder / "nvme").mkdir(parents=True)
        self.text = folder / "text.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
        self._train(4)
        self.bits = self._bits()
        shutil.rmtree(self.output)
        self._train(2)
        self._half = folder / "half"
        shutil.copytree(self.output, self._half)

    def again(self) -> str:
        """Resume from the half, but with data/ and the metrics as they are now; the last bits."""
        shutil.rmtree(self.output / "checkpoints")
        shutil.copytree(self._half / "checkpoints", self.output / "checkpoints")
        self._train(4)
        shutil.copy(self._half / train.METRICS_NAME, self.output)
        return self._bits()

    def _train(self, steps: int) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        config = _tiny.settings(
            self.folder / "nvme",
            io={"backend": "threads"},
            run={
                "architecture": "LlamaForCausalLM",
                "hf_config": {**sizes, "vocab_size": 259, "num_attention_heads": 2},
                "data": str(self.text),
                "batch": 2,
                "sequence_length": 16,
                "steps": steps,
                "eval_batches": 1,
                "output": str(self.output),
            },
            checkpoint={"every_steps": 2},
        )
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            train.run(config)

    def _bits(self) -> str:
        with stored.find(self.output / "checkpoints", None) as found:
            if found.content.values["global_steps"] != 4:
                raise _ProblemError("the run did not come to its end")
            return _tiny.fingerprint_of_checkpoint(found)


def _backing_file(engine: Any, draw: random.Random) -> tuple[int, bytes]:
    """A descriptor of one of the files of the NVMe tier, and what it holds."""
    file = draw.choice(engine._parts.nvme._files._files).io
    nbytes = os.fstat(file.fd).st_size
    return file.fd, os.pread(file.fd, nbytes, 0)


def _overwrite(descriptor: int, intact: bytes) -> None:
    os.ftruncate(descriptor, len(intact))
    os.pwrite(descriptor, intact, 0)


def _check_extent_error(error: StorageError, kind: str, place: int) -> str:
    """What an error about an extent is; it must say where the damage is, and of what."""
    if not error.what or error.offset is None or error.nbytes is None:
        raise _ProblemError(f"damage at {place}: the error does not say of what: {error}")
    if kind == "flipped bit" and not error.offset <= place < error.offset + error.nbytes:
        raise _ProblemError(f"damage at {place}: the error is about another place: {error}")
    if not isinstance(error, ChecksumError) and kind != "cut off":
        raise _ProblemError(f"damage at {place}: {error}")
    return "refused"
