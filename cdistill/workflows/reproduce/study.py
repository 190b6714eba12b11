"""Does the laboratory's score before training predict which preconditioning is better after it, and on which data?

Three scores, each as a ratio to CTM's: the mean square error to the teacher of the untrained student's samples at the
same number of network calls, and, squared, the laboratory's mean consistency gap and mean jump error.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cdistill.preconditionings.coefficients import Coefficients, load_coefficients
from cdistill.workflows.reproduce.claims import ALIGNMENT
from cdistill.workflows.reproduce.experiments import NFE
from cdistill.workflows.reproduce.outcomes import Outcomes, Ratio
from cdistill.workflows.reproduce.request import Request

FORMS = ("analytic", "analytic-forward", "analytic-bounded")  # BCM's is CTM's
BASELINE = "ctm"
SCORES = ("untrained MSE", "consistency gap", "jump error")


@dataclass(frozen=True)
class Comparison:
    """A preconditioning compared with CTM's on one data set.

    Attributes:
        data: The data set.
        form: The preconditioning.
        nfe: Network calls.
        metric: What was measured after the training.
        scores: Score -> the form's over CTM's before the training.
        after: The ratio after the training; see `Outcomes.late`.
    """

    data: str
    form: str
    nfe: int
    metric: str
    scores: Mapping[str, float]
    after: Ratio

    def agrees(self, score: str) -> bool | None:
        """Whether a score is on the side of 1 where the trained student is; None where that cannot be told."""
        if self.after.low <= 1 <= self.after.high:
            return None
        return (self.scores[score] < 1) == (self.after.value < 1)


@dataclass(frozen=True)
class Prediction:
    """How well a score predicts a metric.

    Attributes:
        score: The score.
        metric: "teacher-mse", or "distance" for what stands for FID.
        agree: Comparisons where it is right.
        decided: Comparisons where the trained students can be told apart.
        correlation: Spearman's, over all comparisons; NaN with fewer than three, or where all scores are the same.
    """

    score: str
    metric: str
    agree: int
    decided: int
    correlation: float


def compare(found: Outcomes, laboratory: Mapping[str, Any]) -> list[Comparison]:
    """Compares the forms with CTM's before and after the training.

    Args:
        found: The trained students of a data set.
        laboratory: What `cdistill compare` wrote about its teacher.
    """
    comparisons = []
    for form in FORMS:
        for metric in (ALIGNMENT, found.data.metric):
            for nfe in NFE:
                after, scores = found.late(form, BASELINE, nfe, metric), _scores(laboratory, form, nfe)
                if after is not None and scores is not None:
                    comparisons.append(Comparison(found.data.name, form, nfe, metric, scores, after))
    return comparisons


def _scores(laboratory: Mapping[str, Any], form: str, nfe: int) -> dict[str, float] | None:
    ours, theirs = (laboratory["forms"].get(name) for name in (form, BASELINE))
    if ours is None or theirs is None:
        return None
    pairs = [(ours["ends"][str(nfe)], theirs["ends"][str(nfe)])]
    pairs += [(ours[key], theirs[key]) for key in ("mean_gap", "mean_jump_error")]
    numbers = [(first["value"], second["value"]) for first, second in pairs]
    if not all(first and second for first, second in numbers):  # what is not finite is null
        return None
    return dict(zip(SCORES, [(first / second) ** 2 for first, second in numbers], strict=True))


def predict(comparisons: Iterable[Comparison]) -> list[Prediction]:
    """Counts how often each score is right about each kind of metric, with two calls or more."""
    from scipy.stats import spearmanr

    several = [one for one in comparisons if one.nfe > 1]
    found = []
    for metric, part in (
        (ALIGNMENT, [one for one in several if one.metric == ALIGNMENT]),
        ("distance", [one for one in several if one.metric != ALIGNMENT]),
    ):
        for score in SCORES:
            told = [one.agrees(score) for one in part if one.agrees(score) is not None]
            correlation = math.nan
            if len(part) > 2 and len({one.scores[score] for one in part}) > 1:
                before, after = [one.scores[score] for one in part], [one.after.value for one in part]
                correlation = float(spearmanr(before, after)[0])
            found.append(Prediction(score, metric, sum(map(bool, told)), len(told), correlation))
    return found


def spans(request: Request) -> dict[str, float]:
    """Returns over how many decades of t each data set's l falls from 0.9 to 0.1."""
    files = {data.name: request.coefficients(data.teacher) for data in request.data}
    return {name: decades(load_coefficients(file)[0]) for name, file in files.items() if file.is_file()}


def decades(table: Coefficients, high: float = 0.9, low: float = 0.1) -> float:
    """Returns over how many decades of t the coefficient l falls from `high` to `low`, interpolated in log t."""
    order = table.t.argsort()
    logs, values = table.t[order].log10(), table.l[order]
    ends = [_last_crossing(logs, values, level) for level in (low, high)]
    return ends[1] - ends[0]


def _last_crossing(logs: torch.Tensor, values: torch.Tensor, level: float) -> float:
    """Returns where a rising curve comes to `level` for the last time; its ends where it does not."""
    below = (values < level).nonzero().flatten()
    if len(below) == 0:
        return float(logs[0])
    last = int(below[-1])
    if last == len(values) - 1:
        return float(logs[-1])
    share = (level - values[last]) / (values[last + 1] - values[last])
    return float(logs[last] + share * (logs[last + 1] - logs[last]))
