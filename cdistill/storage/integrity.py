"""What is in a file made here, read without torch: the header of safetensors, our own header in it, the checksum.

Nothing in the file is believed: its header is bounded and checked as a whole (types, shapes, offsets without gaps or
overlaps) before anything is read, and the digest is taken piece by piece. `checkpoints.py` makes and loads these
files; it says what they are.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from cdistill.errors import CorruptFileError, MissingAssetError, printable
from cdistill.storage.files import file_digest, list_checkpoints

SCHEMA = 1
LONGEST_HEADER = 8 << 20  # bytes; that of 2,000 tensors has 0.3 MB
_DEEPEST = 50
_MOST_DIMENSIONS = 64  # numpy's limit
_PIECE = 1 << 20

# Type in the file -> its name in torch and its bytes.
_TYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "U64": ("uint64", 8), "I64": ("int64", 8), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8), "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}  # fmt: skip
NUMBERS = {"float64": "d", "float32": "f", "int64": "q", "int32": "i"}  # those that `numbers` reads


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: Its name.
        dtype: Its type as torch calls it, without "torch.".
        shape: Its shape.
        start: Where its bytes begin in the file.
        size: How many bytes it has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """A safetensors file whose header is sound; its tensors are unread.

    Attributes:
        path: The file.
        size: Its bytes.
        entries: Its tensors by name, in the order of the names.
        metadata: Texts beside them.
    """

    path: Path
    size: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Seal:
    """What a file made here says of itself.

    Attributes:
        header: Its facts, with "kind" and "schema".
        sha256: What its digest must be.
    """

    header: dict[str, Any]
    sha256: object

    @property
    def text(self) -> str:
        """The header as it enters the digest."""
        return canonical(self.header)


def canonical(header: Mapping[str, Any] | None) -> str:
    """Returns the one text of a header that its digest is taken of."""
    return json.dumps(header, sort_keys=True)


def is_shallow(value: Any) -> bool:
    """Whether lists and dicts are nested no deeper in `value` than any honest file needs; deep ones exhaust a stack."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [child for children in inner for child in children]
    return not level


def read_layout(path: Path) -> Layout:
    """Reads where the tensors of a safetensors file are.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is truncated, or its header is not one that safetensors writes.
    """
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; give the path of a file that cdistill made, or of a run")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = _header_length(file.read(8), size)
            return _parse(path, size, file.read(length).decode(), 8 + length)
    except (ValueError, RecursionError) as error:
        told = printable(str(error) or "nested too deeply")
        raise CorruptFileError(
            f"{path}: damaged, or not a safetensors file ({told}); make or fetch it again"
        ) from error


def unseal(path: Path, metadata: Mapping[str, str], kind: str = "") -> Seal:
    """Returns what the metadata of a file say, if it was made here; the digest is still to be compared.

    Args:
        path: The file, for messages.
        metadata: Of its safetensors header.
        kind: What the caller needs, for messages.

    Raises:
        CorruptFileError: It was not made by cdistill, or the header is damaged.
    """
    try:
        sealed = json.loads(metadata.get("cdistill", "null"))
        header = sealed.get("header") if isinstance(sealed, dict) else None
        shallow = is_shallow(header)
        canonical(header)
    except (ValueError, RecursionError) as error:
        told = printable(str(error))
        raise CorruptFileError(f"{path}: damaged, its header is no JSON ({told}); make or fetch it again") from error
    if not isinstance(header, dict):
        needed = f"; a {kind} file is needed" if kind else ""
        raise CorruptFileError(f"{path}: a safetensors file, but not made by cdistill{needed}")
    if not shallow:
        raise CorruptFileError(f"{path}: its header is nested too deeply; make or fetch it again")
    return Seal(header, sealed.get("sha256"))


def check_seal(path: Path, seal: Seal, digest: str) -> None:
    """Raises CorruptFileError unless `digest` is what the seal states, and its header is one that can be read here."""
    if digest != seal.sha256:
        raise CorruptFileError(f"{path}: its checksum does not match, it was altered; make or fetch it again")
    schema, kind = seal.header.get("schema"), seal.header.get("kind")
    if not isinstance(schema, int) or not (isinstance(kind, str) and kind.isprintable()):
        raise CorruptFileError(f"{path}: its header names no kind or schema; make or fetch it again")
    if schema > SCHEMA:
        raise CorruptFileError(f"{path}: has schema {schema}, newer than {SCHEMA}; update cdistill")


def layout_digest(layout: Layout, text: str) -> str:
    """Computes the SHA-256 of `tensor_digest` from the file, a piece at a time."""
    found = hashlib.sha256(text.encode())
    with layout.path.open("rb") as file:
        for name in sorted(layout.entries):
            entry = layout.entries[name]
            found.update(f"\0{name}\0torch.{entry.dtype}\0{entry.shape}\0".encode())
            for piece in _pieces(layout.path, file, entry):
                found.update(piece)
    return found.hexdigest()


def numbers(layout: Layout, name: str, rows: Sequence[int]) -> list[tuple[float, ...]]:
    """Reads some rows of a tensor of one or two dimensions; only these are read.

    Raises:
        CorruptFileError: There is no such tensor of float64, float32, int64 or int32, or not so many rows.
    """
    entry = layout.entries.get(name)
    if entry is None or entry.dtype not in NUMBERS or len(entry.shape) not in (1, 2):
        raise CorruptFileError(f"{layout.path}: holds no table {name!r}; make or fetch it again")
    if rows and max(rows) >= entry.shape[0]:
        raise CorruptFileError(f"{layout.path}: table {name!r} has {entry.shape[0]} rows only; make or fetch it again")
    form = Struct(f"<{entry.count // max(1, entry.shape[0])}{NUMBERS[entry.dtype]}")
    with layout.path.open("rb") as file:
        return [form.unpack(_bytes(layout.path, file, entry.start + row * form.size, form.size)) for row in rows]


def check_manifest(folder: Path) -> list[str]:
    """Returns the names of a checkpoint's files.

    Raises:
        CorruptFileError: One of them has not the digest that the manifest states; the message says from which other
            checkpoint the training can go on.
    """
    others = [path.name for path in list_checkpoints(folder.parent) if path.name != folder.name]
    advice = f"remove this folder to go on from {others[-1]}" if others else "remove this folder to start again"
    try:
        manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text())
        wrong = [n for n, digest in manifest.items() if not _is_name(n) or file_digest(folder / n) != digest]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{folder}: damaged checkpoint ({error}); {advice}") from error
    if wrong:
        raise CorruptFileError(f"{folder}: {', '.join(map(printable, wrong))} was altered; {advice}")
    if "state.json" not in manifest:
        raise CorruptFileError(f"{folder}: its manifest names no state.json; {advice}")
    return sorted(manifest)


def _is_name(name: str) -> bool:
    """Whether `name` is that of a file in the folder itself."""
    return Path(name).name == name and name not in ("", "..")


def _header_length(first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise ValueError("it is shorter than its header says")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read")
    return length


def _parse(path: Path, size: int, text: str, first: int) -> Layout:
    """Checks the whole header: every tensor has its bytes, one after the other up to the end of the file."""
    described = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    if not isinstance(described, dict):
        raise ValueError("its header is no JSON object")
    metadata = described.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its metadata are not texts")
    entries = sorted((_entry(name, value, first) for name, value in described.items()), key=lambda e: (e.start, e.size))
    end = first
    for entry in entries:
        if entry.start != end:
            raise ValueError(f"tensor {printable(entry.name, 60)!r} does not begin where the one before it ends")
        end += entry.size
    if end != size:
        raise ValueError(f"its tensors have {end - first:,} bytes, the file has {size - first:,} for them")
    return Layout(path, size, {entry.name: entry for entry in sorted(entries, key=lambda e: e.name)}, metadata)


def _entry(name: str, value: Any, first: int) -> Entry:
    name.encode()  # a lone surrogate is no text
    if not (isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"tensor {printable(name, 60)!r} is not described by dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in _TYPES:
        raise ValueError(f"tensor {printable(name, 60)!r} has an unknown type")
    shape, offsets = (_naturals(name, value[key]) for key in ("shape", "data_offsets"))
    dtype, width = _TYPES[value["dtype"]]
    size = math.prod(shape) * width
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {printable(name, 60)!r} has not the bytes of its shape")
    return Entry(name, dtype, shape, first + offsets[0], size)


def _naturals(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {printable(name, 60)!r} has no list of numbers, or a too long one")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        raise ValueError(f"tensor {printable(name, 60)!r} has a number that is no size")
    return tuple(value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _pieces(path: Path, file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    for start in range(0, entry.size, _PIECE):
        yield _bytes(path, file, entry.start + start, min(_PIECE, entry.size - start))


def _bytes(path: Path, file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    found = file.read(size)
    if len(found) < size:
        raise CorruptFileError(f"{path}: became shorter while it was read; make or fetch it again")
    return found
