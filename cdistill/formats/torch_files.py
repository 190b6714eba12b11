"""Files that torch saves, old (five pickles and raw data) and new (a zip archive), read as data.

A tensor is copied out of the file when the pickle describes it, into memory of its own, contiguous; what the file says
about devices and gradients is ignored. A storage stays where it lies in the file, so that reading takes the room of the
tensors and not more.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.formats.pickle_stubs import MOST_DIMENSIONS, container_names, numpy_names
from cdistill.formats.pickle_values import Budget, Build, Global, LongBytes, Names, shown
from cdistill.formats.safe_pickle import read_pickle, read_pickle_at
from cdistill.formats.stored_zip import StoredZip

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
TYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_RAW = {1: (torch.uint8, "u1"), 2: (torch.int16, "<i2"), 4: (torch.int32, "<i4"), 8: (torch.int64, "<i8")}
_KEY = re.compile(r"[0-9A-Za-z_]{1,64}")


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers that lie in the file, from byte `start` of `source`."""

    dtype: torch.dtype
    numel: int
    source: LongBytes
    start: int

    def open(self) -> memoryview:
        """Returns the bytes of the numbers."""
        return self.source.open()[self.start : self.start + self.numel * self.dtype.itemsize]


def read_torch_file(path: Path) -> Any:
    """Reads a file that torch saved, old or new: tensors in dicts, lists and tuples, numbers and text.

    An OrderedDict becomes a dict; a text of 64 KiB or more stays a `LongText`.

    MissingAssetError: There is no such file. CorruptFileError: It is damaged, or holds anything else.
    """
    with naming(path):
        data = map_file(path)
        budget = Budget(len(data))
        if not is_torch_file(data):
            raise CorruptFileError("it is no file that torch saved")
        return read_torch(data, tensor_names(budget), budget)


def map_file(path: Path) -> memoryview:
    """Returns the content of a file without reading it yet; the file must not be cut while it is used.

    MissingAssetError: It cannot be opened: nothing is there, a folder or a device. CorruptFileError: It is empty.
    """
    if path.exists() and not path.is_file():
        what = "folder" if path.is_dir() else "device"
        raise MissingAssetError(f"{path}: a {what}, not a file; give the path of a file")
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; put it there or give another path")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CorruptFileError("the file is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise MissingAssetError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a CorruptFileError, and the advice after it."""
    try:
        yield
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}; nothing of it was run; fetch it again or use another file") from error


def is_torch_file(data: memoryview) -> bool:
    """Whether torch saved the content, old or new, judging by how it begins."""
    return _is_zip(data) or _is_legacy(data)


def read_torch(data: memoryview, names: Names, budget: Budget) -> Any:
    """Returns the value in a file that torch saved, old or new; errors as `read_torch_file`, without the path."""
    return _read_zip(data, names, budget) if _is_zip(data) else _read_legacy(LongBytes(data), names, budget)


def tensor_names(budget: Budget) -> dict[str, Build | None]:
    """Returns the names in files of tensors, which `budget` pays for: containers, NumPy's numbers, torch's storages."""
    return {
        **container_names(),
        **numpy_names(),
        **dict.fromkeys(TYPES),
        "torch._utils._rebuild_tensor_v2": lambda arguments: _tensor(arguments, budget),
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": lambda arguments: _storage_from_bytes(arguments, budget),
    }


def _is_zip(data: memoryview) -> bool:
    return bytes(data[:4]) == b"PK\3\4"


def _is_legacy(data: memoryview) -> bool:
    try:
        value, _ = read_pickle_at(data, 0, {}, budget=Budget(len(data), operations=8))
    except CorruptFileError:
        return False
    return type(value) is int and value == MAGIC


def _tensor(arguments: tuple[Any, ...], budget: Budget) -> Tensor:
    """Copies a strided view of a storage: (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        raise CorruptFileError("a tensor that is not made from a storage, an offset, a size and strides")
    storage, offset, size, stride = arguments[:4]
    if any(value is not None and not (isinstance(value, dict) and not value) for value in arguments[5:]):
        raise CorruptFileError("a tensor with hooks, or a conjugate or negative view")
    _check_layout(storage.numel, offset, size, stride)
    width = storage.dtype.itemsize
    budget.spend(work=len(storage.source) if storage.source.encoded else 0, room=math.prod(size) * width)
    raw, numbers = _RAW[width]
    target = torch.empty(size, dtype=raw)
    if target.numel():
        steps = [step * width for step in stride]
        target.numpy()[...] = np.ndarray(size, numbers, storage.open(), offset * width, steps)
    if storage.dtype == torch.bool and target.numel() and int(target.max()) > 1:
        raise CorruptFileError("a tensor of truth values that holds other numbers")
    return target.view(storage.dtype)


def _check_layout(numel: int, offset: Any, size: Any, stride: Any) -> None:
    """Raises CorruptFileError unless the view lies within `numel` numbers and no two of its elements coincide."""
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MOST_DIMENSIONS:
        raise CorruptFileError("a tensor whose size and strides do not fit together")
    if not all(type(value) is int and 0 <= value < 1 << 40 for value in (offset, *size, *stride)):
        raise CorruptFileError("a tensor with an offset, a size or a stride out of range")
    if math.prod(max(length, 1) for length in size) >= 1 << 40:
        raise CorruptFileError("a tensor with too many elements")
    reach = 1
    for step, length in sorted((step, length) for step, length in zip(stride, size, strict=True) if length > 1):
        if step < reach and math.prod(size):
            raise CorruptFileError("a tensor whose elements overlap")
        reach += step * (length - 1)
    if offset + (reach if math.prod(size) else 0) > numel:
        raise CorruptFileError(f"a tensor that reaches beyond its storage of {numel} numbers")


def _parameter(arguments: tuple[Any, ...]) -> Tensor:  # (data, requires_grad, hooks)
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor):
        raise CorruptFileError("a parameter that is not made from a tensor")
    return arguments[0]


def _persistent_id(value: Any) -> tuple[torch.dtype, str, int]:
    """Returns the type, the key and the length of ('storage', torch.FloatStorage, key, location, numel[, None])."""
    if type(value) is not tuple or len(value) not in (5, 6) or type(value[0]) is not str or value[0] != "storage":
        raise CorruptFileError("a reference that is not to a storage")
    kind, key, _, numel = value[1:5]
    if not isinstance(kind, Global) or kind.name not in TYPES:
        raise CorruptFileError(f"a storage of the type {shown(kind)}; known: {', '.join(TYPES)}")
    if type(key) is not str or not _KEY.fullmatch(key) or type(numel) is not int or not 0 <= numel < 1 << 40:
        raise CorruptFileError("a storage whose key or length is out of range")
    if len(value) == 6 and value[5] is not None:
        raise CorruptFileError("a view of a storage, as torch wrote before version 0.4")
    return TYPES[kind.name], key, numel


def _read_zip(data: memoryview, names: Names, budget: Budget) -> Any:
    archive = StoredZip(data, budget)
    mains = [name for name in archive.names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(mains) != 1:
        raise CorruptFileError(f"an archive with {len(mains)} pickles; a file that torch saved has one")
    root = mains[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.names and bytes(archive.open(f"{root}byteorder")) != b"little":
        raise CorruptFileError("an archive that is not little-endian")

    def persistent(value: Any) -> Storage:
        dtype, key, numel = _persistent_id(value)
        content = archive.open(f"{root}data/{key}")
        if len(content) != numel * dtype.itemsize:
            raise CorruptFileError(f"storage {key} has {len(content)} bytes; {numel} numbers of {dtype} are announced")
        return Storage(dtype, numel, LongBytes(content), 0)

    return read_pickle(archive.open(mains[0]), names, persistent, budget)


def _storage_from_bytes(arguments: tuple[Any, ...], budget: Budget) -> Storage:
    """Reads the one storage that a pickled tensor carries as a file in the old format."""
    if len(arguments) != 1 or not isinstance(arguments[0], bytes | LongBytes):
        raise CorruptFileError("a storage that is not made from bytes")
    source = arguments[0]
    source = source if isinstance(source, LongBytes) else LongBytes(memoryview(source))
    try:
        value = _read_legacy(source, dict.fromkeys(TYPES), budget)
    except CorruptFileError as error:
        raise CorruptFileError(f"within the bytes of a storage: {error}") from error
    if not isinstance(value, Storage):
        raise CorruptFileError(f"{shown(value)} where a storage is needed")
    return value


def _read_legacy(source: LongBytes, names: Names, budget: Budget) -> Any:
    """Reads magic number, version, system, value, keys, then the numbers of each key.

    The numbers follow the value that needs them, so the value is read twice: once to learn which storages there
    are, and again with them at hand.
    """
    data = source.open()
    place = _check_head(data, budget)
    announced: dict[str, tuple[torch.dtype, int]] = {}
    tensors = [name for name in names if name.startswith(("torch._utils.", "torch.storage."))]
    quiet: Names = {**names, **dict.fromkeys(tensors, lambda arguments: None)}

    def announce(value: Any) -> None:
        dtype, key, numel = _persistent_id(value)
        if announced.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise CorruptFileError(f"two different storages are called {key}")

    _, end = read_pickle_at(data, place, quiet, announce, budget)
    keys, end = read_pickle_at(data, end, {}, budget=budget)
    storages = _find_storages(source, data, end, keys, announced)
    return read_pickle_at(data, place, names, lambda value: storages[_persistent_id(value)[1]], budget)[0]


def _check_head(data: memoryview, budget: Budget) -> int:
    """Returns where the value begins."""
    magic, place = read_pickle_at(data, 0, {}, budget=budget)
    version, place = read_pickle_at(data, place, {}, budget=budget)
    if type(magic) is not int or magic != MAGIC or type(version) is not int or version != VERSION:
        raise CorruptFileError("not the bytes of a file that torch saved")
    system, place = read_pickle_at(data, place, {}, budget=budget)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CorruptFileError("written on a system that is not little-endian")
    return place


def _find_storages(
    source: LongBytes, data: memoryview, place: int, keys: Any, announced: Mapping[str, tuple[torch.dtype, int]]
) -> dict[str, Storage]:
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CorruptFileError("a list of storages that is none")
    if len(keys) != len(announced) or set(keys) != set(announced):
        raise CorruptFileError("the list of storages does not name those that are used")
    storages = {}
    for key in keys:
        dtype, numel = announced[key]
        if place + 8 + numel * dtype.itemsize > len(data):
            raise CorruptFileError(f"the numbers of storage {key} are cut short: truncated")
        stated = struct.unpack_from("<q", data, place)[0]
        if stated != numel:
            raise CorruptFileError(f"storage {key} has {stated} numbers, {numel} are announced")
        storages[key] = Storage(dtype, numel, source, place + 8)
        place += 8 + numel * dtype.itemsize
    if place != len(data):
        raise CorruptFileError(f"{len(data) - place} bytes follow the last storage")
    return storages
