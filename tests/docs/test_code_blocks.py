"""Every block of code in the README and in docs/ does what it says: Python runs, TOML loads, and
command lines are ones that the program has.

A page whose code another test runs is named in `RUN_BY`.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from offload.cli.main import main
from offload.config import load_config
from tests.docs import scenes
from tests.docs.pages import ROOT, Block, blocks

# Page -> the test module that runs its Python.
RUN_BY: dict[str, str] = {
    "docs/from-deepspeed.md": "tests/integrations/test_deepspeed_docs.py",
    "docs/lightning.md": "tests/integrations/test_lightning_docs.py",
    "docs/trainers.md": "tests/integrations/test_trainers_docs.py",
}

# (page, number of the block in it) -> what is there before it.
SCENES: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
    ("README.md", 0): scenes.language_model,
    ("docs/accumulation.md", 0): scenes.accumulating,
    ("docs/accumulation.md", 1): scenes.accumulating_logits,
    ("docs/fine-tuning-adapters.md", 0): scenes.base_model,
    ("docs/fine-tuning-adapters.md", 1): scenes.encoder_and_decoder,
    ("docs/fine-tuning-adapters.md", 2): scenes.frozen_layer,
    ("docs/fine-tuning-adapters.md", 3): scenes.adapters,
    ("docs/forward-only.md", 0): scenes.forward_only_model,
    ("docs/forward-only.md", 1): scenes.forward_only_worker,
    ("docs/large-models.md", 0): scenes.model_folder,
    ("docs/large-models.md", 1): scenes.model_class,
    ("docs/large-models.md", 2): scenes.model_classes,
    ("docs/quantized-bases.md", 0): scenes.model_path,
    ("docs/quickstart.md", 0): scenes.nothing,
    ("docs/saving.md", 0): scenes.engine,
    ("docs/saving.md", 1): scenes.torch_checkpoint,
    ("docs/saving.md", 2): scenes.foreign_checkpoint,
    ("docs/seeing.md", 0): scenes.engine_and_batch,
    ("docs/training-any-module.md", 0): scenes.named_weights,
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
@pytest.mark.parametrize("block", [b for b in blocks("python") if b.page not in RUN_BY], ids=str)
def test_python_runs(block: Block) -> None:
    with scenes.closing_engines():
        names = SCENES[block.page, block.number]()
        code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
        exec(code, names)


def test_every_scene_has_its_block() -> None:
    found = {(block.page, block.number) for block in blocks("python")}
    assert SCENES.keys() <= found
    for page, test in RUN_BY.items():
        assert any(block.page == page for block in blocks("python")), page
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_settings_are_accepted(block: Block) -> None:
    given = tomllib.loads(block.text)
    given.setdefault("tiers", {}).setdefault("nvme", {"paths": ["nvme"]})
    load_config(given)


def commands() -> list[tuple[Block, str]]:
    return [
        (block, line)
        for block in blocks("", "bash", "sh", "console")
        for line in block.text.splitlines()
        if line.startswith("offload ")
    ]


@pytest.mark.parametrize(("block", "line"), commands(), ids=lambda each: str(each)[:60])
def test_commands_are_those_of_the_program(block: Block, line: str) -> None:
    words = shlex.split(re.sub(r"[\[\]|]|  .*", " ", line), comments=True)
    command = main.commands[words[1]]
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= options, f"{block}: {line}"
    needed = [p for p in command.params if isinstance(p, click.Argument) and p.required]
    given = [word for word in words[2:] if not word.startswith("-")]
    assert len(given) >= len(needed), f"{block}: {line}"


def test_what_is_not_known_is_found() -> None:
    with pytest.raises(AssertionError):
        block = Block("page", "", 0, 1, "")
        test_commands_are_those_of_the_program(block, "offload export CKPT OUT --no-such-option")
    with pytest.raises(KeyError):
        test_commands_are_those_of_the_program(block, "offload no-such-command")
