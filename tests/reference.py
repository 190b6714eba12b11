"""Eq. 7 with DSM, written plainly, one sample at a time: what the fast step must equal.

This is the place to learn the algorithm from. Symbols are the paper's: theta the student, mu its moving average,
phi the teacher.
"""

import itertools

import torch
from torch import Tensor

from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.training.consistency import Batch


def column(value: Tensor) -> Tensor:
    return value.reshape(1)


def consistency_function(
    student: Denoiser, form: Preconditioning, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None
) -> Tensor:
    """f(t,s) x + g(t,s) D(x,t,s); the identity where t = s (Eq. 8)."""
    f, g = form(t, s)
    return f * x + g * student(x, column(t), column(s), label)


def solver(phi: Denoiser, x: Tensor, times: Tensor, label: Tensor | None) -> Tensor:
    """Heun's steps of dx/dt = (x - D_phi(x,t))/t along `times`."""
    for t, u in itertools.pairwise(times):
        slope = (x - phi(x, column(t), None, label)) / t
        guess = x + (u - t) * slope
        x = x + (u - t) * (slope + (guess - phi(guess, column(u), None, label)) / u) / 2
    return x


def ctm_losses(
    theta: Denoiser, mu: Denoiser, phi: Denoiser, form: Preconditioning, grid: Tensor, batch: Batch, h: int
) -> tuple[Tensor, Tensor]:
    """The mean consistency loss (Eq. 7, squared distance, w = 1) and the mean DSM loss of a batch."""
    consistency, dsm = [], []
    eps = grid[-1]
    for k in range(len(batch.x0)):
        x0, x_t, z, sigma = batch.x0[k : k + 1], batch.x_t[k : k + 1], batch.z[k : k + 1], batch.sigma[k]
        label = None if batch.labels is None else batch.labels[k : k + 1]
        i, j = int(batch.start[k]), int(batch.end[k])
        t, u, s = grid[i], grid[i + h], grid[j]
        with torch.no_grad():
            x_u = solver(phi, x_t, grid[i : i + h + 1], label)
            y = consistency_function(mu, form, x_u, u, s, label)
            y_eps = consistency_function(mu, form, y, s, eps, label)
        e = consistency_function(theta, form, x_t, t, s, label)
        e_eps = consistency_function(mu, form, e, s, eps, label)
        consistency.append((e_eps - y_eps).square().mean())
        denoised = theta(x0 + sigma * z, column(sigma), column(sigma), label)
        weight = (sigma**2 + theta.sigma_data**2) / (sigma * theta.sigma_data) ** 2
        dsm.append(weight * (denoised - x0).square().mean())
    return torch.stack(consistency).mean(), torch.stack(dsm).mean()
