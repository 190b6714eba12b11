"""Frechet distance between Gaussians fitted to two sets of feature vectors, and the influence of each vector.

With C_i = G_i G_i^T the distance of the covariances is the least |G_1 - G_2 U|^2 over orthogonal U, attained where U is
the polar factor of G_2^T G_1 (Procrustes). That sum of squares loses no digits where the covariances are nearly equal,
unlike tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2), and where they are singular, unlike a general root of C_1 C_2.
"""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor

from cdistill.evaluation.estimates import Estimate, random_halves
from cdistill.runtime.console import say_once

SPLITS, SPLITS_LARGE, LARGE = 12, 4, 512  # splits for up to LARGE dimensions, and above, where each takes seconds
_BLOCK = 1024  # feature vectors that are turned to float64 together


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (d,) and the unbiased covariance (d, d) of `features` (n, d), in float64."""
    return streamed_moments(features.split(_BLOCK))


def streamed_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the moments of all rows of `parts` together, each (n, d), holding one part at a time."""
    total = Sums()
    for part in parts:
        total.add(part)
    return total.mean, total.covariance


class Sums:
    """Count, mean and scatter of vectors, in float64 on the CPU.

    The sums of parts are merged by Chan, Golub and LeVeque (1979), which loses no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.scatter = torch.zeros(1, 1, dtype=torch.float64)

    def add(self, part: Tensor) -> None:
        """Adds vectors (n, d)."""
        rows = part.double()
        own = rows.mean(0)
        rows = rows - own
        self.merge(len(part), own.cpu(), (rows.T @ rows).cpu())

    def merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Adds the sums of `count` other vectors."""
        total, shift = self.count + count, mean - self.mean
        between = torch.outer(shift, shift).mul_(self.count * count / total)
        self.scatter = between.add_(self.scatter).add_(scatter)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (d, d); of at least two vectors."""
        return self.scatter / (self.count - 1)


Gaussian = tuple[Tensor, Tensor, Tensor]
"""N(m, V diag(e) V^T): mean (d,), eigenvalues that are no rounding errors (r,), ascending, and eigenvectors (d, r)."""


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    """Returns a Gaussian by its moments, in float64.

    Eigenvalues below sqrt(d) units in the last place of the largest are rounding errors (a sample covariance of rank
    300 in 2,048 dimensions has ones of 4 units, measured) and count as zero: their roots would be 1e-8, not 1e-16.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * torch.finfo(values.dtype).eps * sqrt(len(values))
    return mean, values[kept], vectors[:, kept]


def frechet_estimate(features: Tensor, real: Gaussian) -> Estimate:
    """The Frechet distance of samples with features (n, d) to `real`, with the influence of each sample.

    The influence of a sample x, with y = x - m1, is 2 (m1 - m2).y + y'(I - T)y up to a constant, where T y is the
    optimal transport from the samples' Gaussian to the other: the derivative of the distance with respect to the weight
    of x.
    """
    if len(features) <= features.shape[1]:
        say_once(
            f"Frechet distance: {len(features):,} samples have a singular covariance in {features.shape[1]:,} "
            "dimensions; the figure is defined, but far above that of many samples; draw more"
        )
    own = gaussian(*moments(features))
    distance, scale = _couple(own, real)
    mean, shift = own[0], 2 * (own[0] - real[0])
    return Estimate(distance, _influence(features, mean, shift, scale), _splits(features, real))


def _splits(features: Tensor, real: Gaussian) -> Tensor | None:
    """Returns the mean distance of two halves of the samples for several splits, see `estimates`; None of too few."""
    if len(features) < 4:
        return None
    count = SPLITS if features.shape[1] <= LARGE else SPLITS_LARGE
    halves = random_halves(len(features), count)

    def distance(rows: Tensor) -> float:
        own = streamed_moments(features[part] for part in rows.split(_BLOCK))  # without a copy of all of them
        return _couple(gaussian(*own), real)[0]

    return torch.tensor([[distance(half) for half in pair] for pair in halves], dtype=torch.float64).mean(1)


def _influence(features: Tensor, mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # Small results that outlive large blocks would keep the heap from shrinking: they are written in place.
    influence = torch.zeros(len(features), dtype=torch.float64)
    for block, target in zip(features.split(_BLOCK), influence.split(_BLOCK), strict=True):
        y = block.double() - mean
        target.copy_(y @ shift + y.square().sum(1) - (y @ scale).square().sum(1))
    return influence


def _couple(first: Gaussian, second: Gaussian) -> tuple[float, Tensor]:
    """Returns the distance, and A (d, k) such that A A^T is the transport T from the first to the second.

    On the range of C1, T = C1^(-1/2) (C1^(1/2) C2 C1^(1/2))^(1/2) C1^(-1/2); with G1^T G2 = W S Z^T it is
    V1 D1^(-1/2) W S W^T D1^(-1/2) V1^T.
    """
    (m1, e1, v1), (m2, e2, v2) = first, second
    g1, g2 = v1 * e1.sqrt(), v2 * e2.sqrt()
    w, s, zt = torch.linalg.svd(g1.T @ g2, full_matrices=False)
    left, right = g1 @ w, g2 @ zt.T
    distance = (m1 - m2).square().sum() + (left - right).square().sum()
    if g1.shape[1] > len(s):  # what of one covariance lies outside the rank of the other
        distance = distance + (g1 - left @ w.T).square().sum()
    if g2.shape[1] > len(s):
        distance = distance + (g2 - right @ zt).square().sum()
    return float(distance), (v1 / e1.sqrt()) @ (w * s.sqrt())
