"""What is there before a block of the documentation runs: tiny models, batches, files.

The working directory is a folder of the test's own.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import offload
from offload.state.session import OffloadEngine
from tests.oracle import small_llama

Names = dict[str, Any]

SETTINGS = """
[tiers.device]
kind = "cpu"
memory = "4MiB"
[tiers.host]
memory = "32MiB"
[tiers.nvme]
paths = ["nvme"]
[precision]
compute = "fp32"
"""


@contextlib.contextmanager
def closing_engines() -> Iterator[None]:
    """Close every engine that the block has made."""
    made: list[OffloadEngine] = []
    original = OffloadEngine.__init__

    def remember(self: OffloadEngine, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(self)

    OffloadEngine.__init__ = remember  # type: ignore[method-assign]
    try:
        yield
    finally:
        OffloadEngine.__init__ = original  # type: ignore[method-assign]
        for each in made:
            each.close()


def write_config(more: str = "", *names: str) -> None:
    Path("nvme").mkdir(exist_ok=True)
    for name in names or ("config.toml",):
        Path(name).write_text(SETTINGS + more)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    drawn = [torch.randint(0, 64, (2, 8)) for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def names(**more: Any) -> Names:
    return {"torch": torch, "nn": nn, "offload": offload, "peft": peft, "dcp": dcp} | more


def nothing() -> Names:
    return {}


def language_model() -> Names:
    write_config()
    return names(model=small_llama(), batches=batches())


def base_model() -> Names:
    write_config()
    return names(base=small_llama(), batches=batches())


def engine(more: str = "") -> Names:
    write_config(more)
    made = offload.initialize(small_llama(), "config.toml")
    for batch in batches(1):
        made.backward(made(**batch).loss)
        made.step()
    return names(engine=made)


def engine_and_batch() -> Names:
    return engine() | {"batch": batches(1)[0]}


def accumulating() -> Names:
    found = engine("[training]\ngradient_accumulation_steps = 1\n")
    write_config("[training]\ngradient_accumulation_steps = 8\n")
    made = offload.initialize(small_llama(), "config.toml")
    return found | {"engine": made, "micro_batches": batches(8)}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.head(hidden)


def accumulating_logits() -> Names:
    write_config("[training]\ngradient_accumulation_steps = 8\n")
    tokens = [torch.randint(0, 16, (2, 4)) for _ in range(8)]
    micro_batches = [types.SimpleNamespace(tokens=each, targets=each) for each in tokens]
    made = offload.initialize(Decoder(), "config.toml")
    return names(engine=made, micro_batches=micro_batches)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Decoder(), Decoder()
        self.encoder.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(tokens) + self.decoder(tokens)


def encoder_and_decoder() -> Names:
    write_config()
    model = EncoderDecoder()
    return names(model=model, engine=offload.initialize(model, "config.toml"))


def frozen_layer() -> Names:
    write_config()
    model = Decoder()
    model.layers[0].requires_grad_(False)
    made = offload.initialize(model, "config.toml")
    return names(engine=made, layer=model.layers[0].requires_grad_(True))


def adapters() -> Names:
    write_config()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(small_llama(), config)
    return names(engine=offload.initialize(model, "config.toml"))


FORWARD_ONLY = '[optimizer]\nname = "mezo"\nlr = 1e-4\n'


def forward_only_model() -> Names:
    write_config(FORWARD_ONLY)
    return names(model=small_llama(), batches=batches())


class OneWorker:
    """torch.distributed with one process that needs no group."""

    @staticmethod
    def all_reduce(_: torch.Tensor) -> None:
        pass

    @staticmethod
    def get_world_size() -> int:
        return 1


def forward_only_worker() -> Names:
    write_config(FORWARD_ONLY)
    fake = types.SimpleNamespace(tensor=torch.tensor, float64=torch.float64, distributed=OneWorker)
    made = offload.initialize(small_llama(), "config.toml")
    return names(engine=made, batch=batches(1)[0]) | {"torch": fake}


def model_folder() -> Names:
    write_config("", "offload.toml")
    small_llama().save_pretrained("path/to/model")
    return names()


class MyModel(nn.Module):
    def __init__(self, config: Any = None, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def model_class() -> Names:
    write_config("", "offload.toml")
    return names(MyModel=MyModel, config=None)


class WideLlama(transformers.LlamaForCausalLM):
    """Takes a width as `MyModel` of the page does."""

    def __init__(self, config: Any = None, width: int = 0) -> None:
        super().__init__(config if config is not None else small_llama().config)


def model_classes() -> Names:
    write_config()
    small_llama().save_pretrained("folder")
    return names(
        folder="folder",
        config="config.toml",
        LlamaForCausalLM=transformers.LlamaForCausalLM,
        MyModel=WideLlama,
    )


def model_path() -> Names:
    write_config()
    small_llama().to(torch.bfloat16).save_pretrained("base")
    return names(path="base", AutoModelForCausalLM=transformers.AutoModelForCausalLM)


def torch_checkpoint() -> Names:
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(0, 16, (2, 4))).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id="OUT", no_dist=True)
    return names(model=model, optimizer=optimizer)


def foreign_checkpoint() -> Names:
    found = engine()
    small_llama(seed=1).save_pretrained("path")
    return found


class WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def named_weights() -> Names:
    write_config()
    model = WithEmbedding()
    made = offload.initialize(model, "config.toml")
    return names(engine=made, model=model, new_values=torch.zeros(4, 8))
