"""Samples as sheets: one PNG for a sampler, the image of the same seed at the same place in all of them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdistill.reporting.reading import Run, data_uri

_SIDE = 32  # small images are enlarged to about this many pixels
_GAP = 1  # pixels around every image
_GREY = 128  # between the images; tells black and white ones from a page of either colour
_MOST = 64  # images of a sheet


@dataclass(frozen=True)
class Sheet:
    """A picture of many samples.

    Attributes:
        label: The sampler.
        alt: What it shows, in words.
        uri: The PNG.
        width: Its pixels.
        height: Its pixels.
    """

    label: str
    alt: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Comparison:
    """Sheets of several samplers from the same seeds.

    Attributes:
        title: What they have in common.
        seeds: Row by row.
        rows: Seeds of each row of images.
        sheets: The teacher's first.
    """

    title: str
    seeds: Sequence[int]
    rows: Sequence[Sequence[int]]
    sheets: Sequence[Sheet]


def compare_samples(runs: Sequence[Run]) -> list[Comparison]:
    """Returns the teacher beside the students at each NFE; runs with the same seeds and teacher share a comparison."""
    found = []
    for group in _groups([run for run in runs if run.pictures is not None]):
        pictures = [(run.name, run.pictures) for run in group if run.pictures is not None]
        teacher, names = pictures[0][1], ", ".join(name for name, _ in pictures)
        seeds, columns = teacher.seeds[:_MOST], columns_of(min(_MOST, len(teacher.seeds)))
        rows = [seeds[first : first + columns] for first in range(0, len(seeds), columns)]
        for nfe in sorted({calls for _, one in pictures for calls in one.students}):
            parts = [("teacher", teacher.teacher)]
            parts += [(f"{name}, {nfe} NFE", one.students[nfe]) for name, one in pictures if nfe in one.students]
            sheets = [_sheet(label, images[:_MOST], seeds, columns) for label, images in parts]
            found.append(Comparison(f"{names}: {nfe} NFE", seeds, rows, sheets))
    return found


def columns_of(count: int) -> int:
    """Returns how many of `count` images stand in a row; few enough for a telephone."""
    return min(count, 6 if count <= 36 else 8)


def tile(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Puts images (k, C, H, W) row by row on a sheet (rows, columns, C) of cells that are all of one size."""
    factor = max(1, round(_SIDE / images.shape[2]))
    large = images.transpose(0, 2, 3, 1).repeat(factor, 1).repeat(factor, 2)
    empty = -len(large) % columns
    cells = np.pad(large, [(0, empty), (_GAP, _GAP), (_GAP, _GAP), (0, 0)], constant_values=_GREY)
    count, height, width, colours = cells.shape
    grid = cells.reshape(count // columns, columns, height, width, colours)
    return grid.swapaxes(1, 2).reshape(count // columns * height, columns * width, colours)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs, those together whose images can be laid side by side."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.pictures is not None:
            teacher = run.pictures.teacher
            groups.setdefault((*run.pictures.seeds, teacher.shape, teacher.tobytes()), []).append(run)
    return list(groups.values())


def _sheet(label: str, images: NDArray[np.uint8], seeds: Sequence[int], columns: int) -> Sheet:
    pixels = tile(images, columns)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG", optimize=True)
    alt = f"{len(seeds)} samples of {label}, seeds {spans(seeds)}, row by row, {columns} in a row"
    return Sheet(label, alt, data_uri(stream.getvalue()), pixels.shape[1], pixels.shape[0])


def spans(numbers: Sequence[int]) -> str:
    """Writes numbers, stretches of them in short.

    >>> spans([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
