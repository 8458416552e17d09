"""Each trouble that doctor knows, made; each has a remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload.cli import doctor_disk, doctor_machine
from offload.cli.check import FAILED, OK, WARNING, Check
from offload.cli.doctor import examine
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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /proc, /sys and /dev, in which a test makes a trouble."""
    root = tmp_path / "machine"
    for name in ("PROC", "SYS", "DEV"):
        monkeypatch.setattr(doctor_machine, name, root / name.lower())
    return root


def say(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


CPUFREQ = "sys/devices/system/cpu/cpu0/cpufreq"
THP = "sys/kernel/mm/transparent_hugepage/enabled"


@pytest.mark.parametrize(
    ("name", "good", "bad", "fact"),
    [
        ("kernel", {"proc/sys/kernel/osrelease": "5.10.0-8"},
         {"proc/sys/kernel/osrelease": "4.18.0-553.el8"}, "too old for io_uring"),
        ("wsl", {"proc/sys/kernel/osrelease": "6.1.0"},
         {"proc/sys/kernel/osrelease": "5.15.153.1-microsoft-standard-WSL2"}, "inside Windows"),
        ("huge pages", {THP: "always [madvise] never"}, {THP: "always madvise [never]"}, "are off"),
        ("cpu frequency", {f"{CPUFREQ}/scaling_governor": "powersave",
                           f"{CPUFREQ}/scaling_driver": "intel_pstate"},
         {f"{CPUFREQ}/scaling_driver": "acpi-cpufreq"}, "lowest frequency"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_a_trouble_of_the_machine(machine, name, good, bad, fact) -> None:
    for status, files in ((OK, good), (WARNING, bad)):
        for path, text in files.items():
            say(machine, path, text)
        check = checks_by_name({}).get(name, Check(name, OK, ""))
        assert check.status == status
    assert fact in check.fact
    assert check.remedy


def test_several_memory_nodes(machine, monkeypatch) -> None:
    say(machine, "sys/devices/system/node/node0/cpulist", "0-3,8")
    assert "numa" not in checks_by_name({})
    say(machine, "sys/devices/system/node/node1/cpulist", "4-7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 8})
    assert checks_by_name({})["numa"].status == OK
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    check = checks_by_name({})["numa"]
    assert (check.status, "numactl" in check.remedy) == (WARNING, True)


def test_few_open_files(monkeypatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 256))
    check = checks_by_name({})["open files"]
    assert (check.status, "ulimit -n" in check.remedy) == (WARNING, True)


def test_a_gpu_that_torch_cannot_use(machine, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "gpu" not in checks_by_name({})
    say(machine, "dev/nvidia0", "")
    monkeypatch.setattr("torch.version.cuda", None)
    check = checks_by_name({})["gpu"]
    assert (check.status, "has no CUDA" in check.fact) == (WARNING, True)
    assert "gpu" not in checks_by_name({"tiers": {"device": {"kind": "cpu"}}}), "not wanted"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_cgroup_below_the_budget(machine, name) -> None:
    say(machine, f"sys/fs/cgroup/{name}", str(1 << 30))
    config = {"tiers": {"host": {"memory": "512MiB"}}}
    assert checks_by_name(config)["cgroup memory"].status == OK
    check = checks_by_name({"tiers": {"host": {"memory": "2GiB"}}})["cgroup memory"]
    assert (check.status, "1.00 GiB" in check.fact) == (FAILED, True)
    say(machine, f"sys/fs/cgroup/{name}", str((1 << 63) - 4096))
    assert "cgroup memory" not in checks_by_name(config)


@pytest.mark.parametrize(
    ("kind", "fact"),
    [("overlay", "own layer"), ("9p", "not a local disk"), ("nfs4", "not a local")],
)
def test_a_file_system_that_is_no_disk(tmp_path, monkeypatch, kind, fact) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none / {kind} rw 0 0\n")
    monkeypatch.setattr(doctor_disk, "MOUNTS", mounts)
    check = checks_by_name({}, tmp_path)[f"path {tmp_path}"]
    assert (check.status, fact in check.fact, bool(check.remedy)) == (WARNING, True, True)


def test_no_direct_io_and_a_slow_disk(tmp_path, monkeypatch) -> None:
    real = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(doctor_disk, "_SLOW_BYTES_PER_SECOND", 1e15)
    checks = checks_by_name({}, tmp_path)
    for name, fact in (("O_DIRECT", "page cache"), ("speed", "steps will wait")):
        check = checks[f"{name} {tmp_path}"]
        assert (check.status, fact in check.fact) == (WARNING, True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor_disk, "_SLOW_BYTES_PER_SECOND", 0.0)
    assert checks_by_name({}, tmp_path)[f"speed {tmp_path}"].status == OK


def test_little_space(tmp_path, monkeypatch) -> None:
    usage = doctor_disk.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check = checks_by_name({}, tmp_path)[f"path {tmp_path}"]
    assert (check.status, "free space" in check.remedy) == (WARNING, True)


def test_without_the_native_library(monkeypatch) -> None:
    monkeypatch.setattr("offload.native.LIBRARY_AVAILABLE", False)
    assert checks_by_name({})["native library"].status == WARNING


@pytest.mark.parametrize("version", ["2.6.0+cpu", "1.13.1"])
def test_an_old_torch(monkeypatch, version) -> None:
    monkeypatch.setattr("torch.__version__", version)
    check = checks_by_name({})["torch"]
    assert (check.status, version in check.fact) == (FAILED, True)


def test_an_old_python(monkeypatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 9, 1))
    assert checks_by_name({})["python"].status == FAILED


def test_a_job_that_does_not_fit_fails_and_json_says_so(tmp_path) -> None:
    config = {
        "tiers": {"device": {"kind": "cpu", "memory": "1MiB"}, "host": {"memory": "1MiB"}},
        "run": {
            "steps": 1,
            "architecture": "LlamaForCausalLM",
            "hf_config": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
        },
    }
    path = tmp_path / "big.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["doctor", str(path), "--json"])
    found = json.loads(result.output)
    assert (result.exit_code, found["can_run"]) == (1, False)
    (plan,) = [check for check in found["checks"] if check["name"] == "plan"]
    assert plan["status"] == FAILED
    assert plan["remedy"]
    config["tiers"]["host"]["memory"] = "1GiB"
    config["tiers"]["device"]["memory"] = "256MiB"
    assert checks_by_name(config)["plan"].status == OK
