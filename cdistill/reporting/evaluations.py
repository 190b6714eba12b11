"""What evaluations and comparisons wrote, as checked records; those of older versions lack parts."""

import math

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]


class Measured(BaseModel):
    """A row of an evaluation: one sampler with one number of network calls.

    Attributes:
        sampler: "student", "untrained student", "teacher (Heun)" or another.
        nfe: Network calls a sample.
        values: Metric -> value; None where it is not finite.
        errors: Metric -> standard error.
        intervals: Metric -> lower and upper end.
    """

    model_config = ConfigDict(frozen=True)

    sampler: str
    nfe: int
    values: dict[str, float | None]
    errors: dict[str, float | None] = {}
    intervals: dict[str, tuple[float | None, float | None] | None] = {}

    @property
    def is_teacher(self) -> bool:
        """Whether the sampler draws from the teacher."""
        return self.sampler.startswith("teacher")

    def value(self, metric: str) -> float | None:
        """Returns a finite value, or None."""
        found = self.values.get(metric)
        return found if found is not None and math.isfinite(found) else None

    def interval(self, metric: str) -> Interval | None:
        """Returns the ends of an interval, if both are finite."""
        low, high = self.intervals.get(metric) or (None, None)
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return None
        return low, high


class MetricFacts(BaseModel):
    """How a metric is called, and whether "lower" or "higher" is better."""

    model_config = ConfigDict(frozen=True)

    title: str | None = None
    better: str | None = "lower"


class Evaluation(BaseModel):
    """The record of an evaluation; what it says beyond the fields is kept in `model_extra`.

    Attributes:
        step: Finished steps of the student.
        samples: Number of samples, of `seeds`.
        split: Of the data that they were compared with.
        level: Stated coverage of the intervals.
        metrics: Metric -> facts.
        rows: The samplers.
        images: File of the first samples, relative to the run.
        command: What was typed.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int | None = None
    samples: int | None = None
    seeds: str | None = None
    split: str | None = None
    level: float | None = None
    metrics: dict[str, MetricFacts] = {}
    rows: list[Measured]
    images: str | None = None
    command: list[str] | str | None = None

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they were measured."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def facts(self, metric: str) -> MetricFacts:
        """Returns what is known of a metric; lower was better in all of version 0.1."""
        return self.metrics.get(metric, MetricFacts())

    def title(self, metric: str) -> str:
        """Returns how a metric is called."""
        return self.facts(metric).title or metric


class Difference(BaseModel):
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

    model_config = ConfigDict(frozen=True)

    metric: str
    sampler: str
    nfe: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    verdict: str


class Pair(BaseModel):
    """Two runs and what was measured of both."""

    model_config = ConfigDict(frozen=True)

    first: str
    second: str
    differences: list[Difference]


class Contest(BaseModel):
    """What ``cdistill evaluate RUN_A RUN_B --out FILE`` writes."""

    model_config = ConfigDict(frozen=True)

    comparisons: list[Pair]
