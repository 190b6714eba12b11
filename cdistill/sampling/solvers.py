"""One step along the probability-flow ODE dx/dt = (x - D(x,t))/t (Zheng et al. 2025, Eq. 2), and one jump."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cdistill.networks.denoiser import Denoiser, broadcast

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x, t) with everything else bound: x (B, ...), t (B,) float64, result like x."""


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """One step of EDM's second-order solver (Karras et al. 2022, Alg. 1); 2 network calls.

    Maps points x (B, ...) at noise level t to points at noise level u, each (B,) float64.
    """
    slope = (x - denoise(x, t)) / broadcast(t, x)
    there = x + broadcast(u - t, x) * slope
    slope_there = (there - denoise(there, u)) / broadcast(u, x)
    return x + broadcast((u - t) / 2, x) * (slope + slope_there)


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """One step of Euler's method in t, x + (u - t) (x - D)/t; 1 network call; arguments and result as `heun_step`."""
    return exponential_step(x, denoise(x, t), t, u)


def exponential_step(x: Tensor, d: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """x_u = (u/t) x_t + (1 - u/t) d, exact where D is d all the way from t to u (Lu et al. 2022, DPM-Solver++, Sec. 4).

    Maps points x (B, ...) at noise level t to points at noise level u, each (B,) float64; d is like x.
    """
    return broadcast(u / t, x) * x + broadcast(1 - u / t, x) * d


def extrapolate(d: Tensor, before: Tensor, earlier: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """D on the way from t to u, linear in lam = -log t through two values (Lu et al. 2022, Alg. 2).

    (1 + 1/2r) D(t) - 1/2r D(earlier), r = log(earlier/t) / log(t/u): the line at the middle of [lam_t, lam_u]. D at t
    is d (B, ...), D at `earlier`, the noise level before t, is `before`; noise levels are (B,) float64.
    """
    share = (t / u).log() / (2 * (earlier / t).log())
    return d + broadcast(share, d) * (d - before)


def solve(
    step: Callable[[Denoise, Tensor, Tensor, Tensor], Tensor], denoise: Denoise, x: Tensor, times: Tensor
) -> Tensor:
    """Applies `step`, such as `heun_step`, to points x (B, ...) from each of `times` to the next.

    `times` are float64 (k+1,), the same for all points, or (k+1, B), a column for each.
    """
    columns = times.reshape(len(times), -1).expand(-1, len(x))
    for t, u in pairwise(columns):
        x = step(denoise, x, t, u)
    return x


def jump(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    coefficients: tuple[Tensor, Tensor],
    labels: Tensor | None = None,
) -> Tensor:
    """The consistency function x_s = f(t,s) x_t + g(t,s) D(x_t,t,s) (Zheng et al. 2025, Eq. 8); 1 network call.

    Maps points x (B, ...) at noise level t to points at s, both (B,) float64; `coefficients` are f and g at (t, s), and
    `labels` (B,) or None. `denoiser` is the student, or a DDP wrapper around it.
    """
    f, g = coefficients
    out: Tensor = broadcast(f, x) * x + broadcast(g, x) * denoiser(x, t, s, labels)
    return out


def trajectory(step: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, times: Sequence[float] | Tensor) -> Tensor:
    """Returns all points (k+1, B, ...) that `step(x, t, s)` visits at `times` (k+1,), the start included."""
    points = [x]
    columns = torch.as_tensor(times, dtype=torch.float64)[:, None].expand(-1, len(x))
    for t, s in pairwise(columns):
        points.append(step(points[-1], t, s))
    return torch.stack(points)
