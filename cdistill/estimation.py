"""Estimation of l_t and s_t from a teacher (Zheng et al. 2025, Eqs. 15 and 17, Appendix B.1) in one pass.

Six scalars a sample and timestep hold everything: tr J, x.x, x.D, D.D, D.Ddot and x.Ddot, with J = dD/dx and
Ddot = dD/dlam along the PF-ODE, dx/dlam = D - x, dt/dlam = -t. One forward graph over (x, t) and three
vector-Jacobian products with the cotangents v (Rademacher), D and x give them all::

    v.Jv = (J'v).v    D.Ddot = (J'D).(D-x) - t D.dD/dt    x.Ddot = (J'x).(D-x) - t x.dD/dt

Every sample n keeps its x_0, z and v at all timesteps, so that l is smooth in t. The network always runs on chunks
of the same size, aligned to n: the result does not depend on batch sizes or processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill import stopping
from cdistill.data import Source
from cdistill.networks.denoiser import Denoiser, broadcast, chunk_size
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.randomness import generator, shuffled_indices
from cdistill.schedule import lam_of

SCALARS = ("tr J", "x.x", "x.D", "D.D", "D.Ddot", "x.Ddot")
GROUPS = 32
_VANISHING = 1e-13  # |g|^2 below this part of |D|^2 is rounding: s_coef is 0/0 there


@dataclass(frozen=True)
class Statistics:
    """Sums of the six scalars.

    Attributes:
        t: Noise levels (n,), float64, descending.
        dim: Elements of one sample, d.
        count: Number of samples, N.
        groups: Sums over each group of samples (G, n, 6), float64.
        squares: Sums of the squares (n, 6), float64.
    """

    t: Tensor
    dim: int
    count: int
    groups: Tensor
    squares: Tensor

    @property
    def sums(self) -> Tensor:
        """Sums over all samples (n, 6)."""
        return self.groups.sum(0)

    @property
    def variances(self) -> Tensor:
        """Unbiased sample variances (n, 6)."""
        return ((self.squares - self.sums**2 / self.count) / (self.count - 1)).clamp(min=0)


def sample_scalars(denoiser: Denoiser, x: Tensor, t: Tensor, probe: Tensor, labels: Tensor | None) -> Tensor:
    """Computes the six scalars of each sample at one noise level: 1 forward, 3 vector-Jacobian products.

    Args:
        denoiser: The teacher, its parameters frozen.
        x: Points of q(x_t), (B, ...).
        t: Noise levels (B,), float64.
        probe: Rademacher vectors like `x`, for Hutchinson's trace estimator.
        labels: Class indices (B,) or None.

    Returns:
        float64 (B, 6) in the order of `SCALARS`.
    """
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    with torch.enable_grad():
        denoised = denoiser(x, t, None, labels)
    out, point = denoised.detach(), x.detach()
    jv, _ = torch.autograd.grad(denoised, (x, t), probe, retain_graph=True)
    jd, d_dt = torch.autograd.grad(denoised, (x, t), out, retain_graph=True)
    jx, x_dt = torch.autograd.grad(denoised, (x, t), point)
    level = t.detach()
    slope = out - point
    scalars = [
        _dot(jv, probe),
        _dot(point, point),
        _dot(point, out),
        _dot(out, out),
        _dot(jd, slope) - level * d_dt,
        _dot(jx, slope) - level * x_dt,
    ]
    return torch.stack(scalars, dim=1)


def collect_statistics(
    denoiser: Denoiser,
    source: Source,
    t: Tensor,
    samples: int,
    seed: int,
    advance: Callable[[int, str], None] = lambda count, note: None,
    accelerator: Accelerator | None = None,
) -> Statistics:
    """Sums the six scalars over samples x_0 + t z of the data at every noise level.

    Args:
        denoiser: The teacher.
        source: x_0 and labels, walked through in a shuffled order, again and again if need be.
        t: Noise levels (n,), float64, descending.
        samples: N.
        seed: Of the order, z and the probes.
        advance: Told the number of finished (sample, timestep) pairs.
        accelerator: Shares whole chunks among its processes; the sums are those of one to float64 rounding.

    Raises:
        StoppedError: A signal came.
    """
    size = chunk_size(source.shape)
    groups = torch.zeros(min(GROUPS, samples), len(t), len(SCALARS), dtype=torch.float64)
    squares = torch.zeros(len(t), len(SCALARS), dtype=torch.float64)
    device = next(iter(denoiser.state_dict().values())).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for first in range(rank * size, samples, world * size):
        count = min(size, samples - first)
        x0, labels = source.batch(shuffled_indices(len(source), seed, first, size))
        draw = generator(seed, "estimation", first)
        z = torch.randn(x0.shape, generator=draw, dtype=x0.dtype)
        probe = torch.randint(0, 2, x0.shape, generator=draw).to(x0.dtype) * 2 - 1
        x0, z, probe = x0.to(device), z.to(device), probe.to(device)
        moved = None if labels is None else labels.to(device)
        owner = torch.arange(first, first + count) % len(groups)
        for k, level in enumerate(t):
            stopping.check("estimation")
            levels = level.expand(size).to(device)
            scalars = sample_scalars(denoiser, x0 + broadcast(levels, x0) * z, levels, probe, moved).cpu()[:count]
            groups[:, k].index_add_(0, owner, scalars)
            squares[k] += scalars.square().sum(0)
            advance(count * world, "")
    if accelerator:
        groups, squares = (accelerator.reduce(part.to(device), "sum").cpu() for part in (groups, squares))
    return Statistics(t, torch.Size(source.shape).numel(), samples, groups, squares)


def logit_slope(lam: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Computes l' = dl/dlam as l (1-l) y', with y' the slope of the not-a-knot cubic spline through y = logit l.

    l falls off exponentially in lam at both ends, where y is a straight line. On the 1-D mixture with 120 points,
    s is then off by 2e-5; with central differences of l itself by 2e-2 (0.3 with 40 points), which is more than the
    sampling error of 4,096 samples.

    Args:
        lam: Nodes (n,), float64, ascending.
        l: Values (..., n), float64; taken as at least 1e-7 and at most 1 - 1e-7.
    """
    from scipy.interpolate import CubicSpline

    inside = l.clamp(1e-7, 1 - 1e-7)
    nodes = lam.numpy()
    slope = CubicSpline(nodes, torch.logit(inside).numpy(), axis=-1)(nodes, 1)
    return inside * (1 - inside) * torch.from_numpy(slope)


def solve_coefficients(t: Tensor, means: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Computes l_t and s_t from the means of the six scalars (Zheng et al. 2025, Eqs. 15 and 17).

    With a = 1 - l and l' = dl/dlam, see `logit_slope`::

        E|g|^2    = E[D.D] - 2a E[x.D] + a^2 E[x.x]
        E[g.dg]   = E[D.Ddot] + l' E[x.D] - a(E[D.D]-E[x.D]) - a(E[x.Ddot] + l' E[x.x] - a(E[x.D]-E[x.x]))

    Args:
        t: Noise levels (n,), float64, descending, n >= 3.
        means: Means of the scalars (..., n, 6), float64.
        dim: Elements of one sample, d.

    Returns:
        l and s, each (..., n), float64. Where g is lost in rounding (everywhere for Gaussian data, at the smallest
        noise for data much wider than 1) any s is right; it is that of the nearest noise level that has one, else 0.
    """
    trace, xx, xd, dd, d_ddot, x_ddot = means.unbind(-1)
    a = trace / dim
    slope = logit_slope(lam_of(t), 1 - a)
    norm = dd - 2 * a * xd + a**2 * xx
    inner = d_ddot + slope * xd - a * (dd - xd) - a * (x_ddot + slope * xx - a * (xd - xx))
    vanishes = norm <= _VANISHING * (dd + a**2 * xx)
    return 1 - a, _fill(torch.where(vanishes, 0.0, inner / torch.where(vanishes, 1.0, norm)), vanishes)


def make_table(statistics: Statistics) -> Coefficients:
    """Returns l and s of all samples together."""
    found = solve_coefficients(statistics.t, statistics.sums / statistics.count, statistics.dim)
    return Coefficients(statistics.t, *found)


def jackknife_errors(t: Tensor, groups: Tensor, count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Standard errors of l and s by the delete-one-group jackknife.

    Args:
        t: Noise levels (n,), float64, descending.
        groups: Sums over each group of samples (G, n, 6); sample k is in group k mod G.
        count: Number of samples.
        dim: Elements of one sample, d.

    Returns:
        Two tensors (n,), float64.
    """
    sizes = (count + len(groups) - 1 - torch.arange(len(groups))) // len(groups)
    rest = (groups.sum(0) - groups) / (count - sizes)[:, None, None]
    factor = (len(groups) - 1) / len(groups)
    tables = solve_coefficients(t, rest, dim)
    l_error, s_error = ((factor * (part - part.mean(0)).square().sum(0)).sqrt() for part in tables)
    return l_error, s_error


def _fill(values: Tensor, missing: Tensor) -> Tensor:
    """Puts the nearest value that is not missing in the place of each (..., n) that is; 0 where all are missing."""
    place = torch.arange(values.shape[-1])
    distance = (place[:, None] - place).abs().double()
    blocked = torch.where(missing, torch.inf, 0.0)
    return values.gather(-1, (distance + blocked[..., None, :]).argmin(-1))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of samples, in float64."""
    return (x.double() * y.double()).flatten(1).sum(1)
