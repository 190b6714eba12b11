"""What trials measured, seed by seed, how two arms compare, and whether a score before training predicts it.

Arms are compared by the ratio of their figures, seed by seed. Its logarithm is averaged over the seeds, and Student's
interval for that mean holds everything that changes with a seed: batches, noise, the images of the evaluation.

Three scores before training, each as a ratio to CTM's: the mean square error to the teacher of the untrained student's
samples at the same number of network calls, and, squared, the mean consistency gap and the mean jump error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from cdistill.errors import DivergedError
from cdistill.evaluation.estimates import quantile
from cdistill.evaluation.records import STUDENT, TEACHER
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.reporting.curves import Points, crossing, evaluation_curves
from cdistill.storage.run_folder import RunFolder
from cdistill.workflows.reproduce.experiments import ALIGNMENT, NFE, DataSet, Trial

LEVEL = 0.95
SCORES = ("untrained MSE", "consistency gap", "jump error")
COMPARED = ("analytic", "analytic-forward", "analytic-bounded")  # with CTM's; BCM's f and g are CTM's
BASELINE = "ctm"
DISTANCE = "distance"
_LAST = 3  # evaluations whose mean is a final value


@dataclass(frozen=True)
class Outcome:
    """What one trial measured."""

    trial: Trial
    curves: Mapping[tuple[int, str], Points]
    """(NFE, metric) -> points (step, value) of the student, the first at step 0, before the training; those that end in
    values that are not finite are left out."""
    teacher: Mapping[str, float]  # metric -> the teacher's value on the same seeds
    lost: Sequence[str] = ()  # where the student has diverged: "2 NFE" and so on, or "the training"


@dataclass(frozen=True)
class Ratio:
    """The geometric mean over seeds of one arm's figure over another's, with its interval."""

    value: float
    spread: float  # standard error of its logarithm; 0 with one seed
    seeds: int
    bound: str = ""  # ">=" where a figure lies beyond what was measured, so that the true ratio is at least this
    lost: bool = False  # whether the arm diverged with a seed, which is left out

    def interval(self, comparisons: int = 1) -> tuple[float, float]:
        """Returns Student's two-sided interval at `LEVEL`, for all of so many comparisons at once (Bonferroni).

        With one seed it is from 0 to infinity.
        """
        if self.seeds < 2:
            return 0.0, math.inf
        width = quantile(1 - (1 - LEVEL) / comparisons, self.seeds - 1) * self.spread
        factor = math.exp(min(width, 600.0))
        return self.value / factor, self.value * factor

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval()[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval()[1]

    def __str__(self) -> str:
        ends = f" ({self.low:.3g} to {self.high:.3g})" if self.seeds > 1 else ""
        return f"{self.bound} {self.value:.3g}{ends}".lstrip()


def geometric(values: Sequence[float], bound: str = "", lost: bool = False) -> Ratio:
    """Returns the geometric mean of positive values and the standard error of its logarithm.

    >>> str(geometric([2.0, 8.0])), str(geometric([3.0])), str(geometric([3.0], ">="))
    ('4 (0.000599 to 2.67e+04)', '3', '>= 3')
    """
    logs = [math.log(value) for value in values]
    spread = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return Ratio(math.exp(mean(logs)), spread, len(logs), bound, lost)


def read_outcome(trial: Trial, folder: Path) -> Outcome | None:
    """Returns what a trial measured; None if it has neither finished nor diverged."""
    run = RunFolder(folder)
    if run.status().get("exit_code") == DivergedError.exit_code:
        return Outcome(trial, {}, {}, ["the training"])
    if run.status().get("state") != "finished":
        return None
    heun = evaluation_curves([run.results()], TEACHER)
    teacher = {metric: points[-1][1] for (_, metric), points in heun.items()}
    curves = evaluation_curves(run.metrics(), STUDENT)
    recipe = trial.load()
    end = recipe.training.iterations
    whole = {key: points for key, points in curves.items() if points[-1][0] == end}
    metrics = {metric for _, metric in whole} or {trial.data.metric}
    lost = [nfe for nfe in recipe.evaluation.nfe if any((nfe, metric) not in whole for metric in metrics)]
    return Outcome(trial, whole, teacher, [f"{nfe} NFE" for nfe in lost])


def progress(step: float, rate: float) -> float:
    """Returns the iterations that a moving average of the weights shows at `step`, where they move steadily.

    The average of w(n) = n with decay `rate`, begun at w(0) = 0, is n - tau (1 - rate^n) with tau = rate/(1-rate). What
    is evaluated is the average: in a short training its delay would make a faster arm look less fast.

    >>> progress(5, 0.0), round(progress(1000, 0.98)), round(progress(10, 0.98), 1)
    (5.0, 951, 1.0)
    """
    delay: float = rate / (1 - rate) * (1 - rate**step)
    return step - delay


@dataclass(frozen=True)
class Outcomes:
    """All trials of a data set that have finished or diverged."""

    data: DataSet
    by_trial: Mapping[tuple[str, int], Outcome]  # (arm, seed) -> what came out

    def curves(self, arm: str, nfe: int, metric: str) -> dict[int, Points]:
        """Returns the curve of each seed of an arm: seed -> points."""
        return {
            seed: one.curves[nfe, metric]
            for (name, seed), one in self.by_trial.items()
            if name == arm and one.curves.get((nfe, metric))
        }

    def pairs(self, first: str, second: str, nfe: int, metric: str) -> list[tuple[Points, Points]]:
        """Returns the curves of two arms for each seed that both have."""
        ours, others = (self.curves(arm, nfe, metric) for arm in (first, second))
        return [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())]

    def before(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns the ratio of two arms' figures before any training."""
        return self._ratio(arm, baseline, nfe, metric, lambda points: points[0][1] if points[0][0] == 0 else 0.0)

    def late(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns the ratio of two arms' figures, averaged over the evaluations in the second half of the training.

        One evaluation depends on the last steps' luck more than on the method.
        """
        return self._ratio(arm, baseline, nfe, metric, late_mean)

    def _ratio(self, arm: str, baseline: str, nfe: int, metric: str, figure: Callable[[Points], float]) -> Ratio | None:
        pairs = [(figure(ours), figure(theirs)) for ours, theirs in self.pairs(arm, baseline, nfe, metric)]
        values = [ours / theirs for ours, theirs in pairs if ours > 0 and theirs > 0]
        return geometric(values, lost=self._lost(arm, nfe)) if values else None

    def speed(self, arm: str, baseline: str, nfe: int, metric: str) -> Ratio | None:
        """Returns how many times fewer iterations an arm needs to reach the baseline's final value.

        That is the geometric mean of its last three evaluations; its own iterations are those at which it first had
        it. Iterations are counted as `progress` does. An arm that does not get there is compared at its own final
        value; one that was there before the training counts as if it was at the next evaluation.
        """
        rate = Trial(self.data, self.data.arms[0], 0).load().training.ema_rate
        ratios, early = [], False
        for ours, theirs in self.pairs(arm, baseline, nfe, metric):
            if min(value for _, value in [*ours, *theirs]) <= 0:
                continue
            goal = late_goal(theirs)
            if crossing(ours, goal, logarithmic=True) is None:
                goal = _mean(ours[-_LAST:])
            at, own = (crossing(points, goal, logarithmic=True) for points in (ours, theirs))
            if at is None or own is None:  # for the type checker: one comes there, the other lower
                continue
            early |= at == 0
            ratios.append(progress(own or theirs[1][0], rate) / progress(at or ours[1][0], rate))
        return geometric(ratios, ">=" if early else "", self._lost(arm, nfe)) if ratios else None

    def _lost(self, arm: str, nfe: int) -> bool:
        """Whether an arm diverged at a number of network calls with some seed."""
        return any(
            {f"{nfe} NFE", "the training"} & {*one.lost} for (name, _), one in self.by_trial.items() if name == arm
        )

    def final(self, arm: str, nfe: int, metric: str) -> Ratio | None:
        """Returns an arm's figure at the end of the training: the geometric mean over the seeds, with its interval."""
        values = [points[-1][1] for points in self.curves(arm, nfe, metric).values() if points[-1][1] > 0]
        return geometric(values) if values else None

    def teacher(self, metric: str) -> Ratio | None:
        """Returns the teacher's figure: the geometric mean over the seeds, with its interval."""
        values = {
            seed: one.teacher[metric] for (_, seed), one in self.by_trial.items() if one.teacher.get(metric, 0) > 0
        }
        return geometric(list(values.values())) if values else None


def late_goal(points: Points) -> float:
    """Returns what counts as the final value of a curve: the geometric mean of its last three evaluations."""
    return _mean(points[-_LAST:])


def late_mean(points: Points) -> float:
    """Returns the geometric mean of the values after the middle of a curve; 0 if one of them is not positive.

    >>> late_mean([(0, 9.0), (10, 7.0), (20, 4.0), (30, 1.0), (40, 16.0)])
    4.0
    """
    return _mean([(step, value) for step, value in points if step > points[-1][0] / 2])


def _mean(points: Points) -> float:
    values = [value for _, value in points]
    return math.exp(mean(map(math.log, values))) if min(values) > 0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """A preconditioning compared with CTM's on one data set."""

    data: str
    preconditioning: str
    nfe: int
    metric: str  # what was measured after the training
    scores: Mapping[str, float]  # the preconditioning's over CTM's before the training
    after: Ratio  # see `Outcomes.late`

    @property
    def kind(self) -> str:
        """Of the metric: `ALIGNMENT`, or `DISTANCE` to the data, what stands for FID."""
        return ALIGNMENT if self.metric == ALIGNMENT else DISTANCE

    def agrees(self, score: str) -> bool | None:
        """Whether a score is on the side of 1 where the trained student is; None where the interval holds 1."""
        if self.after.low <= 1 <= self.after.high:
            return None
        return (self.scores[score] < 1) == (self.after.value < 1)


def compare(outcomes: Outcomes, before: Mapping[str, Any]) -> list[Comparison]:
    """Compares preconditionings with CTM's after the training, and `before` it by what `cdistill compare` wrote."""
    comparisons = []
    for name in COMPARED:
        for metric in (ALIGNMENT, outcomes.data.metric):
            for nfe in NFE:
                after, scores = outcomes.late(name, BASELINE, nfe, metric), _scores(before, name, nfe)
                if after is not None and scores is not None:
                    comparisons.append(Comparison(outcomes.data.name, name, nfe, metric, scores, after))
    return comparisons


def _scores(before: Mapping[str, Any], name: str, nfe: int) -> dict[str, float] | None:
    ours, theirs = (before["forms"].get(key) for key in (name, BASELINE))
    if ours is None or theirs is None:
        return None
    pairs = [(ours["ends"][str(nfe)], theirs["ends"][str(nfe)])]
    pairs += [(ours[key], theirs[key]) for key in ("mean_gap", "mean_jump_error")]
    numbers = [(first["value"], second["value"]) for first, second in pairs]
    if not all(first and second for first, second in numbers):  # what is not finite is null
        return None
    return dict(zip(SCORES, [(first / second) ** 2 for first, second in numbers], strict=True))


def predict(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Counts how often each score is right about each kind of metric, with two calls or more.

    Returns:
        A dict for each score and kind: in how many comparisons it is right (`agree`) of those whose interval after the
        training excludes 1 (`decided`), and Spearman's `correlation` over all; NaN with fewer than three, or where all
        scores are the same.
    """
    predictions = []
    for kind, score in product((ALIGNMENT, DISTANCE), SCORES):
        chosen = [one for one in comparisons if one.nfe > 1 and one.kind == kind]
        right = [one.agrees(score) for one in chosen if one.agrees(score) is not None]
        before, after = [one.scores[score] for one in chosen], [one.after.value for one in chosen]
        known = len(chosen) > 2 and len(set(before)) > 1
        correlation = float(spearmanr(before, after)[0]) if known else math.nan
        predictions.append(
            {"score": score, "metric": kind, "agree": sum(map(bool, right)), "decided": len(right),
             "correlation": correlation}
        )  # fmt: skip
    return predictions


def decades(table: Coefficients, high: float = 0.9, low: float = 0.1) -> float:
    """Returns over how many decades of t the coefficient l falls from `high` to `low`, interpolated in log t."""
    order = table.t.argsort()
    rising = table.l[order].flip(0).cummin(0).values.flip(0)  # what l stays above from there on
    ends = np.interp([low, high], rising.numpy(), table.t[order].log10().numpy())
    return float(ends[1] - ends[0])
