"""Pictures of samples: grids, single files, arrays."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cdistill.data.source import to_uint8

_SHOWN_SIDE = 48  # small images are enlarged to about this many pixels, so that a person sees them


def save_grid(path: Path, samples: Tensor, columns: int | None = None) -> None:
    """Writes images as one PNG, row by row, small ones enlarged by a whole factor.

    Args:
        path: Where to.
        samples: (n, C, H, W) in [-1, 1], C = 1 or 3.
        columns: Images a row; about the root of n by default.
    """
    pixels = to_uint8(samples).permute(0, 2, 3, 1).numpy()
    count, height, width, colours = pixels.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    factor = max(1, _SHOWN_SIDE // height)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, colours), 128, np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    enlarged = sheet.repeat(factor, 0).repeat(factor, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    _image(enlarged).save(path)


def save_images(folder: Path, samples: Tensor, seeds: list[int]) -> None:
    """Writes each image (n, C, H, W) as ``seed.png``, six digits, not enlarged."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, seed in zip(to_uint8(samples).permute(0, 2, 3, 1).numpy(), seeds, strict=True):
        _image(image).save(folder / f"{seed:06d}.png")


def save_arrays(path: Path, samples: Tensor, labels: Tensor | None, seeds: list[int]) -> None:
    """Writes ``samples`` (uint8 for images, else float64), ``seeds`` and ``labels`` as one .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = to_uint8(samples) if samples.ndim == 4 else samples
    arrays = {"samples": stored.numpy(), "seeds": np.array(seeds)}
    np.savez(path, **arrays, **({} if labels is None else {"labels": labels.numpy()}))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
