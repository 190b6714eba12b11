"""Times between T and eps at which a few-step student ends nearest to its teacher."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.runtime.console import progress
from cdistill.sampling.base import TimedSampler
from cdistill.sampling.drawing import Sampler, generate

FITTING = range(2**31, 2**31 + 512)
HELD_OUT = range(2**31 + 2**20, 2**31 + 2**20 + 1024)  # both far from the seeds that people draw and evaluate
SCANNED, REFINED, ROUNDS = 8, 8, 2
DISTINGUISHABLE = 1.96  # standard errors
_MARGIN = 0.02  # of the way between its neighbours that a time keeps from each

Loss = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class OptimisedTimes:
    """What the search found, and what it is worth on seeds that it has not seen.

    Attributes:
        grid: Times that it started from (k+1,), float64.
        candidate: Those that end nearest to the teacher on the fitting seeds.
        before: Mean square distance to the teacher's ends on the held-out seeds, an element, with `grid`.
        after: The same with `candidate`.
        error: Standard error of ``before - after``, paired by seed.
        calls: Network calls that all this took, counted for each image, the teacher's included.
    """

    grid: Tensor
    candidate: Tensor
    before: float
    after: float
    error: float
    calls: int

    @property
    def confirmed(self) -> bool:
        """Whether `candidate` is nearer to the teacher on the held-out seeds, by more than 1.96 standard errors."""
        return self.before - self.after > DISTINGUISHABLE * self.error

    @property
    def times(self) -> Tensor:
        """The times to use: `candidate` where its gain is confirmed, else `grid`."""
        return self.candidate if self.confirmed else self.grid


class Alignment:
    """Distances of samplers to the teacher's ends from the same noise.

    Args:
        teacher: Its sampler.
        shape: Of one sample.
        num_classes: Number of classes, 0 when unconditional.
        device: Where the networks are.
        accelerator: Shares whole chunks among its processes; every process gets every distance.

    Attributes:
        calls: Network calls so far, counted for each image.
    """

    def __init__(
        self,
        teacher: TimedSampler,
        shape: tuple[int, ...],
        num_classes: int = 0,
        device: torch.device | str = "cpu",
        accelerator: Accelerator | None = None,
    ) -> None:
        self.teacher, self.shape, self.num_classes = teacher, shape, num_classes
        self.device, self.accelerator = device, accelerator
        self.calls = 0
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def distances(self, sampler: TimedSampler, seeds: Sequence[int]) -> Tensor:
        """Returns the mean square distance to the teacher's end for each of `seeds`, (n,) float64."""
        key = tuple(seeds)
        if key not in self._ends:
            self._ends[key] = self._draw(self.teacher, seeds, f"teacher's ends, {len(seeds)} seeds")
        return (self._draw(sampler, seeds) - self._ends[key]).square().flatten(1).mean(1)

    def _draw(self, sampler: TimedSampler, seeds: Sequence[int], title: str = "") -> Tensor:
        self.calls += sampler.nfe * len(seeds)
        if not title:
            return self._generate(sampler, seeds)
        with progress(len(seeds), title, "img") as advance:
            return self._generate(sampler, seeds, advance)

    def _generate(
        self, sampler: Sampler, seeds: Sequence[int], advance: Callable[[int, str], None] = lambda count, note: None
    ) -> Tensor:
        return generate(
            sampler, self.shape, seeds, self.num_classes,
            device=self.device, advance=advance, accelerator=self.accelerator,
        )[0]  # fmt: skip


def optimise_times(
    build: Callable[[Tensor], TimedSampler],
    grid: Tensor,
    alignment: Alignment,
    fitting: Sequence[int] = FITTING,
    held_out: Sequence[int] = HELD_OUT,
) -> OptimisedTimes:
    """Moves the times between T and eps, one after the other, to where the ends are nearest to the teacher's.

    For each time, 8 values between its neighbours are tried, uniform in log t, then up to 8 around the best of them by
    Brent's bounded method; where there are several times, twice over. With n fitting seeds that is at most
    ``n k (1 + 16 r (k-1))`` network calls, r = 1 for k = 2 and 2 otherwise; besides 2k calls for each held-out seed
    and the teacher's for each seed. The values have four digits, so that they can be typed again. Deterministic.

    It makes the distance to the teacher small and nothing else: the Frechet distance may get worse meanwhile.

    Args:
        build: Makes the sampler of a list of times.
        grid: Times to start from (k+1,), float64, k >= 2.
        alignment: Measures the distances.
        fitting: Seeds that the search looks at.
        held_out: Other seeds, on which its result is judged.

    Raises:
        RecipeError: There is no time in between; the sampler draws fresh noise, so that it should not end where the
            teacher does; or a seed is in both sets.
        StoppedError: A signal came.
    """
    _check(build(grid), grid, fitting, held_out)
    start = alignment.calls
    candidate = _search(lambda times: _finite(alignment.distances(build(_levels(times)), fitting)), grid)
    before, after = (alignment.distances(build(times), held_out) for times in (grid, candidate))
    error = float((before - after).std() / math.sqrt(len(held_out)))
    calls = alignment.calls - start
    return OptimisedTimes(grid, candidate, float(before.mean()), float(after.mean()), error, calls)


def _check(sampler: TimedSampler, grid: Tensor, fitting: Sequence[int], held_out: Sequence[int]) -> None:
    if len(grid) < 3:
        raise RecipeError("optimise-steps: got 1 network call; needs 2 or more, for a time between T and eps to choose")
    if sampler.fresh_noise:
        name = type(sampler).__name__
        raise RecipeError(
            f"optimise-steps: got {name}, whose fresh noise leads away from the teacher's ends; use 'ctm'"
        )
    if set(fitting) & set(held_out):
        raise RecipeError("optimise-steps: a seed is in both sets; the gain must be judged on others")


def _finite(distances: Tensor) -> float:
    mean = float(distances.mean())
    return mean if math.isfinite(mean) else math.inf


def _search(loss: Loss, grid: Tensor) -> Tensor:
    """Returns the best times found by coordinate-wise search; see `optimise_times`."""
    times = grid.tolist()
    rounds = ROUNDS if len(times) > 3 else 1
    trials = 1 + rounds * (len(times) - 2) * (SCANNED + REFINED)
    with progress(trials, f"optimising the times of {len(times) - 1} calls", "trial") as advance:
        left = trials

        def tried(candidate: Sequence[float]) -> float:
            nonlocal left
            left -= 1
            value = loss(candidate)
            advance(1, f"{value:.4g}")
            return value

        best = tried(times)
        for _ in range(rounds):
            for k in range(1, len(times) - 1):
                times, best = _move(tried, times, k, best)
        if left:
            advance(left, f"{best:.4g}")
    return _levels(times)


def _levels(times: Sequence[float]) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def _move(loss: Loss, times: list[float], k: int, best: float) -> tuple[list[float], float]:
    """Returns the times with the k-th at its best place between its neighbours, and their loss."""
    from scipy.optimize import minimize_scalar

    def placed(place: float) -> list[float]:
        return [*times[:k], float(f"{math.exp(place):.4g}"), *times[k + 1 :]]

    upper, lower = math.log(times[k - 1]), math.log(times[k + 1])
    margin = _MARGIN * (upper - lower)
    lower, upper = lower + margin, upper - margin
    here = math.log(times[k])
    scanned = [lower + (upper - lower) * (2 * i + 1) / (2 * SCANNED) for i in range(SCANNED)]
    losses = {here: best, **{place: loss(placed(place)) for place in scanned}}
    centre = min(losses, key=lambda place: losses[place])
    bounds = max([lower, *(p for p in losses if p < centre)]), min([upper, *(p for p in losses if p > centre)])
    refined = minimize_scalar(
        lambda place: loss(placed(float(place))), bounds=bounds, method="bounded", options={"maxiter": REFINED}
    )
    losses[float(refined.x)] = min(float(refined.fun), losses.get(float(refined.x), math.inf))
    place = min(losses, key=lambda place: losses[place])
    return (times, best) if losses[place] >= best else (placed(place), losses[place])
