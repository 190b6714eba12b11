"""What metrics.jsonl and evaluation.json say, as points of curves."""

import math
from collections.abc import Iterable
from typing import Any

Points = list[tuple[float, float]]

STUDENT, UNTRAINED, TEACHER = "student", "untrained student", "teacher (Heun)"
_SHOWN = 150  # points of a line of losses; neighbours are averaged


def evaluation_curves(records: Iterable[dict[str, Any]], sampler: str = STUDENT) -> dict[tuple[int, str], Points]:
    """Returns (NFE, metric) -> points (step, value) of a sampler.

    Of two values at one step the later record's counts; what is not finite is left out.
    """
    found: dict[tuple[int, str], dict[float, float]] = {}
    for record in records:
        for row in record.get("rows", []):
            for metric, value in row["values"].items():
                if row["sampler"] == sampler and value is not None and math.isfinite(value):
                    found.setdefault((row["nfe"], metric), {})[record["step"]] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def training_curves(records: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """Returns name -> points (step, value) of every number that the training logged."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if record.get("event") == "train" and name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((record["step"], float(value)))
    return found


def averaged(points: Points, most: int = _SHOWN) -> Points:
    """Returns at most `most` points, each the mean of as many neighbours; the last may be of fewer.

    >>> averaged([(0, 1.0), (10, 3.0), (20, 5.0)], most=2)
    [(5.0, 2.0), (20.0, 5.0)]
    """
    count = math.ceil(len(points) / most)
    parts = [points[first : first + count] for first in range(0, len(points), count)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def crossing(points: Points, value: float, logarithmic: bool) -> float | None:
    """Returns where a curve first comes down to `value`, on the straight line between two evaluations.

    The line is straight in the logarithm of the values where they are drawn so: the result is where the drawn line
    crosses. Nothing is extrapolated: a curve that begins at or below `value` gives its first point.

    >>> crossing([(0, 100.0), (10, 1.0)], 10, logarithmic=True), crossing([(0, 100.0), (10, 1.0)], 0.5, True)
    (5.0, None)

    Args:
        points: (iterations or images, value), from left to right.
        value: What is to be reached; positive if `logarithmic`.
        logarithmic: Whether to interpolate the logarithm.
    """
    before: tuple[float, float] | None = None
    for x, y in points:
        if y <= value:
            if before is None:
                return x
            high, goal, low = (math.log(z) if logarithmic else z for z in (before[1], value, y))
            return before[0] + (x - before[0]) * (high - goal) / (high - low)
        before = x, y
    return None
