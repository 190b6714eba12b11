"""What a pickle may hold here: plain values, how much of them, and how they are shown in errors."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cdistill.errors import CorruptFileError

LONG = 1 << 16  # strings of at least so many bytes are left in the file
LONGEST_KEY = 1024
LARGEST_KEY = 1 << 20
MOST_OPERATIONS = 1_000_000

Build = Callable[[tuple[Any, ...]], Any]
Names = Mapping[str, "Build | None"]
Persistent = Callable[[Any], Any]


@dataclass
class Budget:
    """What reading a file of `size` bytes may cost; all its pickles together have `operations`, opcodes, left."""

    size: int
    operations: int = MOST_OPERATIONS
    work: int = field(init=False)
    room: int = field(init=False)

    def __post_init__(self) -> None:
        self.work = 8 * self.size + (1 << 20)
        self.room = 3 * self.size + (1 << 20)

    def spend(self, work: int = 0, room: int = 0) -> None:
        """Takes bytes that are looked at, and bytes of tensors; raises CorruptFileError when none are left."""
        self.work -= work
        self.room -= room
        if self.work < 0 or self.room < 0:
            raise CorruptFileError(f"it would unfold into much more than its {self.size} bytes")

    def step(self) -> None:
        """Takes one operation; raises CorruptFileError when none are left."""
        self.operations -= 1
        if self.operations < 0:
            raise CorruptFileError("it takes more operations than any known file")


@dataclass(frozen=True)
class Global:
    """A name of the caller's table; `build` makes a value from its arguments, or None: it may only be mentioned."""

    name: str
    build: Build | None


@dataclass(eq=False)
class Record:
    """An object of the file as plain data: what it is called, its arguments, and the state given to it afterwards."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class Items(dict[Any, Any]):
    """A dict that may be given a state, which is dropped: an OrderedDict or EasyDict of the file."""


@dataclass(frozen=True, eq=False)
class LongBytes:
    """A long byte string that still lies in the file; `encoded` ones stand there as UTF-8 of their Latin-1 text."""

    view: memoryview
    encoded: bool = False

    def open(self) -> memoryview:
        """Returns the bytes; raises CorruptFileError if they were encoded and are not Latin-1."""
        return memoryview(latin1(LongText(self.view).decode())) if self.encoded else self.view

    def __len__(self) -> int:
        return len(self.view)


@dataclass(frozen=True, eq=False)
class LongText:
    """A long text that still lies in the file, as UTF-8."""

    view: memoryview

    def decode(self) -> str:
        """Returns the text; raises CorruptFileError if it is not UTF-8."""
        return decoded(self.view)

    def __len__(self) -> int:
        return len(self.view)


def shown(value: Any) -> str:
    """Returns a short text on one line for a value that came from a file."""
    if isinstance(value, Global | Record):
        return value.name
    if isinstance(value, str | bytes):
        return ascii(value[:60]) + ("..." if len(value) > 60 else "")
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    return f"a {type(value).__name__}"


def some(keys: Collection[Any]) -> str:
    """Returns the first keys of a dict of the file, as `shown`."""
    return ", ".join(shown(key) for key in list(keys)[:4]) + (", ..." if len(keys) > 4 else "") or "none"


def check_key(value: Any) -> Any:
    """Returns `value` if it may be a key: short text or bytes, a small integer, a truth value or None.

    Others are refused because hashing or comparing them can be made to take very long.
    """
    if value is None or type(value) is bool:
        return value
    if type(value) is int and abs(value) <= LARGEST_KEY:
        return value
    if type(value) in (str, bytes) and len(value) <= LONGEST_KEY:
        return value
    raise CorruptFileError(f"{shown(value)} cannot be a key of a dict or a member of a set")


def decoded(data: memoryview) -> str:
    """Returns a text that stands as UTF-8; raises CorruptFileError if it does not."""
    try:
        return str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CorruptFileError("a text that is not UTF-8") from error


def latin1(text: str) -> bytes:
    """Returns the bytes that protocol 2 wrote as text; raises CorruptFileError if they are none."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise CorruptFileError("bytes that were written as text, but are not Latin-1") from error
