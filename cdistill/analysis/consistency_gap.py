"""The consistency gap: what preconditionings are worth before any training, on the teacher's own trajectories.

A jump from t to s by a student that is still the teacher misses the trajectory by ``r = x_s - f x_t - g D(x_t,t)``,
the jump error. The optimal student denoiser D* makes r vanish, so that D* - D = r/g: the consistency gap (Zheng et al.
2025, Section 3.3 and Prop. 3.1), which training has to close. Both follow, for any f and g, from six means at each
pair::

    E|r|^2 = E[x_s.x_s] + f^2 E[x_t.x_t] + g^2 E[D.D] - 2f E[x_s.x_t] - 2g E[x_s.D] + 2fg E[x_t.D]

so one pass over the trajectories keeps inner products alone, however many trajectories there are. r is lost in
float64 rounding below 1e-8 of the largest of its terms. The gap alone can be made small by large g, which multiplies
every error of D; therefore the jump error is reported with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cdistill.preconditionings import Preconditioning
from cdistill.sampling.moments import Moments, Number, jackknife, jumps_down, least_squares

_SAME = 1e-9  # ln of a ratio: two preconditionings that differ by less are the same function
_NEEDED = 2.0  # standard errors


def f_and_g_at_pairs(preconditioning: Preconditioning, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns f and g of the jumps from ``levels[:-1]`` to ``levels[1:]``, (n, n), NaN where there is no jump.

    Raises:
        CdistillError: The preconditioning has no jump that it should have, or a wrong one.
    """
    t, s = torch.meshgrid(levels[:-1], levels[1:], indexing="ij")
    wanted = s < t
    if preconditioning.to_eps_only:
        wanted = wanted & (s == levels[-1])
    f, g = torch.full_like(t, math.nan), torch.full_like(t, math.nan)
    f[wanted], g[wanted] = preconditioning(t[wanted], s[wanted])
    return f, g


@dataclass(frozen=True)
class Score:
    """What one preconditioning does on the teacher's trajectories.

    Matrices are (n, n), rows t of ``levels[:-1]``, columns s of ``levels[1:]``, NaN where there is no jump. Means are
    root mean squares over all pairs, NaN for a preconditioning that does not have all.
    """

    name: str  # name in the registry
    f: Tensor  # coefficient of x_t
    g: Tensor  # coefficient of the denoiser
    gap: Tensor  # consistency gap, root mean square per element of D* - D
    jump_error: Tensor  # root mean square per element of x_s - f x_t - g D
    mean_gap: Number  # mean of `gap`
    mean_jump_error: Number  # mean of `jump_error`
    ends: dict[int, Number]
    """NFE -> root mean square per element of the untrained student's end points from the teacher's."""
    overall: Tensor = field(default_factory=lambda: torch.tensor([math.nan]))
    """Ln of the geometric mean of `ends` over all NFE; replicates (1+G,), NaN where one is missing."""

    @property
    def complete(self) -> bool:
        """Whether it has an end point at every NFE."""
        return bool(self.overall.isfinite().all())


@dataclass(frozen=True)
class Rank:
    """The place of a preconditioning in the order of the untrained students."""

    name: str  # the preconditioning
    place: int | None  # 1 for the best; None for one that cannot do every NFE
    tied: bool = False  # whether it shares the place with a neighbour
    ratio: Number | None = None
    """Ln of its error over that of the one before, and the standard error of this paired difference."""


def score(name: str, moments: Moments, f_and_g: tuple[Tensor, Tensor], nfe: Sequence[int]) -> Score:
    """Computes gap, jump error and end points of a preconditioning.

    Args:
        name: Its name, by which its students stand in ``moments.students``.
        moments: Of the teacher.
        f_and_g: See `f_and_g_at_pairs`.
        nfe: Every NFE that counts in `overall`.
    """
    f, g = f_and_g
    jump_error = moments.jump_error(f, g)
    gap = jump_error / g.abs()
    inside = jumps_down(moments.levels)
    columns = zip(moments.students, moments.replicates(moments.ends).sqrt().unbind(1), strict=True)
    ends = {calls: values for (student, calls), values in columns if student == name}
    logs = [ends[calls].clamp(min=1e-300).log() if calls in ends else torch.full((1,), math.nan) for calls in nfe]
    return Score(
        name, f, g, gap[0], jump_error[0],
        jackknife(_root_mean_square(gap, inside)), jackknife(_root_mean_square(jump_error, inside)),
        {calls: jackknife(values) for calls, values in ends.items()},
        torch.stack(torch.broadcast_tensors(*logs)).mean(0),
    )  # fmt: skip


def score_bound(moments: Moments) -> Score:
    """Scores the best f and g of all, see `least_squares`; NFE 1 is their jump from T to eps.

    Its gap is NaN: the smallest gap is not that of the smallest jump error.
    """
    f, g, error = least_squares(moments)
    return Score(
        "any f, g", f[0], g[0], torch.full_like(error[0], math.nan), error[0], (math.nan, math.nan),
        jackknife(_root_mean_square(error, jumps_down(moments.levels))), {1: jackknife(error[:, 0, -1])},
    )  # fmt: skip


def rank(scores: Sequence[Score]) -> list[Rank]:
    """Orders preconditionings by the geometric mean of their end-point errors.

    Two neighbours share a place when their difference is below two standard errors of the paired difference: all use
    the same trajectories. Sharing is not transitive: the first and the last of a place may differ by more.
    Preconditionings that are the same function stand in the order of their names.
    """
    complete = [score for score in scores if score.complete]
    complete.sort(key=lambda score: (round(float(score.overall[0]), 9), score.name))
    ratios = [None, *(jackknife(worse.overall - better.overall) for better, worse in pairwise(complete))]
    shares = [ratio is not None and ratio[0] < max(_NEEDED * ratio[1], _SAME) for ratio in ratios]
    places: list[int] = []
    for index, shared in enumerate(shares):
        places.append(places[-1] if shared else index + 1)
    ranks = [
        Rank(score.name, place, shared or next_shares, ratio)
        for score, place, shared, next_shares, ratio in zip(
            complete, places, shares, [*shares[1:], False], ratios, strict=False
        )
    ]
    return ranks + [Rank(score.name, None) for score in scores if not score.complete]


def _root_mean_square(values: Tensor, inside: Tensor) -> Tensor:
    """Over the pairs (..., n, n) that are `inside` (n, n)."""
    return values[..., inside].square().mean(-1).sqrt()
