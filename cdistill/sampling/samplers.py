"""Samplers: few-step jumps of students, solvers of the ODE for teachers."""

import torch
from torch import Tensor

from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.sampling.drawing import Noise, Sampler
from cdistill.schedule import EPS, rho_grid, sampling_grid
from cdistill.solvers import heun_step, jump, solve, trajectory

TEACHER_POINTS = 18


def student_sampler(denoiser: Denoiser, preconditioning: Preconditioning, nfe: int) -> Sampler:
    """Returns the sampler of a student with `nfe` network calls.

    Deterministic jumps T -> t_1 -> ... -> eps on the k-step rho-grid (Zheng et al. 2025, Appendix B.3); for
    consistency models, which jump to eps only, their multistep sampling with fresh noise (Song et al. 2023, Alg. 1).

    Raises:
        RecipeError: `nfe` is less than 1.
    """
    times = sampling_grid(nfe)
    if preconditioning.to_eps_only:
        return lambda x, labels, noise: _multistep(denoiser, preconditioning, times, x, labels, noise)
    f, g = preconditioning(times[:-1], times[1:])

    def sample(x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        for k in range(nfe):
            t, s, f_k, g_k = (part.expand(len(x)).to(x.device) for part in (times[k], times[k + 1], f[k], g[k]))
            x = jump(denoiser, x, t, s, (f_k, g_k), labels)
        return x

    return sample


def teacher_sampler(denoiser: Denoiser, points: int = TEACHER_POINTS) -> Sampler:
    """Returns Heun's solver on `points` noise levels from T to eps, ``2 (points - 1)`` network calls."""
    times = rho_grid(points)

    def sample(x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        return solve(heun_step, lambda point, t: denoiser(point, t, None, labels), x, times.to(x.device))

    return sample


def trajectories(denoiser: Denoiser, preconditioning: Preconditioning, nfe: int, x: Tensor) -> Tensor:
    """Returns all points (nfe+1, B, ...) of a student's jumps from `x` at T, for an unconditional denoiser."""

    def step(point: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return jump(denoiser, point, t, s, preconditioning(t, s))

    with torch.inference_mode():
        return trajectory(step, x, sampling_grid(nfe))


def teacher_trajectories(denoiser: Denoiser, points: int, x: Tensor) -> Tensor:
    """Returns all points (points, B, ...) of the teacher's ODE from `x` at T by Heun's method, unconditional."""
    with torch.inference_mode():
        return trajectory(
            lambda point, t, s: heun_step(lambda y, level: denoiser(y, level), point, t, s),
            x,
            rho_grid(points),
        )


def _multistep(
    denoiser: Denoiser,
    preconditioning: Preconditioning,
    times: Tensor,
    x: Tensor,
    labels: Tensor | None,
    noise: Noise,
) -> Tensor:
    """Jumps to eps; then, for each time in between, adds noise up to it and jumps to eps again."""
    end = torch.full((len(x),), EPS, dtype=torch.float64, device=x.device)
    for number, time in enumerate(times[:-1]):
        t = time.expand(len(x)).to(x.device)
        if number:
            x = x + (time**2 - EPS**2).sqrt().to(x.device) * noise()
        f, g = preconditioning(t.cpu(), end.cpu())
        x = jump(denoiser, x, t, end, (f.to(x.device), g.to(x.device)), labels)
    return x
