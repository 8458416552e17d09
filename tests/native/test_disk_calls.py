"""Calls that may hang: deadlines, signs of life, what comes after a call that was left."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.errors import DeadlineError
from offload.native import DiskCalls, report_progress

SECONDS = 0.1
LONG_SECONDS = 30.0


@pytest.fixture
def disk() -> Iterator[DiskCalls]:
    with DiskCalls(SECONDS) as calls:
        yield calls


class Hanging:
    """A call that hangs until `answer` is set, and what has come of it."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.answer = threading.Event()
        self.seen: list[str] = []

    def __call__(self) -> str:
        self.has_begun.set()
        assert self.answer.wait(LONG_SECONDS)
        self.seen.append("call")
        return "late"

    def discard(self, result: str) -> None:
        self.seen.append(f"discard {result}")

    def end(self, disk: DiskCalls) -> None:
        self.answer.set()
        eventually(lambda: not disk.hangs)


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG_SECONDS
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.001)


def threads() -> int:
    return sum(thread.name == "offload-disk-calls" for thread in threading.enumerate())


def test_a_call_gives_what_it_returns_or_raises_from_one_other_thread(disk: DiskCalls) -> None:
    first = disk.make("stat", "/a", threading.get_ident)
    assert first != threading.get_ident()
    assert disk.make("stat", "/a", threading.get_ident) == first

    def fail() -> None:
        raise FileNotFoundError("nothing there")

    with pytest.raises(FileNotFoundError, match="nothing there"):
        disk.make("stat", "/a", fail)
    assert not disk.hangs


def test_a_call_that_hangs_is_named_and_its_result_discarded(disk: DiskCalls) -> None:
    hanging = Hanging()
    with pytest.raises(DeadlineError, match=r"fsync of /a/b failed: it hangs.*remedy") as caught:
        disk.make("fsync", "/a/b", hanging, discard=hanging.discard)
    assert (caught.value.operation, caught.value.path) == ("fsync", "/a/b")
    assert disk.hangs
    with pytest.raises(DeadlineError, match="fsync of /a/b"):
        disk.make("stat", "/c", lambda: pytest.fail("behind what hangs nothing is made"))
    hanging.end(disk)
    assert hanging.seen == ["call", "discard late"]
    assert disk.make("stat", "/c", lambda: 3) == 3


def test_what_is_tidied_up_waits_for_what_hangs_and_nobody_for_that(disk: DiskCalls) -> None:
    hanging, order = Hanging(), []
    disk.tidy("remove", "/a", lambda: order.append("at once"))
    assert order == ["at once"]
    with pytest.raises(DeadlineError):
        disk.make("rename", "/a", hanging)
    disk.tidy("remove", "/a", lambda: order.append(f"after {hanging.seen}"))
    disk.tidy("remove", "/a", Path("/nowhere/at/all").stat)
    disk.tidy("remove", "/a", lambda: order.append("last"))
    assert order == ["at once"]
    hanging.end(disk)
    assert order == ["at once", "after ['call']", "last"]


def test_tidying_that_hangs_itself_raises_nothing(disk: DiskCalls) -> None:
    hanging = Hanging()
    disk.tidy("remove", "/a", hanging)
    assert disk.hangs
    hanging.end(disk)
    assert hanging.seen == ["call"]


def test_tidying_raises_what_the_call_raises(disk: DiskCalls) -> None:
    with pytest.raises(FileNotFoundError):
        disk.tidy("remove", "/a", Path("/nowhere/at/all").stat)


def test_signs_of_life_put_the_deadline_off(disk: DiskCalls) -> None:
    def work() -> str:
        for _ in range(8):
            time.sleep(SECONDS / 4)
            report_progress()
        return "done"

    assert disk.make("allocate", "/a", work) == "done"
    report_progress()  # outside of a call it says nothing


def test_who_is_interrupted_leaves_the_call_and_its_result_is_discarded(
    disk: DiskCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging()

    def interrupted(_: DiskCalls, call: object) -> None:
        assert hanging.has_begun.wait(LONG_SECONDS)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiskCalls, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.make("open", "/a", hanging, discard=hanging.discard)
    threading.Timer(SECONDS / 4, hanging.answer.set).start()
    assert disk.make("stat", "/a", lambda: list(hanging.seen)) == ["call", "discard late"]


def test_a_result_that_came_with_an_interrupt_is_discarded_as_well(
    disk: DiskCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    discarded: list[int] = []
    wait = DiskCalls._wait

    def interrupted(self: DiskCalls, call: object) -> None:
        wait(self, call)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiskCalls, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.make("open", "/a", lambda: 7, discard=discarded.append)
    assert discarded == [7]
    assert not disk.hangs


def test_the_thread_ends_with_close_and_that_of_a_hanging_call_with_the_call() -> None:
    before = threads()
    disk = DiskCalls(SECONDS)
    disk.make("stat", "/a", lambda: None)
    assert threads() == before + 1
    disk.close()
    assert threads() == before
    hanging = Hanging()
    with pytest.raises(DeadlineError):
        disk.make("stat", "/a", hanging)
    disk.close()
    assert threads() == before + 1
    assert disk.make("stat", "/a", lambda: 5) == 5  # in another one
    disk.close()
    hanging.answer.set()
    eventually(lambda: threads() == before)


def test_a_forgotten_one_ends_its_thread() -> None:
    before = threads()
    DiskCalls(SECONDS).make("stat", "/a", lambda: None)
    eventually(lambda: threads() == before)


def test_a_fork_makes_its_own_calls(disk: DiskCalls) -> None:
    disk.make("stat", "/a", lambda: None)
    hanging = Hanging()
    with pytest.raises(DeadlineError):
        disk.make("stat", "/a", hanging)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not disk.hangs and disk.make("stat", "/a", lambda: 5) == 5 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    hanging.end(disk)


def test_without_another_thread_the_call_is_made_in_place(
    disk: DiskCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert disk.make("stat", "/a", threading.get_ident) == threading.get_ident()
