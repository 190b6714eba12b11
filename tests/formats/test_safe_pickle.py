import collections
import pickle  # noqa: TID251
import tracemalloc
from pickletools import opcodes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_stubs import as_bytes, container_names, numpy_names, to_array
from cdistill.formats.pickle_values import LONG, Budget, LongBytes, LongText, Record
from cdistill.formats.safe_pickle import LONGEST_LINE, read_pickle, read_pickle_at
from tests.assembler import program

NAMES = {**container_names(), **numpy_names()}
KEYS = st.none() | st.booleans() | st.integers(-(1 << 20), 1 << 20) | st.text(max_size=9) | st.binary(max_size=9)
LEAVES = KEYS | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=30)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(collections.OrderedDict)
        | st.sets(KEYS)
    ),
    max_leaves=30,
)


def same(got, wanted):
    """Equal in value and type, an OrderedDict being a dict; True and 1 are told apart, as are signed zeros."""
    return repr(plain(got)) == repr(plain(wanted))


def plain(value):
    if isinstance(value, set):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


@given(value=VALUES, protocol=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_values_come_back_as_they_were(value, protocol):
    assert same(read_pickle(pickle.dumps(value, protocol=protocol), NAMES), value)


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_recursive_containers_stay_so(protocol):
    inner = [1]
    value = {"a": inner, "b": inner, "self": [], "tuple": ([],)}
    value["self"].append(value)
    value["tuple"][0].append(value["tuple"])
    found = read_pickle(pickle.dumps(value, protocol=protocol), NAMES)
    assert found["a"] is found["b"]
    assert found["self"][0] is found
    assert found["tuple"][0][0] is found["tuple"]


@pytest.mark.parametrize("size", [LONG - 1, LONG, 3 * LONG])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_long_bytes_stay_in_the_file_and_keep_every_byte(size, protocol):
    data = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    found = read_pickle(pickle.dumps(data, protocol=protocol), NAMES)
    assert isinstance(found, LongBytes) == (size >= LONG or (protocol == 2 and size * 1.5 >= LONG))
    assert as_bytes(found) == data


def test_long_texts_stay_in_the_file():
    found = read_pickle(pickle.dumps("ä" * LONG), NAMES)
    assert isinstance(found, LongText)
    assert found.decode() == "ä" * LONG
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        read_pickle(program(b"X", (4).to_bytes(4, "little"), b"\xff\xfe\xfd\xfc"), NAMES)


NUMBERS = [np.float64(0.1), np.float32(0.1), np.float16(2), np.int64(-7), np.int32(7), np.uint8(200), np.bool_(True)]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: str(number.dtype))
def test_numbers_of_numpy_become_those_of_python(number, protocol):
    found = read_pickle(pickle.dumps(number, protocol=protocol), NAMES)
    assert found == number.item()
    assert type(found) is type(number.item())


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (200, 300)])
def test_arrays_come_back(shape, order, protocol):
    array = np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype="<i4", order=order)
    found = to_array(read_pickle(pickle.dumps(array, protocol=protocol), NAMES))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert found.flags.owndata


def python2_batch(count):
    """A data batch of CIFAR-10 as Python 2 wrote it: protocol 2, byte strings."""
    data = bytes(range(256)) * 12 * count
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K%cM\x00\x0ct" % count
    array += dtype + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    labels = b"](" + bytes([c for k in range(count) for c in (ord("K"), k % 10)]) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"U\x0bbatch_labelU\x01xu."


def test_a_batch_of_cifar10_is_read():
    found = read_pickle(python2_batch(30), NAMES)
    assert set(found) == {b"data", b"labels", b"batch_label"}
    assert found[b"labels"] == [k % 10 for k in range(30)]
    images = to_array(found[b"data"])
    assert images.shape == (30, 3072)
    assert images.dtype == np.uint8
    assert images.tobytes() == bytes(range(256)) * 360


def test_an_ordered_dict_of_python_2_is_made_from_pairs():
    found = read_pickle(b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R.", NAMES)
    assert found == {b"a": 1, b"b": 2}
    assert read_pickle(program(b"ccollections\nOrderedDict\n)R}b"), NAMES) == {}


def test_text_of_protocol_0_of_python_2_stays_bytes():
    assert read_pickle(rb"S'a\x00\'\\\n\t'" + b"\n.", {}) == b"a\0'\\\n\t"
    assert read_pickle(b"I01\n.", {}) is True
    assert read_pickle(b"L-12L\n.", {}) == -12
    assert read_pickle(rb"S'\\q\xff\x41'" + b"\n.", {}) == b"\\q\xffA"
    assert read_pickle(b"S'" + bytes(range(128, 256)) + b"'\n.", {}) == bytes(range(128, 256))
    for text in (rb"\q", rb"a\101", rb"\x4", rb"\\\N{DIGIT ONE}", b"\\"):
        with pytest.raises(CorruptFileError, match="escape"):
            read_pickle(b"S'" + text + b"'\n.", {})


@pytest.mark.parametrize("code", [b"S'", b"V", b"I", b"L", b"F", b"Np", b"g", b"c"])
def test_endless_lines_are_refused_before_they_are_read(code):
    with pytest.raises(CorruptFileError, match="a line of 65536 bytes or more"):
        read_pickle(code + b"1" * LONGEST_LINE + b"'\n.", {})
    assert len(read_pickle(b"V" + b"x" * (LONGEST_LINE - 1) + b"\n.", {})) == LONGEST_LINE - 1


def test_lines_are_paid_for():
    budget = Budget(100)
    read_pickle(b"V" + b"x" * 90 + b"\n.", {}, budget=budget)
    assert budget.work == Budget(100).work - 90


REFUSED = {
    "BYTEARRAY8": bytes(8),
    "EXT1": b"\x01",
    "EXT2": b"\x01\x00",
    "EXT4": b"\x01\x00\x00\x00",
    "FROZENSET": b"",
    "INST": b"os\nsystem\n",
    "NEWOBJ_EX": b"",
    "NEXT_BUFFER": b"",
    "OBJ": b"",
    "PERSID": b"x\n",
    "READONLY_BUFFER": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_opcodes_that_are_not_needed_are_refused_by_name(name):
    code = next(opcode.code.encode("latin-1") for opcode in opcodes if opcode.name == name)
    with pytest.raises(CorruptFileError, match=rf"byte 3: the opcode {name} is not allowed"):
        read_pickle(program(b"(", code, REFUSED[name]), NAMES)


def test_every_opcode_is_either_known_or_refused_by_name():
    for opcode in opcodes:
        with pytest.raises(CorruptFileError) as error:
            read_pickle(opcode.code.encode("latin-1"), {})
        assert ("is not allowed" in str(error.value)) == (opcode.name in REFUSED), opcode.name


def test_a_record_takes_its_state_once_and_only_as_data():
    names = {"a.B": lambda arguments: Record("a.B", arguments)}
    found = read_pickle(program(b"ca\nB\n)R}X\x01\x00\x00\x00xK\x05sb"), names)
    assert (found.name, found.arguments, found.state) == ("a.B", (), {"x": 5})
    assert not hasattr(found, "x")
    with pytest.raises(CorruptFileError, match=r"sets the state of a\.B, which has none"):
        read_pickle(program(b"ca\nB\n)R}b}b"), names)


def test_persistent_ids_are_given_to_the_caller_alone():
    assert read_pickle(program(b"K\x07Q"), {}, lambda value: value + 1) == 8
    with pytest.raises(CorruptFileError, match="outside of the pickle"):
        read_pickle(program(b"K\x07Q"), {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (program(b"}", b")", b"2\x86" * 200, b"K\x01s"), "a tuple cannot be a key"),
        (program(b"\x8f(", b")", b"2\x86" * 200, b"\x90"), "a tuple cannot be a key"),
        (program(b"}" + b"G" + bytes(8) + b"Ns"), "a float cannot be a key"),
        (program(b"}\x8a\x08" + b"\xff" * 7 + b"\x01Ns"), "144115188075855871 cannot be a key"),
        (program(b"}X" + (5000).to_bytes(4, "little") + b"x" * 5000 + b"Ns"), "cannot be a key"),
        (b"\x80\x04c_codecs\nencode\nq\x01X\x00\xf0\x00\x00" + b"x" * 61440 + b"X\x06\x00\x00\x00latin1\x86q\x00R"
         + b"h\x01h\x00R" * 100_000 + b".", "unfold into much more"),
        (b"\x80\x04c__builtin__\nset\nq\x01](" + b"K\x01" * 20_000 + b"e\x85q\x00R" + b"h\x01h\x00R" * 50_000 + b".",
         "unfold into much more"),
        (program(b"L" + b"9" * 60_000 + b"L\n"), "not a value"),
        (program(b"S'" + b"\\n" * 500_000 + b"'\n"), "a line of 65536 bytes or more"),
        (program(b"V" + b"\\u1234" * 200_000 + b"\n"), "a line of 65536 bytes or more"),
        (program(*[b"S'" + b"\\n" * 30_000 + b"'\n0"] * 20, b"\xff"), "0xff is no opcode"),
        (program(b"\x8b\x00\x10\x00\x00" + b"\x01" * 4096), "an integer of 4096 bytes"),
    ],
)  # fmt: skip
def test_nothing_grows_beyond_the_size_of_the_file(data, reason):
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match=reason):
            read_pickle(data, NAMES)
        assert tracemalloc.get_traced_memory()[1] < 15 * len(data) + 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("code", [b"(", b"]", b"\x8f", b"2", b"\x94"])
def test_operations_are_counted(code):
    """The dearest opcodes take two hundred bytes each, so their number bounds the memory and the time."""
    data = program(b"N", code * 2_000)
    with pytest.raises(CorruptFileError, match="byte 1002: it takes more operations than any known file"):
        read_pickle_at(data, 0, {}, budget=Budget(len(data), operations=1_001))
    assert Budget(1).operations == 1_000_000


def test_nested_lists_beyond_any_stack_are_read():
    depth = 300_000
    found = read_pickle(program(b"]" * depth, b"a" * (depth - 1)), {})
    for _ in range(depth - 1):
        found = found[0]
    assert found == []
