"""Inversion: the noise at T that a sampler takes to given samples."""

import torch
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser, broadcast
from cdistill.sampling.samplers import StudentSampler, TeacherSampler, TimedSampler
from cdistill.sampling.solvers import heun_step, solve

TOLERANCE = 1e-5  # of the residual; the networks compute in float32
MOST_CALLS, PATIENCE = 100, 10


def invert(sampler: TimedSampler, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Follows a deterministic sampler back from points x (B, ...), float64, at eps to T.

    A teacher's ODE is solved upwards by Heun's method on the same times, whatever its solver: the way back differs from
    the way down by both solvers' errors. A student's jumps are solved one by one, see `invert_jump`.

    Returns:
        Points at T (B, ...), float64; the largest |jump(x_t) - x_s| of the jumps, root mean square over the elements,
        (B,): at most `TOLERANCE` for samples that were inverted; of a teacher 0, whose solver has nothing to iterate.

    Raises:
        RecipeError: The sampler draws fresh noise, so that many points lead to the same sample.
    """
    if sampler.fresh_noise:
        raise RecipeError(f"invert: got {type(sampler).__name__}, which draws fresh noise; only 'ctm' has an inverse")
    with torch.inference_mode():
        if isinstance(sampler, StudentSampler):
            residual = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for step in sampler.steps.flip(0).to(x.device):
                t, s, f, g = step[:, None].expand(-1, len(x))
                x, left, _ = invert_jump(sampler.denoiser, x, t, s, (f, g), labels)
                residual = residual.maximum(left)
            return x, residual
        if not isinstance(sampler, TeacherSampler):
            raise RecipeError(f"invert: got {type(sampler).__name__}; needs a sampler of a student or of a teacher")
        times = sampler.times.flip(0).to(x.device)
        back = solve(heun_step, lambda point, t: sampler.denoiser(point, t, None, labels), x, times)
        return back, torch.zeros(len(x), dtype=torch.float64, device=x.device)


def invert_jump(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    coefficients: tuple[Tensor, Tensor],
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Solves x_s = f x_t + g D(x_t, t, s) for x_t by iterating x_t <- (x_s - g D(x_t, t, s)) / f.

    It contracts where |g/f dD/dx| < 1, that is, for short jumps or large t; a long jump to small s nearly forgets where
    it came from. Each sample keeps the iterate with its smallest residual; the end comes when all are small enough,
    after 10 calls in which none improved, or after 100. The arguments are those of `jump`, x at noise level s.

    Returns:
        Points at noise level t, like `x`; their residuals (B,), see `invert`; the number of network calls.
    """
    f, g = (broadcast(part, x) for part in coefficients)
    variance = denoiser.sigma_data**2
    point = best = broadcast(((variance + t**2) / (variance + s**2)).sqrt(), x) * x  # exact for Gaussian data
    residual = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    calls = improved = 0
    while calls < MOST_CALLS and calls - improved < PATIENCE and bool((residual > TOLERANCE / 10).any()):
        d = denoiser(point, t, s, labels)
        calls += 1
        left = (f * point + g * d - x).square().flatten(1).mean(1).sqrt()
        better = left < residual
        improved = calls if bool(better.any()) else improved
        best, residual = torch.where(broadcast(better, x) > 0, point, best), torch.where(better, left, residual)
        point = torch.nan_to_num((x - g * d) / f, nan=0.0, posinf=0.0, neginf=0.0)
    return best, residual, calls
