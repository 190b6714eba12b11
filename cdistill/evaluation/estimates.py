"""Figures with error bars: the influence of each sample, and what follows for two runs on the same seeds.

To first order every metric used here is a mean over the samples: m(P_n) - m(P) ~ mean of psi(x_i), with psi its
influence function (von Mises 1947; Hampel 1974). The spread of psi gives the standard error, and the spread of the
*difference* of two samplers' psi on the same seeds gives that of their difference, where the common noise cancels.

A distance that is nearly zero is not linear but quadratic in the samples' moments. Write its variance as V1 + V2, the
parts of first and second order (Hoeffding 1948). The influence function at the samples themselves gives V1 + 2 V2, as
the jackknife does (Efron and Stein 1981): too much. Over random splits of the samples into halves, the variance of the
mean of the two halves' figures is V2: a half has four times the variance of second order, the mean of two halves half
of that, and the covariance with the whole is V2. Terms of third order, V3, enter both three times: taking all of
the latter off would leave too little, V1 + V2. Half of it is taken off: what remains, V1 + 1.5 (V2 + V3), errs on the
safe side (tests/benchmarks/coverage.py measures by how much).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.runtime.randomness import generator

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure of a set of samples.

    Attributes:
        influence: Of each sample on it, to first order (n,), float64, in the order of the seeds; a constant added to
            all of them changes nothing.
        splits: The mean of the figures of two halves of the samples, for several fixed random splits (k,), float64;
            None for a figure that is a mean over the samples.
    """

    value: float  # the figure
    influence: Tensor
    splits: Tensor | None = None
    share: bool = False  # whether the figure is a share, from 0 to 1

    @property
    def error(self) -> float:
        """Standard error of `value`, over the draw of the seeds; the reference data are taken as they are."""
        variance = float(self.influence.var() / len(self.influence))
        curved = 0.0 if self.splits is None else float(self.splits.var())
        return math.sqrt(max(variance - curved / 2, variance / 2))  # V1 + V2 is at least half of V1 + 2 V2

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns the two-sided confidence interval for the figure's expectation at this number of samples.

        Student's, which is wide for few samples; for a share Wilson's (1927), which stays within 0 and 1 and has a
        width there too, with as many samples as give the standard error.
        """
        count = len(self.influence)
        if self.share:
            p, error = min(max(self.value, 0.0), 1.0), self.error
            return wilson(p, p * (1 - p) / error**2 if 0 < p < 1 and error > 0 else count, level)
        width = quantile(level, count - 1) * self.error
        return self.value - width, self.value + width


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Returns first minus second, of two sets of samples from the same seeds in the same order."""
    splits = None
    if first.splits is not None and second.splits is not None:
        splits = first.splits - second.splits
    return Estimate(first.value - second.value, first.influence - second.influence, splits)


def random_halves(count: int, splits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields which of `count` samples are in either half, for fixed random splits: the same for every sampler."""
    for number in range(splits):
        order = torch.randperm(count, generator=generator(0, "halves", number))
        yield order[: count // 2], order[count // 2 :]


def quantile(level: float, freedom: float = math.inf) -> float:
    """Returns q with P(|X| < q) = `level` for Student's X with so many degrees of freedom; the normal one by default.

    >>> round(quantile(0.95), 4), round(quantile(0.95, 9), 4)
    (1.96, 2.2622)
    """
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom))


def wilson(share: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Returns Wilson's interval for the share of `count` independent samples.

    >>> [round(end, 3) for end in wilson(1.0, 64)], [round(end, 3) for end in wilson(0.5, 100)]
    ([0.943, 1.0], [0.404, 0.596])
    """
    z = quantile(level)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - width), min(1.0, centre + width)


def mean_estimate(values: Tensor, share: bool = False) -> Estimate:
    """Returns the mean of one value a sample (n,)."""
    values = values.double()
    return Estimate(float(values.mean()), values, share=share)
