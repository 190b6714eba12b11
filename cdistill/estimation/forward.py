"""The forward-only estimator: l_t and s_t from network outputs alone, with no derivative of the network.

*l.* For x_t = x_0 + t z, Stein's identity (integration by parts in z) says for any smooth D::

    E[z . D(x_0 + t z, t)] = t E[tr J],  J = dD/dx

The mean of z and of its mirror image, ``z.(D(x_0+tz) - D(x_0-tz))/(2t)``, cancels the terms of even order in z; both
points are samples of q(x_t), so that a pair costs two forward passes for two samples. What remains is close to z'Jz,
whose largest fluctuation is that of |z|^2. Its mean d is known, and the ratio::

    1 - l = E[tr J]/d ~ sum z.(D(x_0+tz) - D(x_0-tz))/(2t) / sum z.z

has none of it: the ratio is exact, sample by sample, wherever J is a multiple of the identity (at low noise, for
Gaussian data). Its bias is of order 1/N and below the error bars for any practical N.

*s.* The paper's s_t = E[g.dg/dlam]/E|g|^2, with g = D - (1-l) x and the derivative along the PF-ODE (Eq. 17). If D is
E[x_0|x_t], the PF-ODE carries q(x_t) along, so that E over q(x_t) and d/dlam commute: E[g.dg/dlam] is half of
d/dlam E|g|^2, and with d log S/dlam = s_t (Section 3.2)::

    s_t = d/dlam log sqrt(E|g|^2),  S_t = const sqrt(E|g|^2)

S is the root mean square of g. For a D that is not the posterior mean of the data this is off by a known amount: along
x_t = x_0 + t z itself, dx/dlam = x_0 - x, q(x_t) is preserved for *any* D, and subtracting the two derivatives leaves::

    s_t(paper) - s_t(forward) = E[(D - x_0) . (dg/dx)' g] / E|g|^2

which vanishes for D = E[x_0|x_t], and is small where the teacher's error D - E[x_0|x_t] is small or unrelated to the
gradient of |g|^2. `cdistill estimate-coeffs --compare` measures it for a teacher at hand.
"""

import torch
from torch import Tensor
from typing_extensions import override

from cdistill.estimation.base import Estimator, Points, fill, final, inner, matched_slope, squared_residual
from cdistill.networks.denoiser import Denoiser
from cdistill.schedule import lam_of

_FEWEST_LEVELS = 3  # that a slope needs


class Forward(Estimator):
    """1 forward pass for each sample and noise level, in inference mode; for teachers that denoise well."""

    scalars = ("z.(D+ - D-)/2t", "z.z", "x.x", "x.D", "D.D")
    paired = True

    @override
    def measure(self, denoiser: Denoiser, points: Points, t: Tensor) -> Tensor:
        with torch.inference_mode():
            x = points.at(t)
            out = denoiser(x, t, None, points.labels)
            half = len(x) // 2
            z = points.z[:half]
            moments = [inner(x, x), inner(x, out), inner(out, out)]
            stein = inner(z, out[:half] - out[half:]) / (2 * t[:half])
            return torch.stack(
                [stein, inner(z, z), *((values[:half] + values[half:]) / 2 for values in moments)], dim=1
            )

    @override
    def solve(self, t: Tensor, means: Tensor, stops: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        stein, zz, xx, xd, dd = means.unbind(-1)
        a = stein / zz
        norm, vanishes = squared_residual(a, xx, xd, dd)
        lost = final(vanishes, stops)
        known = ~lost.reshape(-1, len(t)).any(0)
        s = torch.zeros(lost.shape, dtype=torch.float64)
        if int(known.sum()) >= _FEWEST_LEVELS:
            root = norm[..., known].clamp(min=torch.finfo(torch.float64).tiny).log() / 2
            s[..., known] = matched_slope(lam_of(t)[known], root, stops[known])
        return final(1 - a, stops), fill(s, (~known).expand_as(s))
