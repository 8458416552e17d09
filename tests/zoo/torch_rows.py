"""Rows of the zoo: what plain PyTorch offers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.zoo.row import KEY_BIAS, Row, seeded
from tests.zoo.torch_modules import (
    BATCH,
    TIME,
    WIDTH,
    Answers,
    Attends,
    Bags,
    Bilinears,
    Cells,
    Checkpointed,
    Complex,
    Customized,
    Embeds,
    Encodes,
    First,
    InPlace,
    Keyed,
    Listed,
    Odd,
    PartlyFrozen,
    Routed,
    Standardized,
    Through,
    Tied,
    Translates,
    Twice,
    framed,
    parametrized,
)


def _regression(model: Any, index: int) -> torch.Tensor:
    drawn = seeded(index)
    x, target = torch.randn(2, BATCH, TIME, WIDTH, generator=drawn)
    torch.manual_seed(index)
    return (model(x.to(_dtype(model))).float() - target).square().mean()


def _dtype(model: Any) -> torch.dtype:
    parameters = getattr(model, "module", model).parameters()
    return next(p.dtype for p in parameters if not p.is_complex())


def _answers(model: Any, index: int) -> torch.Tensor:
    x = torch.randn(BATCH, TIME, WIDTH, generator=seeded(index))
    out = model(x.to(_dtype(model)))
    match getattr(model, "module", model).kind:
        case "tuple":
            value, hidden, nothing = out
            assert nothing is None
        case "dict":
            value, hidden = out["value"], list(out["hidden"].values())
        case "dataclass":
            value, hidden = out.value, out.hidden
        case _:
            assert out is None
            return getattr(model, "module", model).loss.float()
    return (value - 0.3).square().mean().float() + sum(h.square().mean().float() for h in hidden)


_EIGHT = (BATCH, 8, 4, 8)
_CUBE = (BATCH, 4, 4, 4, 4)
_NESTED = r".*nested tensors is in prototype.*"
_SGD = partial(torch.optim.SGD, lr=0.125, foreach=False)

TORCH_ROWS = (
    Row(
        "LSTM",
        "recurrent",
        framed(lambda: First(nn.LSTM(WIDTH, WIDTH // 2, 2, bidirectional=True, batch_first=True))),
        _regression,
        "two layers, both directions: one kernel takes all sixteen weights",
        pages=12,
    ),
    Row(
        "LSTM, projected",
        "recurrent",
        framed(lambda: First(nn.LSTM(WIDTH, 48, proj_size=WIDTH, batch_first=True))),
        _regression,
        "one kernel takes all weights",
        pages=4,
        warnings=(r"LSTM with projections is not supported with oneDNN.*",),
    ),
    Row(
        "GRU",
        "recurrent",
        framed(lambda: First(nn.GRU(WIDTH, WIDTH, 2, dropout=0.1, batch_first=True))),
        _regression,
        "one kernel takes all weights of both layers",
        pages=5,
    ),
    Row(
        "RNN",
        "recurrent",
        framed(lambda: First(nn.RNN(WIDTH, WIDTH, 2, batch_first=True))),
        _regression,
        "one kernel takes all weights of both layers",
        pages=6,
    ),
    Row(
        "LSTMCell, GRUCell",
        "recurrent",
        framed(Cells),
        _regression,
        "one kernel takes the four weights of a cell",
        pages=3,
    ),
    Row(
        "MultiheadAttention",
        "attention",
        framed(Attends),
        _regression,
        "evaluation runs as one kernel over the weights of a layer",
        pages=4,
    ),
    Row(
        "TransformerEncoder",
        "attention",
        framed(partial(Encodes, nested=False)),
        _regression,
        "padding mask; evaluation runs as one kernel over the weights of a layer",
        pages=4,
        same_kernels=False,
        per_step=KEY_BIAS,
    ),
    Row(
        "TransformerEncoder, nested",
        "attention",
        framed(Encodes),
        _regression,
        "padding mask; evaluation runs on nested tensors, one kernel a layer",
        pages=4,
        same_kernels=False,
        per_step=KEY_BIAS,
        warnings=(_NESTED,),
    ),
    Row(
        "Transformer",
        "attention",
        framed(Translates),
        _regression,
        "causal decoder; evaluation runs as one kernel over the weights of an encoder layer",
        pages=4,
        same_kernels=False,
        per_step=KEY_BIAS,
    ),
    Row(
        "Conv1d",
        "convolution",
        framed(lambda: Through((BATCH, 8, 32), nn.Conv1d(8, 16, 3), nn.Conv1d(16, 8, 3, 1, 2))),
        _regression,
    ),
    Row(
        "Conv2d",
        "convolution",
        framed(
            lambda: Through(
                _EIGHT, nn.Conv2d(8, 16, 3, padding="same"), nn.Conv2d(16, 8, 3, 1, 1, groups=4)
            )
        ),
        _regression,
        "one of them grouped",
    ),
    Row(
        "Conv3d",
        "convolution",
        framed(lambda: Through(_CUBE, nn.Conv3d(4, 8, 3, 1, 1), nn.Conv3d(8, 4, 3, 1, 1))),
        _regression,
    ),
    Row(
        "ConvTranspose1d",
        "convolution",
        framed(
            lambda: Through((BATCH, 8, 32), nn.Conv1d(8, 16, 2, 2), nn.ConvTranspose1d(16, 8, 2, 2))
        ),
        _regression,
    ),
    Row(
        "ConvTranspose2d",
        "convolution",
        framed(lambda: Through(_EIGHT, nn.Conv2d(8, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2))),
        _regression,
    ),
    Row(
        "ConvTranspose3d",
        "convolution",
        framed(lambda: Through(_CUBE, nn.Conv3d(4, 8, 2, 2), nn.ConvTranspose3d(8, 4, 2, 2))),
        _regression,
    ),
    Row(
        "BatchNorm",
        "normalization",
        framed(
            lambda: nn.Sequential(
                Through((BATCH, 8, 32), nn.BatchNorm1d(8)),
                Through(
                    _EIGHT, nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8, momentum=None)
                ),
                Through(_CUBE, nn.BatchNorm3d(4, affine=False)),
            )
        ),
        _regression,
        "running statistics and their counter are compared as well",
    ),
    Row(
        "GroupNorm",
        "normalization",
        framed(
            lambda: nn.Sequential(
                Through(_EIGHT, nn.GroupNorm(2, 8)),
                nn.Linear(WIDTH, WIDTH),
                Through(_EIGHT, nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
            )
        ),
        _regression,
        "with InstanceNorm",
    ),
    Row(
        "LayerNorm, RMSNorm",
        "normalization",
        framed(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.PReLU(8, 0.1), nn.RMSNorm(WIDTH))),
        _regression,
    ),
    Row("EmbeddingBag", "embedding", framed(Bags), _regression, "sum with weights, mean, maximum"),
    Row(
        "Embedding, sparse",
        "embedding",
        framed(partial(Embeds, sparse=True)),
        _regression,
        "sparse gradients; SGD, because torch's AdamW refuses them",
        optimizer={"name": "sgd", "lr": 0.125},
        plain_optimizer=_SGD,
    ),
    Row(
        "Embedding, max_norm",
        "embedding",
        framed(partial(Embeds, max_norm=3.0, padding_idx=0)),
        _regression,
        "forward edits the table in place",
    ),
    Row("Embedding, tied", "embedding", framed(Tied), _regression, "the head's weight as well"),
    Row(
        "weight_norm",
        "parametrization",
        framed(lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
        _regression,
    ),
    Row(
        "weight_norm, by hooks",
        "parametrization",
        framed(lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))),
        _regression,
        "the old one, which torch has deprecated",
        warnings=(r".*weight_norm.*deprecated.*",),
    ),
    Row(
        "spectral_norm",
        "parametrization",
        framed(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        _regression,
        "buffers of the power iteration are compared as well",
    ),
    Row(
        "spectral_norm, by hooks",
        "parametrization",
        framed(lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        _regression,
        "the old one",
    ),
    Row(
        "orthogonal",
        "parametrization",
        framed(
            lambda: nn.Sequential(
                *(
                    parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map=kind)
                    for kind in ("matrix_exp", "householder")
                )
            )
        ),
        _regression,
        "matrix_exp and householder_product have no bf16 form",
        has_bf16=False,
    ),
    Row("a parametrization of one's own", "parametrization", framed(parametrized), _regression),
    Row(
        "autograd.Function",
        "autograd",
        framed(Customized),
        _regression,
        "two, that save their weight",
    ),
    Row(
        "checkpoint, reentrant",
        "autograd",
        framed(partial(Checkpointed, reentrant=True)),
        _regression,
        "with dropout",
    ),
    Row(
        "checkpoint, not reentrant",
        "autograd",
        framed(partial(Checkpointed, reentrant=False)),
        _regression,
        "with dropout",
    ),
    Row("in-place ops on activations", "autograd", framed(InPlace), _regression),
    Row(
        "parts that change with the step",
        "autograd",
        framed(Routed),
        _regression,
        "every step uses other experts; those without a gradient stand still",
    ),
    *(
        Row(f"output: {kind}", "outputs", partial(Answers, kind), _answers, notes)
        for kind, notes in (
            ("tuple", ""),
            ("dict", ""),
            ("dataclass", ""),
            ("None", "the loss is an attribute of the module"),
        )
    ),
    Row("ParameterList", "parameters", framed(Listed), _regression),
    Row("ParameterDict", "parameters", framed(Keyed), _regression, "with a scalar in it"),
    Row("Bilinear", "parameters", framed(Bilinears), _regression),
    Row(
        "complex parameters",
        "parameters",
        framed(Complex),
        _regression,
        "complex64 has no bf16 form",
        has_bf16=False,
    ),
    Row("odd parameters", "parameters", framed(Odd), _regression, "scalar, empty, unused, strided"),
    Row("a layer run twice", "parameters", framed(Twice), _regression, "and a borrowed weight"),
    Row("a frozen layer", "parameters", framed(PartlyFrozen), _regression),
    Row(
        "buffers only",
        "parameters",
        framed(Standardized),
        _regression,
        "a submodule without parameters; its buffers are compared as well",
    ),
)
