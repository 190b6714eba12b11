"""Many small images in one picture, and their seeds in words; needs no torch."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_GAP = 2  # pixels around every image
_GREY = 128  # between the images: differs from black and white ones and from a page of either colour


def tile(
    images: NDArray[np.uint8], columns: int | None = None, labels: Sequence[str] = (), side: int = 48
) -> Image.Image:
    """Returns images (n, C, H, W), C = 1 or 3, side by side in rows of `columns`, about the root of n by default.

    `labels` are texts to the left of the rows; small images are enlarged by a whole factor to about `side` pixels.
    """
    count, colours, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    factor = max(1, round(side / height))
    large = images.transpose(0, 2, 3, 1).repeat(factor, 1).repeat(factor, 2)
    frame = [(0, -count % columns), (_GAP, _GAP), (_GAP, _GAP), (0, 0)]
    framed = height * factor + 2 * _GAP, width * factor + 2 * _GAP
    cells = np.pad(large, frame, constant_values=_GREY).reshape(-1, columns, *framed, colours)
    pixels = cells.swapaxes(1, 2).reshape(-1, columns * cells.shape[3], colours)
    picture = Image.fromarray(pixels[..., 0] if colours == 1 else pixels)
    return _with_labels(picture, labels, cells.shape[2]) if labels else picture


def _with_labels(picture: Image.Image, labels: Sequence[str], height: int) -> Image.Image:
    """Adds a margin on the left with one text for each row of `height` pixels."""
    font = ImageFont.load_default(size=14)
    margin = 10 + int(max(font.getlength(label) for label in labels))
    wider = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    wider.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wider)
    for row, label in enumerate(labels):
        draw.text((5, int((row + 0.5) * height)), label, "black", font, anchor="lm")
    return wider


def as_ranges(numbers: Sequence[int]) -> str:
    """Writes numbers in their order as the command line takes them.

    >>> as_ranges([0, 1, 2, 7, 5, 6])
    '0-2,7,5-6'
    """
    array = np.array(numbers)
    stretches = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in stretches)
