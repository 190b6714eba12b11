"""What evaluations, comparisons and trainings recorded: checked records, and their numbers as points of curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]
Points = Sequence[tuple[float, float]]

STUDENT, UNTRAINED, TEACHER = "student", "untrained student", "teacher (Heun)"
_SHOWN = 150  # points of a line of losses; neighbours are averaged
_HIGHER = ("precision", "recall", "density", "coverage", "inception-score")  # is better; for records that do not say


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Row(_Record):
    """A row of an evaluation: one sampler with one number of network calls.

    Attributes:
        sampler: "student", "untrained student", "teacher (Heun)" or another.
        nfe: Network calls a sample.
        values: Metric -> value; None where it is not finite.
        errors: Metric -> standard error.
        intervals: Metric -> lower and upper end.
    """

    sampler: str
    nfe: int
    values: dict[str, float | None]
    errors: dict[str, float | None] = {}
    intervals: dict[str, tuple[float | None, float | None] | None] = {}

    def value(self, metric: str) -> float | None:
        """Returns a finite value, or None."""
        value = self.values.get(metric)
        return value if value is not None and math.isfinite(value) else None

    def interval(self, metric: str) -> Interval | None:
        """Returns the ends of an interval, if both are finite."""
        low, high = self.intervals.get(metric) or (None, None)
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return None
        return low, high


class Evaluation(_Record):
    """The record of an evaluation; what it says beyond the fields is kept in `model_extra`.

    Attributes:
        step: Finished steps of the student.
        samples: Number of samples, of `seeds`.
        split: Of the data that they were compared with.
        level: Stated coverage of the intervals.
        metrics: Metric -> its title, and whether "lower" or "higher" is better; those of version 0.1 lack it.
        rows: The samplers.
        images: File of the first samples, relative to the run.
        command: What was typed.
    """

    step: int | None = None
    samples: int | None = None
    seeds: str | None = None
    split: str | None = None
    level: float | None = None
    metrics: dict[str, dict[str, Any]] = {}
    rows: list[Row]
    images: str | None = None
    command: list[str] | str | None = None

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they were measured."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def of(self, sampler: str) -> list[Row]:
        """Returns the rows of a sampler."""
        return [row for row in self.rows if row.sampler == sampler]

    def title(self, metric: str) -> str:
        """Returns how a metric is called."""
        return str(self.metrics.get(metric, {}).get("title") or metric)

    def better(self, metric: str) -> str:
        """Returns "lower" or "higher", or "" for a metric that has no direction."""
        return direction(metric, self.metrics)


class Difference(_Record):
    """A figure of the second run less that of the first, on the same seeds.

    Attributes:
        metric: Its name.
        sampler: Which row of both.
        nfe: Network calls a sample.
        first: The first one's figure.
        second: The other's.
        difference: Second minus first.
        interval: Of the difference.
        verdict: What the second one is: "better", "worse" or "not distinguishable".
    """

    metric: str
    sampler: str
    nfe: int
    first: float
    second: float
    difference: float
    interval: Interval
    verdict: str


class Pair(_Record):
    """Two runs and what was measured of both."""

    first: str
    second: str
    differences: list[Difference]


class Comparisons(_Record):
    """What ``cdistill evaluate RUN_A RUN_B --out FILE`` writes."""

    comparisons: list[Pair]


def direction(metric: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns whether "lower" or "higher" values are better, "" if neither; by the record, or else by the name."""
    better = facts.get(metric, {}).get("better", "higher" if metric in _HIGHER else "lower")
    return better if better in ("lower", "higher") else ""


def evaluation_curves(records: Iterable[dict[str, Any]], sampler: str = STUDENT) -> dict[tuple[int, str], Points]:
    """Returns (NFE, metric) -> points (step, value) of a sampler.

    Of two values at one step the later record's counts; what is not finite is left out.
    """
    curves: dict[tuple[int, str], dict[float, float]] = {}
    for record in records:
        for row in record.get("rows", []):
            for metric, value in row["values"].items():
                if row["sampler"] == sampler and value is not None and math.isfinite(value):
                    curves.setdefault((row["nfe"], metric), {})[record["step"]] = float(value)
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
