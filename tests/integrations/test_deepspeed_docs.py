"""Every code block of docs/from-deepspeed.md runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from offload.cli.main import main
from tests.docs.pages import blocks


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "docs/from-deepspeed.md"
    found = [b for b in blocks("diff", "json", "python", "sh") if b.page == page]
    (configuration,) = [block.text for block in found if block.language == "json"]
    Path("ds_config.json").write_text(configuration)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    names: dict[str, Any] = {
        "model": model,
        "dataset": list(torch.randn(16, 8).to(torch.bfloat16)),
    }
    for block in found:
        language, text = block.language, block.text
        if language == "diff":
            exec("\n".join(t[1:] for t in text.splitlines() if not t.startswith("-")), names)
            assert names["client_state"] == {"epoch": 1}
            assert names["engine"].global_steps == 2
            names["engine"].destroy()
        elif language == "python":
            exec(text, names)
        elif language == "sh":
            for line in text.splitlines():
                program, *arguments = line.split()
                assert program == "offload"
                assert CliRunner().invoke(main, arguments).exit_code == 0
        else:
            assert language == "json"
    assert Path("translated.toml").exists()
