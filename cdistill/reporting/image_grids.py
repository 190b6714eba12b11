"""Samples as sheets: one PNG for a sampler, the image of the same seed at the same place in all of them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdistill.reporting.reading import Pictures, Run, data_uri

_SIDE = 32  # small images are enlarged to about this many pixels
_GAP = 2  # pixels around every image
_GREY = 128  # between the images; tells black and white ones from a page of either colour
MOST = 64  # images of a sheet


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
        rows: Seeds of each row of images.
        sheets: The teacher's first.
    """

    title: str
    rows: Sequence[Sequence[int]]
    sheets: Sequence[Sheet]


def compare_samples(runs: Sequence[Run]) -> list[Comparison]:
    """Returns the teacher beside the students at each NFE; runs with the same seeds and teacher share a comparison."""
    groups = _groups(runs)
    found = []
    for group in groups:
        about = f"{', '.join(group)}: " if len(groups) > 1 else ""
        for nfe in sorted({calls for one in group.values() for calls in one.students}):
            found.append(_compare(f"{about}{nfe} NFE", nfe, group, len(runs) > 1))
    return found


def _compare(title: str, nfe: int, group: Mapping[str, Pictures], several: bool) -> Comparison:
    first = next(iter(group.values()))
    seeds, columns = first.seeds[:MOST], columns_of(min(MOST, len(first.seeds)))
    sheets = []
    if first.teacher is not None:
        sheets.append(_sheet("teacher", "the teacher", first.teacher, seeds, columns))
    for name, one in group.items():
        if nfe in one.students:
            label = name if several else "student"
            sheets.append(_sheet(label, f"{label} with {nfe} NFE", one.students[nfe], seeds, columns))
    return Comparison(title, [seeds[k : k + columns] for k in range(0, len(seeds), columns)], sheets)


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


def _groups(runs: Sequence[Run]) -> list[dict[str, Pictures]]:
    """Returns the runs' pictures by name, those together that can be laid side by side."""
    groups: dict[tuple[object, ...], dict[str, Pictures]] = {}
    for run in runs:
        if run.pictures is not None:
            teacher = run.pictures.teacher
            same = (*run.pictures.seeds, *(() if teacher is None else (teacher.shape, teacher.tobytes())))
            groups.setdefault(same, {})[run.name] = run.pictures
    return list(groups.values())


def _sheet(label: str, whose: str, images: NDArray[np.uint8], seeds: Sequence[int], columns: int) -> Sheet:
    pixels = tile(images[: len(seeds)], columns)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG", optimize=True)
    alt = f"{len(seeds)} samples of {whose}, seeds {spans(seeds)}, row by row, {columns} in a row"
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
