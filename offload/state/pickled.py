"""Plain values out of pickles, without unpickling: a strict interpreter of few opcodes.

[Note: pickles]
A pickle is a program for a stack machine. Unpickling runs it, and it may import and call whatever
it names: a checkpoint from a stranger is then a stranger's program. Here nothing that a file names
is ever imported or called. The opcodes that plain containers, numbers and strings need are carried
out; a name ("module", "name") is looked up in a table of the caller's, and stands for a value or
for a function of ours that makes a plain one; an object of a class in the table is a `Record`: the
class's name and its state. Any other opcode or name is refused, with the byte where it stands.

What a file can cost is bounded. Opcodes are read once, from bytes of limited length; the number of
values, the height of the stack and the size of integers have limits; keys of dicts are strings,
small integers, None or records, so that no hash is expensive; values may share parts and may be
nested deeply, and nobody here walks, compares or prints them.
Source: the opcodes' table in Python's pickletools.py; https://docs.python.org/3/library/pickle.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from offload.errors import CheckpointError

MAX_VALUES = 1_000_000
"""Opcodes that one pickle may have, unless the caller says otherwise."""
_MAX_STACK = 100_000
_MAX_INTEGER_BYTES = 16
_MAX_KEY = 1 << 31
_PROTOCOLS = range(2, 6)
_MAX_SHOWN = 100  # characters of a name in an error


class Record:
    """An object of a known class: its name, and the state that the file gives it.

    Attributes:
        kind: "module.name" of the class.
        state: a dict or tuple; None if the file gives none.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None

    def get(self, name: str) -> Any:
        """A field of the state; None if it has none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


@dataclass(frozen=True, slots=True)
class Constructor:
    """What a name that is called stands for: a function of ours, from arguments to a plain value.

    It raises ValueError for arguments that it does not take. `makes_objects`: the name is a class,
    and makes an object without arguments, too.
    """

    make: Callable[..., Any]
    makes_objects: bool = False


Names = Mapping[tuple[str, str], Any]
"""(module, name) -> a `Constructor`, or the value that the name stands for."""


def class_names(module: str, *names: str) -> dict[tuple[str, str], Constructor]:
    """A table that knows classes of a module, whose objects become records."""
    return {
        (module, name): Constructor(_record_of(f"{module}.{name}"), makes_objects=True)
        for name in names
    }


def _record_of(kind: str) -> Callable[..., Record]:
    def make(*_: Any) -> Record:
        return Record(kind)

    return make


def interpret(
    data: bytes,
    names: Names,
    *,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
    max_values: int = MAX_VALUES,
) -> Any:
    """The value of a pickle of protocol 2 to 5, made of None, bool, int, float, str, bytes, list,
    tuple, dict, `Record`, and what the table makes; see [Note: pickles].

    Args:
        data: the whole pickle, nothing behind it.
        names: what its names stand for.
        where: names the file in errors.
        persistent: from a persistent id to its value; it raises ValueError for one that it refuses.
            None: there may be none.
        max_values: opcodes that it may have.

    Raises:
        CheckpointError: it is damaged, too large, or asks for anything else.
    """
    return _Machine(data, names, where, persistent, max_values).run()


class _Mark:
    """Where the items of a container begin on the stack."""


_MARK = _Mark()


class _Machine:
    """One pickle under interpretation; [Note: pickles]."""

    def __init__(
        self,
        data: bytes,
        names: Names,
        where: str,
        persistent: Callable[[Any], Any] | None,
        max_values: int,
    ) -> None:
        self._data = data
        self._at = 0  # the next byte
        self._names = names
        self._where = where
        self._persistent = persistent
        self._max_values = max_values
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        self._started = self._opcode_at = 0

    def run(self) -> Any:
        """Carry out every opcode up to the last byte."""
        if self._data[:1] != b"\x80":
            self._refuse("it does not begin with a protocol")
        count = 0
        while True:
            self._opcode_at = self._at
            (opcode,) = self._take(1)
            count += 1
            if count > self._max_values or len(self._stack) > _MAX_STACK:
                self._refuse(f"more than {self._max_values} values, or {_MAX_STACK} at a time")
            if opcode == ord("."):
                return self._result()
            carry_out = _OPCODES.get(opcode)
            if carry_out is None:
                self._refuse(f"opcode 0x{opcode:02x}, which no checkpoint needs")
            try:
                carry_out(self)
            except (ValueError, struct.error) as error:
                self._refuse(str(error))

    def _result(self) -> Any:
        if self._at != len(self._data) or len(self._stack) != 1 or self._marks:
            self._refuse("bytes or values are left over at its end")
        return self._stack[0]

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where}: its pickle is refused at byte {self._opcode_at}: {what}",
            expected="plain values and tensors; nothing in it was run",
            remedy="if you trust the file, convert it to safetensors with what wrote it",
        )

    # -- operands ----------------------------------------------------------------------------------

    def _take(self, nbytes: int) -> bytes:
        taken = self._data[self._at : self._at + nbytes]
        if len(taken) != nbytes:
            self._refuse("it ends early")
        self._at += nbytes
        return taken

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise ValueError("it ends early")
        line = self._take(end - self._at)
        self._take(1)
        return _text(line)

    # -- the stack ---------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        self._need(1)
        return self._stack.pop()

    def _need(self, count: int) -> None:
        """There are so many values above the last mark."""
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise ValueError("values are missing on its stack")

    def _top(self) -> Any:
        self._need(1)
        return self._stack[-1]

    def _mark(self) -> None:
        self._marks.append(len(self._stack))
        if len(self._marks) > _MAX_STACK:
            raise ValueError("too many marks")

    def _items(self) -> list[Any]:
        """What has been pushed since the last mark, which goes."""
        if not self._marks:
            raise ValueError("a mark is missing on its stack")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # -- opcodes -----------------------------------------------------------------------------------

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if self._opcode_at or protocol not in _PROTOCOLS:
            raise ValueError(f"protocol {protocol}, expected 2 to 5 and once")

    def _frame(self) -> None:
        nbytes = self._number("<Q")
        if nbytes > len(self._data) - self._at:
            raise ValueError("a frame that is longer than the file")

    def _integer(self, length: int) -> None:
        if length > _MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _string(self, length: int) -> None:
        self._push(_text(self._take(length)))

    def _tuple(self, count: int) -> None:
        self._need(count)
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _append(self, items: Sequence[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError("something is appended to what is no list")
        target.extend(items)

    def _set(self, items: Sequence[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError("an item is set in what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise ValueError(f"a {type(key).__name__} that is no usual key of a dict")
            target[key] = value

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"value {index} is used before it is there")
        self._push(self._memo[index])

    def _global(self) -> None:
        module = self._line()
        self._push(self._meaning(module, self._line()))

    def _stack_global(self) -> None:
        self._need(2)
        name, module = self._pop(), self._pop()
        self._push(self._meaning(module, name))

    def _meaning(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no string")
        if (module, name) not in self._names:
            shown = f"{module}.{name}"[:_MAX_SHOWN]
            raise ValueError(f"it names {shown!r}, which is not known here")
        return self._names[module, name]

    def _call(self) -> None:
        self._need(2)
        arguments, constructor = self._pop(), self._pop()
        if type(constructor) is not Constructor or type(arguments) is not tuple:
            raise ValueError("a call of something that is no constructor")
        try:
            self._push(constructor.make(*arguments))
        except TypeError as error:
            raise ValueError("a constructor with other arguments than it takes") from error

    def _new_object(self) -> None:
        self._need(2)
        arguments, constructor = self._pop(), self._pop()
        if type(constructor) is not Constructor or not constructor.makes_objects or arguments != ():
            raise ValueError("an object of something that is no known class")
        self._push(constructor.make())

    def _build(self) -> None:
        self._need(2)
        state, target = self._pop(), self._top()
        if type(state) not in (dict, tuple):
            raise ValueError("a state that is neither dict nor tuple")
        if type(target) is Record:
            target.state = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are nobody's business
            raise ValueError("a state for something that has none")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("a persistent id, and nothing stands outside of this pickle")
        self._push(self._persistent(self._pop()))


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogatepass")


def _is_key(key: Any) -> bool:
    if type(key) is int:
        return -_MAX_KEY < key < _MAX_KEY
    return key is None or type(key) in (str, bool, Record)


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): carry_out
    for code, carry_out in {
        "\x80": _Machine._protocol,
        "\x95": _Machine._frame,
        "N": lambda m: m._push(None),
        "\x88": lambda m: m._push(True),
        "\x89": lambda m: m._push(False),
        "K": lambda m: m._push(m._number("<B")),
        "M": lambda m: m._push(m._number("<H")),
        "J": lambda m: m._push(m._number("<i")),
        "\x8a": lambda m: m._integer(m._number("<B")),
        "G": lambda m: m._push(m._number(">d")),
        "\x8c": lambda m: m._string(m._number("<B")),
        "X": lambda m: m._string(m._number("<I")),
        "\x8d": lambda m: m._string(m._number("<Q")),
        "C": lambda m: m._push(m._take(m._number("<B"))),
        "B": lambda m: m._push(m._take(m._number("<I"))),
        "(": _Machine._mark,
        ")": lambda m: m._push(()),
        "]": lambda m: m._push([]),
        "}": lambda m: m._push({}),
        "t": lambda m: m._push(tuple(m._items())),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "a": lambda m: m._append([m._pop()]),
        "e": lambda m: m._append(m._items()),
        "s": lambda m: m._set([*reversed([m._pop(), m._pop()])]),
        "u": lambda m: m._set(m._items()),
        "q": lambda m: m._put(m._number("<B")),
        "r": lambda m: m._put(m._number("<I")),
        "\x94": lambda m: m._put(len(m._memo)),
        "h": lambda m: m._get(m._number("<B")),
        "j": lambda m: m._get(m._number("<I")),
        "c": _Machine._global,
        "\x93": _Machine._stack_global,
        "R": _Machine._call,
        "\x81": _Machine._new_object,
        "b": _Machine._build,
        "Q": _Machine._persistent_id,
    }.items()
}
