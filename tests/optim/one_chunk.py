"""Parameters each of which fills a bucket of one chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from offload.partition.layout import Bucket, ParamSpec, pack
from offload.partition.parameters import ParameterState


def one_chunk_buckets(count: int, numel: int) -> tuple[Sequence[Bucket], list[ParameterState]]:
    """The buckets of `count` fp32 parameters of `numel` elements, and those: with gradients."""
    specs = [ParamSpec(f"p{i}", (numel,), numel, "fp32", 4, True) for i in range(count)]
    parameters = [
        ParameterState(
            index=i,
            names=(f"p{i}",),
            parameter=nn.Parameter(torch.zeros(numel)),
            shape=torch.Size([numel]),
            stride=(1,),
            numel=numel,
            bucket=i,
            offset=0,
            gradient_sums=np.ones(1),
        )
        for i in range(count)
    ]
    return pack(specs, bucket_elements=numel), parameters
