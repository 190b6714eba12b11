"""Pictures of samples: grids."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cdistill.data.source import to_uint8

_SHOWN_SIDE = 48  # small images are enlarged to about this many pixels, so that a person sees them


def save_grid(path: Path, samples: Tensor, columns: int | None = None, labels: Sequence[str] = ()) -> None:
    """Writes images as one PNG, row by row, small ones enlarged by a whole factor.

    Args:
        path: Where to.
        samples: (n, C, H, W) in [-1, 1], C = 1 or 3.
        columns: Images a row; about the root of n by default.
        labels: Text in front of each row.
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
    picture = _image(sheet.repeat(factor, 0).repeat(factor, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    (_with_labels(picture, labels, factor * (height + 1)) if labels else picture).save(path)


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


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
