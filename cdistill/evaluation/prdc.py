"""Precision, recall, density and coverage: balls around points that reach to the k-th nearest of their own kind.

Squared distances are taken in float64, of vectors whose mean is subtracted, and compared in float32: what is equal but
for rounding, as when a sample is a copy, counts as equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.errors import CdistillError
from cdistill.evaluation.blocks import blocks
from cdistill.evaluation.estimates import Estimate, mean_estimate

_SAME = 1e-12  # of the squared norms: a smaller squared distance is the rounding error of 0


@dataclass(frozen=True)
class Balls:
    """Points (n, d) with the squared distances to their k + 1 nearest others.

    Attributes:
        points: (n, d), float32, on the CPU.
        nearest: Squared distances (n, k + 1), ascending, float32.
        neighbours: Which points these are (n, k + 1), int64.
        device: Where distances are computed.
    """

    points: Tensor
    nearest: Tensor
    neighbours: Tensor
    device: torch.device

    @property
    def radii(self) -> Tensor:
        """Squared distances to the k-th nearest (n,)."""
        return self.nearest[:, -2]


def find_balls(points: Tensor, k: int, device: torch.device, title: str) -> Balls:
    """Finds the k + 1 nearest others of each point.

    Args:
        points: (n, d), on the CPU.
        k: As the metric has it.
        device: Where distances are computed.
        title: What is being done, for the progress bar.

    Raises:
        CdistillError: There are no more than k + 1 points.
    """
    if len(points) < k + 2:
        raise CdistillError(f"{title}: {len(points)} points; the {k} nearest neighbours need at least {k + 2}")
    centre = _mean(points, device)
    near = torch.zeros(len(points), k + 1)
    which = torch.zeros(len(points), k + 1, dtype=torch.int64)
    for a, rows in blocks(points, device, title):
        best = torch.full((len(rows), k + 1), torch.inf, device=device)
        index = torch.zeros(len(rows), k + 1, dtype=torch.int64, device=device)
        for b, columns in blocks(points, device):
            found = squared_distances(rows - centre, columns - centre)
            if a == b:
                found.fill_diagonal_(torch.inf)
            own = torch.arange(b.start, b.stop, device=device).expand(len(rows), -1)
            best, order = torch.cat([best, found], 1).topk(k + 1, largest=False)
            index = torch.cat([index, own], 1).gather(1, order)
        near[a], which[a] = best.cpu(), index.cpu()
    return Balls(points, near, which, device)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns |x_i - y_j|^2 in float32 (n, m), for float64 x (n, d) and y (m, d) that are near the origin."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    found = torch.addmm(norms, x, y.T, alpha=-2)
    return torch.where(found > _SAME * norms, found, 0).float()


def precision(samples: Tensor, real: Balls) -> Estimate:
    """Share of the samples (n, d) that lie in a ball of the data (Kynkaanniemi et al. 2019, Eq. 1 and 2)."""
    return mean_estimate((_count_balls(samples, real, strict=False) > 0).double(), share=True)


def density(samples: Tensor, real: Balls) -> Estimate:
    """Mean number of balls of the data that a sample lies in, divided by k (Naeem et al. 2020, Eq. 3)."""
    return mean_estimate(_count_balls(samples, real, strict=True).double() / (real.nearest.shape[1] - 1))


def _count_balls(samples: Tensor, real: Balls, strict: bool) -> Tensor:
    """Returns in how many balls of the data each sample lies (n,); inside them only if `strict`."""
    centre, radii = _mean(real.points, real.device), real.radii.to(real.device)
    found = torch.zeros(len(samples), dtype=torch.int64)
    for a, rows in blocks(samples, real.device, "precision"):
        for b, columns in blocks(real.points, real.device):
            distances = squared_distances(rows - centre, columns - centre)
            inside = distances < radii[b] if strict else distances <= radii[b]
            found[a] += inside.sum(1).cpu()
    return found


def coverage(samples: Tensor, real: Balls) -> Estimate:
    """Share of the data whose ball has a sample inside (Naeem et al. 2020, Eq. 4); influence by the jackknife.

    Without a sample, those balls are empty that had it alone.
    """
    centre, radii = _mean(real.points, real.device), real.radii.to(real.device)
    covered, alone = 0, torch.zeros(len(samples), dtype=torch.float64)
    for a, rows in blocks(real.points, real.device, "coverage"):
        count = torch.zeros(len(rows), dtype=torch.int64, device=real.device)
        place = torch.zeros_like(count)
        for b, columns in blocks(samples, real.device):
            inside = squared_distances(rows - centre, columns - centre) < radii[a, None]
            count += inside.sum(1)
            place += (inside * torch.arange(b.start, b.stop, device=real.device)).sum(1)
        covered += int((count > 0).sum())
        sole = place[count == 1].cpu()
        alone.index_add_(0, sole, torch.ones(len(sole), dtype=torch.float64))
    return jackknife(covered / len(real.points), alone / len(real.points))


def recall(samples: Balls, real: Tensor) -> Estimate:
    """Share of the data (m, d) that lies in a ball of the samples; influence by the jackknife.

    Without a sample its ball is gone, and the balls of those that had it among their k nearest reach to their next
    nearest. So a point of the data that lay in its ball alone is lost, unless one of those larger balls holds it; and
    a point that lay in none is won where one of them does.
    """
    held, lost = 0, torch.zeros(len(samples.points), dtype=torch.float64)
    for sole, empty, edge in _memberships(samples, real):
        held += int((~empty).sum())
        lost += _lost(samples, sole, empty, edge)
    return jackknife(held / len(real), lost / len(real))


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
        place, edges = torch.zeros_like(count), []
        for b, columns in blocks(samples.points, device):
            distances = squared_distances(rows - centre, columns - centre)
            inside = distances <= radii[b]
            count += inside.sum(1)
            place += (inside * torch.arange(b.start, b.stop, device=device)).sum(1)
            edges.append(
                ((distances <= larger[b]) & ~inside).nonzero().T + torch.tensor([[0], [b.start]], device=device)
            )
        edge = torch.cat(edges, 1)
        sole = torch.where(count == 1, place, -1)
        yield sole.cpu(), (count == 0).cpu(), edge[:, count[edge[0]] <= 1].cpu()


def _lost(samples: Balls, sole: Tensor, empty: Tensor, edge: Tensor) -> Tensor:
    """Returns how many points of a block are lost without each sample, less those won (n,)."""
    found = torch.zeros(len(samples.points), dtype=torch.float64)
    alone = sole[sole >= 0]
    found.index_add_(0, alone, torch.ones(len(alone), dtype=torch.float64))
    point, sample = edge
    enlarging = samples.neighbours[sample, :-1]  # (p, k): without any of these the pair holds
    rescued = point[(enlarging == sole[point, None]).any(1)].unique()
    found.index_add_(0, sole[rescued], torch.full((len(rescued),), -1.0, dtype=torch.float64))
    won = empty[point]
    pairs = torch.stack([point[won, None].expand(-1, enlarging.shape[1]), enlarging[won]]).flatten(1).unique(dim=1)
    return found.index_add_(0, pairs[1], torch.full((pairs.shape[1],), -1.0, dtype=torch.float64))


def jackknife(value: float, lost: Tensor) -> Estimate:
    """Returns an estimate from what a figure loses when each sample is left out (n,): Tukey's pseudo-values.

    The variance is on average too large, never too small (Efron and Stein 1981).
    """
    return Estimate(value, (len(lost) - 1) * lost, share=True)


def _mean(points: Tensor, device: torch.device) -> Tensor:
    total = sum((part.sum(0) for _, part in blocks(points, device)), torch.zeros(1, dtype=torch.float64, device=device))
    return total / len(points)
