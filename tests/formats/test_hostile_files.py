"""Files made to do harm: every one ends in one line, runs nothing and stays small."""

# ruff: noqa: TID251 - the files that are to be read must be written here

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from cdistill.cli.app import guard
from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError
from cdistill.formats.edm_pickles import read_edm
from cdistill.formats.pickle_stubs import to_array
from cdistill.formats.safe_pickle import read_pickle
from cdistill.formats.torch_files import map_file, read_torch_file
from tests import assembler as a
from tests.assembler import (
    archive,
    call,
    legacy,
    many,
    mapping,
    name,
    number,
    persistent,
    program,
    storage,
    tensor,
    text,
)
from tests.formats.test_safe_pickle import NAMES

EVIL = "touch hacked"


@pytest.mark.parametrize(("place", "what"), [("/", "folder"), (os.devnull, "device")])
def test_what_is_no_file_is_said(place, what):
    with pytest.raises(MissingAssetError, match=f"^{place}: a {what}, not a file; give the path of a file$"):
        map_file(Path(place))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (IsADirectoryError(21, "Is a directory", "/"), "/: is a folder; a file is needed"),
        (PermissionError(13, "Permission denied", "/"), "/: Permission denied; check its permissions"),
        (PermissionError(13, "Permission denied", "/none"), "/none: Permission denied; choose another place"),
        (OSError(28, "No space left", "/none"), "/none: No space left; choose another place, or make room"),
    ],
)
def test_an_error_of_the_system_says_what_to_do(error, message, capsys):
    def command():
        raise error

    assert guard(command) in (2, 7)
    assert message in " ".join(capsys.readouterr().err.split())


class Hook:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, (EVIL,)


def numpy_scalar(kind="f8", data=bytes(8), order="<"):
    dtype = call("numpy", "dtype", text(kind), a.FALSE, a.TRUE)
    dtype += many(number(3), text(order), a.NONE, a.NONE, a.NONE, number(-1), number(-1), number(0)) + a.BUILD
    return call("numpy.core.multiarray", "scalar", dtype, a.raw(data))


def module(**children):
    tables = {"_parameters": a.EMPTY_DICT, "_buffers": a.EMPTY_DICT, "_modules": mapping(**children)}
    return persistent("Block", state=mapping(**tables))


def doubled_modules(count):
    """A tree of modules that has 2^count leaves when it is walked, in a few bytes."""
    inner = module() + b"q\x00"
    for _ in range(count):
        inner = module(a=inner, b=b"h\x00") + b"q\x00"
    return inner


def network(**changes):
    numbers = dict.fromkeys(
        ["img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "sigma_data"], a.TRUE
    )
    tables = {"_parameters": a.EMPTY_DICT, "_buffers": a.EMPTY_DICT, "_modules": mapping(model=song(a.EMPTY_DICT))}
    arguments = {"_init_args": a.EMPTY_TUPLE, "_init_kwargs": mapping(model_type=text("SongUNet"))}
    return persistent(state=mapping(use_fp16=a.TRUE, **{**numbers, **tables, **arguments, **changes}))


def song(inner):
    return persistent("SongUNet", state=mapping(_parameters=a.EMPTY_DICT, _buffers=a.EMPTY_DICT, _modules=inner))


SYSTEM = call("os", "system", text(EVIL))
CALL = b"\x80\x02"
PICKLES = {
    "os.system": (pickle.dumps(Hook()), r"asks for 'posix\.system'"),
    "os.system in protocol 0": (pickle.dumps(Hook(), 0), r"asks for 'posix\.system'"),
    "eval": (program(call("builtins", "eval", text("1"))), r"asks for 'builtins\.eval'"),
    "exec of Python 2": (b"c__builtin__\nexec\n(S'1'\ntR.", r"asks for '__builtin__\.exec'"),
    "getattr": (program(call("builtins", "getattr", name("os", "system"), text("x"))), r"asks for 'builtins\.getattr'"),
    "a dotted name": (program(name("os", "path.join")), r"asks for 'os\.path\.join'"),
    "a dotted allowed name": (program(name("torch", "storage._load_from_bytes")), r"asks for 'torch\.storage\._load"),
    "a path in an allowed class": (program(name("collections", "OrderedDict.__init__")), "asks for 'collections"),
    "a name that is no text": (program(number(1), text("system"), b"\x93"), "no short text"),
    "an endless name": (program(text("o" * 100_000), text("system"), b"\x93"), "no short text"),
    "a name with a line break": (program(text("o\ns"), text("x"), b"\x93"), r"asks for 'o\\ns\.x'"),
    "torch's loader": (
        program(call("torch.serialization", "load", text("x"))),
        r"asks for 'torch\.serialization\.load'",
    ),
    "the tensor from an old version": (program(call("torch._utils", "_rebuild_tensor")), "_rebuild_tensor', which no"),
    "an offset that is a truth value": (
        program(tensor(offset=77).replace(number(77), a.TRUE)),
        "out of range",
    ),
    "a call of text": (program(text("system"), a.EMPTY_TUPLE, a.REDUCE), "it calls 'system', which cannot be called"),
    "a call of a type": (program(call("torch", "FloatStorage")), r"it calls torch\.FloatStorage, which cannot be"),
    "a call of a result": (program(call("collections", "OrderedDict"), b")R"), "it calls a Items, which cannot be"),
    "arguments in a list": (program(name("collections", "OrderedDict"), b"]R"), "with a list in place of arguments"),
    "NEWOBJ of text": (program(text("x"), b")\x81"), "it calls 'x', which cannot be called"),
    "NEWOBJ of a class": (program(name("subprocess", "Popen"), b")\x81"), r"asks for 'subprocess\.Popen'"),
    "NEWOBJ_EX": (program(name("collections", "OrderedDict"), b")}\x92"), "the opcode NEWOBJ_EX is not allowed"),
    "EXT1": (program(b"\x82\x01"), "the opcode EXT1 is not allowed"),
    "EXT4": (program(b"\x84\x01\0\0\0"), "the opcode EXT4 is not allowed"),
    "INST": (b"(S'x'\nios\nsystem\n.", "the opcode INST is not allowed"),
    "OBJ": (program(b"(", name("collections", "OrderedDict"), b"o"), "the opcode OBJ is not allowed"),
    "BUILD on a name": (program(name("collections", "OrderedDict"), b"}b"), r"state of collections\.OrderedDict"),
    "BUILD on a dict": (program(b"}", mapping(x=number(1)), b"b"), "sets the state of a dict, which has none"),
    "BUILD of a tensor": (program(tensor(), b"}b"), "sets the state of a Tensor, which has none"),
    "BUILD with slots": (program(b"]", many(a.NONE, mapping(append=number(1))), b"b"), "sets the state of a list"),
    "__setstate__": (program(persistent(), mapping(__setstate__=number(1)), b"b"), "sets the state of a _Persistent"),
    "a huge length": (program(b"\x8e" + struct.pack("<Q", 1 << 62)), "truncated"),
    "the hugest length": (program(b"\x8d" + b"\xff" * 8), "truncated"),
    "a length of 4 GB": (program(b"X\xff\xff\xff\xff"), "truncated"),
    "a negative length": (program(b"T\xff\xff\xff\xff"), "a negative length"),
    "a huge integer": (program(b"\x8b\xff\xff\xff\x7f"), "truncated"),
    "a negative integer length": (program(b"\x8b\xff\xff\xff\xff"), "a negative length"),
    "an integer with many digits": (b"L" + b"9" * 5000 + b"L\n.", "not a value that a pickle can hold"),
    "no number": (b"Ix\n.", "not a value that a pickle can hold"),
    "no float": (b"Fx\n.", "not a value that a pickle can hold"),
    "a frame beyond the end": (program(b"\x95" + struct.pack("<Q", 1 << 40)), "a frame of 1099511627776 bytes"),
    "a frame in a frame": (b"\x80\x04\x95" + struct.pack("<Q", 20) + b"N0\x95" + bytes(8) + b"N" * 20, "a frame of 0"),
    "a protocol of the future": (b"\x80\xc8N.", "protocol 200 is announced"),
    "a protocol in the middle": (b"N\x80\x04.", "protocol 4 is announced here"),
    "a memo index of 2^31": (program(b"Nr\x00\x00\x00\x80"), "stores a value under 2147483648"),
    "a memo index of many digits": (b"Np" + b"9" * 300 + b"\n.", "stores a value under a int"),
    "a negative memo index": (b"Np-1\n.", "stores a value under -1"),
    "a value never stored": (program(b"j\x00\x00\x00\x80"), "recalls value 2147483648, which was never stored"),
    "an empty stack": (program(b"0"), "the stack is empty"),
    "a stack below the mark": (program(b"N(0b"), "the stack is empty"),
    "no mark": (program(b"t"), "a mark is needed"),
    "a key without a value": (program(b"}(Nu"), "a key without a value"),
    "a key that is a list": (program(b"}]Ns"), "a list cannot be a key"),
    "a member that is a dict": (program(b"\x8f(}\x90"), "a dict cannot be a key"),
    "items into a list": (program(b"](NNu"), "it puts items into a list"),
    "an append to a tensor": (program(tensor(), b"Na"), "it appends to a Tensor"),
    "members into a list": (program(b"](N\x90"), "it adds to a list"),
    "no end": (b"\x80\x04N", "truncated"),
    "values left over": (program(b"NN"), "values left over"),
    "something behind": (program(b"N") + b"x", "1 bytes follow the end"),
    "no opcode": (program(b"\xff"), "0xff is no opcode"),
    "no text": (program(b"X\x01\0\0\0\xff"), "not UTF-8"),
    "a name in Latin-1": (b"c\xff\n\xff\n.", "not UTF-8"),
    "half an escape": (b"V\\u12\n.", "not a value that a pickle can hold"),
    "no quotation marks": (b"Sx\n.", "quotation marks"),
    "a line without an end": (b"Sxxxxxx", "a line without an end"),
    "another codec": (program(call("_codecs", "encode", text("x"), text("rot13"))), "something else than text and"),
    "a codec that is a list": (program(call("_codecs", "encode", text("x"), b"]")), "something else than text and"),
    "no text to encode": (program(call("_codecs", "encode", b"]", text("latin1"))), "a list in place of text"),
    "a text beyond Latin-1": (program(call("_codecs", "encode", text("Ω"), text("latin1"))), "not Latin-1"),
    "a long text beyond Latin-1": (
        program(
            call("torch.storage", "_load_from_bytes", call("_codecs", "encode", text("Ω" * 70000), text("latin1")))
        ),
        "not Latin-1",
    ),
    "bytes of a size": (program(call("builtins", "bytes", number(1 << 40))), "bytes that are made from arguments"),
    "a set of a number": (program(call("builtins", "set", number(1))), "a set that is not made from a list"),
    "a dict of a number": (program(call("collections", "OrderedDict", number(1))), "not made from pairs"),
    "a dict of triples": (program(call("collections", "OrderedDict", b"](](NNNee")), "not made from pairs"),
    "an EasyDict of pairs": (program(call("dnnlib.util", "EasyDict", b"]")), "a dict that is made from arguments"),
    "an object number of NumPy": (program(numpy_scalar("O8")), "the NumPy type 'O8'; allowed: f8"),
    "a number of NumPy that is cut": (program(numpy_scalar("f8", bytes(7))), "type float64 in 7 bytes"),
    "a big-endian number of NumPy": (program(numpy_scalar(order=">")), "not little-endian"),
    "a number of no type": (program(call("numpy.core.multiarray", "scalar", b"N", b"N")), "a NumPy type is needed"),
    "a number of NumPy alone": (program(call("numpy.core.multiarray", "scalar")), "without its type and bytes"),
    "an array of another class": (program(call("numpy.core.multiarray", "_reconstruct", b"N")), "an unknown class"),
    "a container with arguments": (
        program(name("torch.nn.modules.container", "Sequential"), many(SYSTEM), b"\x81"),
        r"asks for 'os\.system'",
    ),
    "a container of itself": (
        program(name("torch.nn.modules.container", "Sequential"), many(b"N"), b"\x81"),
        "is made from arguments",
    ),
    "a persistent id": (program(a.storage_id()), "outside of the pickle"),
    "a persistent object of nothing": (
        program(call("torch_utils.persistence", "_reconstruct_persistent_obj")),
        "without its record",
    ),
    "a persistent object of a list": (
        program(call("torch_utils.persistence", "_reconstruct_persistent_obj", b"]")),
        "without its record",
    ),
    "a parameter of text": (
        program(call("torch._utils", "_rebuild_parameter", text("x"), a.TRUE, b"}")),
        "not made from a tensor",
    ),
    "a storage of text": (program(call("torch.storage", "_load_from_bytes", text("x"))), "not made from bytes"),
    "a storage of other bytes": (
        program(call("torch.storage", "_load_from_bytes", a.raw(program(number(1)) * 2))),
        "not the bytes of a file that torch saved",
    ),
    "a number of NumPy of text": (
        program(numpy_scalar().replace(a.raw(bytes(8)), text("x"))),
        "where bytes are needed",
    ),
    "settings in a list": (program(mapping(ema=network(), dataset_kwargs=b"]")), "dataset_kwargs is a list; a dict is"),
    "a module that is text": (
        program(network(_modules=mapping(model=song(mapping(x=text("y")))))),
        "'y' where a module",
    ),
    "another version": (program(persistent(version=7)), "in version 7 of EDM's format; known: 6"),
    "a class name with a line break": (program(persistent("a\nb")), "without a class name"),
    "a state that is text": (program(persistent(state=text("x"))), "without its source or state"),
    "no source": (program(persistent(module_src=a.NONE)), "without its source or state"),
    "modules doubled 30 times": (
        program(network(_modules=mapping(model=song(mapping(x=doubled_modules(30)))))),
        "nested too deeply or too many",
    ),
    "arguments doubled 200 times": (
        program(network(_init_kwargs=mapping(model_type=b")" + b"2\x86" * 200))),
        "nested too deeply or too large",
    ),
    "arguments doubled 20 times": (
        program(network(_init_kwargs=mapping(model_type=b")" + b"2\x86" * 20))),
        "nested too deeply or too large",
    ),
    "a module that holds itself": (
        program(network(_modules=mapping(model=song(b"}q\x09" + text("x") + song(b"h\x09") + b"s")))),
        "nested too deeply or too many",
    ),
}
STORAGES = {
    "os.system in the value": ({"main": pickle.dumps(Hook(), 2)}, r"within .*asks for 'posix\.system'"),
    "a blob in a blob": ({"main": program(storage())}, r"asks for 'torch\.storage\._load_from_bytes'"),
    "a tensor in a blob": ({"main": program(tensor())}, r"asks for 'torch\._utils\._rebuild_tensor_v2'"),
    "no storage": ({"main": program(number(5)), "keys": (), "numbers": b""}, "5 where a storage is needed"),
    "another tag": ({"tag": "module"}, "a reference that is not to a storage"),
    "a storage of a strange type": ({"kind": "QInt8Storage"}, r"asks for 'torch\.QInt8Storage'"),
    "a type that is a number": (
        {"main": program(many(text("storage"), number(1), text("0"), text("cpu"), number(4), a.NONE) + b"Q")},
        "a storage of the type 1",
    ),
    "a persistent id that is text": ({"main": program(text("storage"), b"Q")}, "a reference that is not to a storage"),
    "a view of a storage": ({"view": many(text("0"), number(0), number(2))}, "a view of a storage"),
    "a key with a path": ({"key": "../../etc/passwd"}, "key or length is out of range"),
    "a negative length": ({"numel": -1}, "key or length is out of range"),
    "a huge length": ({"numel": 1 << 62}, "key or length is out of range"),
    "a large length": ({"numel": 1 << 30}, "the numbers of storage 0 are cut short"),
    "another length": ({"numel": 3}, "storage 0 has 4 numbers, 3 are announced"),
    "another key": ({"keys": ("1",)}, "does not name those that are used"),
    "a key that is a number": (
        {"main": program(a.storage_id()), "keys": (), "numbers": b""},
        "does not name those that are used",
    ),
    "one key for two storages": (
        {"main": program(a.storage_id(), a.storage_id(numel=3), b"\x86")},
        "two different storages are called 0",
    ),
    "a key twice": ({"keys": ("0", "0")}, "does not name those that are used"),
    "no key": ({"keys": ()}, "does not name those that are used"),
    "numbers that are cut": ({"numbers": struct.pack("<q3f", 4, 1, 2, 3)}, "cut short: truncated"),
    "numbers and more": ({"numbers": struct.pack("<q5f", 4, 1, 2, 3, 4, 5)}, "4 bytes follow the last storage"),
    "a negative count": ({"numbers": struct.pack("<q4f", -4, 1, 2, 3, 4)}, "storage 0 has -4 numbers"),
    "big-endian": ({"little": a.FALSE}, "not little-endian"),
}
TENSORS = {
    "a negative offset": ({"offset": -1}, "out of range"),
    "an offset beyond": ({"offset": 1}, "reaches beyond its storage of 4 numbers"),
    "a huge offset": ({"offset": 1 << 62}, "out of range"),
    "a negative size": ({"size": (-1, 2)}, "out of range"),
    "a huge size": ({"size": (1 << 39, 1), "stride": (1, 1)}, "reaches beyond its storage"),
    "a huge size of nothing": ({"size": (0, 1 << 39, 1 << 39), "stride": (1, 1, 1)}, "too many elements"),
    "a negative stride": ({"stride": (2, -1)}, "out of range"),
    "a stride of zero": ({"size": (1 << 39,), "stride": (0,)}, "elements overlap"),
    "strides that overlap": ({"size": (2, 2), "stride": (1, 1)}, "elements overlap"),
    "a stride beyond": ({"stride": (3, 1)}, "reaches beyond its storage of 4 numbers"),
    "too few strides": ({"stride": (1,)}, "do not fit together"),
    "too many dimensions": ({"size": (1,) * 17, "stride": (1,) * 17}, "do not fit together"),
    "no storage": ({"source": number(1)}, "a tensor that is not made from a storage"),
    "hooks": ({"rest": a.FALSE + mapping(x=number(1))}, "a tensor with hooks"),
    "hooks that are a tensor": ({"rest": a.FALSE + tensor()}, "a tensor with hooks"),
    "metadata": ({"rest": a.FALSE + b"}" + mapping(conj=a.TRUE)}, "a conjugate or negative view"),
    "truth values that are none": (
        {"source": storage(kind="BoolStorage", numbers=struct.pack("<q4B", 4, 0, 1, 2, 0))},
        "truth values that holds other numbers",
    ),
}
MAIN = program(tensor(a.storage_id().replace(a.NONE + b"t", b"t")), protocol=2)
ARCHIVES = {
    "os.system": (archive(pickle.dumps(Hook(), 2)), r"asks for 'posix\.system'"),
    "a bad checksum": (archive(MAIN).replace(bytes([0x80, 0x3F]), bytes([0x80, 0x3E])), "checksum"),
    "a compressed member": (archive(MAIN, {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "a storage too short": (archive(MAIN, {"data/0": bytes(12)}), "storage 0 has 12 bytes; 4 numbers"),
    "no storage": (archive(MAIN, {}), "the archive has no member 'archive/data/0'"),
    "a storage elsewhere": (
        archive(program(tensor(a.storage_id(key="../0")), protocol=2), {"0": bytes(16)}),
        "key or length is out of range",
    ),
    "a member beyond the end": (
        archive(MAIN).replace(struct.pack("<II", 16, 16), struct.pack("<II", 9999, 9999)),
        "reaches beyond the end",
    ),
    "more members than fit": (archive(MAIN).replace(struct.pack("<HH", 3, 3), b"\xff\x7f" * 2), "of 32767 members"),
    "no pickle": (archive(MAIN).replace(b"data.pkl", b"data.txt"), "an archive with 0 pickles"),
    "two pickles": (archive(MAIN, {"../b/data.pkl": MAIN}).replace(b"archive/../", b"archive_xx_"), "2 pickles"),
    "a member twice": (
        archive(MAIN, {"data/0": bytes(16), "data/1": b""}).replace(b"data/1", b"data/0"),
        "two members",
    ),
    "big-endian": (archive(MAIN, byteorder=b"big"), "not little-endian"),
    "TorchScript": (
        archive(program(name("__torch__", "Net"), protocol=2), {"code/x.py": b""}),
        r"asks for '__torch__\.Net'",
    ),
    "something behind the pickle": (archive(MAIN + b"x"), "1 bytes follow the end"),
}


def cases():
    for key, (data, reason) in PICKLES.items():
        yield pytest.param(data, reason, read_edm, id=f"pickle: {key}")
    for key, (changes, reason) in STORAGES.items():
        yield pytest.param(program(storage(**changes)), reason, read_edm, id=f"storage: {key}")
        if not key.startswith(("a blob", "a tensor", "no storage")):
            yield pytest.param(
                legacy(**changes), reason.removeprefix("within .*"), read_torch_file, id=f"old file: {key}"
            )
    for key, (changes, reason) in TENSORS.items():
        yield pytest.param(program(tensor(**changes)), reason, read_edm, id=f"tensor: {key}")
    for key, (data, reason) in ARCHIVES.items():
        yield pytest.param(data, reason, read_torch_file, id=f"archive: {key}")


@pytest.mark.parametrize(("data", "reason", "read"), list(cases()))
def test_a_hostile_file_is_refused_in_one_line(tmp_path, monkeypatch, data, reason, read):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match=reason) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6 + 10 * len(data)
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]


def test_the_parts_from_which_the_hostile_files_are_made_are_sound(tmp_path):
    """Without their one fault they are read, so each fault is what is refused."""
    path = tmp_path / "x.bin"
    path.write_bytes(program(network(_modules=mapping(model=song(mapping(x=module()))))))
    assert read_edm(path).model_class == "SongUNet"
    value = program(tensor(storage(kind="BoolStorage", numbers=struct.pack("<q4B", 4, 0, 1, 1, 0))))
    for data in (MAIN, value):
        path.write_bytes(archive(data))
    for data in (archive(MAIN), legacy(main=program(tensor(a.storage_id())))):
        path.write_bytes(data)
        assert read_torch_file(path).tolist() == [[1, 2], [3, 4]]
    assert read_pickle(program(numpy_scalar("f8", struct.pack("<d", 0.25))), NAMES) == 0.25


@pytest.mark.parametrize(
    ("shape", "data", "reason"),
    [
        ((2, 3), bytes(5), "a NumPy array of 6 numbers in 5 bytes"),
        ((-1, -5), bytes(5), "impossible dimensions"),
        ((1 << 41,), bytes(5), "impossible dimensions"),
        ((1 << 39, 1 << 39), bytes(5), "numbers in 5 bytes"),
        ((1,) * 17, bytes(1), "impossible dimensions"),
    ],
)
def test_hostile_arrays_are_refused(shape, data, reason):
    dtype = call("numpy", "dtype", text("u1"))
    array = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"))
    state = many(number(1), many(*map(number, shape)), dtype, a.FALSE, a.raw(data))
    with pytest.raises(CorruptFileError, match=reason):
        to_array(read_pickle(program(array, state, a.BUILD), NAMES))
    with pytest.raises(CorruptFileError, match="where a NumPy array is needed"):
        to_array(read_pickle(program(array), NAMES))


def many_views(count):
    """One storage of 4 MB and `count` tensors on it, each of a few bytes of pickle."""
    numbers = 1 << 20
    first = tensor(a.storage_id(numel=numbers), size=(numbers,), stride=(1,))
    call_again = first[: -len(a.REDUCE)]
    main = b"](" + call_again + b"q\x00" + a.REDUCE
    again = name("torch._utils", "_rebuild_tensor_v2") + b"h\x00" + a.REDUCE
    raw = struct.pack("<q", numbers) + bytes(4 * numbers)
    return legacy(main=program(main + again * count + b"e"), numbers=raw)


def test_a_storage_seen_through_very_many_views_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(many_views(1))
    assert len(read_torch_file(path)) == 2
    path.write_bytes(many_views(10_000))
    with pytest.raises(CorruptFileError, match="it would unfold into much more than its"):
        read_torch_file(path)


def test_an_archive_whose_members_lie_upon_each_other_is_refused(tmp_path):
    """A thousand entries for one storage of 1 MB: each would have its checksum taken."""
    data = bytes(1 << 20)
    keys = [f"k{k}" for k in range(1000)]
    tensors = [tensor(a.storage_id(key=key, numel=1 << 18).replace(a.NONE + b"t", b"t")) for key in keys]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("a/data.pkl", program(b"](", *tensors, b"e", protocol=2))
        file.writestr("a/data/k0", data)
        first = file.getinfo("a/data/k0")
        for key in keys[1:]:
            entry = zipfile.ZipInfo(f"a/data/{key}")
            entry.header_offset, entry.CRC = first.header_offset, first.CRC
            entry.file_size = entry.compress_size = len(data)
            file.filelist.append(entry)
    with pytest.raises(CorruptFileError, match="it would unfold into much more than its"):
        read_torch_file(tmp_path / "x.pt")


def sound_files():
    old, new = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.randn(40)}, old, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.randn(40)}, new)
    return {"edm": program(network()), "old": old.getvalue(), "new": new.getvalue()}


@pytest.mark.parametrize("kind", ["edm", "old", "new"])
def test_no_truncation_gets_through(tmp_path, kind):
    data = sound_files()[kind]
    path = tmp_path / "x.bin"
    for end in range(len(data)):
        path.write_bytes(data[:end])
        for read in (read_edm, read_torch_file):
            with pytest.raises(CdistillError, match=r"x\.bin: "):
                read(path)
