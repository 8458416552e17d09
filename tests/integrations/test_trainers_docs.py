"""The code of docs/trainers.md, run from top to bottom of each section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from tests.docs import scenes
from tests.docs.pages import ROOT, Block, blocks
from tests.oracle import small_llama

PAGE = "docs/trainers.md"
BLOCKS = [block for block in blocks("python") if block.page == PAGE]


def transformers_scene() -> dict[str, Any]:
    tokens = [batch["input_ids"][0] for batch in scenes.batches(8)]
    dataset = [{"input_ids": each, "labels": each} for each in tokens]
    return scenes.names(model=small_llama(), fresh_model=small_llama(), dataset=dataset)


def trl_scene() -> dict[str, Any]:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from tests.integrations.offline import texts, tokenizer

    return scenes.names(model=small_llama(), texts=texts(), tokenizer=tokenizer())


def loop_scene() -> dict[str, Any]:
    return scenes.names(
        model=small_llama(),
        batches=scenes.batches(4),
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )


def notebook_scene() -> dict[str, Any]:
    return scenes.names(build_model=small_llama)


# The blocks of each scene.
SECTIONS = {
    "transformers": (transformers_scene, (0, 1)),
    "trl": (trl_scene, (2,)),
    "loop": (loop_scene, (3, 4)),
    "notebook": (notebook_scene, (5,)),
}


def run(block: Block, names: dict[str, Any]) -> None:
    code = compile("\n" * block.line + block.text, str(ROOT / PAGE), "exec")
    exec(code, names)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make, numbers = SECTIONS[section]
    scenes.write_config()
    Path("config.toml").write_text(Path("config.toml").read_text().partition("[precision]")[0])
    names = make()
    with scenes.closing_engines():
        for number in numbers:
            run(BLOCKS[number], names)
    if section == "transformers":
        assert names["trainer"].state.global_step == 4
        assert Path("out/model.safetensors").exists()
        assert Path("run/checkpoint-2/offload").is_dir()
    elif section == "trl":
        assert Path("adapter/adapter_model.safetensors").exists()
    elif section == "loop":
        assert names["engine"].global_steps == 6
    else:
        assert isinstance(names["engine"], offload.OffloadEngine)


def test_every_block_has_its_section() -> None:
    ran = sorted(number for _, numbers in SECTIONS.values() for number in numbers)
    assert ran == [block.number for block in BLOCKS]
