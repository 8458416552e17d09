"""What crosses a cut, read from the graph that a forward has left.

[Note: Wide cuts]
A cut is *narrow* if the gradients that pass it are those of its crossings. Anything else makes it
wide: a tensor that a later layer uses and was not given at the cut (hidden states that a loss
collects, a skip connection over several blocks), or a leaf that is used on both sides and cannot be
held back (ledger.py), such as an input of the user's that wants a gradient.

In a graph that was not cut, the sequence numbers of its nodes say which were made before a cut. So
one walk over a whole graph finds the wide ones among the cuts that it has been marked with. In a
graph that was cut, each segment has to be by itself: no node belongs to two, and none leads to a
seam other than that at the segment's beginning. What was narrow once may be wide in another step,
as the module's control flow changes; then `Crossed` says so before any gradient has moved.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from offload.engine.accumulation.cuts import Cut, seam_of

_Leaf: Any = getattr(torch._C._functions, "AccumulateGrad")  # noqa: B009 - not in torch's stubs

# Whether the gradients of a leaf, if it comes in parts, can be held back and put together.
CanHold = Callable[[torch.Tensor], bool]


class Crossed(Exception):  # noqa: N818 - a finding, caught where the step can still run otherwise
    """A graph was cut where it is not narrow; nothing has moved.

    Attributes:
        reasons: by cut, what crosses it.
    """

    def __init__(self, reasons: dict[Cut, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


class Mark(NamedTuple):
    """A cut in a graph that was not cut there.

    Attributes:
        position: nodes made before it have smaller sequence numbers.
        edges: what may cross it.
    """

    cut: Cut
    position: int
    edges: frozenset[tuple[Any, int]]


def wide_cuts(root: Any, marks: Sequence[Mark], can_hold: CanHold) -> dict[Cut, str]:
    """The wide ones among the marked cuts, and what makes them so.

    Args:
        root: the node of the loss.
        marks: in the order of their positions.
        can_hold: of leaves.
    """
    positions = [mark.position for mark in marks]
    found: dict[Cut, str] = {}

    def between(first: int, last: int) -> Sequence[Mark]:
        return marks[bisect_right(positions, first) : bisect_right(positions, last)]

    leaves: dict[int, tuple[torch.Tensor, int, int]] = {}
    # A view's node is made anew where it is used; it counts as old as the node that uses it.
    ages: dict[Any, int] = {}
    stack = [(root, 0, max([*positions, root._sequence_nr()]))]
    while stack:
        node, output, age_of_user = stack.pop()
        is_new = node not in ages
        age = ages.setdefault(node, min(node._sequence_nr(), age_of_user))
        for mark in between(age, age_of_user):
            if (node, output) not in mark.edges:
                found[mark.cut] = _output_of(node)
        for child, child_output in node.next_functions if is_new else ():
            if isinstance(child, _Leaf):
                leaf = child.variable
                _, first, last = leaves.get(id(leaf), (leaf, age, age))
                leaves[id(leaf)] = leaf, min(first, age), max(last, age)
            elif child is not None:
                stack.append((child, child_output, age))
    for leaf, first, last in leaves.values():
        crossed = [mark.cut for mark in between(first, last)]
        if crossed and not can_hold(leaf):
            reason = f"a leaf of shape {list(leaf.shape)}, which is used on both sides"
            found.update(dict.fromkeys(crossed, reason))
    return found


class Uses:
    """Which leaves the segments of one graph use.

    Attributes:
        leaves: by id.
        segments: the segments that use a leaf, ascending, by its id.
    """

    def __init__(self) -> None:
        self.leaves: dict[int, torch.Tensor] = {}
        self.segments: dict[int, list[int]] = {}

    def add(self, leaf: torch.Tensor, segment: int) -> None:
        """The segment uses the leaf."""
        self.leaves[id(leaf)] = leaf
        segments = self.segments.setdefault(id(leaf), [])
        if not segments or segments[-1] != segment:
            segments.append(segment)


def check_segments(cuts: Sequence[Cut], roots: Sequence[Iterable[Any]]) -> Uses:
    """Check that every segment of a graph is by itself.

    Args:
        cuts: where the segments begin.
        roots: the nodes from which backward goes into each.

    Raises:
        Crossed: one is not.
    """
    uses = Uses()
    owners: dict[Any, int] = {}

    def is_entrance(node: Any, segment: int) -> bool:
        """Whether there is more of the segment behind the node, which nobody has seen yet."""
        is_new = node not in owners
        crossing = seam_of(node)
        owner = owners.setdefault(node, segment if crossing is None else crossing.segment)
        if owner != segment:
            first, last = sorted((owner, segment))
            raise Crossed(dict.fromkeys(cuts[first + 1 : last + 1], _output_of(node)))
        return is_new and crossing is None

    for segment, nodes in enumerate(roots):
        stack = [node for node in nodes if is_entrance(node, segment)]
        while stack:
            for child, _ in stack.pop().next_functions:
                if isinstance(child, _Leaf):
                    uses.add(child.variable, segment)
                elif child is not None and is_entrance(child, segment):
                    stack.append(child)
    return uses


def _output_of(node: Any) -> str:
    return f"an output of {node.name()}"
