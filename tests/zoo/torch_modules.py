"""Small modules around what plain PyTorch offers: layers, parameters, autograd, outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

WIDTH = 32
BATCH, TIME = 4, 8


class Framed(nn.Module):
    """A core between linear layers, so that the module has many buckets: (4, 8, 32) -> the same."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.core = core
        self.after = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.after(self.core(torch.tanh(self.before(x)))))


def framed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A `build` of the core that `make` makes."""
    return lambda: Framed(make())


class Through(nn.Module):
    """Layers that see the activations in another shape."""

    def __init__(self, shape: tuple[int, ...], *layers: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layers(x.reshape(self.shape))).reshape(x.shape)


class First(nn.Module):
    """A recurrent layer, of whose outputs the first goes on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)[0]


class Cells(nn.Module):
    """LSTM and GRU cells, called once for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.gru = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, hidden, outputs = None, None, []
        for time in range(3):
            state = self.lstm(x[:, time], state)
            hidden = self.gru(state[0], hidden)
            outputs.append(hidden)
        return torch.cat([torch.stack(outputs, 1), x[:, 3:]], 1)


class Attends(nn.Module):
    """Self-attention with weights asked for and not, and attention over another width."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, kdim=16, vdim=16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        x, weights = self.cross(x, x[..., :16], x[..., 16:])
        return x + weights.mean()


def padding() -> torch.Tensor:
    """True where a sequence has ended; (4, 8). Aligned to the left, as the nested path wants it."""
    lengths = torch.tensor([8, 3, 5, 1])
    return torch.arange(TIME)[None] >= lengths[:, None]


class Encodes(nn.Module):
    """nn.TransformerEncoder with a padding mask: in evaluation its nested-tensor fast path."""

    def __init__(self, *, nested: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, WIDTH, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(
            layer, 3, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=nested
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.encoder(x, src_key_padding_mask=padding())


class Translates(nn.Module):
    """nn.Transformer, with a causal mask on its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            WIDTH, 4, 2, 2, dim_feedforward=WIDTH, dropout=0.1, batch_first=True
        )

    def forward(self, x: torch.Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(TIME - 1)
        out = self.transformer(x, x[:, 1:], tgt_mask=mask, tgt_is_causal=True)
        return torch.cat([out, x[:, :1]], 1)


class Bags(nn.Module):
    """EmbeddingBag over token indices with offsets and weights, and over a table."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(64, WIDTH, mode="sum")
        self.mean = nn.EmbeddingBag(64, WIDTH, mode="mean", padding_idx=0)
        self.largest = nn.EmbeddingBag(64, WIDTH, mode="max")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = tokens_of(x)
        offsets = torch.arange(0, ids.numel(), TIME)
        weighted = self.bag(ids.flatten(), offsets, per_sample_weights=x.mean(-1).flatten())
        return x + (weighted + self.mean(ids) + self.largest(ids))[:, None]


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """Token numbers below 64 of activations, the same whatever the last bits are; (4, 8)."""
    return torch.arange(x[..., 0].numel()).mul(7).remainder(64).view(x.shape[:-1])


class Embeds(nn.Module):
    """An embedding added to the activations; twice, so that gradients of its table add up."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = tokens_of(x)
        return x + self.table(ids) + self.table(ids.flip(0))


class Tied(nn.Module):
    """An embedding whose table is the weight of the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(x + self.table(tokens_of(x) % WIDTH))


class Twice(nn.Module):
    """One layer that runs twice, and a weight that is used outside its module as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lender = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return F.linear(self.lender(x), self.lender.weight.t(), self.lender.bias)


class Listed(nn.Module):
    """Weights in a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 6 for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


class Keyed(nn.Module):
    """Weights in a ParameterDict: of two and one dimensions, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                "in": nn.Parameter(torch.randn(WIDTH, WIDTH) / 6),
                "out": nn.Parameter(torch.randn(WIDTH, WIDTH) / 6),
                "shift": nn.Parameter(torch.randn(WIDTH) / 6),
                "scale": nn.Parameter(torch.tensor(1.5)),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(x @ self.weights["in"] + self.weights["shift"])
        return inner @ self.weights["out"] * self.weights["scale"]


class Odd(nn.Module):
    """A scalar, an empty, an unused and a transposed parameter, and one over channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, WIDTH))
        self.unused = nn.Parameter(torch.randn(WIDTH))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH).div(6).t())
        self.conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([(x @ self.turned).flatten(0, 1), self.empty]).view(x.shape) * self.scale
        return torch.as_tensor(self.conv(x.view(BATCH, 8, 4, 8)).reshape(x.shape))


class Bilinears(nn.Module):
    """nn.Bilinear of the activations with themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(8, 8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.as_tensor(self.form(x[..., :8].contiguous(), x[..., 8:16].contiguous()))


class Complex(nn.Module):
    """A complex filter over frequencies, and a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH)
        turned = x.to(torch.complex64) @ self.matrix
        return turned.real + turned.imag.tanh()


class Standardized(nn.Module):
    """A submodule that has buffers only: a running mean and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.linspace(-1, 1, WIDTH), persistent=False)
        self.mean: torch.Tensor
        self.seen: torch.Tensor
        self.table: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 1)), 0.125)
                self.seen += 1
        return x - self.mean + self.table.to(x.dtype)


class Scaled(torch.autograd.Function):
    """x * weight with a backward of its own, which saves both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class Steep(torch.autograd.Function):
    """x @ weight.t(), keeping the weight as an attribute of the context."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient @ ctx.weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class Customized(nn.Module):
    """Weights that go through autograd functions of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(torch.as_tensor(Scaled.apply(x, self.first)))
        return torch.as_tensor(Steep.apply(x, self.second))


class Checkpointed(nn.Module):
    """Blocks that are recomputed in backward, with dropout in them."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.as_tensor(checkpoint(block, x, use_reentrant=self.reentrant))
        return x


class InPlace(nn.Module):
    """In-place ops on activations: activation functions, masked and indexed writes, addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu_()
        x = self.second(x).add_(self.scale).mul_(0.5)
        x[:, 0] = self.scale
        x[:, 1:3].sub_(1.0)
        return x.masked_fill_(x > 1.5, 1.5)


class Orthant(nn.Module):
    """A parametrization of the user's own, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight) * self.gain

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.atanh(weight.clamp(-0.9, 0.9))


def parametrized() -> nn.Module:
    """A linear layer with two parametrizations in a row."""
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Orthant())
    parametrize.register_parametrization(layer, "weight", Orthant())
    return layer


@dataclass
class Answer:
    """What `Answers("dataclass")` returns."""

    value: torch.Tensor
    hidden: list[torch.Tensor]
    note: str = "unused"


class Answers(nn.Module):
    """Three layers whose results leave as a tuple, a dict, a dataclass, or not at all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        hidden = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            hidden.append(x)
        match self.kind:
            case "tuple":
                return x, tuple(hidden), None
            case "dict":
                return {"value": x, "hidden": {str(i): h for i, h in enumerate(hidden)}}
            case "dataclass":
                return Answer(x, hidden)
        self.loss = sum((h.square().mean() for h in hidden), (x - 0.3).square().mean())
        return None


class PartlyFrozen(nn.Module):
    """A frozen layer between trained ones, as under adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.last(self.frozen(torch.tanh(self.first(x)))))


class Routed(nn.Module):
    """Experts chosen by the data and the step: another part of the model each time."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        chosen = [self.experts[(self.calls * step) % 6] for step in (1, 2)]
        for expert in chosen:
            x = x + torch.tanh(expert(x))
        return x
