"""Reading within bounds: regular files alone, and JSON and TOML only so long, so deep and of numbers so large.

Whatever is read may come from a stranger. A pipe would be waited for, a device never ends, a parser that follows a
nested text exhausts the stack: all of that is refused here, before any work. Needs no torch.
"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cdistill.errors import CorruptFileError, brief, printable

LARGEST = 64 << 20  # bytes of a picture, of arrays or of a log
LARGEST_TEXT = 16 << 20  # bytes of one JSON object
LARGEST_RECIPE = 256 << 10  # bytes of a TOML file
_DEEPEST = 50  # lists and objects in each other; honest files have 5
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
_DOTTED = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file without waiting; CorruptFileError for a folder, pipe or device, OSError if it is missing."""
    _check_regular(path, path.stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # what is there now may be something else
    file = os.fdopen(descriptor, "rb")
    try:
        _check_regular(path, os.fstat(descriptor))
    except CorruptFileError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """Returns the content of a file of at most `most` bytes; errors as `open_regular`, also if it is longer."""
    with open_regular(path) as file:
        content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        content += file.read(most + 1 - len(content)) if len(content) <= most else b""
    if len(content) > most:
        raise damaged(path, f"it has more than {most:,} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if there is none or it cannot be read; for files that may be lost."""
    try:
        return load_json(path)
    except (FileNotFoundError, CorruptFileError):
        return {}


def load_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; CorruptFileError if it holds anything else, OSError if it is missing."""
    try:
        value = parse_json(read_bytes(path, LARGEST_TEXT))
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "no JSON object")
    return value


def parse_json(text: bytes | str) -> Any:
    """Returns what a JSON text says; ValueError, in one line, if it is none or exceeds the bounds."""
    return _parse(json.loads, text)


def parse_toml(text: bytes | str) -> dict[str, Any]:
    """Returns what a TOML text says; ValueError, in one line, if it is none or exceeds the bounds."""
    if len(text) > LARGEST_RECIPE:
        raise ValueError(f"more than {LARGEST_RECIPE:,} bytes")
    values: dict[str, Any] = _parse(_load_toml, text)
    return values


def _load_toml(text: bytes | str) -> dict[str, Any]:
    decoded = text.decode() if isinstance(text, bytes) else text
    if dotted := _DOTTED.search(decoded):  # the parser takes the square of their number
        raise ValueError(f"a key of more than 16 parts: {dotted[0][:20]}...")
    return tomllib.loads(decoded)


def _parse(load: Callable[[bytes | str], Any], text: bytes | str) -> Any:
    """Returns what `load` makes of a text; ValueError, in one line, for whatever it raises, or beyond the bounds."""
    try:
        value = load(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_DEEPEST}") from error
    except ValueError as error:
        raise ValueError(printable(brief(error))) from error
    _check_bounds(value)
    return value


def damaged(where: object, reason: str) -> CorruptFileError:
    """Returns the error of a file of our own that cannot be what was written."""
    return CorruptFileError(f"{where}: damaged ({printable(reason)}); restore it, or make it again")


def explain(error: ValidationError) -> str:
    """Returns the first thing that does not fit a schema: its place and what is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def _check_bounds(value: Any) -> None:
    """Raises ValueError unless a parsed text is shallow and its whole numbers have at most 64 bits."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        if any(isinstance(item, int) and abs(item) >= 1 << 64 for item in level):
            raise ValueError("a whole number of more than 64 bits")
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for children in inner for child in children]
    if level:
        raise ValueError(f"nested deeper than {_DEEPEST}")


def _check_regular(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        what = _KINDS.get(stat.S_IFMT(facts.st_mode), "device")
        raise CorruptFileError(f"{path}: a {what}, not a file; give the path of a file")
