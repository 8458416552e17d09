"""Threads of tests: all start together, none is waited for without end."""

from __future__ import annotations

import threading
from collections.abc import Callable

SECONDS = 60.0


def run_in_threads(*calls: Callable[[], object]) -> None:
    """Run each call in a thread of its own, all at once.

    Raises:
        AssertionError: a call has not ended in time; its thread is left behind.
        BaseException: the first error of a call.
    """
    errors: list[BaseException] = []
    ready = threading.Barrier(len(calls))

    def guarded(call: Callable[[], object]) -> None:
        try:
            ready.wait(SECONDS)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
