"""The preconditionings that were chosen by hand: CM, BCM and CTM."""

from torch import Tensor
from typing_extensions import override

from cdistill.preconditionings.base import Preconditioning


class CM(Preconditioning):
    """f = sd^2/(sd^2+(t-s)^2), g = sd (t-s)/sqrt(sd^2+t^2) on F, s = eps (Song et al. 2023; Zheng et al. 2025, Eq. 4).

    In terms of D it tends to CTM's for t >> eps; at t -> eps it is off by a factor c_skip(eps) = 1 - 1.6e-5.
    """

    multiplies = "network"
    to_eps_only = True

    @override
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.sigma_data**2
        return variance / (variance + (t - s) ** 2), self.sigma_data * (t - s) / (variance + t**2).sqrt()


class BCM(Preconditioning):
    """f = (sd^2+ts)/(sd^2+t^2), g = sd (t-s)/sqrt(sd^2+t^2) on F (Li & He 2024; Zheng et al. 2025, Table 1).

    With EDM's denoiser, D = c_skip x + c_out F, this is CTM's consistency function exactly:
    s/t + (1-s/t) c_skip = (sd^2+ts)/(sd^2+t^2) and (1-s/t) c_out = g.
    """

    multiplies = "network"

    @override
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.sigma_data**2
        return (variance + t * s) / (variance + t**2), self.sigma_data * (t - s) / (variance + t**2).sqrt()


class CTM(Preconditioning):
    """f = s/t, g = 1 - s/t on D: Euler's step (Kim et al. 2024; Zheng et al. 2025, Eq. 6)."""

    @override
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return s / t, (t - s) / t
