"""CIFAR-10's own archives and folders, in the binary and the Python edition (Krizhevsky 2009).

``cifar-10-batches-bin/data_batch_1.bin`` ... ``data_batch_5.bin`` are the training part, ``test_batch.bin`` the
held-out one; the Python edition has the same names without ``.bin``, in a folder ``cifar-10-batches-py``.
"""

import gzip
import tarfile
import zlib
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from cdistill.data.labels import check_classes
from cdistill.data.source import Source
from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError
from cdistill.formats.images import Pixels
from cdistill.formats.inert import container_names, numpy_names, to_array
from cdistill.formats.opcodes import read_pickle

SHAPE = (3, 32, 32)
CLASSES = 10
_STEMS = {"train": [f"data_batch_{k}" for k in range(1, 6)], "heldout": ["test_batch"]}
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", ".")
_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 64 * 2**20  # of one batch; the real ones have 30 MB
_MOST_TOTAL = 2**30  # of everything in an archive


def find_cifar(path: Path) -> Path | None:
    """Returns the folder that holds CIFAR-10's batches: `path` or a known one in it; None if there is none."""
    stem = _STEMS["train"][0]
    places = [path / folder for folder in _FOLDERS]
    return next((p for p in places if (p / stem).is_file() or (p / f"{stem}.bin").is_file()), None)


def load_cifar(path: Path, split: str = "train") -> Source:
    """Loads CIFAR-10 from a ``.tar.gz`` or an extracted folder, always into memory (180 MB).

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: Damaged, or without CIFAR-10's batches.
        CdistillError: `split` is neither "train" nor "heldout".
    """
    if split not in _STEMS:
        raise CdistillError(f"data {str(path)!r}: has no part {split!r}; only 'train' and 'heldout'")
    stems = _STEMS[split]
    folder = find_cifar(path) if path.is_dir() else None
    wanted = {*stems, *[f"{stem}.bin" for stem in stems]}
    found = _read_tar(path, wanted) if folder is None else _read_folder(folder, wanted)
    suffix = ".bin" if f"{stems[0]}.bin" in found else ""
    if missing := [stem + suffix for stem in stems if stem + suffix not in found]:
        raise CorruptFileError(f"{path}: no {missing[0]} in it; needs CIFAR-10's binary or Python edition, whole")
    read = _read_binary if suffix else _read_python
    parts = [read(found[stem + suffix], f"{path}: {stem}{suffix}") for stem in stems]
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
        pixels, labels = to_array(_entry(batch, "data")), np.array(_entry(batch, "labels"))
    except CorruptFileError as error:
        raise CorruptFileError(f"{where}: {error}; fetch it again") from error
    except ValueError as error:  # a ragged list
        raise CorruptFileError(f"{where}: its labels are no numbers; fetch it again") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(pixels), _RECORD - 1) or labels.dtype.kind != "i":
        raise CorruptFileError(f"{where}: {pixels.dtype} images {pixels.shape}; needs uint8 (n, 3072) and labels")
    if labels.shape != (len(pixels),) or not len(labels):
        raise CorruptFileError(f"{where}: labels {labels.shape} for {len(pixels)} images; fetch it again")
    return pixels.reshape(-1, *SHAPE), check_classes(labels, where, CLASSES)


def _entry(batch: Any, name: str) -> Any:
    """Returns an entry of the dict; Python 2 wrote its keys as bytes."""
    found = batch.get(name, batch.get(name.encode())) if isinstance(batch, dict) else None
    if found is None:
        raise CorruptFileError(f"has no {name!r}")
    return found


def _read_folder(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    found = {}
    for name in sorted(wanted):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = file.read(_MOST_BYTES)
    return found


def _read_tar(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Reads the members called as in `wanted`, in whatever folder; nothing is extracted."""
    found, total = {}, 0
    try:
        with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                total += member.size
                if total > _MOST_TOTAL:
                    raise CorruptFileError(f"{path}: {member.name}: more than {_MOST_TOTAL:,} bytes; no CIFAR-10")
                name = PurePosixPath(member.name).name
                if member.isreg() and name in wanted and member.size <= _MOST_BYTES:
                    content = archive.extractfile(member)
                    found[name] = content.read() if content else b""
            stream.read(_MOST_BYTES)  # the end is where gzip compares the CRC-32
    except FileNotFoundError as error:
        raise MissingAssetError(f"{path}: no such file; check the path") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a sound tar archive ({error}); fetch it again") from error
    return found


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    """Opens a file that may be compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")
