"""Samplers of students: where the jumps end."""

import math

from torch import Tensor

from cdistill.sampling.base import StudentSampler


class Jumps(StudentSampler):
    """CTM's deterministic jumps T -> t_1 -> ... -> eps (Zheng et al. 2025, Appendix B.3): s_n = t_{n+1}, no noise."""

    def ends(self, times: Tensor) -> Tensor:
        """See :class:`StudentSampler`."""
        return times[1:]


class Multistep(StudentSampler):
    """Consistency models' multistep sampling (Song et al. 2023, Alg. 1): s_n = eps, noise up to t_{n+1} between."""

    fresh_noise = True
    eps_only = True

    def ends(self, times: Tensor) -> Tensor:
        """See :class:`StudentSampler`."""
        return times[-1].expand(len(times) - 1)


class GammaSampling(StudentSampler):
    """CTM's gamma-sampling (Kim et al. 2024, Alg. 3): s_n = sqrt(1-gamma^2) t_{n+1}, then noise gamma t_{n+1} z.

    Kim et al. end at 0, where the last noise vanishes. Here the smallest noise level is eps: s_n = max(sqrt(1-gamma^2)
    t_{n+1}, eps), and the noise is what is missing from s_n to t_{n+1}, gamma t_{n+1} unless the maximum is eps. So the
    last jump ends at eps without noise, gamma = 0 is :class:`Jumps` and gamma = 1 is :class:`Multistep`.
    """

    fresh_noise = True
    takes_gamma = True

    def ends(self, times: Tensor) -> Tensor:
        """See :class:`StudentSampler`."""
        assert self.gamma is not None  # checked by the base class
        return (math.sqrt(1 - self.gamma**2) * times[1:]).maximum(times[-1])
