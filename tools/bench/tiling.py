"""What tiled weights and a chunked loss save in memory, and what they cost in time.

    python tools/bench/tiling.py [--part tiles|chunks] [--rounds 7] [--tokens 1024]

Tiles: a table and a head by each tile factor, under the smallest device budget of that factor; the
peak is what the engine has held of it. Chunks: the loss of a Llama by chunks of tokens; the
largest tensor is of any op in forward and backward, peak memory what forward and backward add to
the resident memory of the process. In each part the sides take steps in turn, in one process;
`time` is the median ratio to the side that does without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _process import MIB, make_parser
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import offload

FACTORS = (1, 2, 4, 8, 16)
_WARM_UP = 2


class Vocabulary(nn.Module):
    """Tokens to their loss, through a table and a head with little between them."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each token from the one before."""
        logits = self.head(self.mix(self.embed(input_ids)))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


class Llama(nn.Module):
    """A small Llama, to its loss."""

    def __init__(self, vocabulary: int, width: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=max(width // 64, 1),
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each token from the one before."""
        loss: torch.Tensor = self.model(input_ids=input_ids, labels=input_ids).loss
        return loss


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor with memory that any op has made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and look at what it has made."""
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and not made.is_meta:
                self.nbytes = max(self.nbytes, made.numel() * made.element_size())
        return result


def passes(engine: Any, ids: torch.Tensor) -> None:
    """Forward and backward."""
    engine.backward(engine(input_ids=ids))


def time_ratios(engines: Mapping[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Time of a whole step of each engine over that of the first, median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + _WARM_UP):
        for name, engine in engines.items():
            started = time.perf_counter()
            passes(engine, ids)
            engine.step()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))[_WARM_UP:]
    return {
        name: statistics.median(b / a for a, b in zip(first, values[_WARM_UP:], strict=True))
        for name, values in seconds.items()
    }


def peak_bytes_added(engine: Any, ids: torch.Tensor) -> int:
    """What forward and backward add to the resident memory of the process, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the present
    before = resident_bytes("VmRSS")
    passes(engine, ids)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A number of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def config_of(home: str, folder: str, device: int, sections: Mapping[str, Any]) -> dict[str, Any]:
    """All state at `home`, in fp32."""
    return {
        "tiers": {
            "device": {"kind": "cpu", "memory": device},
            "host": {"memory": "6GiB"},
            **({"nvme": {"paths": [folder]}} if home == "nvme" else {}),
        },
        "placement": dict.fromkeys(("weights", "gradients", "optimizer"), home),
        "precision": {"compute": "fp32"},
        **sections,
    }


def open_engine(model: nn.Module, home: str, folder: str, **sections: Any) -> Any:
    """An engine under the smallest device budget that its plan allows."""
    roomy = offload.plan(model, config_of(home, folder, 8 << 30, sections))
    device = roomy.need_bytes["device"]
    return offload.initialize(model, config_of(home, folder, device, sections))


def measure_tiles(options: argparse.Namespace, ids: torch.Tensor) -> list[dict[str, float]]:
    """Peak device bytes and time of each tile factor."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        engines = {}
        for factor in FACTORS:
            torch.manual_seed(0)
            model = Vocabulary(options.vocabulary, options.width)
            tiling = {"modules": ["embed", "head"], "tiles": factor} if factor > 1 else {}
            engine = open_engine(model, options.home, folder, tiling=tiling)
            engines[str(factor)] = stack.enter_context(engine)
        ratios = time_ratios(engines, ids, options.rounds)
        reports = {name: engine.report().tiers["device"] for name, engine in engines.items()}
    print(f"{'tiles':>8}{'budget MiB':>12}{'of untiled':>12}{'peak MiB':>10}{'time':>8}")
    rows = []
    for name, report in reports.items():
        budget, peak = report.budget_bytes, report.peak_bytes
        share = budget / reports["1"].budget_bytes
        print(
            f"{name:>8}{budget / MIB:>12.1f}{share:>12.3f}{peak / MIB:>10.1f}{ratios[name]:>8.3f}"
        )
        row = {"tiles": int(name), "budget": budget, "share": share, "peak": peak}
        rows.append({**row, "time": ratios[name]})
    return rows


def measure_chunks(options: argparse.Namespace, ids: torch.Tensor) -> list[dict[str, float]]:
    """Largest tensor, peak memory and time of each size of chunks; 0 is the whole loss."""
    sizes: Sequence[int] = (0, *(options.tokens // share for share in (4, 16, 64)))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        engines = {}
        for size in sizes:
            torch.manual_seed(0)
            model = Llama(options.vocabulary, options.width // 2)
            training = {"loss_chunk_tokens": size, **({"lm_head": "model.lm_head"} if size else {})}
            engine = open_engine(model, options.home, folder, training=training)
            engines[str(size)] = stack.enter_context(engine)
        ratios = time_ratios(engines, ids, options.rounds)
        added, largest = {}, {}
        for name, engine in engines.items():
            added[name] = peak_bytes_added(engine, ids)
            mode = Largest()
            with mode:
                passes(engine, ids)
            largest[name] = mode.nbytes
    print(f"{'chunk':>8}{'largest MiB':>14}{'peak added MiB':>17}{'time':>8}")
    rows = []
    for name in engines:
        print(
            f"{name:>8}{largest[name] / MIB:>14.1f}{added[name] / MIB:>17.1f}{ratios[name]:>8.3f}"
        )
        rows.append(
            {
                "chunk": int(name),
                "largest": largest[name],
                "added": added[name],
                "time": ratios[name],
            }
        )
    return rows


def main() -> None:
    """Measure both, and print tables and a line of JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1_024)
    parser.add_argument("--home", choices=("host", "nvme"), default="nvme")
    parser.add_argument("--part", choices=("tiles", "chunks", "both"), default="both")
    parser.add_argument("--folder", default=None, help="where state on nvme goes")
    options = parser.parse_args()
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(0, options.vocabulary, (1, options.tokens), generator=drawn)
    print(f"vocabulary {options.vocabulary}, {options.tokens} tokens, state on {options.home}")
    parts = {"tiles": measure_tiles, "chunks": measure_chunks}
    chosen = parts if options.part == "both" else (options.part,)
    print(json.dumps({part: parts[part](options, ids) for part in chosen}))


if __name__ == "__main__":
    main()
