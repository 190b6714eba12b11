"""The samplers that a person asks for on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.runtime.console import compact, say
from cdistill.sampling import SamplerChoice, TimedSampler, default_sampler, make_sampler, teacher_sampler
from cdistill.sampling.optimising import HELD_OUT, Alignment, OptimisedTimes, optimise_times
from cdistill.teachers import Teacher

DEFAULT_NFE = 2


@dataclass(frozen=True)
class Request:
    """What to draw with.

    Attributes:
        choice: The sampler; its `nfe` is unused.
        nfe: Numbers of network calls, one sampler each; 2 for a student and 34 for a teacher where neither they nor
            the choice's times are given.
        optimise: Whether to choose the times by the distance to the teacher's ends.
    """

    choice: SamplerChoice
    nfe: Sequence[int] | None = None
    optimise: bool = False


def requested_samplers(
    request: Request, denoiser: Denoiser, preconditioning: Preconditioning | None
) -> dict[str, TimedSampler]:
    """Builds the samplers of a student, or of a teacher where there is no preconditioning.

    Returns:
        Title -> sampler; "nfe2" or "teacher" for the default one, with what is not the default behind it.

    Raises:
        RecipeError: As `make_sampler`.
    """
    choice = request.choice
    usual = choice.times is None and preconditioning is not None
    calls: Sequence[int | None] = request.nfe or [DEFAULT_NFE if usual else None]
    built = [replace(choice, nfe=k).build(denoiser, preconditioning) for k in calls]
    return {_title(request, sampler, default_sampler(preconditioning)): sampler for sampler in built}


def optimised_samplers(
    choice: SamplerChoice,
    student: tuple[Denoiser, Preconditioning],
    teacher: Teacher,
    samplers: Mapping[str, TimedSampler],
    accelerator: Accelerator,
) -> dict[str, TimedSampler]:
    """Moves the times of a student's samplers to where they end nearest to the teacher, and says what it gained.

    Args:
        choice: How the samplers were made.
        student: Whose they are, D(x, t, s), and f and g.
        teacher: Where they should end.
        samplers: Title -> sampler on the rho-grid.
        accelerator: Shares the sampling among its processes.

    Returns:
        Title -> sampler; one whose gain is not confirmed on held-out seeds stays as it was.

    Raises:
        RecipeError: As `optimise_times`; or the choice has times of its own.
    """
    if choice.times is not None:
        raise RecipeError("--optimise-steps: chooses the times itself, from the rho-grid on; leave --times out")
    for network in (student[0], teacher.denoiser):
        network.to(accelerator.device)
    alignment = Alignment(
        teacher_sampler(teacher.denoiser), teacher.shape, teacher.denoiser.num_classes, accelerator.device, accelerator
    )

    def build(times: Tensor) -> TimedSampler:
        return make_sampler(*student, choice.name, times=times, gamma=choice.gamma)

    chosen = {}
    for title, sampler in samplers.items():
        if sampler.nfe == 1 and len(samplers) > 1:
            say("1 NFE: there is no time between T and eps to choose")
            chosen[title] = sampler
            continue
        found = optimise_times(build, sampler.times, alignment)
        say(describe(found))
        chosen[f"{title}-optimised" if found.confirmed else title] = build(found.times)
    return chosen


def describe(found: OptimisedTimes) -> str:
    """Returns what came out in a line: times, gain on the held-out seeds, cost, how to use it again."""
    times = ",".join(f"{time:.10g}" for time in found.candidate.tolist())
    gain = compact(found.before - found.after, found.error)
    measured = (
        f"MSE to the teacher on {len(HELD_OUT)} held-out seeds {found.before:.4g} on the rho-grid, {found.after:.4g} "
        f"with {times}: gain {gain}"
    )
    verdict = f"use it again with --times {times}" if found.confirmed else "not distinguishable; keeps the rho-grid"
    return f"{len(found.grid) - 1} NFE: {measured}; {verdict}   ({found.calls:,} network calls)"


def _title(request: Request, sampler: TimedSampler, default: str) -> str:
    choice = request.choice
    name = None if choice.name == default else choice.name
    parts = [name, None if choice.gamma is None else f"{choice.gamma:g}", choice.times and "times"]
    usual = sampler.draws_from == "teacher" and request.nfe is None and not any(parts)
    calls = None if usual else f"nfe{sampler.nfe}"
    front = ["teacher", calls] if sampler.draws_from == "teacher" else [calls]
    return "-".join(str(part) for part in [*front, *parts] if part)
