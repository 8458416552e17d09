"""No pickle is run: every file that offload reads is replaced by a planted one, and opened.

A planted pickle makes a folder when it is unpickled. Whatever can unpickle is a trap besides.
"""

from __future__ import annotations

import _pickle
import contextlib
import importlib.util
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._weights_only_unpickler
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import offload
from offload.cli.data import Windows, documents
from offload.cli.report import read_outcome
from offload.errors import OffloadError
from offload.state import dcp as dcp_reader
from offload.state import universal as universal_reader
from offload.state.dcp_export import export_dcp
from offload.state.delta import export_delta
from offload.state.export import export_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FOREIGN = Path(__file__).with_name("foreign")
CONFIG = {
    "tiers": {"device": {"kind": "cpu", "memory": "4MiB"}, "host": {"memory": "4MiB"}},
    "precision": {"compute": "fp32"},
}

spec = importlib.util.spec_from_file_location("make_universal", FOREIGN / "make_universal.py")
Net = importlib.util.module_from_spec(spec)
spec.loader.exec_module(Net)
Net = Net.Net


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# -- what is planted -------------------------------------------------------------------------------


def raw(original: bytes, planted: Planted) -> bytes:
    return pickle.dumps(planted, 2)


def newest(original: bytes, planted: Planted) -> bytes:
    return pickle.dumps({"param": planted}, 4)


def archive(original: bytes, planted: Planted) -> bytes:
    out = io.BytesIO()
    torch.save({"param": planted}, out)
    return out.getvalue()


def inside(original: bytes, planted: Planted) -> bytes:
    """Before what the file holds, so that what is wanted of it is there, too."""
    if original[:2] == b"PK":
        out = io.BytesIO()
        try:
            packed = zipfile.ZipFile(io.BytesIO(original))
        except zipfile.BadZipFile:
            return archive(original, planted)
        with packed, zipfile.ZipFile(out, "w") as made:
            for entry in packed.infolist():
                data = packed.read(entry)
                is_pickle = entry.filename.endswith("data.pkl")
                made.writestr(entry.filename, first(data, planted) if is_pickle else data)
        return out.getvalue()
    if original[:1] == b"\x80":
        return first(original, planted)
    text = json.dumps({"planted": pickle.dumps(planted, 0).decode()})
    return text.encode() + b"\n" + original


def first(original: bytes, planted: Planted) -> bytes:
    """A pickle that makes the planted one first, drops it, and goes on as before."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, 2)
    pickler.fast = True  # without a memo, which is counted on by what follows
    pickler.dump(planted)
    return original[:2] + out.getvalue()[2:-1] + b"0" + original[2:]


PLANTS = (raw, newest, archive, inside)


# -- what is opened --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Files in a folder, and everything that opens them."""

    folder: Path
    openers: tuple[Callable[[], object], ...]


def unpacked(name: str, folder: Path) -> Path:
    """A real one; of its parameters two are enough."""
    with zipfile.ZipFile(FOREIGN / f"{name}.zip") as packed:
        packed.extractall(folder)
    return folder


def kinds(tmp_path: Path, engine) -> dict[str, Kind]:
    with offload.initialize(Net(), CONFIG) as source:
        source.save_checkpoint(tmp_path / "ckpt", "one")
    own = Kind(
        tmp_path / "ckpt",
        (
            lambda: engine.load_checkpoint(tmp_path / "ckpt"),
            lambda: engine.load_checkpoint(tmp_path / "ckpt", "one"),
            lambda: export_checkpoint(tmp_path / "ckpt", tmp_path / "out"),
            lambda: export_dcp(tmp_path / "ckpt", tmp_path / "new", optimizer=True),
        ),
    )
    export_checkpoint(tmp_path / "ckpt", tmp_path / "hf", max_shard_bytes=300)
    folder = Kind(
        tmp_path / "hf",
        (
            lambda: engine.import_checkpoint(tmp_path / "hf"),
            lambda: offload.from_pretrained(tmp_path / "hf", CONFIG, model_class=Net).close(),
            lambda: export_delta(tmp_path / "ckpt", tmp_path / "hf", tmp_path / "delta2"),
        ),
    )
    export_delta(tmp_path / "ckpt", tmp_path / "hf", tmp_path / "delta")
    delta = Kind(
        tmp_path / "delta",
        (lambda: offload.apply_delta(tmp_path / "hf", tmp_path / "delta", tmp_path / "again"),),
    )
    export_dcp(tmp_path / "ckpt", tmp_path / "dcp", optimizer=True)
    ours = Kind(tmp_path / "dcp", (lambda: engine.import_checkpoint(tmp_path / "dcp"),))
    found = {"checkpoint": own, "safetensors": folder, "delta": delta, "own dcp": ours}
    for name in ("zero1_two_ranks", "zero3_two_ranks", "dcp_two_ranks"):
        path = unpacked(name, tmp_path / name)
        path = path / "dcp" if name.startswith("dcp") else path
        found[name] = Kind(path, (lambda path=path: engine.import_checkpoint(path),))
    return found | {"run": run_folder(tmp_path / "run")}


def run_folder(run: Path) -> Kind:
    """What `offload train` leaves and reads: its configuration, metrics and tokens; and texts."""
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "placed_bytes": {}}\n')
    (run / "train.tokens").write_bytes(bytes(400))
    (run / "text.jsonl").write_text('{"text": "words"}\n')

    def windows() -> None:
        tokens = np.memmap(run / "train.tokens", np.uint8, mode="r")
        Windows(tokens, batch=1, sequence_length=8, seed=0).shuffled(0)

    return Kind(
        run,
        (
            lambda: offload.load_config(run / "config.json"),
            lambda: read_outcome(run),
            windows,
            lambda: [document() for document in documents(str(run / "text.jsonl"))],
        ),
    )


def wanted_files(kind: Kind) -> list[Path]:
    """Every file; of the many alike of a universal checkpoint those of one parameter."""
    files = sorted(path for path in kind.folder.rglob("*") if path.is_file())
    few = {"embed.weight", "frozen.weight", "offsets"}
    return [
        path
        for path in files
        if path.parent.parent.name != "zero" or path.parent.name in few
        if path.name not in ("expected.safetensors", "latest")
    ]


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    original = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(original)


@pytest.fixture
def traps(monkeypatch) -> list[str]:
    """The names of what has been called that can unpickle."""
    sprung: list[str] = []

    def trap(owner: object, name: str) -> None:
        def spring(*_, **__):
            sprung.append(name)
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(owner, name, spring)

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            trap(module, name)
    for name in ("_load", "_loads", "_Unpickler"):
        trap(pickle, name)
    for module in (torch, torch.serialization, torch._weights_only_unpickler):
        trap(module, "load")
    trap(torch._weights_only_unpickler, "Unpickler")
    real = np.load

    def load(*args, allow_pickle=False, **options):
        assert not allow_pickle
        return real(*args, **options)

    monkeypatch.setattr(np, "load", load)
    return sprung


def opened(kind: Kind) -> int:
    """Call every opener; what is raised on purpose is an answer. Returns how many refused."""
    refused = 0
    for opener in kind.openers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # damaged, passed over
            try:
                opener()
            except (OffloadError, UnicodeDecodeError):
                refused += 1
    return refused


NAMES = (
    *("checkpoint", "safetensors", "delta", "own dcp", "zero1_two_ranks", "zero3_two_ranks"),
    *("dcp_two_ranks", "run"),
)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_planted_runs(tmp_path, name, request):
    torch.manual_seed(0)
    marker = tmp_path / "it ran"
    with offload.initialize(Net(), CONFIG) as engine:
        kind = kinds(tmp_path, engine)[name]
        assert opened(kind) == 0, "as they are, all of them open"
        planted = [
            (path, plant.__name__, plant(path.read_bytes(), Planted(marker)))
            for path in wanted_files(kind)
            for plant in PLANTS
        ]
        sprung = request.getfixturevalue("traps")
        refused = 0
        for path, how, data in planted:
            with replaced(path, data):
                refused += opened(kind) > 0
            assert not marker.exists(), (path, how)
            assert not sprung, (path, how)
    assert len(planted) >= 8
    assert refused >= len(planted) // 3, "most of them are looked at, and refused"


def planted_values(folder: Path, marker: Path) -> None:
    """A directory of torch's own making with pickles among its values, in a place that is read."""
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    weights, state = get_state_dict(model, optimizer)
    state["state"]["embed.weight"]["step"] = Planted(marker)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder, no_dist=True)


def test_nothing_planted_among_the_values_of_a_directory_runs(tmp_path, request):
    marker = tmp_path / "it ran"
    planted_values(tmp_path / "dcp", marker)
    sprung = request.getfixturevalue("traps")
    message = r"it names 'posix\.mkdir', which is not known here"
    with (
        offload.initialize(Net(), CONFIG) as engine,
        pytest.raises(OffloadError, match=message),
    ):
        engine.import_checkpoint(tmp_path / "dcp")
    assert not marker.exists()
    assert not sprung


# -- the traps have teeth --------------------------------------------------------------------------


class LoadingArchive:
    """What a reader that trusts its files would do."""

    def __init__(self, file, **_) -> None:
        self.value = torch.load(file.path, weights_only=False)


@pytest.fixture
def naive(monkeypatch) -> None:
    monkeypatch.setattr(universal_reader, "TorchArchive", LoadingArchive)
    monkeypatch.setattr(dcp_reader, "interpret", lambda data, *_, **__: pickle.loads(data))


@pytest.mark.parametrize("name", ["zero1_two_ranks", "dcp_two_ranks"])
@pytest.mark.parametrize("plant", PLANTS)
def test_with_torch_load_and_pickle_the_planted_runs(tmp_path, naive, name, plant):
    if name == "dcp_two_ranks" and plant is archive:
        pytest.skip("the metadata is no archive of torch.save")
    marker = tmp_path / "it ran"
    path = unpacked(name, tmp_path / name)
    path = path / "dcp" if name.startswith("dcp") else path / "universal"
    target = path / ".metadata" if name.startswith("dcp") else path / "zero/body.bias/exp_avg.pt"
    target.write_bytes(plant(target.read_bytes(), Planted(marker)))
    with offload.initialize(Net(), CONFIG) as engine, contextlib.suppress(Exception):
        engine.import_checkpoint(path)
    assert marker.exists()


def test_with_torch_load_and_pickle_the_traps_spring(tmp_path, naive, traps):
    with offload.initialize(Net(), CONFIG) as engine:
        for name in ("zero1_two_ranks", "dcp_two_ranks"):
            path = unpacked(name, tmp_path / name)
            with pytest.raises(AssertionError, match="was called"):
                engine.import_checkpoint(path / "dcp" if name.startswith("dcp") else path)
    assert traps == ["load", "loads"]


def test_torchs_own_reader_runs_the_planted(tmp_path):
    """Both in its metadata and among its values: what docs/saving.md says of it."""
    for name in ("metadata", "value"):
        marker = tmp_path / f"{name} ran"
        folder = tmp_path / name
        planted_values(folder, marker if name == "value" else tmp_path / "unused")
        model = Net()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights}
        if name == "metadata":
            path = folder / ".metadata"
            path.write_bytes(inside(path.read_bytes(), Planted(marker)))
        else:
            state["state"]["embed.weight"]["step"] = 0
            content["optim"] = state
        dcp.load(content, checkpoint_id=folder, no_dist=True)
        assert marker.exists(), name
