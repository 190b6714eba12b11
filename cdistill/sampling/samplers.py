"""Samplers by name: few-step sampling of students, solvers of the ODE for teachers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.errors import CdistillError, RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.registry import SAMPLERS
from cdistill.sampling.base import StudentSampler, TeacherSampler, TimedSampler, grid_for
from cdistill.sampling.solvers import heun_step, jump, trajectory
from cdistill.schedule import rho_grid, sampling_grid, time_list

TEACHER_POINTS = 18
TEACHER_NFE = 2 * (TEACHER_POINTS - 1)
Times = str | Sequence[float] | Tensor
"""What `time_list` takes."""


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler as a person asks for it; the arguments of `make_sampler`.

    Attributes:
        name: Registered name; None for `default_sampler`.
        nfe: Network calls, on the rho-grid.
        times: See `time_list`; in place of `nfe`.
        gamma: For 'gamma', the share of fresh noise.
    """

    name: str | None = None
    nfe: int | None = None
    times: str | Sequence[float] | None = None
    gamma: float | None = None

    def build(self, denoiser: Denoiser, preconditioning: Preconditioning | None) -> TimedSampler:
        """Builds the sampler of a student, or of a teacher where there is no preconditioning."""
        return make_sampler(denoiser, preconditioning, self.name, self.nfe, self.times, self.gamma)


def make_sampler(
    denoiser: Denoiser,
    preconditioning: Preconditioning | None,
    name: str | None = None,
    nfe: int | None = None,
    times: Times | None = None,
    gamma: float | None = None,
) -> TimedSampler:
    """Builds a registered sampler of a student, or of a teacher where `preconditioning` is None.

    Args:
        denoiser: D(x, t, s) of the student or D(x, t) of the teacher.
        preconditioning: The student's f and g.
        name: Registered name; None for `default_sampler`.
        nfe: Network calls, on the rho-grid; 34 for a teacher where neither `nfe` nor `times` is given.
        times: See `time_list`; in place of `nfe`.
        gamma: For 'gamma', the share of fresh noise.

    Raises:
        UnknownNameError: No such sampler.
        RecipeError: It draws from the other kind of network; both or none of `nfe` and `times`; or as the classes in
            the registry say.
    """
    wanted = "teacher" if preconditioning is None else "student"
    name = name or default_sampler(preconditioning)
    kind = sampler_class(name, wanted)
    if nfe is not None and times is not None:
        raise RecipeError("times: got a number of network calls too; the times say how many there are; leave --nfe out")
    if nfe is None and times is None and preconditioning is not None:
        raise RecipeError("nfe: missing; a student needs a number of network calls, or times")
    grid = grid_for(kind, TEACHER_NFE if nfe is None else nfe) if times is None else time_list(times)
    if preconditioning is not None and issubclass(kind, StudentSampler):
        return kind(denoiser, preconditioning, grid, gamma)
    if gamma is not None:
        raise RecipeError(f"gamma: got {gamma}; goes with a student; a teacher's solver adds no noise")
    return kind(denoiser, grid)


def default_sampler(preconditioning: Preconditioning | None) -> str:
    """Returns "heun" for a teacher (None), "cm" for a student that jumps to eps only, "ctm" for any other."""
    if preconditioning is None:
        return "heun"
    return "cm" if preconditioning.to_eps_only else "ctm"


def sampler_class(name: str, draws_from: str) -> type[TimedSampler]:
    """Returns a registered class for "student" or "teacher".

    Raises:
        UnknownNameError: No such sampler.
        RecipeError: It draws from the other.
    """
    kind = SAMPLERS.get(name)
    base = TeacherSampler if draws_from == "teacher" else StudentSampler
    if not (isinstance(kind, type) and issubclass(kind, TimedSampler)):
        raise CdistillError(f"sampler {name!r}: {kind!r} is no subclass of cdistill's StudentSampler or TeacherSampler")
    if not issubclass(kind, base):
        fitting = [other for other in SAMPLERS.names() if issubclass(SAMPLERS.get(other), base)]
        raise RecipeError(
            f"sampler: got {name!r}, which draws from a {kind.draws_from}; for a {draws_from}: {', '.join(fitting)}"
        )
    return kind


def student_sampler(
    denoiser: Denoiser,
    preconditioning: Preconditioning,
    nfe: int | None,
    name: str | None = None,
    times: Times | None = None,
    gamma: float | None = None,
) -> TimedSampler:
    """Builds the sampler of a student with `nfe` network calls, or over `times`; see `make_sampler`.

    By default deterministic jumps on the rho-grid, and multistep sampling for consistency models.
    """
    return make_sampler(denoiser, preconditioning, name, nfe, times, gamma)


def teacher_sampler(
    denoiser: Denoiser, points: int = TEACHER_POINTS, name: str = "heun", times: Times | None = None
) -> TimedSampler:
    """Builds a solver for a teacher on `points` noise levels from T to eps, or on `times`; see `make_sampler`."""
    return make_sampler(denoiser, None, name, times=rho_grid(points) if times is None else times)


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
