"""What joins the module after initialize is told of, once, and by name."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from tests.oracle import make_engine, settings, small_loss, small_model


def _train(engine: object) -> float:
    loss = small_loss(engine, 0)
    engine.backward(loss)  # type: ignore[attr-defined]
    engine.step()  # type: ignore[attr-defined]
    return loss.item()


def test_added_parameters_are_told_of_once(tmp_path: Path) -> None:
    model = small_model()
    with make_engine(model, settings("host")) as engine:
        first = _train(engine)
        head = nn.Linear(64, 64)
        with torch.no_grad():
            head.weight.copy_(torch.eye(64))
            head.bias.zero_()
        model.append(head)
        with pytest.warns(UserWarning, match=r"11\.weight, 11\.bias: added after offload"):
            second = _train(engine)
        assert second < first  # the rest trains on
        assert head.weight.grad is not None  # the user's own
        _train(engine)  # no second warning: warnings are errors here
        head.register_parameter("scale", nn.Parameter(torch.ones(1)))
        with pytest.warns(UserWarning, match=r"11\.scale: added"):
            _train(engine)


def test_frozen_additions_and_other_modules_are_nobodys_business(tmp_path: Path) -> None:
    model = small_model()
    with make_engine(model, settings("host")) as engine:
        nn.Linear(4, 4).register_parameter("more", nn.Parameter(torch.ones(1)))
        model.append(nn.Linear(64, 64).requires_grad_(False))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _train(engine)


def test_a_closed_engine_watches_no_registrations(tmp_path: Path) -> None:
    before = len(torch_module._global_module_registration_hooks)
    engine = make_engine(small_model(), settings("host"))
    assert len(torch_module._global_module_registration_hooks) == before + 1
    engine.close()
    assert len(torch_module._global_module_registration_hooks) == before
    places = weakref.ref(engine._places)
    del engine
    gc.collect()
    assert places() is None
