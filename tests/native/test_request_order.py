"""The order of the Python queue; native/tests/test_request_queue.cpp has the same cases in C++."""

from __future__ import annotations

from dataclasses import dataclass

from offload.native.core import BULK_URGENCY
from offload.native.request_order import MAX_PASSED, RequestOrder

PLANNED = 1 << 56


@dataclass(eq=False)
class Asked:
    name: str
    urgency: int
    num_blocks: int
    lane: str
    next_nbytes: int = 1


class Queue:
    """A queue that tells whose block was next, "-" = none may start."""

    def __init__(self, **limits: float) -> None:
        self.order: RequestOrder[Asked] = RequestOrder(**limits)
        self.urgencies: list[int] = []  # of the blocks in flight

    def add(self, name: str, urgency: int, num_blocks: int = 1, lane: str = "read") -> Asked:
        request = Asked(name, urgency, num_blocks, lane)
        self.order.add(request)
        return request

    def take(self) -> str:
        request = self.order.take()
        if request is None:
            return "-"
        self.urgencies.append(request.urgency)
        request.num_blocks -= 1
        if not request.num_blocks:
            self.order.remove(request)
        return request.name

    def take_and_end(self, count: int) -> str:
        names = ""
        for _ in range(count):
            names += self.take()
            self.end_first()
        return names

    def end_first(self) -> None:
        self.order.end(self.urgencies.pop(0), 1)


def test_equals_keep_their_order_and_lanes_take_turns():
    queue = Queue()
    queue.add("a", BULK_URGENCY, 2)
    queue.add("b", BULK_URGENCY)
    queue.add("x", BULK_URGENCY, 2, lane="write")
    assert queue.take_and_end(5) == "axaxb"
    assert queue.take() == "-"
    assert not queue.order


def test_the_urgent_pass_between_blocks_and_across_lanes():
    queue = Queue()
    queue.add("x", BULK_URGENCY, 3, lane="write")
    assert queue.take_and_end(1) == "x"
    queue.add("a", BULK_URGENCY + 7)
    queue.add("b", PLANNED + 2)
    queue.add("c", PLANNED + 1)
    queue.add("d", 0)
    assert queue.take_and_end(6) == "dcbxax"


def test_all_but_the_first_class_is_held_while_much_is_in_flight():
    queue = Queue(max_blocks=5, max_bytes=4)
    first = queue.add("a", BULK_URGENCY, 4)
    queue.add("x", BULK_URGENCY, 4, lane="write")
    assert [queue.take() for _ in range(5)] == ["a", "x", "a", "x", "-"]
    queue.add("p", PLANNED)
    assert queue.take() == "-"
    queue.add("u", 0, 2)
    assert queue.take() == "u"
    for _ in range(4):
        queue.end_first()
    assert [queue.take() for _ in range(2)] == ["u", "-"]  # half as much beside the urgent
    queue.end_first()
    assert [queue.take() for _ in range(2)] == ["p", "-"]
    queue.end_first()
    assert [queue.take() for _ in range(2)] == ["x", "-"]
    first.urgency = 0
    assert queue.take() == "a"


def test_the_number_of_blocks_in_flight_is_limited_too():
    queue = Queue(max_blocks=2)
    queue.add("a", BULK_URGENCY, 3)
    assert [queue.take() for _ in range(3)] == ["a", "a", "-"]


def test_the_oldest_is_served_while_urgent_ones_go_on():
    queue = Queue(max_blocks=1, max_bytes=1)
    queue.add("a", BULK_URGENCY, 3, lane="write")
    taken = ""
    for _ in range(60):
        queue.add("u", 0, 2)
        taken += queue.take()
    expected = ("u" * MAX_PASSED + "a") * 3
    assert taken == expected + "u" * (60 - len(expected))
