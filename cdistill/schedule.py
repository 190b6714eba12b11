"""Noise levels and their grids, and the glossary of the symbols used in every formula.

========  =======================================================================================
``t``     noise level (EDM's sigma) that a jump starts from, ``EPS <= t <= T``
``s``     noise level that a jump ends at, ``EPS <= s <= t``; **the smaller one**
``u``     noise level between them, where the teacher's solver hands over to the student
``lam``   ``-log t``; grows as noise falls
``x_t``   ``x_0 + t z`` with z standard normal
``D``     denoiser, ``D(x, t)`` of the teacher and ``D(x, t, s)`` of the student
``F``     free network inside a denoiser, ``D = c_skip x + c_out F``
``f, g``  preconditioning: ``x_s = f(t,s) x_t + g(t,s) D(x_t,t,s)``
``l``     ``d log L / d lam``, the linear part that the analytic preconditioning takes out
``s_coef``  ``d log S / d lam`` (the paper's ``s_t``, not to be confused with ``s``)
``eta``   ``int L S d lam``, the time in which the generalised ODE is stepped
``d``     number of elements of one sample
========  =======================================================================================

All grids are float64 with both ends exact: float32 would give 79.99998 for T and a last point below EPS.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cdistill.errors import RecipeError, printable

EPS = 0.002
T = 80.0
SIGMA_DATA = 0.5
RHO = 7.0
_MOST_TIMES = 10_000  # of a list


def rho_grid(points: int, eps: float = EPS, t_max: float = T, rho: float = RHO) -> Tensor:
    """EDM's noise levels, ``(T^(1/rho) + i/(N-1) (eps^(1/rho) - T^(1/rho)))^rho`` (Karras et al. 2022, Eq. 5).

    Deviates from Appendix B of Zheng et al. (2025), who print i/N: with N points only i/(N-1) makes
    "17 steps" unrestricted for N = 18.

    Args:
        points: N, at least 2.
        eps: Smallest noise level, the last point.
        t_max: Largest noise level, the first point.
        rho: Exponent; larger values spend more points on low noise.

    Returns:
        float64 tensor of shape (points,), strictly decreasing from exactly `t_max` to exactly `eps`.

    Raises:
        RecipeError: Fewer than two points, or not 0 < eps < t_max.

    >>> rho_grid(3).tolist()
    [80.0, 2.5152..., 0.002]
    """
    _check(points, eps, t_max)
    ramp = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    grid: Tensor = (t_max ** (1 / rho) + ramp * (eps ** (1 / rho) - t_max ** (1 / rho))) ** rho
    return _pin(grid, eps, t_max)


def log_uniform_grid(points: int, eps: float = EPS, t_max: float = T) -> Tensor:
    """Noise levels uniform in log t (Zheng et al. 2025, Appendix B.1); arguments and result as `rho_grid`."""
    _check(points, eps, t_max)
    return _pin(torch.linspace(math.log(t_max), math.log(eps), points, dtype=torch.float64).exp(), eps, t_max)


def sampling_grid(nfe: int) -> Tensor:
    """The ``nfe + 1`` times of `nfe` jumps; the last is eps, there is no jump to 0 (Appendix B.3).

    Raises:
        RecipeError: `nfe` is less than 1.
    """
    if nfe < 1:
        raise RecipeError(f"nfe: got {nfe}; the number of network calls must be 1 or more")
    return rho_grid(nfe + 1)


def time_list(times: str | Sequence[float] | Tensor) -> Tensor:
    """Returns a user's list of noise levels for a sampler; T at its start and eps at its end may be left out.

    Args:
        times: Numbers, or text with commas between them; an end may be off by a rounding to float32.

    Returns:
        float64 (k+1,), strictly decreasing from exactly T to exactly eps.

    Raises:
        RecipeError: Not numbers, none at all, or not strictly decreasing from T to eps.

    >>> time_list("2.5").tolist(), time_list([80, 1, 0.5, 0.002]).tolist()
    ([80.0, 2.5, 0.002], [80.0, 1.0, 0.5, 0.002])
    """
    try:
        values: Sequence[str | float] | Tensor = times.split(",") if isinstance(times, str) else times
        levels = [float(value) for value in values]
    except (TypeError, ValueError):
        levels = []
    first = 1 if levels and math.isclose(levels[0], T, rel_tol=1e-6) else 0
    last = 1 if levels and math.isclose(levels[-1], EPS, rel_tol=1e-6) else 0
    whole = [T, *levels[first : len(levels) - last], EPS]
    if not levels or len(levels) > _MOST_TIMES or not all(t > s for t, s in pairwise(whole)):
        shown = times if isinstance(times, str) else ",".join(f"{level:g}" for level in levels)
        raise RecipeError(
            f"times: got {printable(shown)!r}; needs noise levels that fall strictly from {T:g} to {EPS:g}; both ends "
            f"may be left out, as in {T:g},2.5,{EPS:g}"
        )
    return torch.tensor(whole, dtype=torch.float64)


def lam_of(t: Tensor) -> Tensor:
    """Returns lam = -log t; any shape, float64 in, float64 out."""
    return -torch.log(t)


def _check(points: int, eps: float, t_max: float) -> None:
    if points < 2 or not 0 < eps < t_max:
        raise RecipeError(f"grid: got {points} points in [{eps}, {t_max}]; needs 2 or more and 0 < eps < T")


def _pin(grid: Tensor, eps: float, t_max: float) -> Tensor:
    grid[0], grid[-1] = t_max, eps
    return grid
