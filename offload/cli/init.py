"""`offload init MODEL`: a commented configuration for a model and this machine, planned.

[Note: what init decides]
The least that works: everything in memory, else with a disk, else with a disk and activations
recomputed. The first of these whose plan fits is written; if none fits, nothing is, and the last
plan's table says what is missing. Budgets stay `auto`, so that the file also serves tomorrow, when
other memory is free; what `auto` is today stands in the comments.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.cli.doctor_disk import file_system
from offload.cli.trainable import model_to_plan
from offload.config import available_host_bytes, config_json_schema, load_config
from offload.engine.planning import plan
from offload.errors import DoesNotFitError, OffloadError, format_bytes
from offload.schedule.plan import Plan

BUILT_IN = "built-in"
_LOWEST_FREE_BYTES = 4 << 30
_DISKS = {"ext4", "xfs", "btrfs", "f2fs", "ext3", "ext2", "zfs", "overlay"}
_BUILT_IN_MODEL = """\
architecture = "LlamaForCausalLM"  # new weights, 13 million parameters, bytes for tokens
hf_config = { vocab_size = 259, hidden_size = 384, intermediate_size = 1024, \
num_hidden_layers = 8, num_attention_heads = 6, num_key_value_heads = 3, \
max_position_embeddings = 1024, bos_token_id = 256, eos_token_id = 257, pad_token_id = 258 }"""


@dataclass(frozen=True, slots=True)
class Request:
    """What `offload init` was asked for.

    Attributes:
        model: a Hugging Face folder, a config.json, or "built-in".
        out: the file to write.
        data: as `run.data`.
        lora: train adapters instead of all weights.
    """

    model: str
    out: Path
    data: str
    lora: bool


@dataclass(frozen=True, slots=True)
class _Choice:
    disk: Path | None
    recompute: bool = False


def write_config(request: Request) -> Plan:
    """Write the configuration and its schema beside it, and return its plan.

    Raises:
        ConfigError: the model cannot be read.
        DoesNotFitError: it does not fit this machine; nothing is written.
        OffloadError: the file exists.
    """
    if request.out.exists():
        raise OffloadError(
            f"{request.out} exists", remedy="name another file with -o, or remove that one"
        )
    if request.out.suffix != ".toml":
        raise OffloadError(f"{request.out} is no .toml file", remedy="name one with -o")
    schema = request.out.with_name("offload.schema.json")
    made: Plan | None = None
    for choice in _choices(request.out.absolute().parent):
        text = render(request, choice, schema.name)
        config = load_config(tomllib.loads(text))
        made = plan(model_to_plan(config), config)
        if made.fits:
            _write(request.out, text)
            if not schema.exists():
                _write(schema, json.dumps(config_json_schema(), indent=2) + "\n")
            return made
    assert made is not None
    raise DoesNotFitError(table=str(made), fact=f"{request.model} does not fit this machine")


def _choices(folder: Path) -> Iterator[_Choice]:
    yield _Choice(None)
    disk = roomiest_disk(folder)
    if disk is not None:
        yield _Choice(disk)
        yield _Choice(disk, recompute=True)


def roomiest_disk(folder: Path) -> Path | None:
    """The folder with most free space on a disk, of `folder`, /var/tmp, home and mounted disks."""
    candidates = [folder, Path("/var/tmp"), Path.home(), *_mounts()]
    usable = [
        path
        for path in candidates
        if path.is_dir() and os.access(path, os.W_OK | os.X_OK) and file_system(path) in _DISKS
    ]
    found = max(usable, key=lambda path: shutil.disk_usage(path).free, default=None)
    if found is None or shutil.disk_usage(found).free < _LOWEST_FREE_BYTES:
        return None
    return found


def _mounts() -> list[Path]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    found = (line.split()[1:3] for line in lines)
    return [Path(mount.replace(r"\\040", " ")) for mount, kind in found if kind in _DISKS]


def render(request: Request, choice: _Choice, schema: str) -> str:
    """The configuration as text; see [Note: what init decides]."""
    lines = [
        f"#:schema ./{schema}",
        f"# Written by `offload init`. `offload plan {request.out}` shows where the state lives,",
        f"# `offload train {request.out}` trains; docs/configuration.md has every setting.",
        "",
        *_tiers(choice),
        "",
        "[precision]",
        'compute = "bf16"              # weights and gradients; the optimizer keeps exact fp32',
        "[training]",
        "gradient_accumulation_steps = 1  # micro-batches before each optimizer step",
        "max_grad_norm = 1.0",
        "[optimizer]",
        'name = "adamw"',
        f"lr = {'2e-4' if request.lora else '1e-5' if _has_weights(request.model) else '1e-3'}",
        "[lr_scheduler]",
        'name = "cosine"',
        "warmup_steps = 10",
        "[checkpoint]",
        "every_steps = 50              # the same command again goes on from the newest",
        "",
    ]
    if request.lora:
        lines += [
            "[lora]                        # the model is frozen, adapters are trained",
            "r = 16",
            "alpha = 32",
            f"export = {_text('adapter' if _has_weights(request.model) else 'merged')}"
            "           # or merged, the whole model",
            "",
        ]
    lines += [
        "[run]",
        _BUILT_IN_MODEL if request.model == BUILT_IN else f"model = {_text(request.model)}",
        f"data = {_text(request.data)}"
        "  # stdlib, text, or .jsonl with text, prompt and completion, or messages",
        "validation = 0.05             # this share is held out; or a file",
        "# packing = true              # several short examples in one sequence",
        "steps = 100",
        "batch = 1",
        "sequence_length = 512",
        f"gradient_checkpointing = {str(choice.recompute).lower()}"
        "  # true: less memory for activations, a third more computation",
        "eval_every = 50",
        "keep_best = true              # the checkpoint with the lowest held-out loss",
        "export = true                 # at the end, as transformers loads it",
        "generate_tokens = 50",
        f"output = {_text(str(Path('runs') / request.out.stem))}",
    ]
    return "\n".join(lines) + "\n"


def _tiers(choice: _Choice) -> list[str]:
    host = f"now {format_bytes(available_host_bytes())} are available"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        kind, device = "auto", f"{properties.name}, {format_bytes(properties.total_memory)}"
    else:
        kind, device = "cpu", "no GPU that torch can use: a part of host memory"
    lines = [
        "[tiers.device]",
        f'kind = "{kind}"  # {device}',
        'memory = "auto"               # or a hard budget, e.g. "8GiB"',
        "[tiers.host]",
        f'memory = "auto"               # {host}',
    ]
    if choice.disk is None:
        return [
            *lines,
            "# Everything fits in memory. With a disk it needs less:",
            "# [tiers.nvme]",
            '# paths = ["/path/on/a/local/disk"]',
        ]
    free = format_bytes(shutil.disk_usage(choice.disk).free)
    return [*lines, "[tiers.nvme]", f"paths = [{_text(str(choice.disk))}]  # {free} free"]


def _has_weights(model: str) -> bool:
    return model != BUILT_IN and Path(model).is_dir()


def _text(value: str) -> str:
    """A TOML string: JSON's escapes are TOML's."""
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OffloadError(f"{path} cannot be written: {error.strerror}") from error
