"""Every module of the zoo, built without memory and loaded from files: the same values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offload
from offload.state import recording
from offload.state.recording import materialized, version_of
from tests.zoo.row import Row
from tests.zoo.rows import ROWS

FP32 = {"precision": {"compute": "fp32"}}


@pytest.fixture(autouse=True)
def all_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "THRESHOLD_ELEMENTS", 1)


@pytest.fixture(autouse=True)
def allowed_warnings(row: Row) -> Iterator[None]:
    """What the module's own library says is its own affair."""
    with warnings.catch_warnings():
        for message in row.warnings:
            warnings.filterwarnings("ignore", message)
        yield


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, themselves."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_deferred_build_is_bit_equal(row: Row) -> None:
    torch.manual_seed(3)
    plain = row.build()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with offload.deferred_init():
        deferred = row.build()
    assert torch.equal(after, torch.get_rng_state())
    found = state_of(deferred)
    assert any(version_of(parameter) is not None for parameter in deferred.parameters())
    for name, value in state_of(plain).items():
        real = found[name]
        if version_of(real) is not None:
            (real,) = materialized([real])
        assert real.stride() == value.stride()
        assert torch.equal(real, value), name
    buffers = dict(deferred.named_buffers())
    for name, value in plain.named_buffers():
        assert torch.equal(buffers[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_folder_loads_as_with_transformers(row: Row, tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    model = row.build()
    if not isinstance(model, transformers.PreTrainedModel):
        pytest.skip("not a model of transformers")
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    with offload.from_pretrained(tmp_path, FP32, model_class=type(model)) as engine:
        with engine.gathered():
            found = state_of(engine.module)
            for name, value in state_of(expected).items():
                assert torch.equal(value, found[name]), name
        buffers = dict(engine.module.named_buffers())
        for name, value in expected.named_buffers():
            assert torch.equal(buffers[name], value), name
