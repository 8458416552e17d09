"""Each trouble that doctor knows, made; each has a remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload.cli.doctor import FAILED, OK, WARNING, Check, examine
from offload.cli.main import main
from offload.config import load_config


def checks_by_name(config: dict[str, object], *paths: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(load_config(config), [str(p) for p in paths])}


def test_this_machine_can_train(tmp_path: Path) -> None:
    checks = checks_by_name({"tiers": {"nvme": {"paths": [str(tmp_path)]}}})
    assert [check for check in checks.values() if check.status == FAILED] == []
    assert {"platform", "python", "torch", "memlock", "host budget", "io python"} <= set(checks)
    assert f"path {tmp_path}" in checks


def test_every_trouble_has_a_remedy(tmp_path: Path) -> None:
    config = {"tiers": {"host": {"memory": "900TiB"}, "device": {"kind": "cuda:99"}}}
    checks = checks_by_name(config, tmp_path / "absent")
    troubles = [check for check in checks.values() if check.status != OK]
    assert all(check.remedy for check in troubles)
    failed = {check.name for check in troubles if check.status == FAILED}
    assert {"host budget", "device", f"path {tmp_path / 'absent'}"} <= failed


def test_device_and_host_share_the_memory_without_an_accelerator() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    config = {"tiers": {"host": {"memory": 1 << 20}, "device": {"kind": "cpu", "memory": total}}}
    assert checks_by_name(config)["host and device budget"].status == FAILED


def test_a_backend_that_does_not_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"io_uring": "blocked", "libaio": "ok", "threads": "ok", "python": "ok"}
    monkeypatch.setattr("offload.native.IoEngine.probe", staticmethod(lambda: reasons))
    assert checks_by_name({})["io io_uring"].status == OK
    assert "is used" in checks_by_name({})["io libaio"].fact
    check = checks_by_name({"io": {"backend": "io_uring"}})["io io_uring"]
    assert (check.status, "blocked" in check.fact) == (FAILED, True)


def test_low_memlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr("offload.cli.doctor._has_ipc_lock", lambda: False)
    check = checks_by_name({})["memlock"]
    assert (check.status, "64.00 KiB" in check.fact) == (WARNING, True)


def test_a_file_system_in_memory() -> None:
    path = Path("/dev/shm")
    if not path.is_dir():
        pytest.skip("no /dev/shm here")
    check = checks_by_name({}, path)[f"path {path}"]
    assert (check.status, "memory, not disk" in check.fact) == (WARNING, True)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    checks_by_name({}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_exit_code(tmp_path: Path) -> None:
    good = CliRunner().invoke(main, ["doctor", "--path", str(tmp_path)])
    bad = CliRunner().invoke(main, ["doctor", "--path", str(tmp_path / "absent")])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "mkdir -p" in bad.output
