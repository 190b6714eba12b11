"""Samplers: which noise levels a student jumps between, and how a teacher's ODE is solved.

A third party writes a subclass of :class:`StudentSampler` or :class:`TeacherSampler`, names it in the entry-point group
``cdistill.samplers`` and has it in every command::

    class ToEpsAndBack(StudentSampler):
        fresh_noise = True

        def jump_ends(self, times):
            return times[-1].expand(len(times) - 1)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from cdistill.errors import CdistillError, RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.registry import SAMPLERS
from cdistill.runtime.devices import send
from cdistill.sampling.drawing import Noise
from cdistill.sampling.solvers import (
    Denoise,
    euler_step,
    exponential_step,
    extrapolate,
    heun_step,
    jump,
    solve,
    trajectory,
)
from cdistill.schedule import rho_grid, sampling_grid, time_list

TEACHER_POINTS = 18
TEACHER_NFE = 2 * (TEACHER_POINTS - 1)
STUDENT_NFE = 2
Times = str | Sequence[float] | Tensor
"""What `time_list` takes."""


class TimedSampler(ABC):
    """Maps points at T to points at eps over noise levels `times`, float64 (k+1,), descending; is a `Sampler`.

    Attributes:
        fresh_noise: Whether it adds noise after the start, so that its samples are not the endpoints of the teacher's
            trajectories from the same noise.
    """

    draws_from: ClassVar[Literal["student", "teacher"]]  # "student" or "teacher"
    calls_per_step: ClassVar[int] = 1  # network calls in each of the k steps
    fresh_noise: ClassVar[bool] = False

    def __init__(self, denoiser: Denoiser, times: Tensor) -> None:
        self.denoiser, self.times = denoiser, times

    @property
    def nfe(self) -> int:
        """Number of network calls for an image."""
        return self.calls_per_step * (len(self.times) - 1)

    @property
    def facts(self) -> dict[str, Any]:
        """What its samples depend on besides the network and its coefficients, as JSON."""
        return {"sampler": f"{type(self).__module__}:{type(self).__qualname__}", "times": self.times.tolist()}

    @abstractmethod
    def __call__(self, x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Maps points x (B, ...), float64, at T to points at eps; `labels` (B,) are class indices or None."""


class StudentSampler(TimedSampler):
    """Jumps t_n -> s_n <= t_{n+1}, each followed by noise sqrt(t_{n+1}^2 - s_n^2) z up to t_{n+1}; k calls for k steps.

    `eps_only` ones work for preconditionings that jump to eps only: s_n = eps for every n. RecipeError if another is
    for such a preconditioning, or if `gamma` is missing, not allowed or outside [0, 1].
    """

    draws_from = "student"
    eps_only: ClassVar[bool] = False
    takes_gamma: ClassVar[bool] = False  # whether `gamma`, the share of fresh noise, must be given

    def __init__(
        self, denoiser: Denoiser, preconditioning: Preconditioning, times: Tensor, gamma: float | None = None
    ) -> None:
        super().__init__(denoiser, times)
        if preconditioning.to_eps_only and not self.eps_only:
            raise RecipeError(
                f"sampler: got {type(self).__name__}, whose jumps end anywhere, for a student that jumps to eps only; "
                "use 'cm'"
            )
        if self.takes_gamma != (gamma is not None):
            raise RecipeError(f"gamma: got {gamma}; goes with the sampler 'gamma', which needs a number from 0 to 1")
        if gamma is not None and not 0 <= gamma <= 1:
            raise RecipeError(f"gamma: got {gamma}; needs a number from 0 (no fresh noise) to 1 (all noise is fresh)")
        self.gamma = gamma
        ends = self.jump_ends(times)
        self.steps = torch.stack([times[:-1], ends, *preconditioning(times[:-1], ends)], 1)
        self.added = (times[1:] ** 2 - ends**2).sqrt()

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "gamma": self.gamma}

    @abstractmethod
    def jump_ends(self, times: Tensor) -> Tensor:
        """Returns where the jumps from t_0 ... t_{k-1} end, s (k,), eps <= s_n <= t_{n+1}; the last is eps."""

    @override
    def __call__(self, x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        for step, added in zip(send(self.steps, x.device), self.added, strict=True):
            t, s, f, g = step[:, None].expand(-1, len(x))
            x = jump(self.denoiser, x, t, s, (f, g), labels)
            if added > 0:
                x = x + added * noise()
        return x


class Jumps(StudentSampler):
    """CTM's deterministic jumps T -> t_1 -> ... -> eps (Zheng et al. 2025, Appendix B.3): s_n = t_{n+1}, no noise."""

    @override
    def jump_ends(self, times: Tensor) -> Tensor:
        return times[1:]


class Multistep(StudentSampler):
    """Consistency models' multistep sampling (Song et al. 2023, Alg. 1): s_n = eps, noise up to t_{n+1} between."""

    fresh_noise = True
    eps_only = True

    @override
    def jump_ends(self, times: Tensor) -> Tensor:
        return times[-1].expand(len(times) - 1)


class GammaSampling(StudentSampler):
    """CTM's gamma-sampling (Kim et al. 2024, Alg. 3): s_n = sqrt(1-gamma^2) t_{n+1}, then noise gamma t_{n+1} z.

    Kim et al. end at 0, where the last noise vanishes. Here the smallest noise level is eps: s_n = max(sqrt(1-gamma^2)
    t_{n+1}, eps), and the noise is what is missing from s_n to t_{n+1}, gamma t_{n+1} unless the maximum is eps. So the
    last jump ends at eps without noise, gamma = 0 is :class:`Jumps` and gamma = 1 is :class:`Multistep`.
    """

    fresh_noise = True
    takes_gamma = True

    @override
    def jump_ends(self, times: Tensor) -> Tensor:
        assert self.gamma is not None  # checked by the base class
        return (math.sqrt(1 - self.gamma**2) * times[1:]).maximum(times[-1])


class TeacherSampler(TimedSampler):
    """A solver of the probability-flow ODE dx/dt = (x - D(x,t))/t."""

    draws_from = "teacher"

    @override
    def __call__(self, x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        return self.solve(lambda point, t: self.denoiser(point, t, None, labels), x, send(self.times, x.device))

    @abstractmethod
    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        """Solves the ODE from x (B, ...) at ``times[0]`` to ``times[-1]``; exactly ``k calls_per_step`` calls of D."""


class Heun(TeacherSampler):
    """EDM's second-order solver (Karras et al. 2022, Alg. 1); 2 calls for each step, as none ends at 0."""

    calls_per_step = 2

    @override
    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        return solve(heun_step, denoise, x, times)


class Euler(TeacherSampler):
    """Euler's method in sigma, order 1; for EDM's parametrisation the same as DDIM (Song et al. 2021a, Sec. 4.3)."""

    @override
    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        return solve(euler_step, denoise, x, times)


class DPMSolverPP2M(TeacherSampler):
    """DPM-Solver++(2M), the multistep solver of order 2 for D (Lu et al. 2022, Alg. 2), with alpha = 1, lam = -log t.

    The first step has no predecessor and is Euler's. All others are of second order, the last too: it ends at eps, not
    at 0, where lam is infinite and implementations fall back to first order.
    """

    @override
    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        levels = times[:, None].expand(-1, len(x))
        before = earlier = None
        for t, u in pairwise(levels):
            d = denoise(x, t)
            ahead = d if before is None or earlier is None else extrapolate(d, before, earlier, t, u)
            x = exponential_step(x, ahead, t, u)
            before, earlier = d, t
        return x


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
        RecipeError: It is unknown or draws from the other kind of network; both or none of `nfe` and `times`.
    """
    kind = sampler_class(name or default_sampler(preconditioning), "teacher" if preconditioning is None else "student")
    if nfe is not None and times is not None:
        raise RecipeError("times: got a number of network calls too; the times say how many there are; leave --nfe out")
    if nfe is None and times is None and preconditioning is not None:
        raise RecipeError("nfe: missing; a student needs a number of network calls, or times")
    levels = _grid(kind, TEACHER_NFE if nfe is None else nfe) if times is None else time_list(times)
    if preconditioning is not None and issubclass(kind, StudentSampler):
        return kind(denoiser, preconditioning, levels, gamma)
    if gamma is not None:
        raise RecipeError(f"gamma: got {gamma}; goes with a student; a teacher's solver adds no noise")
    return kind(denoiser, levels)


@dataclass(frozen=True)
class SamplerChoice:
    """The arguments of `make_sampler` as a person gives them and records keep them."""

    name: str | None = None
    nfe: int | None = None
    times: str | Sequence[float] | None = None
    gamma: float | None = None


def make_samplers(
    denoiser: Denoiser, preconditioning: Preconditioning | None, choice: SamplerChoice, nfe: Sequence[int] | None = None
) -> dict[str, TimedSampler]:
    """Builds a sampler, see `make_sampler`, for each number of network calls; the `nfe` of `choice` is not read.

    Without these and without times there are 2 calls for a student and 34 for a teacher.

    Returns:
        Title -> sampler: "nfe2" or "teacher" for the default one, followed by what differs from the default.
    """
    usual = STUDENT_NFE if choice.times is None and preconditioning is not None else None
    calls: Sequence[int | None] = nfe or [usual]
    built = [make_sampler(denoiser, preconditioning, **vars(replace(choice, nfe=k))) for k in calls]
    default = default_sampler(preconditioning)
    return {_title(choice, sampler, default, nfe is not None): sampler for sampler in built}


def _title(choice: SamplerChoice, sampler: TimedSampler, default: str, counted: bool) -> str:
    name = None if choice.name == default else choice.name
    unusual = [name, None if choice.gamma is None else f"{choice.gamma:g}", choice.times and "times"]
    calls = f"nfe{sampler.nfe}"
    if sampler.draws_from == "teacher":
        return "-".join(str(part) for part in ["teacher", calls if counted or any(unusual) else None, *unusual] if part)
    return "-".join(str(part) for part in [calls, *unusual] if part)


def default_sampler(preconditioning: Preconditioning | None) -> str:
    """Returns "heun" for a teacher (None), "cm" for a student that jumps to eps only, "ctm" for any other."""
    if preconditioning is None:
        return "heun"
    return "cm" if preconditioning.to_eps_only else "ctm"


def sampler_class(name: str, draws_from: str) -> type[TimedSampler]:
    """Returns a registered class for "student" or "teacher"; RecipeError if it is unknown or draws from the other."""
    kind = SAMPLERS.get(name)
    base = TeacherSampler if draws_from == "teacher" else StudentSampler
    if not (isinstance(kind, type) and issubclass(kind, TimedSampler)):
        raise CdistillError(f"sampler {name!r}: {kind!r} is no subclass of cdistill's StudentSampler or TeacherSampler")
    if not issubclass(kind, base):
        allowed = [other for other in SAMPLERS.names() if issubclass(SAMPLERS.get(other), base)]
        raise RecipeError(
            f"sampler: got {name!r}, which draws from a {kind.draws_from}; for a {draws_from}: {', '.join(allowed)}"
        )
    return kind


def _grid(kind: type[TimedSampler], nfe: int) -> Tensor:
    """Returns the rho-grid on which a sampler makes exactly `nfe` network calls, or raises RecipeError."""
    steps, rest = divmod(nfe, kind.calls_per_step)
    if rest or steps < 1:
        calls = kind.calls_per_step
        needed = f"a multiple of {calls}: it makes {calls} calls a step, the last too" if calls > 1 else "1 or more"
        raise RecipeError(f"nfe: got {nfe} for {kind.__name__}; the number of network calls must be {needed}")
    return sampling_grid(steps)


def trajectories(denoiser: Denoiser, preconditioning: Preconditioning, nfe: int, x: Tensor) -> Tensor:
    """Returns all points (nfe+1, B, ...) of a student's jumps from `x` at T, for an unconditional denoiser."""

    def step(point: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return jump(denoiser, point, t, s, preconditioning(t, s))

    with torch.inference_mode():
        return trajectory(step, x, sampling_grid(nfe))


def teacher_trajectories(denoiser: Denoiser, points: int, x: Tensor) -> Tensor:
    """Returns all points (points, B, ...) of the teacher's ODE from `x` at T by Heun's method, unconditional."""
    with torch.inference_mode():
        return trajectory(lambda point, t, s: heun_step(denoiser, point, t, s), x, rho_grid(points))
