"""What evaluations and trainings recorded, as points of curves."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from cdistill.evaluation.records import STUDENT

Points = Sequence[tuple[float, float]]

_SHOWN = 150  # points of a line of losses; neighbours are averaged


def evaluation_curves(records: Iterable[dict[str, Any]], sampler: str = STUDENT) -> dict[tuple[int, str], Points]:
    """Returns (NFE, metric) -> points (step, value) of a sampler.

    Of two values at one step the later record's counts; what is not finite is left out.
    """
    curves: dict[tuple[int, str], dict[float, float]] = {}
    for record in records:
        for row in record.get("rows", []):
            for metric, value in row["values"].items():
                if row["sampler"] == sampler and value is not None and math.isfinite(value):
                    curves.setdefault((row["nfe"], metric), {})[record.get("step") or 0] = float(value)
    return {key: sorted(points.items()) for key, points in curves.items()}


def training_curves(records: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """Returns name -> points (step, value) of every number that the training logged."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if record.get("event") == "train" and name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((record["step"], float(value)))
    return dict(curves)


def averaged(points: Points, most: int = _SHOWN) -> Points:
    """Returns at most `most` points, each the mean of as many neighbours; the last may be of fewer.

    >>> averaged([(0, 1.0), (10, 3.0), (20, 5.0)], most=2)
    [(5.0, 2.0), (20.0, 5.0)]
    """
    count = math.ceil(len(points) / most)
    groups = [points[first : first + count] for first in range(0, len(points), count)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def crossing(points: Points, value: float, logarithmic: bool, higher: bool = False) -> float | None:
    """Returns where a curve first reaches `value`, on the straight line between two evaluations.

    The line is straight in the logarithm of the values where they are drawn so: the result is where the drawn line
    crosses. Nothing is extrapolated: a curve that begins at `value` or better gives its first point.

    >>> crossing([(0, 100.0), (10, 1.0)], 10, logarithmic=True), crossing([(0, 100.0), (10, 1.0)], 0.5, True)
    (5.0, None)
    >>> crossing([(0, 0.0), (10, 1.0)], 0.5, logarithmic=False, higher=True)
    5.0

    Args:
        points: (iterations or images, value), from left to right.
        value: What is to be reached; positive if `logarithmic`.
        logarithmic: Whether to interpolate the logarithm.
        higher: Whether higher values are better.
    """
    before: tuple[float, float] | None = None
    for x, y in points:
        if y >= value if higher else y <= value:
            if before is None:
                return x
            old, goal, new = (math.log(z) if logarithmic else z for z in (before[1], value, y))
            return before[0] + (x - before[0]) * (old - goal) / (old - new)
        before = x, y
    return None
