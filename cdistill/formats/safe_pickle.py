"""An interpreter of pickles that can only build data: no import, no call into the file, no attribute set.

A pickle is a program for a small stack machine. Here the machine knows numbers, text, bytes, tuples, lists, dicts and
sets; a global name is looked up in a table given by the caller, whose entries make plain values, and every other name,
opcode or shape is an error that states its place. Work and memory are bounded by the size of the file.

Byte strings written by Python 2 stay bytes. Long strings are not copied: see `LongBytes` and `LongText`.
"""

import re
import struct
from collections.abc import Callable
from pickletools import opcodes
from typing import Any

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_values import (
    LONG,
    Budget,
    Global,
    Items,
    LongBytes,
    LongText,
    Names,
    Persistent,
    Record,
    check_key,
    decoded,
    shown,
)

LONGEST_NAME = 256
LONGEST_INTEGER = 255  # bytes
LONGEST_LINE = 1 << 16  # bytes
NEWEST_PROTOCOL = 5


def read_pickle(
    data: bytes | memoryview, names: Names, persistent: Persistent | None = None, budget: Budget | None = None
) -> Any:
    """Returns the value of a pickle that fills `data`; `budget` is shared by the pickles of one file.

    `names` are "module.name" -> function of the argument tuple that makes a plain value, or None: no call is allowed;
    `persistent` gives the value of a persistent id, of which there are none without it.
    CorruptFileError, with the byte at which it stands, for anything else.
    """
    value, end = read_pickle_at(data, 0, names, persistent, budget)
    if end != len(data):
        raise CorruptFileError(f"byte {end}: {len(data) - end} bytes follow the end of the pickle")
    return value


def read_pickle_at(
    data: bytes | memoryview,
    start: int,
    names: Names,
    persistent: Persistent | None = None,
    budget: Budget | None = None,
) -> tuple[Any, int]:
    """Returns the value of the pickle that begins at byte `start`, and where it ends; otherwise as `read_pickle`."""
    machine = _Machine(memoryview(data), start, names, persistent, budget or Budget(len(data)))
    return machine.run(), machine.place


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(
        self, data: memoryview, start: int, names: Names, persistent: Persistent | None, budget: Budget
    ) -> None:
        self.data = data
        self.start = self.place = start
        self.names = names
        self.persistent = persistent
        self.budget = budget
        self.frame_end = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            at = self.place
            try:
                self.budget.step()
                code = self.take(1)[0]
                if code == _STOP:
                    return self.finish()
                handler = _HANDLERS.get(code)
                if handler is None:
                    raise CorruptFileError(_refusal(code))
                handler(self)
            except CorruptFileError as error:
                raise CorruptFileError(f"byte {at}: {error}") from error
            except (ValueError, OverflowError) as error:
                raise CorruptFileError(f"byte {at}: not a value that a pickle can hold") from error

    def finish(self) -> Any:
        value = self.pop()
        if self.stack or self.marks:
            raise CorruptFileError("the pickle ends with values left over")
        return value

    def take(self, count: int) -> memoryview:
        end = self.place + count
        if end > len(self.data):
            raise CorruptFileError(f"{count} bytes are needed, {len(self.data) - self.place} are left: truncated")
        taken = self.data[self.place : end]
        self.place = end
        return taken

    def line(self) -> bytes:
        size = 64
        while size <= LONGEST_LINE:
            window = bytes(self.data[self.place : self.place + size])
            end = window.find(b"\n")
            if end >= 0:
                self.budget.spend(work=end)
                self.place += end + 1
                return window[:end]
            if len(window) < size:
                raise CorruptFileError("a line without an end: truncated")
            size *= 2
        raise CorruptFileError(f"a line of {LONGEST_LINE} bytes or more, which no such file needs")

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise CorruptFileError("a value is needed, but the stack is empty")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CorruptFileError("a mark is needed, but none is set")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def global_name(self, module: Any, name: Any) -> None:
        if not (type(module) is str and type(name) is str and len(module) + len(name) <= LONGEST_NAME):
            raise CorruptFileError("a global name that is no short text")
        whole = f"{module}.{name}"
        if "." in name or whole not in self.names:
            raise CorruptFileError(f"it asks for {shown(whole)}, which no such file needs")
        self.stack.append(Global(whole, self.names[whole]))

    def reduce(self) -> None:
        arguments = self.pop()
        function = self.pop()
        if not isinstance(function, Global) or function.build is None:
            raise CorruptFileError(f"it calls {shown(function)}, which cannot be called")
        if type(arguments) is not tuple:
            raise CorruptFileError(f"it calls {function.name} with {shown(arguments)} in place of arguments")
        self.budget.spend(work=_weight(arguments))
        self.stack.append(function.build(arguments))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Record) and target.state is None:
            target.state = state
        elif not isinstance(target, Items):
            raise CorruptFileError(f"it sets the state of {shown(target)}, which has none")

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CorruptFileError(f"it recalls value {shown(index)}, which was never stored")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        if not 0 <= index <= len(self.data):
            raise CorruptFileError(f"it stores a value under {shown(index)}, beyond the size of the file")
        self.memo[index] = self.top()

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise CorruptFileError(f"it appends to {shown(target)}, which is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise CorruptFileError(f"it puts items into {shown(target)}, which is no dict")
        target.update(_pairs(values))

    def add_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            raise CorruptFileError(f"it adds to {shown(target)}, which is no set")
        target.update(check_key(value) for value in values)


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise CorruptFileError("a key without a value")
    return {check_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _weight(arguments: tuple[Any, ...]) -> int:
    sized = (str, bytes, list, tuple, dict, set, LongBytes, LongText)
    return len(arguments) + sum(len(value) for value in arguments if isinstance(value, sized))


def _refusal(code: int) -> str:
    known = next((opcode.name for opcode in opcodes if ord(opcode.code) == code), None)
    return f"the opcode {known} is not allowed" if known else f"{code:#04x} is no opcode: not a pickle, or damaged"


_Handler = Callable[[_Machine], None]
_STOP = ord(".")


def _constant(value: Any) -> _Handler:
    return lambda m: m.stack.append(value)


def _fresh(make: Callable[[], Any]) -> _Handler:
    return lambda m: m.stack.append(make())


def _indexed(layout: str, use: Callable[[_Machine, Any], None]) -> _Handler:
    packed = struct.Struct(layout)
    return lambda m: use(m, packed.unpack(m.take(packed.size))[0])


def _number(layout: str) -> _Handler:
    return _indexed(layout, lambda m, number: m.stack.append(number))


def _counted(layout: str, make: Callable[[memoryview], Any]) -> _Handler:
    def handler(m: _Machine, count: int) -> None:
        if count < 0:
            raise CorruptFileError("a negative length")
        m.stack.append(make(m.take(count)))

    return _indexed(layout, handler)


def _short_or_long_text(data: memoryview) -> str | LongText:
    return LongText(data) if len(data) >= LONG else decoded(data)


def _short_or_long_bytes(data: memoryview) -> bytes | LongBytes:
    return LongBytes(data) if len(data) >= LONG else bytes(data)


def _integer(data: memoryview) -> int:
    if len(data) > LONGEST_INTEGER:
        raise CorruptFileError(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


_ESCAPED = re.compile(rb"""(?:[^\\]++|\\(?:x[0-9a-fA-F]{2}|[\\'"nrt]))*+""")  # as Python 2 wrote byte strings


def _line_bytes(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise CorruptFileError("a text without its quotation marks")
    text = line[1:-1]
    known = _ESCAPED.match(text)
    end = known.end() if known else 0
    if end < len(text):
        raise CorruptFileError(f"a text with the escape {shown(text[end + 1 : end + 2])}")
    return text.decode("unicode-escape").encode("latin-1")


def _on_line(make: Callable[[bytes], Any]) -> _Handler:
    return lambda m: m.stack.append(make(m.line()))


def _pop(m: _Machine) -> None:
    """Drops the last value, or the last mark if nothing lies on it, as protocol 0 does."""
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


def _tuple(count: int) -> _Handler:
    return lambda m: m.stack.append(tuple([m.pop() for _ in range(count)][::-1]))


def _protocol(m: _Machine) -> None:
    at = m.place - 1
    version = m.take(1)[0]
    if version > NEWEST_PROTOCOL or at != m.start:
        raise CorruptFileError(f"protocol {version} is announced here; at most {NEWEST_PROTOCOL} is, at the beginning")


def _frame(m: _Machine) -> None:
    at = m.place - 1
    length = struct.unpack("<Q", m.take(8))[0]
    if at < m.frame_end or length > len(m.data) - m.place:
        raise CorruptFileError(f"a frame of {length} bytes does not fit here")
    m.frame_end = m.place + length


def _persistent(m: _Machine) -> None:
    if m.persistent is None:
        raise CorruptFileError("it refers to something outside of the pickle")
    m.stack.append(m.persistent(m.pop()))


_BY_NAME: dict[str, _Handler] = {
    "PROTO": _protocol,
    "FRAME": _frame,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": _fresh(list),
    "EMPTY_DICT": _fresh(dict),
    "EMPTY_SET": _fresh(set),
    "BININT": _number("<i"),
    "BININT1": _number("<B"),
    "BININT2": _number("<H"),
    "BINFLOAT": _number(">d"),
    "LONG1": _counted("<B", _integer),
    "LONG4": _counted("<i", _integer),
    "INT": _on_line(lambda line: line == b"01" if line in (b"00", b"01") else int(line)),
    "LONG": _on_line(lambda line: int(line.removesuffix(b"L"))),
    "FLOAT": _on_line(float),
    "STRING": _on_line(_line_bytes),
    "UNICODE": _on_line(lambda line: line.decode("raw-unicode-escape")),
    "SHORT_BINSTRING": _counted("<B", bytes),
    "BINSTRING": _counted("<i", _short_or_long_bytes),
    "SHORT_BINBYTES": _counted("<B", bytes),
    "BINBYTES": _counted("<I", _short_or_long_bytes),
    "BINBYTES8": _counted("<Q", _short_or_long_bytes),
    "SHORT_BINUNICODE": _counted("<B", decoded),
    "BINUNICODE": _counted("<I", _short_or_long_text),
    "BINUNICODE8": _counted("<Q", _short_or_long_text),
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": _pop,
    "POP_MARK": lambda m: m.pop_mark().clear(),
    "DUP": lambda m: m.stack.append(m.top()),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda m: m.stack.append(tuple(m.pop_mark())),
    "LIST": lambda m: m.stack.append(m.pop_mark()),
    "DICT": lambda m: m.stack.append(_pairs(m.pop_mark())),
    "APPEND": lambda m: m.append([m.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "SETITEM": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "ADDITEMS": lambda m: m.add_items(m.pop_mark()),
    "GET": lambda m: m.get(int(m.line())),
    "BINGET": _indexed("<B", _Machine.get),
    "LONG_BINGET": _indexed("<I", _Machine.get),
    "PUT": lambda m: m.put(int(m.line())),
    "BINPUT": _indexed("<B", _Machine.put),
    "LONG_BINPUT": _indexed("<I", _Machine.put),
    "MEMOIZE": lambda m: m.put(len(m.memo)),
    "GLOBAL": lambda m: m.global_name(decoded(memoryview(m.line())), decoded(memoryview(m.line()))),
    "STACK_GLOBAL": lambda m: m.global_name(*[m.pop(), m.pop()][::-1]),
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _persistent,
}
_HANDLERS = {ord(opcode.code): _BY_NAME[opcode.name] for opcode in opcodes if opcode.name in _BY_NAME}
