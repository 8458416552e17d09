"""The interpreter of pickles: what it makes, what it refuses, and that it runs nothing."""

from __future__ import annotations

import collections
import pickle
import pickletools
import tracemalloc
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import CheckpointError
from offload.state.pickled import Constructor, Record, class_names, interpret
from offload.state.torch_format import encode

ALLOWED = {
    ("collections", "OrderedDict"): Constructor(dict),
    **class_names(__name__, "Point", "Line"),
    ("math", "pi"): 3,
}


class Point:
    def __init__(self, x):
        self.x = x


def read(data: bytes, names=ALLOWED, **options):
    return interpret(data, names, where="file.pt", **options)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
)


def plain(scalars: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.lists(inner, max_size=5).map(tuple)
            | st.dictionaries(st.text(max_size=5) | st.integers(-99, 99), inner, max_size=5)
        ),
        max_leaves=30,
    )


@given(plain(SCALARS | st.binary(max_size=20)), st.integers(3, 5))
@settings(max_examples=300, deadline=None)
def test_plain_values_are_those_of_pickle(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@given(plain(SCALARS))
@settings(max_examples=100, deadline=None)
def test_protocol_2_and_what_offload_writes(value):
    assert read(pickle.dumps(value, 2)) == value
    assert read(encode(value)) == value
    assert pickle.loads(encode(value)) == value


def test_objects_are_records_and_shared_values_stay_shared():
    point = Point([1])
    value = read(pickle.dumps({"a": point, "b": point, "c": point.x}, 4))
    assert type(value["a"]) is Record
    assert (value["a"].kind, value["a"].state) == (f"{__name__}.Point", {"x": [1]})
    assert value["a"] is value["b"]
    assert value["c"] is value["a"].get("x")
    ordered = collections.OrderedDict(x=1)
    ordered.extra = "attribute"
    assert read(pickle.dumps(ordered, 2)) == {"x": 1}
    loop: list = []
    loop.append(loop)
    found = read(pickle.dumps(loop, 4))
    assert found[0] is found


class Planted:
    def __reduce__(self):
        return (exec, ("print('ran')",))


def dumped(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


REFUSED = {
    "a call of exec": pickle.dumps(Planted(), 4),
    "os.system": dumped(b"cposix\nsystem\nX\x02\0\0\0ls\x85R"),
    "an attribute of an allowed class": pickle.dumps(Planted(), 2).replace(b"exec", b"dict"),
    "nested names": dumped(b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93"),
    "a name of no string": dumped(b"K\x01K\x01\x93"),
    "a long name": dumped(b"c" + b"m" * 5000 + b"\nx\n"),
    "a name without end": dumped(b"cos")[:-1],
    "another persistent id": dumped(b"K\x01Q"),
    "a call of a value": dumped(b"cmath\npi\n)R"),
    "a call without a tuple": dumped(b"ccollections\nOrderedDict\nNR"),
    "other arguments": dumped(b"ccollections\nOrderedDict\n(K\x01K\x02tR"),
    "an object of a function": dumped(b"ccollections\nOrderedDict\n)\x81"),
    "an object with arguments": dumped(f"c{__name__}\nPoint\n".encode(), b"K\x01\x85\x81"),
    "a state of a list": dumped(b"]}b"),
    "a state of a constructor": dumped(b"ccollections\nOrderedDict\n}b"),
    "a state of a constant": dumped(b"cmath\npi\n}b"),
    "a state that is a list": dumped(f"c{__name__}\nPoint\n".encode(), b")\x81]b"),
    "append to a tuple": dumped(b")K\x01a"),
    "append to nothing": dumped(b"K\x01a"),
    "an item of a list": dumped(b"]K\x01K\x01s"),
    "an item of a constructor": dumped(b"ccollections\nOrderedDict\nK\x01K\x01s"),
    "odd items": dumped(b"}(K\x01u"),
    "a key that is a tuple": dumped(b"}K\x01\x85K\x01s"),
    "a key that is a float": pickle.dumps({1.5: 1}, 4),
    "a key that is large": pickle.dumps({2**40: 1}, 4),
    "a key that is a list": dumped(b"}]K\x01s"),
    "a large integer": pickle.dumps(2**200, 4),
    "a value that is not there": dumped(b"h\x05"),
    "below a mark": dumped(b"K\x01(\x85"),
    "no mark": dumped(b"t"),
    "a mark left": dumped(b"K\x01("),
    "nothing": dumped(),
    "too much": dumped(b"NN"),
    "bytes behind": dumped(b"N") + b"N",
    "no stop": b"\x80\x02N",
    "no protocol": b"N.",
    "protocol 1": b"\x80\x01N.",
    "protocol 9": b"\x80\x09N.",
    "two protocols": dumped(b"\x80\x02N"),
    "a long frame": dumped(b"\x95\xff\0\0\0\0\0\0\0N"),
    "a long string": dumped(b"X\xff\xff\xff\x7fabc"),
    "a very long string": dumped(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc"),
    "no text": dumped(b"X\x01\0\0\0\xff"),
    "empty": b"",
    "many marks": dumped(b"(" * 100_001),
    "many values": dumped(b"N" * 100_002),
    **{
        f"opcode {opcode.name}": dumped(b"N" * 3 + opcode.code.encode("latin1") + b"N" * 20)
        for opcode in pickletools.opcodes
        if opcode.name
        in {
            *("INT", "LONG", "STRING", "UNICODE", "FLOAT", "PERSID", "INST", "OBJ", "DUP", "POP"),
            *("POP_MARK", "EXT1", "EXT2", "EXT4", "LONG4", "BINSTRING", "SHORT_BINSTRING", "GET"),
            *("PUT", "NEWOBJ_EX", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8", "LIST"),
            *("NEXT_BUFFER", "READONLY_BUFFER", "BINBYTES8", "DICT"),
        }
    },
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_everything_else_is_refused_where_it_stands(data, capsys):
    with pytest.raises(
        CheckpointError, match=r"file\.pt: its pickle is refused at byte \d+: ."
    ) as caught:
        read(data)
    assert len(str(caught.value)) < 500
    assert not capsys.readouterr().out


def test_the_refusal_names_the_name_or_the_opcode():
    with pytest.raises(CheckpointError, match=r"byte 2: it names 'posix\.system', which is not"):
        read(REFUSED["os.system"])
    with pytest.raises(CheckpointError, match=r"opcode 0x69, which no checkpoint needs"):
        read(REFUSED["opcode INST"])


def test_limits_of_values():
    data = pickle.dumps(list(range(1000)), 4)
    assert read(data) == list(range(1000))
    with pytest.raises(CheckpointError, match="more than 500 values"):
        read(data, max_values=500)


def test_shared_values_cost_nothing():
    """A thousand levels that double in size each: read as what they are, and never walked."""
    data = b"\x80\x02)" + b"".join(b"q\x00h\x00\x86" for _ in range(1000)) + b"."
    found = read(data)
    assert found[0] is found[1]
    deep = read(dumped(b")" + b"\x85" * 90_000))
    assert len(deep) == 1
    with pytest.raises(CheckpointError, match="no usual key"):
        read(data[:-1].replace(b"\x80\x02)", b"\x80\x02})", 1) + b"Ns.")


SAMPLES = [
    pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": {"c": Point(1)}}, protocol)
    for protocol in (2, 3, 4, 5)
]
PLAIN_TYPES = (type(None), bool, int, float, str, bytes, list, tuple, dict, Record, Constructor)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "repeat"]),
        st.integers(0, 400),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, changes) -> bytes:
    for kind, at, piece in changes:
        at %= len(data) + 1
        if kind == "flip":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = data[:at] + data[at : at + 40] * len(piece) + data[at:]
    return data


@given(st.sampled_from(SAMPLES), MUTATIONS)
@settings(max_examples=500, deadline=None)
def test_mutated_pickles_are_refused_or_plain(data, changes):
    try:
        value = read(mutated(data, changes))
    except CheckpointError:
        return
    assert isinstance(value, PLAIN_TYPES)


KNOWN_OPCODES = [
    *(b"N", b"\x88", b"\x89", b"K\x07", b"M\x07\x01", b"J\x01\0\0\0", b"\x8a\x01\x05", b"("),
    *(b"G?\xf0\0\0\0\0\0\0", b"\x8c\x01a", b"X\x01\0\0\0b", b"C\x01c", b")", b"]", b"}", b"t"),
    *(b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"q\x01", b"\x94", b"h\x01", b"h\x00"),
    *(b"R", b"\x81", b"b", b"ccollections\nOrderedDict\n", f"c{__name__}\nPoint\n".encode()),
]


@given(st.lists(st.sampled_from(KNOWN_OPCODES), max_size=60))
@settings(max_examples=500, deadline=None)
def test_programs_of_known_opcodes_are_refused_or_plain(opcodes):
    data = dumped(*opcodes)
    tracemalloc.start()
    try:
        value = read(data)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000 + 1_000 * len(data)
    assert isinstance(value, PLAIN_TYPES)


def test_pathlib_and_friends_are_not_known_by_themselves():
    with pytest.raises(CheckpointError, match="PurePosixPath"):
        read(pickle.dumps(PurePosixPath("/a"), 4))
