"""Grey 12x12 patches of the two photographs that scikit-learn bundles (CC BY): real natural images.

The photographs are reduced to half size and divided into vertical stripes; every third stripe is held out, so
that both photographs are in both parts and no pixel is.
"""

import numpy as np
import torch

from cdistill.data.source import Source
from cdistill.errors import CdistillError

SIDE = 12
_STRIPE = 32
_COUNTS = {"train": 16384, "heldout": 4096}


def load_patches(split: str = "train") -> Source:
    """Returns 16,384 patches ("train") or 4,096 ("heldout") cut at random, half from each photograph."""
    from sklearn.datasets import load_sample_image

    if split not in _COUNTS:
        raise CdistillError(f"data 'patches': has no part {split!r}; only 'train' and 'heldout'")
    # RandomState, not default_rng: NumPy keeps its stream for ever, so the patches stay the same.
    draw = np.random.RandomState(0 if split == "train" else 1)
    cuts = []
    for photograph in ("china.jpg", "flower.jpg"):
        grey = _half_size(load_sample_image(photograph) @ np.array([0.299, 0.587, 0.114]))
        for top, left in _corners(grey.shape, split, _COUNTS[split] // 2, draw):
            cuts.append(grey[top : top + SIDE, left : left + SIDE])
    images = np.stack(cuts).round().astype(np.uint8)
    return Source("patches", torch.from_numpy(images)[:, None], flips=True)


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
