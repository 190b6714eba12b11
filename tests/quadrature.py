"""Expectations over the paper's 1-D mixture by quadrature: the oracle of the estimator."""

import torch
from torch import Tensor

from cdistill.estimation import Statistics, sample_scalars
from cdistill.teachers.mixture import mixture_1d

COMPONENTS = ((1 / 3, -2.0, 1.0), (2 / 3, 1.0, 0.25))


def nodes_and_weights(t: Tensor, points: int = 2001) -> tuple[Tensor, Tensor]:
    """Points x (n, 1) and the probability of each under q(x_t)."""
    reach = 12 * float((1 + t**2).sqrt())
    x = torch.linspace(-2 - reach, 1 + reach, points, dtype=torch.float64)[:, None]
    density = torch.zeros_like(x)
    for weight, mean, variance in COMPONENTS:
        spread = variance + t**2
        density += weight * torch.exp(-((x - mean) ** 2) / (2 * spread)) / spread.sqrt()
    return x, density / density.sum()


def mixture_statistics(t: Tensor) -> Statistics:
    """The six scalars' expectations at each noise level, as the statistics of a single exact sample."""
    rows = []
    for level in t:
        x, weight = nodes_and_weights(level)
        scalars = sample_scalars(mixture_1d(), x, level.expand(len(x)), torch.ones_like(x), None)
        rows.append((scalars * weight).sum(0))
    sums = torch.stack(rows)
    return Statistics(t, 1, 1, sums[None], sums**2)
