"""Rows: modules whose kernels take many weights at once, and modules that compute their weights."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.faults.lab import Run, row
from tests.faults.modules import WIDTH, Block, inputs, loss_of, tokens, weight


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.recurrent = kind(WIDTH, WIDTH // 2, 2, batch_first=True)
        self.cell = nn.LSTMCell(WIDTH // 2, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.more = Block()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embed(ids))
        state = None
        for time in range(2):
            state = self.cell(hidden[:, time], state)
        assert state is not None
        return self.head(self.more(state[0]))


def _tokens(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(tokens(step)), step))


@row("forward", "pack", make=lambda: Recurrent(nn.LSTM), pages=12)
def lstm(run: Run) -> None:
    _tokens(run)


@row("forward", "pack", make=lambda: Recurrent(nn.GRU), pages=12)
def gru(run: Run) -> None:
    _tokens(run)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.more = nn.ModuleList(Block() for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids))
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        for block in self.more:
            hidden = block(hidden)
        return hidden


@row("dispatch", "pack", "fused", make=Attends, pages=14)
def multihead_attention(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(tokens(step)), step))
        run.module.eval()
        with torch.no_grad():
            run.record("fast path", run(tokens(step + 9)))
        with torch.inference_mode():
            run.record("fast path, inference", run(tokens(step + 10)))
        run.module.train()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.more = nn.ModuleList(Block() for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=self.padding())
        for block in self.more:
            hidden = block(hidden)
        return hidden

    @staticmethod
    def padding() -> torch.Tensor:
        return torch.arange(8)[None] >= torch.tensor([8, 3, 5, 1])[:, None]


@row("dispatch", "pack", "fused", "ahead", make=Padded, pages=7)
def nested_encoder(run: Run) -> None:
    """Whether a padded batch becomes a nested tensor hangs on the class of the first weights."""
    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")
    encoder = run.module.get_submodule("encoder")
    for step in range(3):
        run.train(loss_of(run(tokens(step)), step))
        run.module.eval()
        with torch.no_grad():
            run.record("nested", run(tokens(step + 9)))
            hidden = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(step))
            run.record("by itself", encoder(hidden, src_key_padding_mask=Padded.padding()))
            with pytest.raises(TypeError):
                encoder(hidden, src_key_padding_mask=Padded.padding(), unknown=1)
        with torch.inference_mode():
            run.record("nested, inference", run(tokens(step + 10)))
        run.record("with gradients", run(tokens(step + 11)))
        run.module.train()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.old = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.more = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.more:
            x = block(self.old(self.new(x)))
        return x


@row("forward", "pack", make=Normed, pages=3)
def weight_norm(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.more = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.more:
            x = block(self.old(self.new(x)))
        return x


@row("forward", "pack", make=Spectral)
def spectral_norm(run: Run) -> None:
    for step in range(4):
        run.train(loss_of(run(inputs(step))))


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.layer, "weight", Symmetric())
        self.turned = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False))
        self.more = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.more:
            with parametrize.cached():
                x = self.turned(block(self.layer(self.layer(x))))
        return x


@row("forward", "pack", make=Parametrized)
def parametrized_weights(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(inputs(step))))


class Normalized(nn.Module):
    """Running statistics, frozen weights, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.group = nn.GroupNorm(4, WIDTH)
        self.more = nn.ModuleList(Block() for _ in range(4))
        self.more[1].requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, WIDTH))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH // 2).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.more:
            x = block(x)
        x = self.group(self.norm(x)) * self.temperature
        return x + F.pad(x @ self.turned.t(), (0, 16)) if len(self.empty) == 0 else x


@row("forward", "pack", make=Normalized, pages=3)
def frozen_scalar_and_empty_parameters(run: Run) -> None:
    for step in range(3):
        run.train(loss_of(run(inputs(step))))
        run.record("buffers", dict(run.module.named_buffers()))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.shared = weight(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) @ self.shared
        return x.float()


def _cached_casts() -> int:
    """Whether autocast would keep a cast of a leaf at this moment."""
    return int(torch.is_autocast_cache_enabled())


@row("dispatch", "autocast_cache", make=Autocast)
def autocast(run: Run) -> None:
    seen = []
    run.module.blocks[2].register_forward_hook(lambda *_: seen.append(_cached_casts()))
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(run(inputs(step)))
        # Without the cache each use of a weight is cast and summed by itself.
        if run.engine is None:
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                loss = loss_of(run(inputs(step)))
        run.train(loss)
    if run.engine is not None:
        assert not any(seen), "autocast keeps casts of weights"
    assert torch.is_autocast_cache_enabled(), "the user's setting is lost"
