"""CIFAR-10's own archives and folders, in the binary and the Python edition (Krizhevsky 2009).

``cifar-10-batches-bin/data_batch_1.bin`` ... ``data_batch_5.bin`` are the split "train", ``test_batch.bin`` is
"heldout"; the Python edition has the same names without ``.bin``, in a folder ``cifar-10-batches-py``.
"""

import gzip
import tarfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdistill.data.labels import check_classes
from cdistill.data.source import Source, check_split
from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.formats.images import Pixels
from cdistill.formats.pickle_stubs import container_names, numpy_names, to_array
from cdistill.formats.pickle_values import shown
from cdistill.formats.safe_pickle import read_pickle

SHAPE = (3, 32, 32)
CLASSES = 10
_STEMS = {"train": [f"data_batch_{k}" for k in range(1, 6)], "heldout": ["test_batch"]}
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", ".")
_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 64 * 2**20  # of one batch; the real ones have 30 MB
_MOST_TOTAL = 2**29  # of everything that comes out of the archive; the real one has 180 MB
_MOST_MEMBERS = 1000
_MOST_PAX = 2**16
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)


def find_cifar(path: Path) -> Path | None:
    """Returns the folder that holds CIFAR-10's batches: `path` or a known one in it; None if there is none."""
    stem = _STEMS["train"][0]
    places = [path / folder for folder in _FOLDERS]
    return next((p for p in places if (p / stem).is_file() or (p / f"{stem}.bin").is_file()), None)


def load_cifar(path: Path, split: str = "train") -> Source:
    """Loads CIFAR-10 from a ``.tar.gz`` or an extracted folder, into memory (180 MB); errors as `loading.load_file`."""
    check_split(str(path), split, _STEMS)
    stems = _STEMS[split]
    folder = find_cifar(path) if path.is_dir() else None
    wanted = {*stems, *[f"{stem}.bin" for stem in stems]}
    contents = _read_tar(path, wanted) if folder is None else _read_folder(folder, wanted)
    suffix = ".bin" if f"{stems[0]}.bin" in contents else ""
    if missing := [stem + suffix for stem in stems if stem + suffix not in contents]:
        raise CorruptFileError(f"{path}: no {missing[0]} in it; needs CIFAR-10's binary or Python edition, whole")
    read = _read_binary if suffix else _read_python
    parts = [read(contents[stem + suffix], f"{path}: {stem}{suffix}") for stem in stems]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Source(str(path), torch.from_numpy(images), torch.from_numpy(labels), CLASSES, flips=True)


def _read_binary(content: bytes, where: str) -> tuple[Pixels, Any]:
    """Reads records of a label and 3x32x32 pixels."""
    if not content or len(content) % _RECORD:
        raise CorruptFileError(f"{where}: {len(content):,} bytes, no multiple of {_RECORD:,}; fetch it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, *SHAPE), check_classes(records[:, 0], where, CLASSES)


def _read_python(content: bytes, where: str) -> tuple[Pixels, Any]:
    """Reads a pickled dict of an array (n, 3072) and a list of labels; nothing in it is executed."""
    try:
        batch = read_pickle(content, {**numpy_names(), **container_names()})
        pixels = to_array(_entry(batch, "data"))
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _RECORD - 1 or not len(pixels):
            raise CorruptFileError(f"{pixels.dtype} images {pixels.shape}; needs uint8 (n, 3072)")
        labels = _check_list(_entry(batch, "labels"), len(pixels))
    except CorruptFileError as error:
        raise CorruptFileError(f"{where}: {error}; fetch it again") from error
    return pixels.reshape(-1, *SHAPE), labels


def _check_list(labels: Any, count: int) -> Any:
    """Returns a list of classes as int64; NumPy would unfold lists in lists, which may hold themselves."""
    if type(labels) is not list or len(labels) != count:
        raise CorruptFileError(f"its labels are no list of {count} numbers, one for each image")
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label < CLASSES]:
        raise CorruptFileError(f"label {shown(wrong[0])}; classes are whole numbers from 0 to {CLASSES - 1}")
    return np.array(labels, np.int64)


def _entry(batch: Any, name: str) -> Any:
    """Returns an entry of the dict; Python 2 wrote its keys as bytes."""
    value = batch.get(name, batch.get(name.encode())) if isinstance(batch, dict) else None
    if value is None:
        raise CorruptFileError(f"has no {name!r}")
    return value


def _read_folder(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    contents = {}
    for name in sorted(wanted):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                contents[name] = file.read(_MOST_BYTES)
    return contents


def _read_tar(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Reads the members called as in `wanted`, in whatever folder, from a .tar or .tar.gz; nothing is extracted.

    CorruptFileError: Damaged, larger than CIFAR-10, with entries of another kind, or with two of one name.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as stream:
            return _read_members(_Bounded(stream), wanted)
    except FileNotFoundError as error:
        raise MissingAssetError(f"{path}: no such file; check the path") from error
    except (CorruptFileError, tarfile.TarError, EOFError, zlib.error, OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not a valid tar archive ({error}); fetch it again") from error


def _read_members(stream: Any, wanted: set[str]) -> dict[str, bytes]:
    """Reads the wanted members of a `_Bounded` stream, to its very end."""
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_PlainMember) as archive:
        for count, member in enumerate(archive):
            name = member.name.rpartition("/")[2]
            if count == _MOST_MEMBERS:
                raise CorruptFileError(f"more than {_MOST_MEMBERS:,} entries, no CIFAR-10")
            if name not in wanted or member.isdir():
                continue
            if member.size > _MOST_BYTES:
                raise CorruptFileError(f"{name} has {member.size:,} bytes; at most {_MOST_BYTES:,} are read")
            if any(name.removesuffix(".bin") == other.removesuffix(".bin") for other in contents):
                raise CorruptFileError(f"{name} is in it twice")
            content = archive.extractfile(member)
            assert content is not None
            contents[name] = content.read()
    while stream.read(_MOST_PAX):  # the end is where gzip compares the CRC-32
        pass
    return contents


class _PlainMember(tarfile.TarInfo):
    """A file or a folder with a short name; other kinds are refused by their header, before anything of them is read.

    Long names, sparse maps and headers of any length and depth are what has made `tarfile` hang or fill the memory.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (*_PLAIN, *_PAX) or self.size < 0 or (self.type in _PAX and self.size > _MOST_PAX):
            kind = self.type.decode("latin-1")
            raise CorruptFileError(f"an entry of kind {kind!a}, {self.size:,} bytes; only files and folders are read")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


class _Bounded:
    """A stream that raises CorruptFileError once more than `_MOST_TOTAL` bytes came out of it."""

    def __init__(self, stream: gzip.GzipFile | BufferedReader) -> None:
        self._stream, self._left = stream, _MOST_TOTAL

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or what is left."""
        content = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise CorruptFileError(f"more than {_MOST_TOTAL:,} bytes, no CIFAR-10")
        return content
