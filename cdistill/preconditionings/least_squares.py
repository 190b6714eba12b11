"""The least-squares preconditioning: f and g that jump best along the teacher's trajectories, by interpolation.

Beyond the paper. At pairs of a grid f and g minimise E|x_s - f x_t - g D(x_t,t)|^2 (`cdistill.sampling.moments`). With
delta = lam_s - lam_t = log(t/s) they are written as::

    f = (s/t) (1 + delta P),    g = (1 - s/t) (1 + delta Q)

P and Q bilinear in (lam_t, lam_s), 0 on the diagonal. CTM's f and g have P = Q = 0. So f(t,t) = 1 and g(t,t) = 0 hold
exactly, and as s -> t both have CTM's slopes to first order, which are the teacher's: dx/dt = (x - D)/t.
"""

import math

import torch
from torch import Tensor
from typing_extensions import override

from cdistill.errors import CdistillError, RecipeError
from cdistill.preconditionings.base import Preconditioning
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.schedule import EPS, SIGMA_DATA, lam_of


class LeastSquares(Preconditioning):
    """f and g by least squares along the teacher's trajectories, interpolated; their g has no bound."""

    needs_coefficients = True
    needs_fit = True

    def __init__(self, sigma_data: float = SIGMA_DATA, eps: float = EPS, table: Coefficients | None = None) -> None:
        super().__init__(sigma_data, eps, table)
        fit = None if table is None else table.fit
        if fit is None:
            raise RecipeError(
                "least-squares: the coefficients have no fit of f and g; make them with cdistill estimate-coeffs "
                "--form least-squares"
            )
        self.lam = lam_of(fit.t)
        delta = self.lam - self.lam[:, None]
        ratio = (-delta).exp()  # s/t
        self.p = _mirrored((fit.f / ratio - 1) / delta)
        self.q = _mirrored((fit.g / (1 - ratio) - 1) / delta)

    @override
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        lam_t, lam_s = lam_of(t), lam_of(s)
        low, high = float(self.lam[0]), float(self.lam[-1])
        if bool(((lam_t < low - 1e-9) | (lam_s > high + 1e-9)).any()):
            raise CdistillError(
                f"coefficients: f and g are fitted from {math.exp(-low):.4g} to {math.exp(-high):.4g}, not from "
                f"{float(t.max()):.4g} to {float(s.min()):.4g}; such jumps cannot be made"
            )
        i, u = self._locate(lam_t)
        j, v = self._locate(lam_s)
        ratio, delta = s / t, lam_s - lam_t
        p, q = (
            (1 - u) * ((1 - v) * node[i, j] + v * node[i, j + 1])
            + u * ((1 - v) * node[i + 1, j] + v * node[i + 1, j + 1])
            for node in (self.p, self.q)
        )
        return ratio * (1 + delta * p), (1 - ratio) * (1 + delta * q)

    def _locate(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the node below each lam and how far it is towards the next one, 0 to 1."""
        inside = lam.clamp(self.lam[0], self.lam[-1])
        k = (torch.searchsorted(self.lam, inside.contiguous(), right=True) - 1).clamp(0, len(self.lam) - 2)
        return k, (inside - self.lam[k]) / (self.lam[k + 1] - self.lam[k])


def _mirrored(nodes: Tensor) -> Tensor:
    """Returns values (m, m) given above the diagonal with 0 on it and their negative below.

    A bilinear function through such nodes is 0 on the whole diagonal.
    """
    above = nodes.triu(1).nan_to_num(0.0)
    return above - above.T
