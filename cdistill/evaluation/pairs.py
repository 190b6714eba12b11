"""Metrics over all pairs of feature vectors: KID, precision and recall; in blocks, so that memory stays bounded.

KID is the unbiased squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018). Precision and recall
(Kynkaanniemi et al. 2019) compare balls around points that reach to the k-th nearest of their own set. Their squared
distances are taken in float64, of vectors whose mean is subtracted, and compared in float32: what is equal but for
rounding, as when a sample is a copy, counts as equal.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.errors import CdistillError
from cdistill.evaluation.estimates import Estimate, mean_estimate
from cdistill.runtime import signals
from cdistill.runtime.console import progress

BLOCK = 1024  # vectors; a block of pairs takes 8 MB in float64
_LONG = 16 * BLOCK  # vectors that are worth a progress bar
_SAME = 1e-12  # of the squared norms: a smaller squared distance is the rounding error of 0


def blocks(vectors: Tensor, device: torch.device, title: str = "") -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of `vectors` (n, d) as float64 on `device`, with their positions; with a title, shows a bar."""
    long = title and len(vectors) >= _LONG
    with progress(len(vectors), title, "img") if long else nullcontext() as advance:
        for start in range(0, len(vectors), BLOCK):
            rows = slice(start, min(start + BLOCK, len(vectors)))
            yield rows, vectors[rows].to(device).double()
            if advance is not None:
                signals.check("evaluation")
                advance(rows.stop - start, "")


def kernel_distance(features: Tensor, real: Tensor, within_real: float, device: torch.device) -> Estimate:
    """MMD^2 over all pairs of x (n, d) and y (m, d), with the Hajek projection of each sample, in float64 on `device`.

    mean of k(x_i, x_j), i != j, plus that of k(y_i, y_j), `within_real`, minus twice that of k(x_i, y_j), where
    k(x, y) = (x.y / d + 1)^3. The influence of a sample is 2 (mean over j of k(x, x_j) - mean over j of k(x, y_j)), up
    to a constant.
    """
    within = _kernel_sums(features, None, device, "KID (samples)") / (len(features) - 1)
    across = _kernel_sums(features, real, device, "KID") / len(real)
    value = within.mean() + within_real - 2 * across.mean()
    return Estimate(float(value), 2 * (within - across))


def mean_kernel(features: Tensor, device: torch.device) -> float:
    """Returns the mean of k(y_i, y_j) over all i != j, for y (m, d)."""
    return float(_kernel_sums(features, None, device, "KID (samples)").mean() / (len(features) - 1))


def _kernel_sums(first: Tensor, second: Tensor | None, device: torch.device, title: str) -> Tensor:
    """Returns the sum of k(x_i, y_j) over j for every i (n,); with itself over j != i, each pair computed once."""
    other = first if second is None else second
    sums = torch.zeros(len(first), dtype=torch.float64, device=device)
    for a, rows in blocks(first, device, title):
        for b, columns in blocks(other, device):
            if second is None and b.start < a.start:
                continue
            kernel = (rows @ columns.T / rows.shape[1] + 1).pow_(3)
            if second is None and a == b:
                kernel.fill_diagonal_(0)
            sums[a] += kernel.sum(1)
            if second is None and a != b:
                sums[b] += kernel.sum(0)
    return sums.cpu()


@dataclass(frozen=True)
class Balls:
    """Points (n, d), float32 on the CPU, with the squared distances to their k + 1 nearest others."""

    points: Tensor
    nearest: Tensor  # squared distances (n, k + 1), ascending, float32
    neighbours: Tensor  # which points these are (n, k + 1), int64
    device: torch.device  # where distances are computed

    @property
    def radii(self) -> Tensor:
        """Squared distances to the k-th nearest (n,)."""
        return self.nearest[:, -2]


def find_balls(points: Tensor, k: int, device: torch.device, title: str) -> Balls:
    """Finds the k + 1 nearest others of each of `points` (n, d); CdistillError of fewer than k + 2. A ball holds k."""
    if len(points) < k + 2:
        raise CdistillError(f"{title}: {len(points)} points; the {k} nearest neighbours need at least {k + 2}")
    centre = _mean(points, device)
    nearest = torch.zeros(len(points), k + 1)
    neighbours = torch.zeros(len(points), k + 1, dtype=torch.int64)
    for a, rows in blocks(points, device, title):
        best = torch.full((len(rows), k + 1), torch.inf, device=device)
        index = torch.zeros(len(rows), k + 1, dtype=torch.int64, device=device)
        for b, columns in blocks(points, device):
            distances = squared_distances(rows - centre, columns - centre)
            if a == b:
                distances.fill_diagonal_(torch.inf)
            own = torch.arange(b.start, b.stop, device=device).expand(len(rows), -1)
            best, order = torch.cat([best, distances], 1).topk(k + 1, largest=False)
            index = torch.cat([index, own], 1).gather(1, order)
        nearest[a], neighbours[a] = best.cpu(), index.cpu()
    return Balls(points, nearest, neighbours, device)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns |x_i - y_j|^2 in float32 (n, m), for float64 x (n, d) and y (m, d) that are near the origin."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(norms, x, y.T, alpha=-2)
    return torch.where(squares > _SAME * norms, squares, 0).float()


def precision(samples: Tensor, real: Balls) -> Estimate:
    """Share of the samples (n, d) that lie in a ball of the data (Kynkaanniemi et al. 2019, Eq. 1 and 2)."""
    centre, radii = _mean(real.points, real.device), real.radii.to(real.device)
    held = torch.zeros(len(samples), dtype=torch.bool)
    for a, rows in blocks(samples, real.device, "precision"):
        for b, columns in blocks(real.points, real.device):
            held[a] |= (squared_distances(rows - centre, columns - centre) <= radii[b]).any(1).cpu()
    return mean_estimate(held.double(), share=True)


def recall(samples: Balls, real: Tensor) -> Estimate:
    """Share of the data (m, d) that lie in a ball of the samples; influence by the jackknife.

    Without a sample its ball is gone, and the balls of those that had it among their k nearest reach to their next
    nearest. So a point of the data that lay in its ball alone is lost, unless one of those larger balls holds it; and
    a point that lay in none is won where one of them does. The influences are Tukey's pseudo-values, whose variance is
    on average too large, never too small (Efron and Stein 1981).
    """
    held, lost = 0, torch.zeros(len(samples.points), dtype=torch.float64)
    for sole, empty, edge in _memberships(samples, real):
        held += int((~empty).sum())
        lost += _lost(samples, sole, empty, edge)
    return Estimate(held / len(real), (len(lost) - 1) * (lost / len(real)), share=True)


def _memberships(samples: Balls, real: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields of each block of the data what the jackknife needs.

    Returns:
        The sample whose ball alone holds a point (b,), -1 where several do or none; whether none does (b,); the pairs
        (2, p) of points held by no or one ball, and samples whose balls would hold them when enlarged.
    """
    device = samples.device
    centre, radii, larger = _mean(samples.points, device), samples.radii.to(device), samples.nearest[:, -1].to(device)
    for _, rows in blocks(real, device, "recall"):
        count = torch.zeros(len(rows), dtype=torch.int64, device=device)
        holder, edges = torch.zeros_like(count), []
        for b, columns in blocks(samples.points, device):
            distances = squared_distances(rows - centre, columns - centre)
            inside = distances <= radii[b]
            count += inside.sum(1)
            holder += (inside * torch.arange(b.start, b.stop, device=device)).sum(1)
            edges.append(
                ((distances <= larger[b]) & ~inside).nonzero().T + torch.tensor([[0], [b.start]], device=device)
            )
        edge = torch.cat(edges, 1)
        sole = torch.where(count == 1, holder, -1)
        yield sole.cpu(), (count == 0).cpu(), edge[:, count[edge[0]] <= 1].cpu()


def _lost(samples: Balls, sole: Tensor, empty: Tensor, edge: Tensor) -> Tensor:
    """Returns how many points of a block are lost without each sample, less those won (n,)."""
    lost = torch.zeros(len(samples.points), dtype=torch.float64)
    alone = sole[sole >= 0]
    lost.index_add_(0, alone, torch.ones(len(alone), dtype=torch.float64))
    point, sample = edge
    enlarging = samples.neighbours[sample, :-1]  # (p, k): without any of these the pair holds
    rescued = point[(enlarging == sole[point, None]).any(1)].unique()
    lost.index_add_(0, sole[rescued], torch.full((len(rescued),), -1.0, dtype=torch.float64))
    won = empty[point]
    pairs = torch.stack([point[won, None].expand(-1, enlarging.shape[1]), enlarging[won]]).flatten(1).unique(dim=1)
    return lost.index_add_(0, pairs[1], torch.full((pairs.shape[1],), -1.0, dtype=torch.float64))


def _mean(points: Tensor, device: torch.device) -> Tensor:
    sums = (block.sum(0) for _, block in blocks(points, device))
    return sum(sums, torch.zeros(1, dtype=torch.float64, device=device)) / len(points)
