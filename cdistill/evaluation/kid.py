"""Kernel distance: unbiased squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018)."""

import torch
from torch import Tensor

from cdistill.evaluation.blocks import blocks
from cdistill.evaluation.estimates import Estimate


def kernel_estimate(features: Tensor, real: Tensor, within_real: float, device: torch.device) -> Estimate:
    """MMD^2 of all pairs, with the Hajek projection of each sample.

    mean of k(x_i, x_j), i != j, plus that of k(y_i, y_j), minus twice that of k(x_i, y_j), where
    k(x, y) = (x.y / d + 1)^3. A sample adds 2 (mean over j of k(x, x_j) - mean over j of k(x, y_j)), up to a constant.

    Args:
        features: x (n, d), on the CPU.
        real: y (m, d), on the CPU.
        within_real: The mean of k(y_i, y_j), see `mean_within`.
        device: Where the products are taken, in float64.
    """
    within = _others(features, device) / (len(features) - 1)
    across = _row_sums(features, real, device, "KID") / len(real)
    value = within.mean() + within_real - 2 * across.mean()
    return Estimate(float(value), 2 * (within - across))


def mean_within(features: Tensor, device: torch.device) -> float:
    """Returns the mean of k(y_i, y_j) over all i != j, for y (m, d)."""
    return float(_others(features, device).mean() / (len(features) - 1))


def _others(features: Tensor, device: torch.device) -> Tensor:
    """Returns the sum of k(x_i, x_j) over j != i for every i (n,)."""
    return _row_sums(features, None, device, "KID (samples)")


def _row_sums(first: Tensor, second: Tensor | None, device: torch.device, title: str) -> Tensor:
    """Returns the sum of k(x_i, y_j) over j for every i (n,); with itself over j != i, each pair computed once."""
    other = first if second is None else second
    found = torch.zeros(len(first), dtype=torch.float64, device=device)
    for a, rows in blocks(first, device, title):
        for b, columns in blocks(other, device):
            if second is None and b.start < a.start:
                continue
            kernel = _kernel(rows, columns)
            if second is None and a == b:
                kernel.fill_diagonal_(0)
            found[a] += kernel.sum(1)
            if second is None and a != b:
                found[b] += kernel.sum(0)
    return found.cpu()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow_(3)
