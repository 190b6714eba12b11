"""Analytic-Precond: f and g from the teacher's l_t and s_t (Zheng et al. 2025, Eq. 14 and Table 1).

Both forms are Euler steps of the ODE d(L x)/d eta = g_phi/S, forward from t or backward from s. They are computed
from ratios, so that nothing overflows. With P_l = int l dlam, P_s = int s_coef dlam and Lr = L_t/L_s:

    backward  R = (eta_s-eta_t)/(L_s S_s) = int exp(-int_lam^lam_s (l+s_coef)) dlam,
              f = Lr / (1 + (1-l_s) R),  g = R / (1 + (1-l_s) R)
    forward   R = (eta_s-eta_t)/(L_s S_t),  f = Lr - (1-l_t) R,  g = R

Between them lies the theta method, with R_f and R_b for the two R::

    theta     f = (Lr - (1-theta) (1-l_t) R_f) / q,  g = ((1-theta) R_f + theta R_b) / q,  q = 1 + theta (1-l_s) R_b

Every theta(t,s) keeps f(t,t) = 1, g(t,t) = 0 and the alignment with the teacher as s -> t, since R_f and R_b are
both log(t/s) to first order.

l and s_coef are linear in lam between the points of the table, so P_l and P_s are exact; R is a sum over the
table's segments of Gauss-Legendre quadratures. All terms are positive, so that nothing cancels: g is accurate from
(80, 0.002) down to neighbouring points, and exactly 0 at t = s.
"""

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from cdistill.errors import CdistillError, RecipeError
from cdistill.preconditionings.base import Preconditioning
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.schedule import EPS, SIGMA_DATA, lam_of

_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(6))
_CHUNK = 4096  # pairs computed at once: bounds the memory at 4096 x segments x 6 numbers


class PiecewiseLinear:
    """A function of lam that is linear between nodes, and its exact integral.

    Args:
        lam: Nodes (n,), float64, ascending.
        values: Values at the nodes (n,), float64.
    """

    def __init__(self, lam: Tensor, values: Tensor) -> None:
        self.lam, self.values = lam, values
        self.slopes = values.diff() / lam.diff()
        steps = (values[1:] + values[:-1]) / 2 * lam.diff()
        self.integrals = torch.cat([torch.zeros(1, dtype=lam.dtype), steps.cumsum(0)])

    def at(self, lam: Tensor) -> Tensor:
        """Evaluates the function at `lam`, any shape within the nodes."""
        k, offset = self._locate(lam)
        return self.values[k] + self.slopes[k] * offset

    def integral(self, lam: Tensor) -> Tensor:
        """Integrates the function from the first node to `lam`, any shape within the nodes."""
        k, offset = self._locate(lam)
        return self.integrals[k] + offset * (self.values[k] + self.slopes[k] * offset / 2)

    def _locate(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        k = (torch.searchsorted(self.lam, lam.contiguous(), right=True) - 1).clamp(0, len(self.lam) - 2)
        return k, lam - self.lam[k]


class Analytic(Preconditioning):
    """Backward form, the default: f = L_t S_s/q, g = (eta_s-eta_t)/q, q = L_s S_s + (1-l_s)(eta_s-eta_t) (Table 1)."""

    needs_coefficients = True

    def __init__(self, sigma_data: float = SIGMA_DATA, eps: float = EPS, table: Coefficients | None = None) -> None:
        super().__init__(sigma_data, eps, table)
        if table is None:  # for the type checker: the base class has refused it
            raise RecipeError("coefficients are missing")
        lam = lam_of(table.t)
        # Sampled l can exceed 1 by its noise (1e-3 at large t); that of an exact denoiser lies in [0, 1].
        self.l = PiecewiseLinear(lam, table.l.clamp(0, 1))
        self.s_coef = PiecewiseLinear(lam, table.s)

    @override
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        lam_t, lam_s = self._within(t), self._within(s)
        flat = zip(lam_t.reshape(-1).split(_CHUNK), lam_s.reshape(-1).split(_CHUNK), strict=True)
        f, g = zip(*(self._pair(*chunk) for chunk in flat), strict=True)
        return torch.cat(f).reshape(t.shape), torch.cat(g).reshape(t.shape)

    def _pair(self, lam_t: Tensor, lam_s: Tensor) -> tuple[Tensor, Tensor]:
        end = self.l.integral(lam_s) + self.s_coef.integral(lam_s)
        ratio = self._quadrature(lam_t, lam_s, -end)
        lr = (self.l.integral(lam_t) - self.l.integral(lam_s)).exp()
        q = 1 + (1 - self.l.at(lam_s)) * ratio
        return lr / q, ratio / q

    def _quadrature(self, lam_t: Tensor, lam_s: Tensor, offset: Tensor) -> Tensor:
        """Integrates exp(P_l + P_s + offset) over [lam_t, lam_s]; all arguments and the result (B,)."""
        knots = self.l.lam
        left = knots[:-1].clamp(lam_t[:, None], lam_s[:, None])
        right = knots[1:].clamp(lam_t[:, None], lam_s[:, None])
        half = (right - left) / 2
        nodes = ((left + right) / 2)[..., None] + half[..., None] * _NODES
        exponent = self.l.integral(nodes) + self.s_coef.integral(nodes) + offset[:, None, None]
        return (exponent.exp() * _WEIGHTS).sum(-1).mul(half).sum(-1)

    def _within(self, t: Tensor) -> Tensor:
        """Returns lam of `t`, at most a rounding beyond the ends of the table.

        Raises:
            CdistillError: A noise level lies outside the table.
        """
        lam, knots = lam_of(t), self.l.lam
        low, high = float(knots[0]), float(knots[-1])
        if bool(((lam < low - 1e-9) | (lam > high + 1e-9)).any()):
            raise CdistillError(
                f"coefficients: cover noise levels {np.exp(-high):.4g} to {np.exp(-low):.4g}, not "
                f"{float(t.min()):.4g} to {float(t.max()):.4g}; estimate them on a wider grid"
            )
        return lam.clamp(low, high)


class AnalyticForward(Analytic):
    """Forward form: f = [L_t S_t + (l_t-1)(eta_s-eta_t)]/(L_s S_t), g = (eta_s-eta_t)/(L_s S_t) (Eq. 14).

    It grows without bound on long jumps, g(80, 0.002) in the thousands: the reason for the backward form.
    """

    def _pair(self, lam_t: Tensor, lam_s: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self._quadrature(lam_t, lam_s, -self.l.integral(lam_s) - self.s_coef.integral(lam_t))
        lr = (self.l.integral(lam_t) - self.l.integral(lam_s)).exp()
        return lr - (1 - self.l.at(lam_t)) * ratio, ratio


class AnalyticBounded(Analytic):
    """The forward form as long as its g <= 1, then the theta method with the least theta that keeps g = 1.

    Beyond the paper. The forward form approximates the teacher's ODE better (exact for Gaussian data, whatever S is),
    but its g, the factor of every error of D, has no bound; CTM's g is below 1. g goes from R_f to the backward
    form's as theta goes from 0 to 1, and is 1 at::

        theta = (R_f - 1) / (R_f - l_s R_b),  0 where R_f <= 1

    Where the backward form's own g exceeds 1 (l_s near 1; by 0.003 at most for the embedded teachers) that is the
    bound, and theta is 0 or 1: g <= max(1, g of the backward form). f can come out below 0, by 0.001 there.
    """

    def _pair(self, lam_t: Tensor, lam_s: Tensor) -> tuple[Tensor, Tensor]:
        l_t, l_s, total = self.l.at(lam_t), self.l.at(lam_s), self.l.integral(lam_s)
        forward = self._quadrature(lam_t, lam_s, -total - self.s_coef.integral(lam_t))
        backward = self._quadrature(lam_t, lam_s, -total - self.s_coef.integral(lam_s))
        limit = backward / (1 + (1 - l_s) * backward)
        above = forward > limit.clamp(min=1)
        room = torch.where(above & (limit < 1), forward - l_s * backward, 1)
        theta = torch.where(limit < 1, (forward - 1) / room, 1).where(above, 0)
        explicit = torch.where(limit < 1, (1 - l_s * backward) / room, 0).where(above, 1)  # 1 - theta
        lr = (self.l.integral(lam_t) - total).exp()
        q = 1 + theta * (1 - l_s) * backward
        return (lr - explicit * (1 - l_t) * forward) / q, (explicit * forward + theta * backward) / q
