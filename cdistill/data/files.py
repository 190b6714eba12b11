"""Data sources in files: what is given by its path instead of a registered name.

===========================  =========================================================================================
a ``.zip``                   images, as EDM's dataset_tool.py packs them; classes in ``dataset.json``
a folder                     images in it and in its sub-folders; classes in ``dataset.json`` or by sub-folder
a ``.npz``                   uint8 arrays `images` or `arr_0`, and `labels` or `arr_1`
a ``.tar.gz`` or its folder  CIFAR-10's own archive, binary or Python edition
===========================  =========================================================================================

The order is that of the sorted names. Images come into memory if they take at most half of what is free (or
``$CDISTILL_DATA_MEMORY`` GiB); otherwise they are decoded by processes while they are needed (``$CDISTILL_WORKERS``).
Which of the two it is, and how many processes there are, changes nothing but the time. Flips are allowed; a recipe's
`training.flips` asks for them.
"""

import math
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from cdistill.data.arrays import load_npz
from cdistill.data.cifar import find_cifar, load_cifar
from cdistill.data.labels import count_classes, read_labels
from cdistill.data.lazy import DecodedImages, LazySamples
from cdistill.data.memory import memory_limit
from cdistill.data.source import Source, only_train
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.formats.archives import FolderImages, Images, ZipImages, decode_jobs
from cdistill.registry import DATA_SUFFIXES
from cdistill.runtime import signals as stopping
from cdistill.runtime.console import progress, say

_FEW = 4096  # images that this process decodes sooner than others start
_AT_ONCE = 1024


def load_file(path: Path, split: str = "train") -> Source:
    """Loads images from a file or folder; see the top of this module.

    Args:
        path: Also the name of the source.
        split: "train"; CIFAR-10's own archives have "heldout" too.

    Raises:
        MissingAssetError: Nothing is there.
        CorruptFileError: The first image, the labels or the archive are damaged; other images show when they are read.
        CdistillError: It is of no known kind, or has no such part.
    """
    if not path.exists():
        raise MissingAssetError(f"{path}: no such file or folder; check the path")
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise CdistillError(f"{path}: neither a file nor a folder; give one of the two")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")) or (path.is_dir() and find_cifar(path)):
        return load_cifar(path, split)
    only_train(str(path), split)
    if path.is_dir():
        return _load_images(FolderImages(path))
    if path.suffix.lower() == ".zip":
        return _load_images(ZipImages(path))
    if path.suffix.lower() == ".npz":
        return load_npz(path)
    raise CdistillError(f"{path}: not a kind of data that is read; give a folder, or {', '.join(DATA_SUFFIXES)}")


def _load_images(images: Images) -> Source:
    labels = read_labels(images)
    shape = tuple(decode_jobs(images.path, images.jobs([0]), None)[0].shape)
    samples: Tensor | LazySamples
    if len(images) * math.prod(shape) <= memory_limit():
        samples = _into_memory(DecodedImages(images, shape, 0 if len(images) <= _FEW else None))
    else:
        samples = DecodedImages(images, shape)
        say(f"{images.path}: {len(images):,} images do not fit in memory; decoded while they are needed")
    return Source(
        str(images.path), samples, labels, count_classes(labels), flips=True, content=cache(partial(_digest, images))
    )


def _digest(images: Images) -> str:
    """Reads every file of a folder, so that a person wants to see how far it is, or to stop it."""
    if not isinstance(images, FolderImages) or len(images) <= _FEW:
        return images.digest(lambda: stopping.check("reading the data"))
    with progress(len(images), f"digesting {images.path.name}", "img") as advance:

        def count() -> None:
            stopping.check("reading the data")
            advance(1, "")

        return images.digest(count)


def _into_memory(images: DecodedImages) -> Tensor:
    whole = torch.empty(images.shape, dtype=torch.uint8)
    if len(whole) <= _FEW:
        return images[:]
    with progress(len(whole), f"reading {images.images.path.name}", "img") as advance:
        for start in range(0, len(whole), _AT_ONCE):
            stopping.check("reading the data")
            part = whole[start : start + _AT_ONCE]
            part.copy_(images[start : start + _AT_ONCE])
            advance(len(part), "")
    return whole
