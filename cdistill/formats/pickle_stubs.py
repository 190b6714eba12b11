"""What the names in a pickle stand for here: containers, and NumPy's numbers and arrays as plain data."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_values import Build, Global, Items, LongBytes, LongText, Record, check_key, latin1, shown

NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
MOST_DIMENSIONS = 16


def container_names() -> dict[str, Build | None]:
    """Returns what containers and byte strings are called by Python 2 and 3."""
    names: dict[str, Build | None] = {"collections.OrderedDict": _items, "_codecs.encode": _encode}
    for module in ("builtins", "__builtin__"):
        names |= {f"{module}.set": _set, f"{module}.bytes": empty("bytes that are", bytes)}
    return names


def numpy_names() -> dict[str, Build | None]:
    """Returns what NumPy's types, scalars and arrays are called; arrays become a `Record` for `to_array`."""
    names: dict[str, Build | None] = {"numpy.ndarray": None}
    names["numpy.dtype"] = lambda arguments: Record("numpy.dtype", arguments)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names |= {f"{module}.scalar": _scalar, f"{module}._reconstruct": _reconstruct}
    return names


def to_array(value: Any) -> NDArray[Any]:
    """Copies the array that a pickle of a NumPy array describes; CorruptFileError if size, type and bytes disagree."""
    state = value.state if isinstance(value, Record) and value.name == "numpy.ndarray" else None
    if type(state) is not tuple or len(state) != 5 or type(state[1]) is not tuple or type(state[3]) is not bool:
        raise CorruptFileError(f"{shown(value)} where a NumPy array is needed")
    _, shape, dtype, by_column, raw = state
    kind = _number_type(dtype)
    data = as_bytes(raw)
    if len(shape) > MOST_DIMENSIONS or not all(type(length) is int and 0 <= length < 1 << 40 for length in shape):
        raise CorruptFileError("a NumPy array with impossible dimensions")
    if math.prod(shape) * kind.itemsize != len(data):
        raise CorruptFileError(f"a NumPy array of {shown(math.prod(shape))} numbers in {len(data)} bytes")
    return np.ndarray(shape, kind, data, order="F" if by_column else "C").copy()


def as_bytes(value: Any) -> memoryview:
    """Returns the content of a byte string of the file; raises CorruptFileError for any other value."""
    if isinstance(value, LongBytes):
        return value.open()
    if type(value) is bytes:
        return memoryview(value)
    raise CorruptFileError(f"{shown(value)} where bytes are needed")


def empty(what: str, make: Callable[[], Any]) -> Build:
    """Returns what a name stands for that is called without arguments only; `what` begins the message."""

    def build(arguments: tuple[Any, ...]) -> Any:
        if arguments:
            raise CorruptFileError(f"{what} made from arguments")
        return make()

    return build


def _items(arguments: tuple[Any, ...]) -> Items:
    """Gives an OrderedDict; Python 2 makes it from a list of pairs."""
    if not arguments:
        return Items()
    pairs = arguments[0]
    if len(arguments) != 1 or type(pairs) is not list:
        raise CorruptFileError("an OrderedDict that is not made from pairs")
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise CorruptFileError("an OrderedDict that is not made from pairs")
    return Items((check_key(pair[0]), pair[1]) for pair in pairs)


def _encode(arguments: tuple[Any, ...]) -> bytes | LongBytes:
    """Gives the value of ``_codecs.encode(text, "latin1")``, with which protocol 2 writes bytes."""
    codec = arguments[1] if len(arguments) == 2 else None
    if type(codec) is not str or codec not in ("latin1", "latin-1"):
        raise CorruptFileError("_codecs.encode is called with something else than text and 'latin1'")
    text = arguments[0]
    if isinstance(text, LongText):
        return LongBytes(text.view, encoded=True)
    if type(text) is not str:
        raise CorruptFileError(f"_codecs.encode is called with {shown(text)} in place of text")
    return latin1(text)


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    if len(arguments) > 1 or any(type(values) is not list for values in arguments):
        raise CorruptFileError("a set that is not made from a list")
    return {check_key(value) for values in arguments for value in values}


def _reconstruct(arguments: tuple[Any, ...]) -> Record:
    kind = arguments[0] if arguments else None
    if not isinstance(kind, Global) or kind.name != "numpy.ndarray":
        raise CorruptFileError("a NumPy array of an unknown class")
    return Record("numpy.ndarray")


def _scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    if len(arguments) != 2:
        raise CorruptFileError("a NumPy number without its type and bytes")
    kind = _number_type(arguments[0])
    data = as_bytes(arguments[1])
    if len(data) != kind.itemsize:
        raise CorruptFileError(f"a NumPy number of type {kind} in {len(data)} bytes")
    number: int | float | bool = np.frombuffer(data, kind)[0].item()
    return number


def _number_type(value: Any) -> np.dtype[Any]:
    """Returns the little-endian numeric type that a pickled ``numpy.dtype`` describes."""
    if not isinstance(value, Record) or value.name != "numpy.dtype" or not value.arguments:
        raise CorruptFileError(f"{shown(value)} where a NumPy type is needed")
    name = value.arguments[0]
    name = name.decode("latin-1") if type(name) is bytes else name
    if type(name) is not str or name not in NUMBERS:
        raise CorruptFileError(f"the NumPy type {shown(name)}; allowed: {', '.join(NUMBERS)}")
    order = value.state[1] if type(value.state) is tuple and len(value.state) > 1 else "|"
    if type(order) not in (str, bytes) or order not in ("<", "|", b"<", b"|"):
        raise CorruptFileError("a NumPy type that is not little-endian")
    return np.dtype(f"<{name}")
