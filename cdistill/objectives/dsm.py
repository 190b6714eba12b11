"""Denoising score matching: what keeps D(x, t, t) a denoiser, and what a teacher is trained by."""

import torch
from torch import Tensor

from cdistill.networks.denoiser import broadcast
from cdistill.objectives.distances import L2
from cdistill.schedule import EPS, RHO, T


def dsm_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's denoising loss, (sigma^2+sd^2)/(sigma sd)^2 |D - x_0|^2 / d (Karras et al. 2022, Table 1).

    Args:
        denoised: D(x_0 + sigma z, sigma), (B, ...).
        clean: x_0, (B, ...).
        sigma: Noise levels (B,), float64.
        sigma_data: Standard deviation of the data.

    Returns:
        One loss a sample, (B,).
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return broadcast(weight, denoised).flatten() * L2()(denoised, clean)


def draw_dsm_sigma(size: int, draw: torch.Generator) -> Tensor:
    """Draws CTM's noise levels for DSM: every other one log-normal(-1.2, 1.2), else the rho-schedule at 0.7 U.

    Returns:
        float64 (size,).
    """
    lognormal = (-1.2 + 1.2 * torch.randn(size, generator=draw, dtype=torch.float64)).exp()
    place = 0.7 * torch.rand(size, generator=draw, dtype=torch.float64)
    schedule = (T ** (1 / RHO) + place * (EPS ** (1 / RHO) - T ** (1 / RHO))) ** RHO
    return torch.where(torch.arange(size) % 2 == 0, lognormal, schedule)
