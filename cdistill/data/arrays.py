"""Images in a NumPy archive (.npz): `images`, `arr_0` or our own `samples`; classes, if any, in `labels` or `arr_1`.

Only headers are left to NumPy's reader, which believes what an archive says about sizes.
"""

import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from cdistill.data.labels import check_classes, count_classes
from cdistill.data.memory import hold_images
from cdistill.data.source import Source
from cdistill.errors import CorruptFileError, MismatchError
from cdistill.formats.images import Pixels
from cdistill.formats.npz import npz_errors, read_array, read_header
from cdistill.runtime.console import say
from cdistill.storage.files import file_digest

_IMAGES = ("images", "arr_0", "samples")
_LABELS = ("labels", "arr_1")
_AT_ONCE = 1024  # images
_ROOM = 2**20  # bytes of labels more than the images need: of another shape, which is said


def load_npz(path: Path) -> Source:
    """Loads uint8 images NHWC or NCHW, told apart by the 1 or 3 channels; errors as `load_file` of `loading`.

    An array of Python objects is never read; a label for every image, or none, is needed.
    """
    digest = cache(partial(file_digest, path))
    with npz_errors(path), zipfile.ZipFile(path) as archive:
        arrays = set(archive.namelist())
        images = next((name for name in _IMAGES if f"{name}.npy" in arrays), None)
        labels = next((name for name in _LABELS if f"{name}.npy" in arrays), None)
        if images is None:
            raise CorruptFileError(f"{path}: holds {sorted(arrays)[:5]}; needs an array 'images', 'arr_0' or 'samples'")
        samples = _read_images(path, archive, images, digest)
        if labels is None and (others := sorted(arrays - {f"{images}.npy"})):
            say(f"{path}: no classes: ignored {str(others[:5])[:200]}; an array called 'labels' is read")
        classes = None if labels is None else _read_labels(path, archive, labels, len(samples))
    return Source(str(path), samples, classes, count_classes(classes), flips=True, content=digest)


def _read_images(path: Path, archive: zipfile.ZipFile, name: str, digest: Callable[[], str]) -> Tensor:
    where = f"{path}: {name}"
    with archive.open(f"{name}.npy") as file:
        shape, dtype = read_header(file, where)
        if dtype != np.uint8:
            raise CorruptFileError(f"{where}: {dtype}; images must be uint8, 0 to 255")
        channels_last = _channels_last(shape, where)
        size = archive.getinfo(f"{name}.npy").file_size - file.tell()
        if size != prod(shape):
            raise CorruptFileError(f"{where}: {size:,} bytes for shape {shape}; save it again")
        nchw = (shape[0], shape[3], shape[1], shape[2]) if channels_last else shape
        return hold_images(path, nchw, lambda: _blocks(file, shape, channels_last, where), digest)


def _blocks(file: IO[bytes], shape: tuple[int, ...], channels_last: bool, where: str) -> Iterator[Pixels]:
    """Yields images (n, C, H, W), a block at a time, so that moving the channels takes no second array of that size."""
    for begin in range(0, shape[0], _AT_ONCE):
        block = (min(_AT_ONCE, shape[0] - begin), *shape[1:])
        content = file.read(prod(block))
        if len(content) != prod(block):
            raise CorruptFileError(f"{where}: ends too early; save it again")
        pixels = np.frombuffer(content, np.uint8).reshape(block)
        yield pixels.transpose(0, 3, 1, 2) if channels_last else pixels
    file.read(1)  # the end is where zipfile compares the CRC-32


def _read_labels(path: Path, archive: zipfile.ZipFile, name: str, count: int) -> Tensor:
    where = f"{path}: {name}"
    classes = read_array(archive, name, str(path), 8 * count + _ROOM)
    if classes.shape != (count,):
        raise MismatchError(f"{where}: shape {classes.shape}; {count} images need shape ({count},); save them again")
    if classes.dtype.kind not in "iu":
        raise CorruptFileError(f"{where}: {classes.dtype}; classes must be whole numbers")
    return torch.from_numpy(check_classes(classes, where))


def _channels_last(shape: tuple[int, ...], where: str) -> bool:
    """Whether the array is NHWC, not NCHW."""
    if len(shape) != 4 or min(shape) < 1 or (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        raise CorruptFileError(f"{where}: shape {shape}; needs (N, H, W, C) or (N, C, H, W) with 1 or 3 channels")
    return shape[3] in (1, 3)
