"""Images in a NumPy archive (.npz): `images`, `arr_0` or our own `samples`; classes, if any, in `labels` or `arr_1`.

Only headers are left to NumPy's reader, which believes what an archive says about sizes.
"""

import struct
import zipfile
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdistill.data.labels import check_classes, count_classes
from cdistill.data.lazy import Indices, LazySamples
from cdistill.data.memory import memory_limit
from cdistill.data.source import Source
from cdistill.errors import CdistillError, CorruptFileError, MismatchError
from cdistill.formats.images import Pixels
from cdistill.formats.npz import read_header, sound
from cdistill.runtime.console import say
from cdistill.storage.files import file_digest

_IMAGES = ("images", "arr_0", "samples")
_LABELS = ("labels", "arr_1")
_AT_ONCE = 1024  # images


class MappedImages(LazySamples):
    """Images of an array in a file, which stays on the disk.

    Args:
        path: The file.
        offset: Where the array begins.
        shape: Of the array, NCHW or NHWC.
        last: The channels come last.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], last: bool) -> None:
        self._array = np.memmap(path, np.uint8, "r", offset, shape)
        self._last = last
        self.shape = torch.Size(_nchw(shape, last))

    def read(self, indices: Indices) -> Pixels:
        """See :class:`LazySamples`."""
        return np.ascontiguousarray(_to_nchw(self._array[indices], self._last))


def load_npz(path: Path) -> Source:
    """Loads uint8 images NHWC or NCHW, told apart by the channels, of which there are 1 or 3.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: Damaged, or its arrays are no images and labels; an array of Python objects is never read.
        MismatchError: Not one label for every image.
    """
    with sound(path), zipfile.ZipFile(path) as archive:
        held = set(archive.namelist())
        images = next((name for name in _IMAGES if f"{name}.npy" in held), None)
        labels = next((name for name in _LABELS if f"{name}.npy" in held), None)
        if images is None:
            raise CorruptFileError(f"{path}: holds {sorted(held)[:5]}; needs an array 'images', 'arr_0' or 'samples'")
        samples = _read_images(path, archive, images)
        if labels is None and (others := sorted(held - {f"{images}.npy"})):
            say(f"{path}: no classes: ignored {str(others[:5])[:200]}; an array called 'labels' is read")
        classes = None if labels is None else _read_labels(path, archive, labels, len(samples))
    return Source(
        str(path), samples, classes, count_classes(classes), flips=True, content=cache(partial(file_digest, path))
    )


def _read_images(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor | LazySamples:
    where = f"{path}: {name}"
    with archive.open(f"{name}.npy") as file:
        shape, dtype = read_header(file, where)
        if dtype != np.uint8:
            raise CorruptFileError(f"{where}: {dtype}; images must be uint8, 0 to 255")
        last = _channels_last(shape, where)
        start, info = file.tell(), archive.getinfo(f"{name}.npy")
        if info.file_size - start != prod(shape):
            raise CorruptFileError(f"{where}: {info.file_size - start:,} bytes for shape {shape}; save it again")
        if prod(shape) <= memory_limit():
            return _read_whole(file, shape, last, where)
    if info.compress_type != zipfile.ZIP_STORED:
        raise CdistillError(f"{where}: compressed, and does not fit in memory; save it by numpy.savez, uncompressed")
    return MappedImages(path, _content_offset(path, info) + start, shape, last)


def _read_whole(file: IO[bytes], shape: tuple[int, ...], last: bool, where: str) -> Tensor:
    """Reads in parts, so that turning the channels to the front takes no second array of that size."""
    whole = np.empty(_nchw(shape, last), np.uint8)
    for begin in range(0, shape[0], _AT_ONCE):
        part = (min(_AT_ONCE, shape[0] - begin), *shape[1:])
        content = file.read(prod(part))
        if len(content) != prod(part):
            raise CorruptFileError(f"{where}: ends too early; save it again")
        whole[begin : begin + _AT_ONCE] = _to_nchw(np.frombuffer(content, np.uint8).reshape(part), last)
    file.read(1)  # the end is where zipfile compares the CRC-32
    return torch.from_numpy(whole)


def _read_labels(path: Path, archive: zipfile.ZipFile, name: str, count: int) -> Tensor:
    where = f"{path}: {name}"
    with archive.open(f"{name}.npy") as file:
        shape, dtype = read_header(file, where)
        if shape != (count,):
            raise MismatchError(f"{where}: shape {shape}; {count} images need shape ({count},); save them again")
        if dtype.kind not in "iu":
            raise CorruptFileError(f"{where}: {dtype}; classes must be whole numbers")
        size = count * dtype.itemsize
        content = file.read(size + 1)
    if len(content) != size:
        raise CorruptFileError(f"{where}: {len(content):,} bytes for shape {shape}; save it again")
    return torch.from_numpy(check_classes(np.frombuffer(content, dtype), where))


def _channels_last(shape: tuple[int, ...], where: str) -> bool:
    """Whether the array is NHWC, not NCHW."""
    if len(shape) != 4 or min(shape) < 1 or (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        raise CorruptFileError(f"{where}: shape {shape}; needs (N, H, W, C) or (N, C, H, W) with 1 or 3 channels")
    return shape[3] in (1, 3)


def _nchw(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    return (shape[0], shape[3], shape[1], shape[2]) if last else shape


def _to_nchw(array: NDArray[np.uint8], last: bool) -> NDArray[np.uint8]:
    return array.transpose(0, 3, 1, 2) if last else array


def _content_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Returns where a stored member's content begins, which only its own header says."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name + extra)
