"""Makes `zero*.zip`: what DeepSpeed 0.19 writes, converted by its ds_to_universal.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node RANKS make_universal.py STAGE DTYPE FOLDER

in an environment with DeepSpeed. Three steps of AdamW; the universal checkpoint of the third; and
`expected.safetensors`, the fp32 parameters after a fourth. Ranks see the same batches. Then, once:

    python -m deepspeed.checkpoint.ds_to_universal --input_folder FOLDER/step3 \
        --output_folder FOLDER/universal --inject_missing_state
    cd FOLDER && zip -r -9 NAME.zip universal latest_universal expected.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """A tie, frozen weights, odd sizes, a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.body = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offsets", torch.arange(300, 305))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.frozen(self.embed(tokens)))))


def loss_of(model: Any, step: int) -> torch.Tensor:
    """The loss of a step's batch."""
    tokens = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(step))
    logits = model(tokens).flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, tokens.roll(1, 1).flatten())


def main(stage: str, dtype: str, folder: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bf16"},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    for step in range(4):
        if step == 3:
            engine.save_checkpoint(folder, tag="step3", client_state={"epoch": 1})
        engine.backward(loss_of(engine, step))
        engine.step()
    after = {
        name: safe_get_full_fp32_param(p).clone().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if torch.distributed.get_rank() == 0:
        save_file(after, Path(folder) / "expected.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
