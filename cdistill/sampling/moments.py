"""Inner products along the teacher's trajectories: what the errors of all f and g follow from, and the best f and g.

See `cdistill.analysis.consistency_gap` for the six means that are needed at each pair of noise levels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.estimation.base import standard_error
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings.coefficients import Fit
from cdistill.runtime import signals
from cdistill.runtime.console import Advance
from cdistill.runtime.devices import send
from cdistill.sampling.drawing import Chunk, Sampler, draw_chunks
from cdistill.sampling.solvers import Denoise, heun_step
from cdistill.schedule import rho_grid

GROUPS = 16
_SINGULAR = 1e-12  # of the correlation of x and D: below it, they are multiples of each other

Number = tuple[float, float]
"""A value and its standard error."""

Student = tuple[str, int]
"""An untrained student: name of its preconditioning and number of network calls."""


@dataclass(frozen=True)
class Moments:
    """Inner products along the teacher's trajectories, summed over groups of them."""

    levels: Tensor  # noise levels (L,), float64, descending
    dim: int  # elements of one sample, d
    sizes: Tensor  # trajectories in each group (G,), int64
    xx: Tensor  # sums of x_t.x_s (G, L, L), float64
    dx: Tensor  # sums of D(x_t,t).x_s (G, L-1, L)
    dd: Tensor  # sums of D(x_t,t).D(x_t,t) (G, L-1)
    students: tuple[Student, ...]  # what was compared with the ends of the trajectories, S of them
    ends: Tensor  # sums of |x' - x_eps|^2/d, x' the end points of each student (G, S)

    def replicates(self, sums: Tensor) -> Tensor:
        """Returns means over all trajectories, then over all but each group, from sums (G, ...): (1+G, ...)."""
        whole = sums.sum(0, keepdim=True)
        counts = torch.cat([self.sizes.sum()[None], self.sizes.sum() - self.sizes])
        return torch.cat([whole, whole - sums]) / counts.reshape(-1, *[1] * (sums.ndim - 1))

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns E[x_s.x_s], E[x_t.x_t], E[D.D], E[x_s.x_t], E[x_s.D] and E[x_t.D], divided by d, at all pairs.

        Each broadcasts to (1+G, n, n), n = L-1, rows t of ``levels[:-1]`` and columns s of ``levels[1:]``.
        """
        xx, dx, dd = (self.replicates(sums) / self.dim for sums in (self.xx, self.dx, self.dd))
        own, ahead = xx.diagonal(dim1=1, dim2=2), dx.diagonal(dim1=1, dim2=2)
        return own[:, None, 1:], own[:, :-1, None], dd[:, :, None], xx[:, :-1, 1:], dx[:, :, 1:], ahead[:, :, None]

    def jump_error(self, f: Tensor, g: Tensor) -> Tensor:
        """Computes sqrt(E|x_s - f x_t - g D|^2 / d), see the module; f and g (..., n, n), the result (1+G, n, n)."""
        ss, tt, dd, st, sd, td = self.means()
        square = ss + f**2 * tt + g**2 * dd
        return (square - 2 * (f * st + g * sd - f * g * td)).clamp(min=0).sqrt()


def collect_moments(
    denoiser: Denoiser,
    points: int,
    count: int,
    seed: int,
    substeps: int,
    samplers: Mapping[Student, Sampler] = MappingProxyType({}),
    advance: Advance = lambda count, note: None,
    accelerator: Accelerator | None = None,
    classes: Classes | None = None,
) -> Moments:
    """Follows the teacher's trajectories from T to eps by Heun's method and sums their inner products.

    Args:
        denoiser: The teacher.
        points: Noise levels of the rho-grid, L; CTM's training draws its pairs (t, s) from 18.
        count: Number of trajectories, at least 2; their noise is that of the image seeds from ``seed * count`` on.
        seed: Which trajectories; other seeds share none, with the same `count`.
        substeps: Heun's steps from one level to the next.
        samplers: Untrained students, whose end points are compared with those of the trajectories.
        advance: Called with the number of trajectories that were finished since the last call.
        accelerator: Shares whole chunks among its processes; the sums are those of one to float64 rounding.
        classes: How often each class occurs in the data; as the teacher knows it if None.

    Raises:
        StoppedError: A signal came.
    """
    owners = torch.arange(count) % min(GROUPS, count)
    sizes = owners.bincount()
    totals = [
        torch.zeros(len(sizes), *shape, dtype=torch.float64)
        for shape in ((points, points), (points - 1, points), (points - 1,), (len(samplers),))
    ]
    device = next(iter(denoiser.state_dict().values())).device
    seeds = range(seed * count, (seed + 1) * count)
    for chunk in draw_chunks(
        denoiser.sample_shape, seeds, (classes or denoiser.known_classes).shares, accelerator=accelerator
    ):
        signals.check("comparison")
        products = _chunk_products(denoiser, chunk, points, substeps, list(samplers.values()), device)
        for total, product in zip(totals, products, strict=True):
            total.index_add_(0, owners[chunk.rows], product[chunk.places])
        advance(chunk.turn, "")
    if accelerator:
        totals = [accelerator.reduce(total.to(device), "sum").cpu() for total in totals]
    xx, dx, dd, ends = totals
    dim = torch.Size(denoiser.sample_shape).numel()
    return Moments(rho_grid(points), dim, sizes, xx, dx, dd, tuple(samplers), ends)


def _chunk_products(
    denoiser: Denoiser,
    chunk: Chunk,
    points: int,
    substeps: int,
    samplers: Sequence[Sampler],
    device: torch.device,
) -> list[Tensor]:
    """Returns x.x (B, L, L), D.x (B, L-1, L), D.D (B, L-1) and the squared end errors (B, S) of each sample."""
    start, labels = send(chunk.x, device), None if chunk.labels is None else send(chunk.labels, device)
    with torch.inference_mode():
        path = list(walk(lambda x, t: denoiser(x, t, None, labels), start, points, substeps))
        x = torch.stack([point for point, _ in path], 1).double().flatten(2)
        d = torch.stack([out for _, out in path[:-1] if out is not None], 1).double().flatten(2)
        ends = [sampler(start, labels, chunk.noise(device)).double().flatten(1) for sampler in samplers]
        errors = torch.stack([(end - x[:, -1]).square().mean(1) for end in ends], 1) if ends else x.new_zeros(len(x), 0)
        products = [x @ x.mT, d @ x.mT, d.square().sum(-1), errors]
    return [product.cpu() for product in products]


def walk(denoise: Denoise, x: Tensor, points: int, substeps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Follows the PF-ODE by Heun's method; ``2 substeps (points - 1)`` network calls.

    Args:
        denoise: The teacher.
        x: Points at noise level T, (B, ...).
        points: Noise levels of the rho-grid, at which it stops.
        substeps: Steps from each to the next.

    Yields:
        x_t and D(x_t, t) at each level, None for the last D; Heun's own call there is kept, not repeated.
    """
    fine = send(rho_grid((points - 1) * substeps + 1), x.device)
    calls: list[Tensor] = []

    def remember(point: Tensor, t: Tensor) -> Tensor:
        calls.append(denoise(point, t))
        return calls[-1]

    for first in range(0, len(fine) - 1, substeps):
        start = x
        for t, u in pairwise(fine[first : first + substeps + 1]):
            x = heun_step(remember, x, t.expand(len(x)), u.expand(len(x)))
        yield start, calls[0]
        calls.clear()
    yield x, None


def least_squares(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the f and g that jump best at each pair, and how well they do.

    They solve ``[tt td; td dd] [f; g] = [st; sd]``, the least squares of x_s on x_t and D, both scaled to unit length.
    No preconditioning has a smaller jump error; these two hold for these trajectories and may follow no ODE.

    Returns:
        f, g and the root mean square of the residual per element, replicates (1+G, n, n), NaN where s is not below t.
        Where D is a multiple of x_t, as for Gaussian data, many f and g do equally well; theirs add the same,
        f x_t = g D.
    """
    _, tt, dd, st, sd, td = moments.means()
    scale_x, scale_d = tt.sqrt(), dd.sqrt().clamp(min=1e-300)
    correlation = (td / (scale_x * scale_d))[..., 0]
    unit = torch.ones_like(correlation)
    matrix = torch.stack([unit, correlation, correlation, unit], -1).unflatten(-1, (2, 2))
    right = torch.stack([st / scale_x, sd / scale_d], -2)
    solution = torch.linalg.pinv(matrix, rtol=_SINGULAR, hermitian=True) @ right
    f, g = solution[..., 0, :] / scale_x, solution[..., 1, :] / scale_d
    hidden = torch.where(jumps_down(moments.levels), 0.0, math.nan)
    return f + hidden, g + hidden, moments.jump_error(f, g) + hidden


def fit_f_and_g(moments: Moments) -> Fit:
    """Returns the f and g of `least_squares` with their standard errors, by the jackknife over groups."""
    f, g, _ = least_squares(moments)
    columns = [f[0], g[0], standard_error(f[1:]), standard_error(g[1:])]
    return Fit(moments.levels, *map(_square, columns))


def _square(values: Tensor) -> Tensor:
    """Returns values of the jumps from ``levels[:-1]`` to ``levels[1:]`` as a matrix of all levels (m, m)."""
    whole = values.new_full((len(values) + 1, len(values) + 1), math.nan)
    whole[:-1, 1:] = values
    return whole


def jumps_down(levels: Tensor) -> Tensor:
    """Which of the pairs from ``levels[:-1]`` to ``levels[1:]`` go down, (n, n)."""
    return levels[1:] < levels[:-1, None]


def jackknife(values: Tensor) -> Number:
    """Returns a statistic and its standard error from its replicates (1+G,), see `Moments.replicates`."""
    return float(values[0]), float(standard_error(values[1:]))
