"""Loads data: by a registered name, or from files given by their path.

===========================  =========================================================================================
a ``.zip``                   images, as EDM's dataset_tool.py packs them; classes in ``dataset.json``
a folder                     images in it and in its sub-folders; classes in ``dataset.json`` or by sub-folder
a ``.npz``                   uint8 arrays `images` or `arr_0`, and `labels` or `arr_1`
a ``.tar.gz`` or its folder  CIFAR-10's own archive, binary or Python edition
===========================  =========================================================================================

The order is that of the sorted names. All images are decoded here, so that a damaged one is found before training:
into memory if they take at most half of what is free, otherwise once into a file (see `cdistill.data.memory`), which
changes nothing but the time. Flips are allowed; a recipe's `training.flips` asks for them.
"""

import os
from collections.abc import Iterator
from functools import cache, partial
from math import prod
from pathlib import Path

import numpy as np

from cdistill.data.arrays import load_npz
from cdistill.data.cifar import find_cifar, load_cifar
from cdistill.data.labels import count_classes, read_labels
from cdistill.data.memory import FEW, hold_images
from cdistill.data.source import Source, check_split
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.formats.archives import FolderImages, Images, ZipImages
from cdistill.formats.images import Pixels
from cdistill.registry import DATA_SUFFIXES, SOURCES, is_data_path
from cdistill.runtime import signals
from cdistill.runtime.console import progress

_AT_ONCE = 512  # images that are decoded before signals are answered
_BYTES_AT_ONCE = 2**26  # of their pixels


def load_source(name: str, split: str = "train") -> Source:
    """Loads a data source.

    Args:
        name: A name in the registry, or the path of a file or folder.
        split: "train", or "heldout" where the source has that split.

    Raises:
        UnknownNameError: No such source.
        MissingAssetError: There is no such file.
        CorruptFileError: The file, an image in it, or its labels are damaged.
        CdistillError: The source has no such split.

    >>> load_source("digits").shape
    (1, 8, 8)
    """
    path = os.path.expanduser(name)
    if is_data_path(path):
        return load_file(Path(path).absolute(), split)
    source: Source = SOURCES.get(name)(split)
    return source


def load_file(path: Path, split: str = "train") -> Source:
    """Loads images from a file or folder, whose path is the name of the source; errors as `load_source`."""
    if not path.exists():
        raise MissingAssetError(f"{path}: no such file or folder; check the path")
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise CdistillError(f"{path}: neither a file nor a folder; give one of the two")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")) or (path.is_dir() and find_cifar(path)):
        return load_cifar(path, split)
    check_split(str(path), split)
    if path.is_dir():
        return _load_images(FolderImages(path))
    if path.suffix.lower() == ".zip":
        return _load_images(ZipImages(path))
    if path.suffix.lower() == ".npz":
        return load_npz(path)
    raise CdistillError(f"{path}: not a known kind of data; give a folder, or {', '.join(DATA_SUFFIXES)}")


def _load_images(images: Images) -> Source:
    labels, names = read_labels(images)
    digest = cache(partial(_digest, images))
    shape = tuple(images.decode([0])[0].shape)
    samples = hold_images(images.path, (len(images), *shape), lambda: _decode(images, shape), digest)
    return Source(
        str(images.path), samples, labels, count_classes(labels), class_names=names, flips=True, content=digest,
        lossy=images.lossy,
    )  # fmt: skip


def _decode(images: Images, shape: tuple[int, ...]) -> Iterator[Pixels]:
    """Yields all images (n, C, H, W) at a time; by this thread alone, because Pillow keeps Python's lock."""
    indices, size = range(len(images)), max(1, min(_AT_ONCE, _BYTES_AT_ONCE // prod(shape)))
    for start in range(0, len(images), size):
        yield np.stack(images.decode(indices[start : start + size], shape))


def _digest(images: Images) -> str:
    """Digests images; all files of a folder are read for it, so it shows its progress and answers signals."""
    if not isinstance(images, FolderImages) or len(images) <= FEW:
        return images.digest(lambda: signals.check("reading the data"))
    with progress(len(images), f"digesting {images.path.name}", "img") as advance:

        def count() -> None:
            signals.check("reading the data")
            advance(1, "")

        return images.digest(count)
