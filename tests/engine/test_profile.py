"""A machine's profile counts only if this machine, as it is now, has made it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from offload.config import OffloadConfig
from offload.engine import planning, profile
from offload.engine.profile import DiskSpeed, MachineProfile, find_profile, keep_profile
from offload.errors import StorageError
from offload.schedule.cost import LaneSpeeds

CONFIG = OffloadConfig(tiers={"device": {"kind": "cpu"}})


def made() -> MachineProfile:
    disk = DiskSpeed("/disk", "mixed", 1 << 20, 4, 2e9)
    return MachineProfile({"h2d": 7.0, "cpu": 3.0, "flops": 11.0}, (disk,), time.time())


def test_what_is_kept_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_profile(CONFIG).profile is None
    assert "has not been measured" in find_profile(CONFIG).note
    kept = made()
    path = keep_profile(CONFIG, kept)
    assert path.parent == tmp_path / "offload"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_profile(CONFIG).profile == kept
    assert kept.lane_speeds() == LaneSpeeds(h2d=7.0, cpu=3.0, flops=11.0)
    assert planning.known_speeds(CONFIG) == kept.lane_speeds()
    newer = MachineProfile({"h2d": 8.0}, (), time.time())
    keep_profile(CONFIG, newer)
    assert find_profile(CONFIG).profile == newer
    assert list(path.parent.iterdir()) == [path]


def test_each_kind_of_configuration_has_its_own() -> None:
    keep_profile(CONFIG, made())
    for other in (
        OffloadConfig(tiers={"device": {"kind": "cpu"}}, precision={"compute": "fp32"}),
        OffloadConfig(tiers={"device": {"kind": "cpu"}}, optimizer={"name": "sgd"}),
        OffloadConfig(tiers={"device": {"kind": "cpu"}, "nvme": {"paths": ["/"]}}),
        OffloadConfig(tiers={"device": {"kind": "cpu"}}, io={"checksum": False}),
    ):
        assert find_profile(other).profile is None
    same = OffloadConfig(tiers={"device": {"kind": "cpu", "memory": 1}}, io={"retries": 0})
    assert find_profile(same).profile is not None


@pytest.mark.parametrize("key", ["cpu", "cores", "memory_gib", "gpu", "torch", "offload", "disks"])
def test_one_of_another_machine_is_not_believed(key: str) -> None:
    path = keep_profile(CONFIG, made())
    entry = json.loads(path.read_text())
    entry["fingerprint"][key] = "another"
    path.write_text(json.dumps(entry))
    found = find_profile(CONFIG)
    assert found.profile is None
    assert f"of another {key}:" in found.note


@pytest.mark.parametrize(("age_days", "counts"), [(80, True), (91, False), (-1, False)])
def test_one_that_is_too_old_is_not_believed(age_days: int, counts: bool) -> None:
    made_at = time.time() - age_days * 86_400
    keep_profile(CONFIG, MachineProfile({"h2d": 7.0}, (), made_at))
    found = find_profile(CONFIG)
    assert (found.profile is not None) == counts
    assert counts or "too old" in found.note


DAMAGE: list[dict[str, Any]] = [
    {"format": 2},
    {"speeds": {"h2d": -1.0}},
    {"speeds": {"h2d": float("inf")}},
    {"speeds": {"h2d": float("nan")}},
    {"speeds": {"h2d": True}},
    {"speeds": {"h2d": "fast"}},
    {"speeds": {"unknown": 1.0}},
    {"speeds": []},
    {"disks": {}},
    {"disks": [{}]},
    {"disks": [["path"]]},
    {"fingerprint": None},
    {"made_at": None},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_one_is_not_believed(damage: dict[str, Any]) -> None:
    path = keep_profile(CONFIG, made())
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert find_profile(CONFIG).profile is None
    assert "is damaged; run `offload bench`" in find_profile(CONFIG).note


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}"]
)
def test_one_that_is_no_json_is_not_believed(content: bytes) -> None:
    path = keep_profile(CONFIG, made())
    path.write_bytes(content)
    found = find_profile(CONFIG)
    assert found.profile is None
    assert "not used" in found.note


def test_one_cut_anywhere_is_not_believed() -> None:
    path = keep_profile(CONFIG, made())
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert find_profile(CONFIG).profile is None


def test_one_that_others_can_write_is_not_believed() -> None:
    path = keep_profile(CONFIG, made())
    path.chmod(0o622)
    found = find_profile(CONFIG)
    assert found.profile is None
    assert "can be written by others" in found.note


def test_a_folder_in_its_place_is_not_believed(tmp_path: Path) -> None:
    path = profile.profile_path(CONFIG)
    path.mkdir(parents=True)
    assert find_profile(CONFIG).profile is None
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        keep_profile(CONFIG, made())
    assert list(path.parent.iterdir()) == [path]


def test_a_home_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(not_a_folder))
    assert find_profile(CONFIG).profile is None
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        keep_profile(CONFIG, made())


def test_a_relative_cache_home_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/somebody")
    assert str(profile.profile_path(CONFIG)).startswith("/somebody/.cache/offload/machine-")
