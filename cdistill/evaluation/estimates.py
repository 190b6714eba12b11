"""Figures with error bars: what each sample did to a figure, and what follows for two runs on the same seeds.

To first order every metric used here is a mean over the samples: m(P_n) - m(P) ~ mean of psi(x_i), with psi its
influence function (von Mises 1947; Hampel 1974). The spread of psi gives the standard error, and the spread of the
*difference* of two samplers' psi on the same seeds gives that of their difference, where the common noise cancels.

A distance that is nearly zero is not linear but quadratic in the samples' moments. Write its variance as V1 + V2, the
parts of first and second order (Hoeffding 1948). The influence function at the samples themselves gives V1 + 2 V2, as
the jackknife does (Efron and Stein 1981): too much. Over random splits of the samples into halves, the variance of the
mean of the two halves' figures is V2: a half has four times the variance of second order, the mean of two halves half
of that, and the covariance with the whole is V2. So V2 is measured, and taken off.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.randomness import generator

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure of a set of samples.

    Attributes:
        value: The figure.
        influence: What each sample adds to it to first order (n,), float64, in the order of the seeds; a constant
            added to all of them changes nothing.
        splits: The mean of the figures of two halves of the samples, for several fixed random splits (k,), float64;
            None for a figure that is a mean over the samples.
    """

    value: float
    influence: Tensor
    splits: Tensor | None = None

    @property
    def error(self) -> float:
        """Standard error of `value`, over the draw of the seeds; the reference data are taken as they are."""
        variance = float(self.influence.var() / len(self.influence))
        curved = 0.0 if self.splits is None else float(self.splits.var())
        return math.sqrt(max(variance - curved, variance / 2))  # V1 + V2 is at least half of V1 + 2 V2

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns the two-sided confidence interval for the figure's expectation at this number of samples."""
        width = quantile(level) * self.error
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


def quantile(level: float) -> float:
    """Returns z with P(|Z| < z) = `level` for a normal Z.

    >>> round(quantile(0.95), 4)
    1.96
    """
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def mean_estimate(values: Tensor) -> Estimate:
    """Returns the mean of one value a sample (n,)."""
    values = values.double()
    return Estimate(float(values.mean()), values)
