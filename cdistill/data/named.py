"""The data sets that go by a name: two that scikit-learn bundles, and those of EDM's teachers.

``digits`` are 1,797 real handwritten digits of 8x8 pixels (UCI Machine Learning Repository, CC BY 4.0). ``patches`` are
grey 12x12 patches of two photographs (CC BY): reduced to half size and divided into vertical stripes, of which every
third is held out, so that both photographs are in both splits and no pixel is.

EDM's are looked for in ``$CDISTILL_DATA`` under the names that EDM gives their files. FFHQ and AFHQv2 are used without
classes, as EDM does, even if their files hold some. Horizontal flips are allowed in these and in the patches; whether
they are used is the recipe's choice.
"""

from dataclasses import replace

import numpy as np
import torch

from cdistill.data.loading import load_file
from cdistill.data.source import Source, check_split
from cdistill.errors import MismatchError, MissingAssetError
from cdistill.storage.files import data_folder

SIDE = 12  # of a patch
_STRIPE = 32
_COUNTS = {"train": 16384, "heldout": 4096}
# Files in the data folder, the preferred one first; pixels of a side; classes, 0 without labels; where they come from.
_CIFAR = ("cifar10-32x32.zip", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
_PUBLISHED: dict[str, tuple[tuple[str, ...], int, int, str]] = {
    "afhqv2-64": (("afhqv2-64x64.zip",), 64, 0, "AFHQv2"),
    "cifar10": (_CIFAR, 32, 10, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "ffhq64": (("ffhq-64x64.zip",), 64, 0, "FFHQ"),
    "imagenet64": (("imagenet-64x64.zip",), 64, 1000, "ImageNet (ILSVRC 2012)"),
}


def load_digits(split: str = "train") -> Source:
    """Returns all 1,797 digits, too few to be split; the 17 grey levels 0..16 are spread over 0..255."""
    from sklearn.datasets import load_digits as bundled

    check_split("digits", split)
    pixels, labels = bundled(return_X_y=True)
    images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    return Source("digits", (images * 255 / 16).round().to(torch.uint8), torch.from_numpy(labels).long(), 10)


def load_patches(split: str = "train") -> Source:
    """Returns 16,384 patches ("train") or 4,096 ("heldout") cut at random, half from each photograph."""
    from sklearn.datasets import load_sample_image

    check_split("patches", split, _COUNTS)
    # RandomState, not default_rng: NumPy keeps its stream for ever, so the patches stay the same.
    draw = np.random.RandomState(0 if split == "train" else 1)
    cuts = []
    for photograph in ("china.jpg", "flower.jpg"):
        whole = load_sample_image(photograph) @ np.array([0.299, 0.587, 0.114])
        height, width = whole.shape[0] // 2, whole.shape[1] // 2  # an odd last row or column is left out
        grey = whole[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
        for top, left in _corners(grey.shape, split, _COUNTS[split] // 2, draw):
            cuts.append(grey[top : top + SIDE, left : left + SIDE])
    images = np.stack(cuts).round().astype(np.uint8)
    return Source("patches", torch.from_numpy(images)[:, None], flips=True)


def load_published(name: str, split: str = "train") -> Source:
    """Loads a data set that has to be fetched once, from the first of its files in the data folder.

    Errors as `load_source`; MismatchError: Its images or classes are not those of the data set.
    """
    files, side, num_classes, origin = _PUBLISHED[name]
    advice = f"make it from {origin} by dataset_tool.py of https://github.com/NVlabs/edm"
    if name == "cifar10":
        files = files if split == "train" else files[1:]
        advice = f"fetch {files[-2]} from {origin}"
    else:
        check_split(name, split)
    folder = data_folder()
    path = next((folder / file for file in files if (folder / file).is_file()), None)
    if path is None:
        raise MissingAssetError(
            f"data {name!r}: no {' or '.join(files)} in {folder}; {advice}, and put it there, or give another path as "
            "data"
        )
    source = load_file(path, split)
    if not num_classes:
        source = replace(source, labels=None, num_classes=0)
    expected = ((3, side, side), num_classes)
    if (source.shape, source.num_classes) != expected:
        raise MismatchError(
            f"{path}: shape {source.shape}, {source.num_classes} classes; {name!r} has shape {expected[0]}, "
            f"{expected[1]} classes; {advice}"
        )
    return replace(source, name=name)


def _corners(shape: tuple[int, ...], split: str, count: int, draw: np.random.RandomState) -> list[tuple[int, int]]:
    """Draws top left corners of patches that lie within the stripes of `split`."""
    held_out = (np.arange(shape[1]) // _STRIPE) % 3 == 2
    mine = held_out if split == "heldout" else ~held_out
    inside = np.convolve(mine, np.ones(SIDE), "valid") == SIDE
    lefts = np.flatnonzero(inside)
    tops = draw.randint(0, shape[0] - SIDE + 1, count)
    return [(int(top), int(left)) for top, left in zip(tops, lefts[draw.randint(0, len(lefts), count)], strict=True)]
