"""The record of an evaluation: its figures and how they were made, as measured and as read from a file; no torch.

A figure that is not finite is None, as JSON has no other word for it. Records of older versions lack some fields.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from cdistill.errors import MissingAssetError
from cdistill.runtime.console import Table
from cdistill.storage.bounded import damaged, explain, load_json

SCHEMA = 2
STUDENT, UNTRAINED, TEACHER, IMAGES = "student", "untrained student", "teacher (Heun)", "images"
UNDECIDED = "not distinguishable"
_HIGHER = ("precision", "recall", "density", "coverage", "inception-score")  # is better, where a record does not say

Interval = tuple[float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class Row(_Record):
    """A row of an evaluation: one sampler with one number of network calls, 0 for images, of which it is not known.

    `sampler` is "student", "untrained student", "teacher (Heun)" or another; the rest is by metric.
    """

    sampler: str
    nfe: int
    values: dict[str, float | None]
    errors: dict[str, float | None] = {}
    intervals: dict[str, tuple[float | None, float | None] | None] = {}
    _estimates: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, sampler: str, nfe: int, estimates: Mapping[str, Any]) -> "Row":
        """Returns the row of metric -> `cdistill.evaluation.estimates.Estimate`, which it keeps to be compared."""
        row = cls(
            sampler=sampler,
            nfe=nfe,
            values={name: finite(estimate.value) for name, estimate in estimates.items()},
            errors={name: finite(estimate.error) for name, estimate in estimates.items()},
            intervals={name: finite_interval(estimate.interval()) for name, estimate in estimates.items()},
        )
        row._estimates.update(estimates)
        return row

    @property
    def estimates(self) -> Mapping[str, Any]:
        """Metric -> estimate, with the influence of each sample; empty for a row that was read from a file."""
        return self._estimates

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

    def figure(self, metric: str) -> str:
        """Returns the figure as a table shows it: "-" where it was not measured."""
        if metric not in self.values:
            return "-"
        return figure(self.values[metric], self.interval(metric))


class Evaluation(_Record):
    """One student, teacher or set of images, measured; what the record says beyond the fields is in `model_extra`.

    Attributes:
        metrics: Metric -> its title, and whether "lower" or "higher" is better; records of version 0.1 lack it.
    """

    step: int | None = None  # finished steps of the student
    samples: int | None = None
    seeds: str | None = None  # first and last of the samples
    split: str | None = None  # of the data that they were compared with
    level: float | None = None  # stated coverage of the intervals
    metrics: dict[str, dict[str, Any]] = {}
    rows: list[Row]
    images: str | None = None  # file of the first samples, relative to the run
    command: list[str] | str | None = None  # what was typed
    _drawn: dict[int, Any] = PrivateAttr(default_factory=dict)
    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Reads a record; MissingAssetError if there is none, CorruptFileError if it is none of an evaluation."""
        if not path.is_file():
            raise MissingAssetError(f"{path}: no such record; cdistill evaluate writes one beside every result")
        try:
            evaluation = cls.model_validate(load_json(path))
        except ValidationError as error:
            raise damaged(path, f"not a record of an evaluation: {explain(error)}") from error
        if not any(row.values for row in evaluation.rows):
            raise damaged(path, "it holds no figures")
        evaluation._path = path
        return evaluation

    @property
    def path(self) -> Path | None:
        """File of the record, once it has been written or read."""
        return self._path

    @property
    def picture(self) -> Path | None:
        """The first samples as one PNG; None for vectors."""
        if self._path is None or self.images is None:
            return None
        return (self._path.parent / self.images).with_suffix(".png")

    @property
    def drawn(self) -> dict[int, Any]:
        """NFE -> the student's first samples, uint8 images (k, C, H, W) or float64 vectors (k, d), as just measured."""
        return self._drawn

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they were measured."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def of(self, *samplers: str) -> list[Row]:
        """Returns the rows of some samplers."""
        return [row for row in self.rows if row.sampler in samplers]

    def title(self, metric: str) -> str:
        """Returns the heading of a metric's column."""
        return str(self.metrics.get(metric, {}).get("title") or metric)

    def better(self, metric: str) -> str:
        """Returns whether "lower" or "higher" values of a metric are better, "" if neither."""
        return direction(metric, self.metrics)

    @property
    def subject(self) -> str:
        """What was measured: a run and its step, a file, or a teacher."""
        facts = self.model_extra or {}
        if "run" in facts:
            return f"{facts['run']}, step {self.step}"
        return str(facts["file"]) if "file" in facts else f"teacher {facts.get('teacher')}"

    def table(self) -> Table:
        """Returns the figures, each with half the width of its interval."""
        data = (self.model_extra or {}).get("data")
        against = "statistics of real data" if data is None else f"{data} ({self.split})"
        names = list(self.metrics) or self.names
        return Table(
            f"{self.subject}: {self.samples} samples against {against}",
            ["sampler", "NFE", *map(self.title, names)],
            [[row.sampler, str(row.nfe or "-"), *map(row.figure, names)] for row in self.rows],
            None if self.level is None else f"± half the {self.level:.0%} confidence interval over the seeds",
        )


class Difference(_Record):
    """A figure of the second evaluation less that of the first, on the same seeds."""

    metric: str
    sampler: str
    nfe: int
    first: float | None
    second: float | None
    difference: float | None
    error: float | None = None  # standard error of the difference; the noise that both share cancels
    interval: tuple[float | None, float | None]  # two-sided, for this one difference alone
    verdict: str  # what the second one is: "better", "worse" or "not distinguishable"


class Pair(_Record):
    """Two evaluations, by what was measured, and their differences."""

    first: str
    second: str
    differences: list[Difference]


class Comparisons(_Record):
    """What ``cdistill evaluate RUN_A RUN_B`` writes: each of the others compared with the first, and the records."""

    comparisons: list[Pair]
    records: list[Evaluation] = []
    _path: Path | None = PrivateAttr(default=None)

    def table(self) -> Table:
        """Returns the differences; the verdict is about the second of each pair."""
        rows = [
            [
                pair.second, part.metric, str(part.nfe), figure(part.first), figure(part.second),
                figure(part.difference, part.interval), part.verdict,
            ]
            for pair in self.comparisons
            for part in pair.differences
        ]  # fmt: skip
        first = self.comparisons[0].first if self.comparisons else ""
        columns = ["second", "metric", "NFE", first, "second", "difference", "the second is"]
        return Table(f"compared with {first}, on the same seeds", columns, rows)

    @property
    def path(self) -> Path | None:
        """File of the comparison, once it has been written."""
        return self._path


def direction(metric: str, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns whether "lower" or "higher" values are better, "" if neither; where `facts` do not say, the name does."""
    better = facts.get(metric, {}).get("better", "higher" if metric in _HIGHER else "lower")
    return better if better in ("lower", "higher") else ""


def finite(value: float) -> float | None:
    """Returns what JSON can hold: None for a value that is not finite."""
    return value if math.isfinite(value) else None


def finite_interval(interval: Interval) -> tuple[float | None, float | None]:
    """Returns what JSON can hold of an interval."""
    return finite(interval[0]), finite(interval[1])


def figure(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    """Writes a value and half the width of its interval, with two digits of that.

    >>> figure(0.21387, (0.20291, 0.22483)), figure(0.5, (0.5, 0.5)), figure(1234.5, (1200.0, 1269.0)), figure(None)
    ('0.214 ± 0.011', '0.5', '1234 ± 34', 'not finite')
    """
    if value is None:
        return "not finite"
    low, high = interval or (None, None)
    width = 0.0 if low is None or high is None else (high - low) / 2
    if not 0 < width < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(width)))
    return f"{value:.{digits}f} ± {width:.{digits}f}"


def to_json(record: _Record) -> str:
    """Returns the text of a record's file."""
    return json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n"
