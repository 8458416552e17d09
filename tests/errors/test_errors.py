"""The error tree: bases, messages, and the attributes that callers use."""

from __future__ import annotations

import errno
import inspect
import subprocess
import sys

import pytest

import offload
from offload import errors

ALL_CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.OffloadError)
]


def test_the_picture_at_the_top_names_every_class() -> None:
    assert errors.__doc__ is not None
    for error_class in ALL_CLASSES:
        assert error_class.__name__ in errors.__doc__
        assert error_class.__doc__, error_class


def test_every_class_is_exported() -> None:
    for error_class in ALL_CLASSES:
        assert getattr(offload, error_class.__name__) is error_class
        assert error_class.__name__ in offload.__all__


@pytest.mark.parametrize(
    ("error_class", "base"),
    [
        (errors.ConfigError, ValueError),
        (errors.StorageError, OSError),
        (errors.DiskFullError, errors.StorageError),
        (errors.ChecksumError, errors.StorageError),
        (errors.DeadlineError, errors.StorageError),
    ],
)
def test_bases(error_class: type[Exception], base: type[Exception]) -> None:
    assert issubclass(error_class, base)
    assert issubclass(error_class, errors.OffloadError)


def test_message_gives_fact_expectation_and_remedy() -> None:
    error = errors.EngineStateError("closed", expected="an open engine", remedy="make a new one")
    assert str(error) == "closed; expected: an open engine; remedy: make a new one"


def test_config_error_lists_every_problem() -> None:
    error = errors.ConfigError(problems=["first", "second"], source="a.toml")
    assert error.problems == ["first", "second"]
    assert str(error) == "2 problems in a.toml:\n  - first\n  - second"


def test_storage_error_names_everything() -> None:
    error = errors.StorageError(
        operation="read",
        path="/disk/file",
        offset=8192,
        nbytes=4096,
        errno=errno.ENXIO,
        what="layer.0.weight",
    )
    assert (error.errno, error.path, error.offset, error.nbytes) == (
        errno.ENXIO,
        "/disk/file",
        8192,
        4096,
    )
    assert (error.operation, error.what) == ("read", "layer.0.weight")
    for part in ("read", "/disk/file", "8192", "4096", "ENXIO", "layer.0.weight"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("error_class", "code"),
    [
        (errors.StorageError, errno.EIO),
        (errors.ChecksumError, errno.EBADMSG),
        (errors.DeadlineError, errno.ETIMEDOUT),
    ],
)
def test_errno_when_the_system_gave_none(error_class: type[errors.StorageError], code: int) -> None:
    error = error_class(operation="write", path="/x", detail="because")
    assert error.errno == code
    assert "because" in str(error)


def test_disk_full_error_names_path_need_and_room() -> None:
    error = errors.DiskFullError(path="/disk", needed_bytes=3 << 30, free_bytes=1 << 30)
    assert (error.errno, error.needed_bytes, error.free_bytes) == (errno.ENOSPC, 3 << 30, 1 << 30)
    for part in ("/disk", "3.00 GiB", "1.00 GiB", "tiers.nvme.paths"):
        assert part in str(error)


def test_budget_error_names_tier_bytes_and_owner() -> None:
    error = errors.BudgetError(
        tier="host", requested_bytes=2048, free_bytes=1024, budget_bytes=4096, owner="staging"
    )
    for part in ("host", "2048", "1024", "4096", "staging", "tiers.host.memory"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 50, "1.00 PiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert errors.format_bytes(nbytes) == text


def test_listed() -> None:
    assert errors.listed(["a"]) == "a"
    assert errors.listed(["a", "b", "c"]) == "a, b, c"
    assert errors.listed(list("abcde")) == "a, b, c and 2 more"
    assert errors.listed(list("abcde"), most=4) == "a, b, c, d and 1 more"


def test_import_is_lazy() -> None:
    code = (
        "import sys, offload; offload.OffloadError, offload.load_config, offload.StepReport;"
        "sys.exit(sorted({'torch', 'numpy', 'numba'} & set(sys.modules)) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = offload.nothing
