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
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR_FILES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")


def load_digits(split: str = "train") -> Source:
    """Returns all 1,797 digits; the 17 grey levels 0..16 are spread over 0..255.

    Raises:
        CdistillError: `split` is not "train"; 1,797 images are too few to divide.
    """
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
        grey = _half_size(load_sample_image(photograph) @ np.array([0.299, 0.587, 0.114]))
        for top, left in _corners(grey.shape, split, _COUNTS[split] // 2, draw):
            cuts.append(grey[top : top + SIDE, left : left + SIDE])
    images = np.stack(cuts).round().astype(np.uint8)
    return Source("patches", torch.from_numpy(images)[:, None], flips=True)


def load_cifar10(split: str = "train") -> Source:
    """Returns 50,000 photographs of 32x32 pixels in 10 classes ("train"), or 10,000 others ("heldout")."""
    files = ("cifar10-32x32.zip", *_CIFAR_FILES) if split == "train" else _CIFAR_FILES
    return _load_published("cifar10", files, 32, 10, f"fetch {_CIFAR_FILES[0]} from {_CIFAR_PAGE}", split)


def load_ffhq(split: str = "train") -> Source:
    """Returns the 70,000 faces of FFHQ at 64x64 pixels."""
    check_split("ffhq64", split)
    return _load_published("ffhq64", ("ffhq-64x64.zip",), 64, 0, _made_from("FFHQ"), split)


def load_afhqv2(split: str = "train") -> Source:
    """Returns the 15,803 animal faces of AFHQv2 at 64x64 pixels."""
    check_split("afhqv2-64", split)
    return _load_published("afhqv2-64", ("afhqv2-64x64.zip",), 64, 0, _made_from("AFHQv2"), split)


def load_imagenet(split: str = "train") -> Source:
    """Returns ImageNet's 1,281,167 training photographs at 64x64 pixels in 1,000 classes."""
    check_split("imagenet64", split)
    advice = _made_from("ImageNet (ILSVRC 2012)")
    return _load_published("imagenet64", ("imagenet-64x64.zip",), 64, 1000, advice, split)


def _load_published(name: str, files: tuple[str, ...], side: int, num_classes: int, advice: str, split: str) -> Source:
    """Loads a data set that has to be fetched once.

    Args:
        name: Name in the registry.
        files: Names of its file in the data folder, the preferred one first; the first that is there is loaded.
        side: Pixels of an image's side; images are RGB.
        num_classes: Number of classes, 0 without labels.
        advice: How to get it.
        split: "train" or "heldout".

    Raises:
        MissingAssetError: None is there; the message says how to get one and where to put it.
        MismatchError: Its images or classes are not those of the data set.
    """
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


def _made_from(name: str) -> str:
    return f"make it from {name} by dataset_tool.py of https://github.com/NVlabs/edm"


def _half_size(image: np.ndarray) -> np.ndarray:
    """Averages blocks of 2x2 pixels; an odd last row or column is left out."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    mean: np.ndarray = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return mean


def _corners(shape: tuple[int, ...], split: str, count: int, draw: np.random.RandomState) -> list[tuple[int, int]]:
    """Draws top left corners of patches that lie within the stripes of `split`."""
    held_out = (np.arange(shape[1]) // _STRIPE) % 3 == 2
    mine = held_out if split == "heldout" else ~held_out
    inside = np.convolve(mine, np.ones(SIDE), "valid") == SIDE
    lefts = np.flatnonzero(inside)
    tops = draw.randint(0, shape[0] - SIDE + 1, count)
    return [(int(top), int(left)) for top, left in zip(tops, lefts[draw.randint(0, len(lefts), count)], strict=True)]
