"""Each path is measured by operation, block and depth; `offload bench` keeps what it has shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload.cli.main import main
from offload.cli.measuring import measure_disks, measure_flops, sample
from offload.config import OffloadConfig, load_config
from offload.engine.profile import DISK_OPERATIONS, SPEEDS, find_profile


def on(*folders: Path) -> OffloadConfig:
    paths = [str(folder) for folder in folders]
    return OffloadConfig(tiers={"device": {"kind": "cpu"}, "nvme": {"paths": paths}})


def test_each_path_by_operation_block_and_depth(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    found = list(measure_disks(on(*folders), size_bytes=4 << 20, passes=1))
    cells = {(disk.path, disk.operation, disk.block_bytes, disk.depth) for disk in found}
    assert cells == {
        (str(folder), operation, block_bytes, depth)
        for folder in folders
        for operation in DISK_OPERATIONS
        for block_bytes, depth in (
            (65_536, 1),
            (65_536, 4),
            (65_536, 16),
            (1 << 20, 1),
            (1 << 20, 4),
        )
    }
    assert all(disk.bytes_per_second > 0 for disk in found)
    assert not any(list(folder.iterdir()) for folder in folders)
    assert list(measure_disks(on(), size_bytes=4 << 20, passes=1)) == []


def test_a_sample_has_every_lane(tmp_path: Path) -> None:
    assert sample(on(tmp_path), size_bytes=1 << 20, passes=1).speeds.keys() == set(SPEEDS)
    assert sample(on(), size_bytes=1 << 20, passes=1).speeds.keys() == {
        "cpu",
        "h2d",
        "d2h",
        "flops",
    }
    assert measure_flops(on(), 1) > 0


def test_bench_keeps_what_it_has_shown(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[tiers.device]\nkind = "cpu"\n[tiers.nvme]\npaths = ["{tmp_path}"]\n')
    arguments = ["bench", str(path), "--size", "1MiB", "--passes", "1", "--steps", "0"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    profile = find_profile(load_config(path)).profile
    assert profile is not None
    lanes = {lane["lane"]: lane["median_bytes_per_second"] for lane in printed["lanes"]}
    assert {**profile.speeds, "memory": lanes["memory"]} == {**lanes, "flops": printed["flops"]}
    assert [disk["depth"] for disk in printed["disks"]] == [disk.depth for disk in profile.disks]
    assert printed["profile"].startswith("kept for `offload plan` in ")


def test_a_home_that_cannot_be_written_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    arguments = ["bench", "--size", "1MiB", "--passes", "1", "--steps", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "not kept for `offload plan`: write of" in result.stdout
    assert "GFLOP/s" in result.stdout
