"""The host budget under cgroup v1, v2 and none, from made-up proc and sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.config import (
    available_host_bytes,
    free_swap_bytes,
    host_room_bytes,
    load_config,
    resolve_host_budget,
)

GIB = 1 << 30


def make_root(root: Path, *, available_kib: int, membership: str | None) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\n"
    )
    if membership is not None:
        (root / "proc/self/cgroup").write_text(membership)
    return root


def make_group(group: Path, files: dict[str, str]) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name).write_text(text)


def v2_group(limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        "memory.max": limit,
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def v1_group(limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


def test_without_control_groups(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership=None)
    assert available_host_bytes(root) == 8 * GIB


def test_v2_limit_of_an_ancestor(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership="0::/jobs/mine\n")
    make_group(root / "sys/fs/cgroup/jobs/mine", v2_group("max\n", GIB))
    make_group(root / "sys/fs/cgroup/jobs", v2_group(f"{4 * GIB}\n", 3 * GIB, inactive=GIB))
    assert available_host_bytes(root) == 2 * GIB


def test_v2_seen_from_inside_a_container(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership="0::/\n")
    make_group(root / "sys/fs/cgroup", v2_group(f"{2 * GIB}\n", GIB))
    assert available_host_bytes(root) == GIB


def test_v1_with_the_path_of_the_host(tmp_path: Path) -> None:
    membership = "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    root = make_root(tmp_path, available_kib=8 << 20, membership=membership)
    make_group(root / "sys/fs/cgroup/memory", v1_group(3 * GIB, 2 * GIB, inactive=GIB // 2))
    assert available_host_bytes(root) == GIB + GIB // 2


def test_v1_without_limit_and_a_full_group(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership="4:memory:/x\n")
    make_group(root / "sys/fs/cgroup/memory", v1_group(2**63 - 4096, 5 * GIB))
    assert available_host_bytes(root) == 8 * GIB
    make_group(root / "sys/fs/cgroup/memory/x", v1_group(GIB, 2 * GIB))
    assert available_host_bytes(root) == 0


def test_this_machine() -> None:
    assert 0 < available_host_bytes() < 2**50


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_host_budget(load_config({"tiers": {"host": {"memory": "3GiB"}}})) == 3 * GIB
    monkeypatch.setattr("offload.config.available_host_bytes", lambda: 10 * GIB)
    assert resolve_host_budget(load_config(None)) == 6 * GIB


def test_no_file_page_counts_as_used_for_the_room(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership="0::/a\n3:memory:/b\n")
    v2 = v2_group(f"{6 * GIB}\n", 5 * GIB, inactive=GIB)
    v2["memory.stat"] += f"active_file {2 * GIB}\n"
    make_group(root / "sys/fs/cgroup/a", v2)
    v1 = v1_group(7 * GIB, 4 * GIB, inactive=GIB)
    v1["memory.stat"] += f"active_file 3\ntotal_active_file {2 * GIB}\n"
    make_group(root / "sys/fs/cgroup/memory/b", v1)
    assert available_host_bytes(root) == 2 * GIB
    assert host_room_bytes(root) == 4 * GIB + 7


def test_a_limit_that_only_throttles_is_a_limit(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=8 << 20, membership="0::/jobs\n")
    group = root / "sys/fs/cgroup/jobs"
    make_group(group, {**v2_group("max\n", GIB), "memory.high": f"{2 * GIB}\n"})
    assert available_host_bytes(root) == GIB
    assert host_room_bytes(root) == GIB + 7
    make_group(group, {**v2_group(f"{3 * GIB}\n", GIB), "memory.high": f"{4 * GIB}\n"})
    assert available_host_bytes(root) == 2 * GIB


def test_free_swap(tmp_path: Path) -> None:
    root = make_root(tmp_path, available_kib=1, membership=None)
    assert free_swap_bytes(root) == 0
    with (root / "proc/meminfo").open("a") as file:
        file.write("SwapTotal: 10 kB\nSwapFree: 3 kB\n")
    assert free_swap_bytes(root) == 3 << 10
