"""Frechet distance between Gaussians fitted to two sets of feature vectors."""

from collections.abc import Iterable

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (d,) and the unbiased covariance (d, d) of `features` (n, d), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def streamed_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the moments of all rows of `parts` together, each (n, d), holding one part at a time.

    The parts' own means and scatters are merged (Chan, Golub and LeVeque 1979), which loses no digits.
    """
    count, mean, scatter = 0, torch.zeros(1), torch.zeros(1, 1)
    for part in parts:
        rows = part.double()
        own, size = rows.mean(0), len(rows)
        shift, centred = own - mean, rows - own
        scatter = scatter + centred.T @ centred + torch.outer(shift, shift) * (count * size / (count + size))
        mean = mean + shift * (size / (count + size))
        count += size
    return mean, scatter / (count - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """|m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, Eq. 6).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which stays exact for singular
    covariances, unlike a general matrix root.

    Args:
        first: Mean (d,) and covariance (d, d), float64.
        second: The same of the other set.
    """
    (m1, c1), (m2, c2) = first, second
    cross = torch.linalg.svdvals(_root(c1) @ _root(c2)).sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric positive semi-definite square root."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
