"""What trials measured, seed by seed, and how two arms compare.

Arms are compared by the ratio of their figures, seed by seed. Its logarithm is averaged over the seeds, and Student's
interval for that mean holds everything that changes with a seed: batches, noise, the images of the evaluation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from cdistill.evaluation.estimates import quantile
from cdistill.reporting.records import STUDENT, TEACHER, Points, crossing, evaluation_curves
from cdistill.reproduction.experiments import DataSet, Trial
from cdistill.runs import RunFolder

LEVEL = 0.95


@dataclass(frozen=True)
class Outcome:
    """What one trial measured.

    Attributes:
        trial: Which.
        curves: (NFE, metric) -> points (step, value) of the student, the first at step 0, before the training.
        teacher: Metric -> the teacher's value on the same seeds.
        lost: (NFE, metric) of curves that end in values that are not finite: the student has diverged there. They
            count nowhere.
    """

    trial: Trial
    curves: Mapping[tuple[int, str], Points]
    teacher: Mapping[str, float]
    lost: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Ratio:
    """The geometric mean over seeds of one arm's figure over another's, with its interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval; 0 with one seed, of which nothing follows.
        high: Upper end; infinite with one seed.
        seeds: How many.
        limit: Whether a figure lies beyond what was measured, so that the true ratio is at most this.
    """

    value: float
    low: float
    high: float
    seeds: int
    limit: bool = False

    def __str__(self) -> str:
        bound = "<= " if self.limit else ""
        return f"{bound}{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def geometric(values: Sequence[float], limit: bool = False) -> Ratio:
    """Returns the geometric mean of positive values and its interval at `LEVEL`, Student's of their logarithms.

    >>> str(geometric([2.0, 8.0])), str(geometric([3.0]))
    ('4 (0.000599 to 2.67e+04)', '3 (0 to inf)')
    """
    logs = [math.log(value) for value in values]
    centre = mean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(centre), 0.0, math.inf, len(logs), limit)
    width = quantile(LEVEL, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(centre), math.exp(centre - width), math.exp(min(centre + width, 700)), len(logs), limit)


def read_outcome(trial: Trial, folder: Path) -> Outcome | None:
    """Returns what a trial measured; None if it has not finished."""
    run = RunFolder(folder)
    if run.status().get("state") != "finished":
        return None
    heun = evaluation_curves([run.results()], TEACHER)
    teacher = {metric: points[-1][1] for (_, metric), points in heun.items()}
    curves = evaluation_curves(run.metrics(), STUDENT)
    end = trial.load().training.iterations
    whole = {key: points for key, points in curves.items() if points[-1][0] == end}
    return Outcome(trial, whole, teacher, sorted(curves.keys() - whole.keys()))


@dataclass(frozen=True)
class Outcomes:
    """All finished trials of a data set.

    Attributes:
        data: The data set.
        found: (arm, seed) -> what came out.
    """

    data: DataSet
    found: Mapping[tuple[str, int], Outcome]

    def curves(self, arm: str, nfe: int, metric: str) -> dict[int, Points]:
        """Returns the curve of each seed of an arm: seed -> points."""
        return {
            seed: one.curves[nfe, metric]
            for (name, seed), one in self.found.items()
            if name == arm and one.curves.get((nfe, metric))
        }

    def pairs(self, first: str, second: str, nfe: int, metric: str) -> list[tuple[Points, Points]]:
        """Returns the curves of two arms for each seed that both have."""
        ours, others = (self.curves(arm, nfe, metric) for arm in (first, second))
        return [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())]

    def before(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns the ratio of two arms' figures before any training."""
        pairs = self.pairs(arm, baseline, nfe, metric)
        return _ratio([(ours[0][1], theirs[0][1]) for ours, theirs in pairs if ours[0][0] == theirs[0][0] == 0])

    def late(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns the ratio of two arms' figures, averaged over the evaluations in the second half of the training.

        One evaluation depends on the last steps' luck more than on the method.
        """
        pairs = self.pairs(arm, baseline, nfe, metric)
        return _ratio([(late_mean(ours), late_mean(theirs)) for ours, theirs in pairs])

    def speed(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns how many times fewer iterations an arm needs to reach the baseline's final value.

        The baseline's own iterations are those at which it first had that value. An arm that does not get there counts
        as if it did at its last evaluation: the ratio is at most that.
        """
        found, limit = [], False
        for ours, theirs in self.pairs(arm, baseline, nfe, metric):
            if theirs[-1][1] <= 0 or ours[-1][1] <= 0:
                continue
            goal = theirs[-1][1]
            at, own = crossing(ours, goal, logarithmic=True), crossing(theirs, goal, logarithmic=True)
            assert own is not None  # its last point is there
            limit |= at is None
            found.append(max(own, 1.0) / max(ours[-1][0] if at is None else at, 1.0))
        return geometric(found, limit) if found else None

    def final(self, arm: str, nfe: int, metric: str) -> Ratio | None:
        """Returns an arm's figure at the end of the training: the geometric mean over the seeds, with its interval."""
        values = [points[-1][1] for points in self.curves(arm, nfe, metric).values() if points[-1][1] > 0]
        return geometric(values) if values else None

    def teacher(self, metric: str) -> Ratio | None:
        """Returns the teacher's figure: the geometric mean over the seeds, with its interval."""
        values = {seed: one.teacher[metric] for (_, seed), one in self.found.items() if one.teacher.get(metric, 0) > 0}
        return geometric(list(values.values())) if values else None


def late_mean(points: Points) -> float:
    """Returns the geometric mean of the values behind the middle of a curve; 0 if one of them is not positive.

    >>> late_mean([(0, 9.0), (10, 7.0), (20, 4.0), (30, 1.0), (40, 16.0)])
    4.0
    """
    values = [value for step, value in points if step > points[-1][0] / 2]
    return math.exp(mean(map(math.log, values))) if min(values) > 0 else 0.0


def _ratio(pairs: Iterable[tuple[float, float]]) -> Ratio | None:
    values = [ours / theirs for ours, theirs in pairs if ours > 0 and theirs > 0]
    return geometric(values) if values else None
