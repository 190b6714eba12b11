"""Figures with error bars: what each sample did to a figure, and what follows for two runs on the same seeds.

To first order every metric used here is a mean over the samples: m(P_n) - m(P) ~ mean of psi(x_i), with psi its
influence function at P (von Mises 1947; Hampel 1974). The spread of psi gives the standard error, and the spread of
the *difference* of two samplers' psi on the same seeds gives that of their difference, where the common noise cancels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure of a set of samples.

    Attributes:
        value: The figure.
        influence: What each sample adds to it to first order (n,), float64, in the order of the seeds; a constant
            added to all of them changes nothing.
    """

    value: float
    influence: Tensor

    @property
    def error(self) -> float:
        """Standard error of `value`, over the draw of the seeds; the reference data are taken as they are."""
        return float(self.influence.std() / math.sqrt(len(self.influence)))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns the two-sided confidence interval for the figure's expectation at this number of samples."""
        width = quantile(level) * self.error
        return self.value - width, self.value + width


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Returns first minus second, of two sets of samples from the same seeds in the same order."""
    return Estimate(first.value - second.value, first.influence - second.influence)


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
