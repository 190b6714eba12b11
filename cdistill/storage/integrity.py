"""What is in a file made here, read without torch: the header of safetensors, our own header in it, the checksum.

Nothing in the file is trusted: its header is bounded, safetensors checks it as a whole (types, shapes, offsets without
gaps or overlaps) before anything is read, and the digest is computed in pieces. `checkpoints.py` makes and loads these
files, and describes their format.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Annotated, Any, BinaryIO

from pydantic import Field, ValidationError, create_model
from safetensors import SafetensorError, safe_open

from cdistill.errors import CorruptFileError, MissingAssetError, printable
from cdistill.storage.bounded import damaged, explain, load_json, open_regular, parse_json
from cdistill.storage.files import file_digest, list_checkpoints, step_of

SCHEMA = 1
_STATE = create_model(  # of state.json, beside what a task adds
    "State",
    step=(Annotated[int, Field(ge=0)], ...),
    identity=(dict[str, str], {}),
    due=(bool, True),
    scaler=(dict[str, float] | None, None),
    network=(dict[str, Any] | None, None),
)
LONGEST_HEADER = 2 << 20  # bytes; that of 2,000 tensors has 0.3 MB
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


@contextmanager
def open_tensors(path: Path, framework: str) -> Iterator[tuple[safe_open, int]]:
    """Opens a safetensors file for "np" or "pt" tensors, and yields the byte where these begin, too.

    CorruptFileError: It is no regular file, truncated, or its header is too long, or not one that safetensors writes.
    """
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read")
        with safe_open(path, framework) as opened:
            yield opened, 8 + length
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFileError(
            f"{path}: damaged, or not a safetensors file ({printable(str(error))}); make or fetch it again"
        ) from error


def read_layout(path: Path) -> Layout:
    """Reads where the tensors of a safetensors file are; MissingAssetError if there is none.

    CorruptFileError: It is truncated, or its header is not one that safetensors writes.
    """
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; give the path of a file that cdistill made, or of a run")
    with open_tensors(path, "np") as (opened, begin):
        entries = dict(_entries(opened, begin))
        metadata = opened.metadata() or {}
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
        stated = parse_json(metadata.get("cdistill", "null"))
    except ValueError as error:
        raise CorruptFileError(f"{path}: damaged, its header is no JSON ({error}); make or fetch it again") from error
    header = stated.get("header") if isinstance(stated, dict) else None
    if not isinstance(header, dict):
        needed = f"; a {kind} file is needed" if kind else ""
        raise CorruptFileError(f"{path}: a safetensors file, but not made by cdistill{needed}")
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
    with open_regular(layout.path) as file:
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
    with open_regular(layout.path) as file:
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
        manifest = load_json(folder / "manifest.json")
        wrong = [n for n, digest in manifest.items() if not _is_name(n) or file_digest(folder / n) != digest]
    except (OSError, ValueError, CorruptFileError) as error:
        raise CorruptFileError(f"{folder}: damaged checkpoint ({error}); {advice}") from error
    if wrong:
        raise CorruptFileError(f"{folder}: {', '.join(map(printable, wrong))} was altered; {advice}")
    if "state.json" not in manifest:
        raise CorruptFileError(f"{folder}: its manifest names no state.json; {advice}")
    return sorted(manifest)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's ``state.json``; CorruptFileError unless it is one of this folder."""
    path = folder / "state.json"
    state = load_json(path)
    try:
        _STATE.model_validate(state, strict=True)
    except ValidationError as error:
        raise damaged(path, explain(error)) from error
    if (step := state["step"]) != step_of(folder):
        raise damaged(path, f"it is of step {step}, the folder of step {step_of(folder)}")
    return state


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
