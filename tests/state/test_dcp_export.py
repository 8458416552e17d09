"""What torch.distributed.checkpoint makes of an export, with its own code."""

from __future__ import annotations

import errno
import stat
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

import offload
from offload.cli.main import main
from offload.errors import CheckpointError, DiskFullError, StorageError
from offload.state import durable
from offload.state.dcp_export import export_dcp
from offload.state.stored import StoredCheckpoint
from tests.state.saving import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
TIERS = {"tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "1MiB"}}}


def load(folder, state):
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_torch_loads_the_model_with_ties_and_buffers(tmp_path, small_engine, small_loss):
    engine = small_engine()
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path / "ckpt")
    out = export_dcp(tmp_path / "ckpt", tmp_path / "out")
    fresh = small_engine(seed=1).module
    state = load(out, {"model": get_model_state_dict(fresh)})
    fresh.load_state_dict(state["model"])
    expected = engine.module.state_dict()
    assert state["model"].keys() == expected.keys()
    assert all(torch.equal(state["model"][name], expected[name]) for name in expected)
    names = sorted(path.name for path in out.iterdir())
    assert names == [".metadata", "__0_0.distcp"]
    assert stat.S_IMODE((out / ".metadata").stat().st_mode) & 0o600 == 0o600


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_torch_goes_on_from_the_optimizers_state(tmp_path, groups, moments):
    """Against an engine of plain torch in fp32 that has taken the same steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    groups_of = {"groups": [{"match": ["1.*"], "weight_decay": 0.5}]} if groups == 2 else {}
    optimizer = {"lr": 1e-2, "moments": moments, **groups_of}
    config = TIERS | {"optimizer": optimizer, "precision": {"compute": "fp32"}}
    batches = torch.randn(4, 5, 80)
    with offload.initialize(model, config) as engine:
        for batch in batches[:3]:
            engine.backward(engine(batch).square().mean())
            engine.step()
        engine.save_checkpoint(tmp_path / "ckpt")
        moment = dict(engine.named_state())["2.weight"]["exp_avg"]
        engine.backward(engine(batches[3]).square().mean())
        engine.step()
        expected = engine.state_dict()
    out = export_dcp(tmp_path / "ckpt", tmp_path / "out", dtype="fp32", optimizer=True)
    fresh = nn.Sequential(nn.Linear(80, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    named = dict(fresh.named_parameters())
    split = [[n for n in named if groups == 1 or n[0] != "1"], [n for n in named if n[0] == "1"]]
    adamw = torch.optim.AdamW([{"params": [named[n] for n in s]} for s in split[:groups]])
    weights, state = get_state_dict(fresh, adamw)
    loaded = load(out, {"model": weights, "optim": state})
    set_state_dict(fresh, adamw, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.0, 0.5][:groups]
    assert adamw.state[fresh[2].weight]["step"] == 3
    assert torch.equal(adamw.state[fresh[2].weight]["exp_avg"], moment)
    fresh(batches[3]).square().mean().backward()
    adamw.step()
    bound = 1e-6 if moments == "fp32" else 1e-2
    for name, tensor in fresh.state_dict().items():
        assert (tensor - expected[name]).norm() <= bound * expected[name].norm(), name


def test_masters_are_exact_and_halves_are_halves(tmp_path):
    model = nn.Linear(5, 4)
    with offload.initialize(model, TIERS) as engine:
        engine.backward(engine(torch.ones(2, 5, dtype=torch.bfloat16)).float().sum())
        engine.step()
        engine.save_checkpoint(tmp_path / "ckpt")
        state = dict(engine.named_state())["weight"]
    for dtype, key in (("fp32", "master"), ("compute", "weight")):
        out = export_dcp(tmp_path / "ckpt", tmp_path / dtype, dtype=dtype)
        target = {"model.weight": torch.empty_like(state[key])}
        assert torch.equal(load(out, target)["model.weight"], state[key])


def test_any_optimizers_scalars_and_tensors(tmp_path):
    model = nn.Linear(5, 4)
    make = lambda p: torch.optim.RMSprop(p, foreach=False, momentum=0.5)  # noqa: E731
    config = TIERS | {"precision": {"compute": "fp32"}}
    with offload.initialize(model, config, optimizer=make) as engine:
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 5)).sum())
            engine.step()
        engine.save_checkpoint(tmp_path / "ckpt")
        average = engine.read_state("weight", "square_avg")
    export_dcp(tmp_path / "ckpt", tmp_path / "out", optimizer=True)
    fresh = nn.Linear(5, 4)
    rmsprop = make(fresh.parameters())
    weights, state = get_state_dict(fresh, rmsprop)
    loaded = load(tmp_path / "out", {"model": weights, "optim": state})
    assert torch.equal(loaded["optim"]["state"]["weight"]["square_avg"], average)
    assert loaded["optim"]["state"]["weight"]["step"] == 2
    assert loaded["optim"]["param_groups"][0]["momentum"] == 0.5


def test_every_torch_tool_reads_it_and_files_are_cut(tmp_path, small_engine, small_loss):
    engine = small_engine()
    engine.train(small_loss)
    save_checkpoint(engine, tmp_path / "ckpt")
    out = export_dcp(tmp_path / "ckpt", tmp_path / "out", optimizer=True, max_file_bytes=2_000)
    assert len(list(out.glob("__0_*.distcp"))) > 5
    dcp_to_torch_save(out, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert found["optim"]["state"]["scale"]["step"] == 1
    assert "frozen.weight" not in found["optim"]["state"]
    assert torch.equal(found["model"]["head.weight"], engine.module.head.weight.detach())
    assert found["optim"]["param_groups"][0]["params"] == [
        "scale", "embed.weight", "norm.weight", "norm.bias",
    ]  # fmt: skip


def test_a_checkpoint_that_does_not_name_ties_and_groups(tmp_path, small_engine, monkeypatch):
    """As versions before this one wrote it: one group is still that of all that is trained."""
    engine = small_engine()
    real = offload.state.export.description
    kept = ("names", "configs")
    monkeypatch.setattr(
        offload.state.export, "description", lambda e: {k: real(e)[k] for k in kept}
    )
    save_checkpoint(engine, tmp_path / "ckpt")
    out = export_dcp(tmp_path / "ckpt", tmp_path / "out", optimizer=True)
    dcp_to_torch_save(out, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert "head.weight" not in found["model"]
    assert len(found["optim"]["param_groups"][0]["params"]) == 4


def test_nothing_is_overwritten(tmp_path, small_engine):
    save_checkpoint(small_engine(), tmp_path / "ckpt")
    out = tmp_path / "out"
    out.mkdir()
    export_dcp(tmp_path / "ckpt", out)
    with pytest.raises(CheckpointError, match="is not empty; remedy: export to a new directory"):
        export_dcp(tmp_path / "ckpt", out)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_dcp(tmp_path / "ckpt", tmp_path / "link")


def test_a_full_disk_leaves_nothing(tmp_path, small_engine, monkeypatch):
    save_checkpoint(small_engine(), tmp_path / "ckpt")
    with monkeypatch.context() as patched:
        patched.setattr(durable, "free_bytes", lambda folder: 1000)
        with pytest.raises(DiskFullError, match="export elsewhere"):
            export_dcp(tmp_path / "ckpt", tmp_path / "out")
    count = []

    def fail(descriptor, data, offset, real=durable.write_all):
        count.append(1)
        if len(count) == 9:
            raise OSError(errno.EIO, "bad disk")
        real(descriptor, data, offset)

    monkeypatch.setattr(durable, "write_all", fail)
    with pytest.raises(StorageError, match=r"write of model\.scale"):
        export_dcp(tmp_path / "ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_one_tensor_is_in_memory_at_a_time(tmp_path, small_engine, monkeypatch):
    save_checkpoint(small_engine(), tmp_path / "ckpt")
    alive = []
    real_read = StoredCheckpoint.read

    def read(self, record):
        assert all(ref() is None for ref in alive), "an earlier tensor is still alive"
        tensor = real_read(self, record)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredCheckpoint, "read", read)
    export_dcp(tmp_path / "ckpt", tmp_path / "out", optimizer=True)
    assert len(alive) > 15


def test_on_the_command_line(tmp_path, small_engine):
    save_checkpoint(small_engine(), tmp_path / "ckpt")
    command = ["export", str(tmp_path / "ckpt"), str(tmp_path / "out")]
    for options, message in (
        (["--optimizer"], "--optimizer needs --format dcp"),
        (["--format", "dcp", "--delta", str(tmp_path)], "cannot be with --format dcp"),
    ):
        result = CliRunner().invoke(main, [*command, *options])
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = CliRunner().invoke(main, [*command, "--format", "dcp", "--optimizer"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        str(tmp_path / "out" / name) for name in (".metadata", "__0_0.distcp")
    ]
