"""Samples on a page: one PNG for each sampler, the image of the same seed at the same place in all of them."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdistill.reporting.reading import Pictures, Run
from cdistill.sampling.image_grids import as_ranges, tile

_SIDE = 32  # small images are enlarged to about this many pixels
MOST = 64  # images of a grid

Grid = dict[str, Any]
"""A picture of many samples: `label`, the sampler; `alt`, what it shows in words; `uri`, the PNG; size in pixels."""

Comparison = tuple[str, list[Sequence[int]], list[Grid]]
"""(what the samplers have in common, seeds of each row of images, grids: the teacher's first)."""


def compare_samples(runs: Sequence[Run]) -> list[Comparison]:
    """Returns the teacher beside the students at each NFE; runs with the same seeds and teacher share a comparison."""
    groups = _groups(runs)
    comparisons = []
    for group in groups:
        about = f"{', '.join(group)}: " if len(groups) > 1 else ""
        for nfe in sorted({calls for _, _, students in group.values() for calls in students}):
            comparisons.append(_compare(f"{about}{nfe} NFE", nfe, group, len(runs) > 1))
    return comparisons


def _compare(title: str, nfe: int, group: Mapping[str, Pictures], several: bool) -> Comparison:
    seeds, teacher, _ = next(iter(group.values()))
    seeds = seeds[:MOST]
    columns = min(len(seeds), 6 if len(seeds) <= 36 else 8)  # few enough for a telephone
    grids = []
    if teacher is not None:
        grids.append(_draw("teacher", "the teacher", teacher, seeds, columns))
    for name, (_, _, students) in group.items():
        if nfe in students:
            label = name if several else "student"
            grids.append(_draw(label, f"{label} with {nfe} NFE", students[nfe], seeds, columns))
    return title, [seeds[k : k + columns] for k in range(0, len(seeds), columns)], grids


def data_uri(png: bytes) -> str:
    """Returns a PNG as the address of an image that is in the page itself."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _groups(runs: Sequence[Run]) -> list[dict[str, Pictures]]:
    """Returns the runs' pictures by name, those together that can be laid side by side."""
    groups: dict[tuple[object, ...], dict[str, Pictures]] = {}
    for run in runs:
        if run.pictures is not None:
            seeds, teacher, _ = run.pictures
            same = (*seeds, *(() if teacher is None else (teacher.shape, teacher.tobytes())))
            groups.setdefault(same, {})[run.name] = run.pictures
    return list(groups.values())


def _draw(label: str, whose: str, images: NDArray[np.uint8], seeds: Sequence[int], columns: int) -> Grid:
    picture = tile(images[: len(seeds)], columns, side=_SIDE)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    alt = (
        f"{len(seeds)} samples of {whose}, seeds {as_ranges(seeds).replace(',', ', ')}, row by row, {columns} in a row"
    )
    uri = data_uri(stream.getvalue())
    return {"label": label, "alt": alt, "uri": uri, "width": picture.width, "height": picture.height}
