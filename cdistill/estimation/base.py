"""What an estimator is, the sums that it leaves, and standard errors from them.

A third party writes a subclass, names it in the entry-point group ``cdistill.estimators`` and has it in every command
that estimates coefficients, ``estimate-coeffs --compare`` too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cdistill.networks.denoiser import Denoiser, broadcast

_VANISHING = 1e-13  # |g|^2 below this fraction of |D|^2 is rounding: s_coef is 0/0 there


@dataclass(frozen=True)
class Points:
    """Samples of q(x_t) at every noise level t: x_t = x_0 + t z."""

    x0: Tensor  # data (B, ...)
    z: Tensor  # standard normal noise, like `x0`; in pairs row k + B/2 has the x_0 of row k and -z
    probe: Tensor  # Rademacher vectors, like `x0`, for Hutchinson's trace estimator
    labels: Tensor | None  # class indices (B,) or None

    def at(self, t: Tensor) -> Tensor:
        """Returns x_t (B, ...) at the noise levels `t` (B,)."""
        return self.x0 + broadcast(t, self.x0) * self.z


class Estimator(ABC):
    """Means of scalars over samples of q(x_t), from which l_t and s_t follow (Zheng et al. 2025, Eqs. 15 and 17).

    `paired` ones need points in pairs x_0 + t z, x_0 - t z; `backwards` are the backward passes of each forward pass.
    """

    scalars: ClassVar[tuple[str, ...]]
    paired: ClassVar[bool] = False
    backwards: ClassVar[int] = 0

    @abstractmethod
    def measure(self, denoiser: Denoiser, points: Points, t: Tensor) -> Tensor:
        """Computes the scalars of every sample, or of every pair, at one noise level t, (B,) float64.

        Returns:
            float64 (B, k), or (B/2, k) for pairs, in the order of `scalars`.
        """

    @abstractmethod
    def solve(self, t: Tensor, means: Tensor, stops: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Computes l_t and s_t.

        Args:
            t: Noise levels (n,), float64, descending, n >= 3.
            means: Means of the scalars after each round, (R, ..., n, k), float64; see :class:`GroupSums`.
            stops: The last round of each noise level (n,), int64.
            dim: Elements of one sample, d.

        Returns:
            l and s, each (..., n), float64. Where g is lost in rounding (everywhere for Gaussian data, at the smallest
            noise for data much wider than 1) any s is right; it is that of the nearest level that has one, else 0.
        """


@dataclass(frozen=True)
class GroupSums:
    """Sums of an estimator's scalars over groups of samples, taken in rounds until every level is precise enough."""

    t: Tensor  # noise levels (n,), float64, descending
    dim: int  # elements of one sample, d
    sums: Tensor  # of each round and group of samples (R, G, n, k), float64
    sizes: Tensor  # rows that were summed (R, G), float64
    stops: Tensor  # the last round of each noise level (n,), int64; later rounds hold nothing of it
    samples: Tensor  # points of q(x_t) that each noise level took (n,), int64

    def means(self) -> Tensor:
        """Means of all samples up to each round, (R, n, k); meaningless beyond a level's last round."""
        return self.sums.cumsum(0).sum(1) / self.sizes.cumsum(0).sum(1)[:, None, None]

    def means_without(self) -> Tensor:
        """Means that leave out each group in turn, (R, G, n, k)."""
        sums, sizes = self.sums.cumsum(0), self.sizes.cumsum(0)
        return (sums.sum(1, keepdim=True) - sums) / (sizes.sum(1, keepdim=True) - sizes)[..., None, None]


def standard_error(replicates: Tensor) -> Tensor:
    """Standard error (...) of a quantity from its values (G, ...) without each of G groups of samples in turn.

    The delete-one-group jackknife, sqrt((G-1)/G sum_g (q_g - mean q)^2); it is itself known to about 1/sqrt(2(G-1)),
    13 % for 32 groups.
    """
    groups = len(replicates)
    return ((groups - 1) / groups * (replicates - replicates.mean(0)).square().sum(0)).sqrt()


def replicates(estimator: Estimator, sums: GroupSums) -> tuple[Tensor, Tensor]:
    """Returns l and s without each group of samples in turn, each (G, n)."""
    return estimator.solve(sums.t, sums.means_without(), sums.stops, sums.dim)


def final(values: Tensor, stops: Tensor) -> Tensor:
    """Returns the values (..., n) of each noise level's last round from values (R, ..., n) after each round."""
    return torch.stack([values[stop, ..., k] for k, stop in enumerate(stops.tolist())], dim=-1)


def matched_slope(lam: Tensor, values: Tensor, stops: Tensor) -> Tensor:
    """Slope of the not-a-knot cubic spline through values whose noise is common to neighbouring noise levels.

    All levels see the same samples, so that the noise of `values` is smooth in lam and hardly moves the slope. Where
    one level stopped before its neighbour that would no longer hold: the difference of the two is therefore taken
    over the samples that they share, and the spline goes through the sums of these differences.

    From nodes lam (n,), ascending, values after each round (R, ..., n) and the last round of each node (n,): (..., n).
    """
    from scipy.interpolate import CubicSpline

    shared = torch.minimum(stops[:-1], stops[1:]).tolist()
    steps = [values[last, ..., k + 1] - values[last, ..., k] for k, last in enumerate(shared)]
    start = values[stops[0], ..., 0]
    path = torch.stack([start, *(start + total for total in torch.stack(steps).cumsum(0))], dim=-1)
    nodes = lam.numpy()
    return torch.from_numpy(CubicSpline(nodes, path.numpy(), axis=-1)(nodes, 1))


def squared_residual(trace: Tensor, xx: Tensor, xd: Tensor, dd: Tensor) -> tuple[Tensor, Tensor]:
    """E|g|^2 = dd - 2a xd + a^2 xx with a = 1 - l = E[tr J]/d, xx = E[x.x] and so on, and where rounding loses it."""
    norm = dd - 2 * trace * xd + trace**2 * xx
    return norm, norm <= _VANISHING * (dd + trace**2 * xx)


def fill(values: Tensor, missing: Tensor) -> Tensor:
    """Replaces each missing value of (..., n) by the nearest that is not missing; 0 where all are."""
    index = torch.arange(values.shape[-1])
    distance = (index[:, None] - index).abs().double()
    blocked = torch.where(missing, torch.inf, 0.0)
    return values.gather(-1, (distance + blocked[..., None, :]).argmin(-1))


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of samples (B, ...), in float64."""
    return (x.double() * y.double()).flatten(1).sum(1)
