"""What a sampler is.

A third party writes a subclass of :class:`StudentSampler` or :class:`TeacherSampler`, names it in the entry-point group
``cdistill.samplers`` and has it in every command::

    class ToEpsAndBack(StudentSampler):
        fresh_noise = True

        def ends(self, times):
            return times[-1].expand(len(times) - 1)
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.sampling.drawing import Noise
from cdistill.sampling.solvers import Denoise, jump
from cdistill.schedule import sampling_grid


class TimedSampler(ABC):
    """Points at T to points at eps, over a list of times; an instance is a `Sampler`.

    Args:
        denoiser: The network.
        times: float64 (k+1,), strictly decreasing, from T to eps.

    Attributes:
        draws_from: "student" or "teacher".
        calls_per_step: Network calls for each of the k steps.
        fresh_noise: Whether it draws noise besides that of the start, so that its ends are not those of the teacher's
            trajectory from the same noise.
    """

    draws_from: ClassVar[Literal["student", "teacher"]]
    calls_per_step: ClassVar[int] = 1
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
        """Maps points at T to points at eps.

        Args:
            x: Points at noise level T, (B, ...), float64.
            labels: Class indices (B,) or None.
            noise: Draws fresh normal noise, like `x`.

        Returns:
            Points at noise level eps, like `x`.
        """


class StudentSampler(TimedSampler):
    """Jumps t_n -> s_n <= t_{n+1}, each followed by noise sqrt(t_{n+1}^2 - s_n^2) z up to t_{n+1}; k calls for k steps.

    Args:
        denoiser: The student, D(x, t, s).
        preconditioning: f and g.
        times: t_0 = T > ... > t_k = eps, float64 (k+1,).
        gamma: The share of fresh noise, for samplers that take it.

    Attributes:
        eps_only: Whether it works for preconditionings that jump to eps only, that is, s_n = eps always.
        takes_gamma: Whether `gamma` must be given.

    Raises:
        RecipeError: The preconditioning jumps to eps only and the sampler does not; or `gamma` is missing, not wanted
            or outside [0, 1].
    """

    draws_from = "student"
    eps_only: ClassVar[bool] = False
    takes_gamma: ClassVar[bool] = False

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
            raise RecipeError(f"gamma: got {gamma}; goes with the sampler 'gamma', which needs one from 0 to 1")
        if gamma is not None and not 0 <= gamma <= 1:
            raise RecipeError(f"gamma: got {gamma}; needs a number from 0, no fresh noise, to 1, nothing but")
        self.gamma = gamma
        ends = self.ends(times)
        self.steps = torch.stack([times[:-1], ends, *preconditioning(times[:-1], ends)], 1)
        self.added = (times[1:] ** 2 - ends**2).sqrt()

    @property
    def facts(self) -> dict[str, Any]:
        """See :class:`TimedSampler`."""
        return {**super().facts, "gamma": self.gamma}

    @abstractmethod
    def ends(self, times: Tensor) -> Tensor:
        """Returns where the jumps from t_0 ... t_{k-1} end, s (k,), eps <= s_n <= t_{n+1}; the last is eps."""

    def __call__(self, x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """See :class:`TimedSampler`."""
        for step, added in zip(self.steps.to(x.device), self.added, strict=True):
            t, s, f, g = step[:, None].expand(-1, len(x))
            x = jump(self.denoiser, x, t, s, (f, g), labels)
            if added > 0:
                x = x + added.to(x.device) * noise()
        return x


class TeacherSampler(TimedSampler):
    """A solver of the probability-flow ODE dx/dt = (x - D(x,t))/t."""

    draws_from = "teacher"

    def __call__(self, x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """See :class:`TimedSampler`."""
        return self.solve(lambda point, t: self.denoiser(point, t, None, labels), x, self.times.to(x.device))

    @abstractmethod
    def solve(self, denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
        """Solves the ODE.

        Args:
            denoise: D, with the labels bound.
            x: Points at ``times[0]``, (B, ...).
            times: float64 (k+1,), on the device of `x`.

        Returns:
            Points at ``times[-1]``, like `x`, after exactly ``k calls_per_step`` calls.
        """


def grid_for(kind: type[TimedSampler], nfe: int) -> Tensor:
    """Returns the rho-grid on which a sampler spends exactly `nfe` network calls.

    Raises:
        RecipeError: It cannot: fewer than one step, or not a whole number of them.
    """
    steps, rest = divmod(nfe, kind.calls_per_step)
    if rest or steps < 1:
        calls = kind.calls_per_step
        needed = f"a multiple of {calls}: it makes {calls} calls a step, the last too" if calls > 1 else "1 or more"
        raise RecipeError(f"nfe: got {nfe} for {kind.__name__}; the number of network calls must be {needed}")
    return sampling_grid(steps)
