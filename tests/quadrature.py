"""Expectations over Gaussian mixtures by quadrature: the oracle of the estimators."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cdistill.data import Source
from cdistill.estimation.autodiff import Autodiff
from cdistill.estimation.base import Estimator, GroupSums, Points
from cdistill.estimation.collecting import Collection
from cdistill.estimation.estimate import CoefficientEstimate, solve
from cdistill.estimation.forward import Forward
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import Denoiser
from cdistill.runtime.randomness import generator
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d


@dataclass(frozen=True, eq=False)
class PlaneMixture:
    """A mixture whose components differ in a plane only, so that every expectation is a double integral.

    Attributes:
        plane: The mixture within the plane.
        spread: Eigenvalues of the covariance across the plane, common to all components (d-2,).
        denoiser: The whole, turned by a random rotation.
    """

    plane: MixtureDenoiser
    spread: Tensor
    denoiser: MixtureDenoiser


@cache
def random_mixture(dim: int, seed: int, components: int = 3) -> PlaneMixture:
    """A random mixture in `dim` >= 2 dimensions with different covariances in the plane."""
    draw = generator(seed, "plane mixture", dim)
    weights = torch.rand(components, generator=draw, dtype=torch.float64) + 0.3
    means = 1.2 * torch.randn(components, 2, generator=draw, dtype=torch.float64)
    factors = 0.5 * torch.randn(components, 2, 2, generator=draw, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.04 * torch.eye(2, dtype=torch.float64)
    spread = torch.rand(dim - 2, generator=draw, dtype=torch.float64) + 0.02
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))
    whole = torch.zeros(components, dim, dim, dtype=torch.float64)
    whole[:, :2, :2], whole[:, range(2, dim), range(2, dim)] = covariances, spread
    turned = MixtureDenoiser(weights, means @ turn[:, :2].T, turn @ whole @ turn.T)
    return PlaneMixture(MixtureDenoiser(weights, means, covariances), spread, turned)


def _lattice(denoiser: MixtureDenoiser, t: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Points x (n, d) of a regular lattice in d = 1 or 2 dimensions, and the probability of each under q(x_t).

    Those of less than 1e-20, which no double would feel, are left out.
    """
    dim = denoiser.means.shape[1]
    spreads = denoiser.eigenvalues + t**2
    reach = 9 * float(spreads.max().sqrt())
    axes = [
        torch.linspace(float(column.min()) - reach, float(column.max()) + reach, points, dtype=torch.float64)
        for column in denoiser.means.T
    ]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, dim)
    offset = torch.einsum("bki,kij->bkj", x[:, None] - denoiser.means, denoiser.eigenvectors)
    exponents = -(offset.square() / spreads + spreads.log()).sum(-1) / 2 + denoiser.weights.log()
    density = exponents.logsumexp(-1)
    weight = (density - density.max()).exp()
    weight = weight / weight.sum()
    felt = weight > 1e-20
    return x[felt], weight[felt]


def expectations(denoiser: MixtureDenoiser, t: Tensor, points: int) -> Tensor:
    """Means of the six scalars of `Autodiff` at every noise level (n, 6), in 1 or 2 dimensions."""
    rows = []
    for level in t:
        x, weight = _lattice(denoiser, level, points)
        total = torch.zeros(len(x), 6, dtype=torch.float64)
        for axis in torch.eye(x.shape[1], dtype=torch.float64):
            measured = Autodiff().measure(
                denoiser, Points(x, torch.zeros_like(x), axis.expand_as(x), None), level.expand(len(x))
            )
            total = torch.cat([total[:, :1] + measured[:, :1], measured[:, 1:]], dim=1)
        rows.append((total * weight[:, None]).sum(0))
    return torch.stack(rows)


def _across(spread: Tensor, t: Tensor) -> Tensor:
    """The same of the directions across the plane, where D = c y, c = e/(e+t^2), y ~ N(0, e+t^2)."""
    e, variance = spread, spread + t[:, None] ** 2
    c = e / variance
    slope = 2 * t[:, None] ** 2 * e / variance**2 + c * (c - 1)  # dD/dlam = slope * y
    terms = [c, variance, c * variance, c**2 * variance, c * slope * variance, slope * variance]
    return torch.stack([term.sum(1) for term in terms], dim=1)


def exact_means(mixture: PlaneMixture | None, t: Tensor) -> tuple[Tensor, int]:
    """Means of `Autodiff`'s scalars (n, 6) and the dimension; of the paper's 1-D mixture if None is given."""
    return _exact_means(mixture, tuple(t.tolist()))


@cache
def _exact_means(mixture: PlaneMixture | None, levels: tuple[float, ...]) -> tuple[Tensor, int]:
    t = torch.tensor(levels, dtype=torch.float64)
    if mixture is None:
        return expectations(mixture_1d(), t, 2001), 1
    means = expectations(mixture.plane, t, 141)  # steps of at most 0.8 standard deviations of any component
    return means + _across(mixture.spread, t), 2 + len(mixture.spread)


def as_sums(means: Tensor, t: Tensor, dim: int, estimator: Estimator) -> GroupSums:
    """The sums that infinitely many samples would leave, in two equal groups."""
    if isinstance(estimator, Forward):
        means = torch.cat([means[:, :1], torch.full_like(means[:, :1], dim), means[:, 1:4]], dim=1)
    sums = means[None, None].expand(1, 2, -1, -1)
    ones = torch.ones(len(t), dtype=torch.int64)
    return GroupSums(t, dim, sums, torch.ones(1, 2, dtype=torch.float64), 0 * ones, ones)


def exact_estimate(mixture: PlaneMixture | None, t: Tensor, estimator: Estimator | None = None) -> CoefficientEstimate:
    """l and s on the grid `t` from exact expectations."""
    estimator = estimator or Autodiff()
    means, dim = exact_means(mixture, t)
    return solve(estimator, as_sums(means, t, dim, estimator), 0.5)


def collect_sums(
    estimator: Estimator, denoiser: Denoiser, source: Source, t: Tensor, settings: EstimationSection, **options: Any
) -> GroupSums:
    """The sums of a whole collection."""
    return Collection(estimator, denoiser, source, t, settings, **options).run()
