"""Samplers of teachers: solvers of the probability-flow ODE from T to eps."""

from itertools import pairwise

from torch import Tensor

from cdistill.sampling.base import TeacherSampler
from cdistill.sampling.solvers import Denoise, euler_step, exponential_step, extrapolate, heun_step, solve


class Heun(TeacherSampler):
    """EDM's second-order solver (Karras et al. 2022, Alg. 1); 2 calls for each step, as none ends at 0."""

    calls_per_step = 2

    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        """See :class:`TeacherSampler`."""
        return solve(heun_step, denoise, x, times)


class Euler(TeacherSampler):
    """Euler's method in sigma, order 1; for EDM's parametrisation the same as DDIM (Song et al. 2021a, Sec. 4.3)."""

    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        """See :class:`TeacherSampler`."""
        return solve(euler_step, denoise, x, times)


class DPMSolverPP2M(TeacherSampler):
    """DPM-Solver++(2M), the multistep solver of order 2 for D (Lu et al. 2022, Alg. 2), with alpha = 1, lam = -log t.

    The first step has no predecessor and is Euler's. All others are of second order, the last too: it ends at eps, not
    at 0, where lam is infinite and implementations fall back to first order.
    """

    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        """See :class:`TeacherSampler`."""
        levels = times[:, None].expand(-1, len(x))
        before = earlier = None
        for t, u in pairwise(levels):
            d = denoise(x, t)
            ahead = d if before is None or earlier is None else extrapolate(d, before, earlier, t, u)
            x = exponential_step(x, ahead, t, u)
            before, earlier = d, t
        return x
