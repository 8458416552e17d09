"""nn.TransformerEncoder in evaluation: every way to its fused kernels, with its weights away.

torch chooses between the layer's kernel, attention's kernel, nested tensors and plain ops by the
class of the weights, by hooks, gradients and autocast. Whatever it chooses, the result is plain
PyTorch's within rounding and the same bits in all placements, or plain PyTorch's error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracle import make_engine, relative_difference, settings, two_buckets_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*:UserWarning")

WIDTH, TIME = 32, 9
BUCKET_ELEMENTS = 1024
PADDING = torch.arange(TIME)[None] >= torch.tensor([TIME, 3, 5, 1])[:, None]
TOLERANCE = 1e-6
_HEADS = (WIDTH, 4)


class Encoder(nn.Module):
    """An encoder behind a linear layer, run as `use` says."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, batch_first=True)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, x: torch.Tensor, use: str) -> Any:
        return USES[use](self.encoder, self.before(x))


def _nested(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    nested = torch._nested_tensor_from_mask(x, PADDING.logical_not(), mask_check=False)
    return encoder.layers[1](nested).to_padded_tensor(0.0, x.size())


def _layer_by_layer(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in encoder.layers:
        x = layer(x, src_key_padding_mask=PADDING)
    return x


def _attention_weights(layer: Any) -> tuple[torch.Tensor, ...]:
    own = layer.self_attn
    return own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias


def _layer_kernel(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    layer = encoder.layers[1]
    norms = layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias
    linears = layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias
    return torch._transformer_encoder_layer_fwd(
        x, *_HEADS, *_attention_weights(layer), False, False, layer.norm1.eps, *norms, *linears
    )


def _attention_kernel(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    weights = _attention_weights(encoder.layers[1])
    return torch._native_multi_head_attention(x, x, x, *_HEADS, *weights)[0]


def _function(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias, out_weight, out_bias = _attention_weights(encoder.layers[1])
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        *(x, x, x, *_HEADS, weight, bias, None, None, False, 0.0, out_weight, out_bias),
        training=False,
    )[0]


USES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "padded": lambda encoder, x: encoder(x, src_key_padding_mask=PADDING),
    "not padded": lambda encoder, x: encoder(x),
    "causal": lambda encoder, x: encoder(
        x, nn.Transformer.generate_square_subsequent_mask(TIME), is_causal=True
    ),
    "nested": _nested,
    "layer by layer": _layer_by_layer,
    "layer kernel": _layer_kernel,
    "attention kernel": _attention_kernel,
    "function": _function,
}
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": contextlib.nullcontext,
}
FROZEN = {"none": (), "encoder": ("encoder",), "all": ("",), "first": ("layers.0", "before")}
CASES = [(mode, "none") for mode in MODES] + [("gradients", frozen) for frozen in list(FROZEN)[1:]]


def _make(frozen: str) -> nn.Module:
    torch.manual_seed(0)
    module = Encoder().eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN[frozen]))
    return module


def _evaluate(model: Any, use: str, mode: str) -> Any:
    """The result, or the error that torch gives, as its type."""
    x = torch.randn(4, TIME, WIDTH, generator=torch.Generator().manual_seed(3))
    try:
        with MODES[mode]():
            return model(x, use).detach()
    except AssertionError as error:  # nested tensors that no kernel takes
        return type(error)


@functools.cache
def _plain(use: str, mode: str, frozen: str) -> Any:
    return _evaluate(_make(frozen), use, mode)


def _config(placement: str, frozen: str, folder: Path) -> dict[str, Any]:
    if placement == "device":
        return settings("device", bucket_elements=BUCKET_ELEMENTS)
    layer = two_buckets_bytes(
        _make(frozen).requires_grad_(True),
        itemsize=4,
        bucket_elements=BUCKET_ELEMENTS,
        buckets=5,
    )
    return settings(placement, folder, device=layer, bucket_elements=BUCKET_ELEMENTS)


@pytest.mark.parametrize(("mode", "frozen"), CASES, ids=lambda value: value)
def test_evaluation_is_plain_pytorchs_in_all_placements(
    mode: str, frozen: str, tmp_path: Path
) -> None:
    results: dict[str, list[Any]] = {}
    for placement in ("device", "host", "nvme"):
        config = _config(placement, frozen, tmp_path)
        with make_engine(_make(frozen), config) as engine:
            for _ in range(2):  # under guard, and then with what has proven to be safe
                results[placement] = [_evaluate(engine, use, mode) for use in USES]
    for use, *found in zip(USES, *results.values(), strict=True):
        expected = _plain(use, mode, frozen)
        for one in found:
            if isinstance(expected, type):
                assert one is expected, use
                continue
            assert torch.equal(one, found[0]), use
            assert relative_difference(one, expected) <= TOLERANCE, use
