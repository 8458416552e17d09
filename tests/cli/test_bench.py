"""The bandwidth measurement runs on a small file, counts what it moves, and cleans up."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from offload.cli.main import main


def test_lanes_of_memory_and_disk(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    config = tmp_path / "config.toml"
    config.write_text(
        f'[tiers.nvme]\npaths = ["{folders[0]}"]\n[io]\nbackend = "python"\nblock_bytes = 65536\n'
    )
    arguments = ["bench", str(config), "--path", str(folders[1]), "--size", "1MiB", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lanes = {lane["lane"]: lane for lane in json.loads(result.stdout)["lanes"]}
    assert list(lanes) == ["memory", "nvme_write", "nvme_read", "nvme_mixed"]
    assert [lane["nbytes"] for lane in lanes.values()] == [2 << 20, 1 << 20, 1 << 20, 1 << 20]
    for lane in lanes.values():
        assert 0 < lane["median_bytes_per_second"] <= lane["best_bytes_per_second"]
    for folder in folders:
        assert str(folder) in lanes["nvme_read"]["where"]
        assert list(folder.iterdir()) == []


def test_wrong_size_and_absent_path(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(main, ["bench", "--size", "20G"])
    assert (wrong.exit_code, "did you mean 20GiB" in wrong.stderr) == (2, True)
    config = tmp_path / "config.toml"
    config.write_text('[io]\nbackend = "python"\n')
    arguments = ["bench", str(config), "--size", "1MiB", "--path", str(tmp_path / "absent")]
    absent = CliRunner().invoke(main, arguments)
    assert (absent.exit_code, "absent" in absent.stderr) == (2, True)
    tiny = CliRunner().invoke(main, ["bench", "--size", "1KiB", "--path", str(tmp_path)])
    assert (tiny.exit_code, "too small" in tiny.stderr) == (2, True)
