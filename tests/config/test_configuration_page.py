"""docs/configuration.md is what the schema says, and names every key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from offload.config import OffloadConfig
from offload.config.problems import valid_keys

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    path = ROOT / "tools" / "configuration_page.py"
    spec = importlib.util.spec_from_file_location("configuration_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    module = generator()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run tools/configuration_page.py"
    )


def test_the_page_names_every_key() -> None:
    page = generator().page()
    for dotted in valid_keys(OffloadConfig):
        section, _, key = dotted.rpartition(".")
        body = page.split(f"[{section}]")[1].split("\n## ")[0]
        assert re.search(rf"^\| `{key}` \|", body, re.MULTILINE), dotted
