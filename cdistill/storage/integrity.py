"""What is in a file made here, read without torch: the header of safetensors, our own header in it, the checksum.

Nothing in the file is trusted: its header is bounded, safetensors checks it as a whole (types, shapes, offsets without
gaps or overlaps) before anything is read, and the digest is computed in pieces. `checkpoints.py` makes and loads these
files, and describes their format.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from cdistill.errors import CorruptFileError, MissingAssetError, printable
from cdistill.storage.files import file_digest, list_checkpoints

SCHEMA = 1
LONGEST_HEADER = 8 << 20  # bytes; that of 2,000 tensors has 0.3 MB
_DEEPEST = 50
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


Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor in a file: its type as torch calls it, without "torch.", its shape, where its bytes begin, how many."""


@dataclass(frozen=True)
class Layout:
    """A safetensors file whose header is valid: its bytes, its unread tensors by name in order, texts beside them."""

    path: Path
    size: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def canonical(header: Mapping[str, Any] | None) -> str:
    """Returns the header as the text that enters its digest."""
    return json.dumps(header, sort_keys=True)


def is_shallow(value: Any) -> bool:
    """Whether lists and dicts are nested no deeper in `value` than any honest file needs; deep ones exhaust a stack."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for children in inner for child in children]
    return not level


def read_layout(path: Path) -> Layout:
    """Reads where the tensors of a safetensors file are; MissingAssetError if there is none.

    CorruptFileError: It is truncated, or its header is not one that safetensors writes.
    """
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; give the path of a file that cdistill made, or of a run")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read")
        with safe_open(path, "np") as opened:
            entries = dict(_entries(opened, 8 + length))
            metadata = opened.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        reason = printable(str(error))
        raise CorruptFileError(
            f"{path}: damaged, or not a safetensors file ({reason}); make or fetch it again"
        ) from error
    return Layout(path, path.stat().st_size, dict(sorted(entries.items())), metadata)


def verify(layout: Layout) -> tuple[dict[str, Any], str]:
    """Returns the header of a file made here, and its digest, once that is the one stated.

    CorruptFileError: It was not made by cdistill, was altered, or is of a newer schema.
    """
    header, stated = own_header(layout.path, layout.metadata)
    digest = layout_digest(layout, canonical(header))
    check_header(layout.path, header, stated, digest)
    return header, digest


def own_header(path: Path, metadata: Mapping[str, str], kind: str = "") -> tuple[dict[str, Any], object]:
    """Returns the header in the metadata of a file made here, and the digest stated there, which is not yet compared.

    CorruptFileError: It was not made by cdistill, or the header is damaged.
    """
    try:
        stated = json.loads(metadata.get("cdistill", "null"))
        header = stated.get("header") if isinstance(stated, dict) else None
        shallow = is_shallow(header)
        canonical(header)
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise CorruptFileError(f"{path}: damaged, its header is no JSON ({reason}); make or fetch it again") from error
    if not isinstance(header, dict):
        needed = f"; a {kind} file is needed" if kind else ""
        raise CorruptFileError(f"{path}: a safetensors file, but not made by cdistill{needed}")
    if not shallow:
        raise CorruptFileError(f"{path}: its header is nested too deeply; make or fetch it again")
    return header, stated.get("sha256")


def check_header(path: Path, header: Mapping[str, Any], stated: object, digest: str) -> None:
    """Raises CorruptFileError unless `digest` is the one `stated`, and the header is one that can be read here."""
    if digest != stated:
        raise CorruptFileError(f"{path}: its checksum does not match, it was altered; make or fetch it again")
    schema, kind = header.get("schema"), header.get("kind")
    if not isinstance(schema, int) or not (isinstance(kind, str) and kind.isprintable()):
        raise CorruptFileError(f"{path}: its header names no kind or schema; make or fetch it again")
    if schema > SCHEMA:
        raise CorruptFileError(f"{path}: has schema {schema}, newer than {SCHEMA}; update cdistill")


def layout_digest(layout: Layout, text: str) -> str:
    """Computes the SHA-256 of `tensor_digest` from the file, a piece at a time."""
    digest = hashlib.sha256(text.encode())
    with layout.path.open("rb") as file:
        for name in sorted(layout.entries):
            dtype, shape, begin, size = layout.entries[name]
            digest.update(f"\0{name}\0torch.{dtype}\0{shape}\0".encode())
            for start in range(0, size, _PIECE):
                digest.update(_bytes(layout.path, file, begin + start, min(_PIECE, size - start)))
    return digest.hexdigest()


def numbers(layout: Layout, name: str, rows: Sequence[int]) -> list[tuple[float, ...]]:
    """Reads some rows of a tensor of one or two dimensions; only these are read.

    CorruptFileError: There is no such tensor of float64, float32, int64 or int32, or not so many rows.
    """
    dtype, shape, start, _ = layout.entries.get(name, ("", (), 0, 0))
    if dtype not in NUMBERS or len(shape) not in (1, 2):
        raise CorruptFileError(f"{layout.path}: holds no table {name!r}; make or fetch it again")
    if rows and max(rows) >= shape[0]:
        raise CorruptFileError(f"{layout.path}: table {name!r} has {shape[0]} rows only; make or fetch it again")
    row_layout = Struct(f"<{math.prod(shape) // max(1, shape[0])}{NUMBERS[dtype]}")
    with layout.path.open("rb") as file:
        return [
            row_layout.unpack(_bytes(layout.path, file, start + row * row_layout.size, row_layout.size)) for row in rows
        ]


def check_manifest(folder: Path) -> list[str]:
    """Returns the names of a checkpoint's files.

    CorruptFileError: One has not the digest in the manifest; it names the checkpoint from which training can resume.
    """
    others = [path.name for path in list_checkpoints(folder.parent) if path.name != folder.name]
    advice = f"remove this folder to resume from {others[-1]}" if others else "remove this folder to start again"
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


def _entries(file: safe_open, start: int) -> Iterator[tuple[str, Entry]]:
    """Yields the tensors in the order of their bytes, which safetensors has checked to leave no gaps."""
    for name in file.offset_keys():
        tensor = file.get_slice(name)
        if tensor.get_dtype() not in _TYPES:
            raise ValueError(f"tensor {printable(name, 60)!r} has the unknown type {tensor.get_dtype()}")
        dtype, width = _TYPES[tensor.get_dtype()]
        size = width * math.prod(tensor.get_shape())
        yield name, (dtype, tuple(tensor.get_shape()), start, size)
        start += size


def _bytes(path: Path, file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise CorruptFileError(f"{path}: became shorter while it was read; make or fetch it again")
    return content
