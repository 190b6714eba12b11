"""Collecting an estimator's statistics: in rounds, by several processes, and on after an interruption.

Every sample n keeps its x_0 and z at all noise levels, so that the noise of l and S is smooth in t. Points are drawn in
blocks of a fixed size aligned to n, and on a CPU the network sees one block at a time: the result does not depend on
batch sizes or processes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.estimation.base import Estimator, Points, Statistics
from cdistill.estimation.jackknife import coefficient_errors
from cdistill.estimation.resume import Part, Position
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.runtime import signals as stopping
from cdistill.runtime.randomness import generator, shuffled_indices

GROUPS = 32
_FIRST_ROUND = 256  # samples before the first look at the errors: 4 pairs or more in each group
_GROWTH = 1.5  # of the samples from round to round: at most half as many again as were needed
_CUDA_BLOCKS = 8  # blocks in a call on a GPU, which 16 images would leave idle
# Below it the two points of a pair lie within a few roundings of each other. Measured on the embedded teachers, fp16
# moves l by at most 3e-4 above it (bf16 by 3e-3, and by 0.05 at t = 0.002) and s by 5e-3 at t = 0.002.
_HALF_FROM = 0.01

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Budget:
    """How many samples, and how.

    Attributes:
        samples: N at each noise level, even; the most of them with a target.
        seed: Of the order of the data, z and the probes.
        target_error: A noise level is done when the standard errors of l and s are no larger; None for all samples.
        paired: Whether to draw pairs x_0 + t z, x_0 - t z for an estimator that does not need them, too.
        precision: "fp32"; "fp16" at noise levels of 0.01 or more; "auto": fp16 where a GPU runs forward passes alone.
    """

    samples: int
    seed: int = 0
    target_error: float | None = None
    paired: bool = False
    precision: str = "auto"


def collect_statistics(
    estimator: Estimator,
    denoiser: Denoiser,
    source: Source,
    t: Tensor,
    budget: Budget,
    advance: Advance = lambda count, note: None,
    accelerator: Accelerator | None = None,
    part: Part | None = None,
) -> Statistics:
    """Sums an estimator's scalars over samples x_0 + t z of the data at every noise level.

    Args:
        estimator: Which scalars.
        denoiser: The teacher.
        source: x_0 and labels, walked through in a shuffled order, again and again if need be.
        t: Noise levels (n,), float64, descending.
        budget: How many samples.
        advance: Told the number of finished (sample, timestep) pairs.
        accelerator: Shares whole chunks among its processes; the sums are those of one to float64 rounding.
        part: Where unfinished work is kept, and goes on from.

    Raises:
        RecipeError: The budget's precision does not suit the estimator.
        StoppedError: A signal came; `part` holds all that was done.
        CdistillError: The teacher's outputs are not finite.
    """
    work = _Collection(estimator, denoiser, source, t, budget, advance, accelerator, part or Part(None, {}))
    position = work.start()
    for end in round_ends(budget)[len(position.ends) :]:
        if not position.active():
            break
        work.run_round(position, end)
        total = work.add_up(position)
        position.close_round(total, end)
        if budget.target_error is not None:
            work.stop_precise_levels(position, budget.target_error)
        work.part.save(position)
    return work.statistics(position)


def round_ends(budget: Budget) -> list[int]:
    """Returns the samples after each round: all at once, or growing by half while a target is not reached."""
    ends = [budget.samples]
    if budget.target_error is not None:
        ends = [min(_FIRST_ROUND, budget.samples)]
        while ends[-1] < budget.samples:
            ends.append(min(budget.samples, int(ends[-1] * _GROWTH) // 64 * 64))
    return ends


def is_fast(estimator: Estimator, device: torch.device) -> bool:
    """Whether forward passes alone run on a GPU: compiled, several blocks at once, in half precision unless told."""
    return device.type == "cuda" and not estimator.backwards


def network_precision(estimator: Estimator, precision: str, device: torch.device) -> str:
    """Returns the precision that the teacher runs in, where the noise is not too small for it.

    Raises:
        RecipeError: Half precision for an estimator with backward passes, which would underflow.
    """
    if precision == "auto":
        return "fp16" if is_fast(estimator, device) else "fp32"
    if precision != "fp32" and estimator.backwards:
        raise RecipeError(f"precision: got {precision}; backward passes underflow in it: fp32, or estimator forward")
    return precision


class _Collection:
    """What the rounds share; arguments as `collect_statistics`."""

    def __init__(
        self,
        estimator: Estimator,
        denoiser: Denoiser,
        source: Source,
        t: Tensor,
        budget: Budget,
        advance: Advance,
        accelerator: Accelerator | None,
        part: Part,
    ) -> None:
        self.estimator, self.source, self.t, self.budget = estimator, source, t, budget
        self.advance, self.accelerator, self.part = advance, accelerator, part
        self.device = next(iter(denoiser.state_dict().values())).device
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.precision = network_precision(estimator, budget.precision, self.device)
        self.paired = budget.paired or estimator.paired
        self.groups = min(GROUPS, budget.samples // (2 if self.paired else 1))
        self.block = chunk_size(source.shape)
        fast = is_fast(estimator, self.device)
        self.chunk = self.block * (_CUDA_BLOCKS if fast else 1)
        self.denoiser = cast(Denoiser, torch.compile(denoiser, dynamic=False)) if fast else denoiser
        self.stopped = False

    def start(self) -> Position:
        """Returns where all processes go on together."""
        position = self.part.load() or Position.fresh(self.groups, len(self.t), len(self.estimator.scalars))
        if self.accelerator and self.world > 1:
            rounds = self.accelerator.gather(torch.tensor([len(position.ends)], device=self.device))
            position.back_to(int(rounds.min()))
        return position

    def run_round(self, position: Position, end: int) -> None:
        """Adds this process's chunks of a round, up to sample `end`, to ``position.current``."""
        first = position.ends[-1] if position.ends else 0
        active = position.active()
        current = position.current.to(self.device)
        position.current = current
        starts = range(first + self.rank * self.chunk, end, self.world * self.chunk)
        for start in starts[position.chunk :]:
            count = min(self.chunk, end - start)
            points, owners = self.draw(start, count)
            for level in active[position.level :]:
                if stopping.requested():
                    self.stopped = True
                    return self.part.save(position)
                self.part.save_sometimes(position)
                current[:, level] += owners @ self.measure(points, level)
                position.level += 1
                position.pairs += count
                self.advance(count * self.world, "")
            position.chunk, position.level = position.chunk + 1, 0
        return None

    def draw(self, start: int, count: int) -> tuple[Points, Tensor]:
        """Draws a chunk of points from `start` on, and says which groups its first `count` belong to.

        Returns:
            The points, and a matrix of zeros and ones (G, rows).
        """
        each = 2 if self.paired else 1
        x0, z, probes, labels = self._draw_units(start)
        if self.paired:
            x0, z = torch.cat([x0, x0]), torch.cat([z, -z])
            labels = None if labels is None else torch.cat([labels, labels])
        unit = start // each + torch.arange(self.chunk // each)
        counted = unit < (start + count) // each
        owners = (torch.arange(self.groups)[:, None] == unit % self.groups) & counted
        moved = None if labels is None else labels.to(self.device)
        points = Points(x0.to(self.device), z.to(self.device), probes.to(self.device), moved)
        return points, owners.double().to(self.device)

    def _draw_units(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draws x_0, z, probes and labels of the points of a chunk, or of its pairs; probes for every point."""
        x0, labels = self.source.batch(self._rows(start))
        each = 2 if self.paired else 1
        noise, probes = [], []
        for first in range(start, start + self.chunk, self.block):
            shape = self.block // each, *self.source.shape
            draw = generator(self.budget.seed, "estimation", first)
            noise.append(torch.randn(shape, generator=draw, dtype=x0.dtype))
            probes.append(torch.randint(0, 2, (each, *shape), generator=draw).to(x0.dtype) * 2 - 1)
        return x0, torch.cat(noise), torch.cat(probes, dim=1).flatten(0, 1), labels

    def _rows(self, start: int) -> Tensor:
        """Positions in the data of the points of a chunk, or of its pairs."""
        each = 2 if self.paired else 1
        return shuffled_indices(len(self.source), self.budget.seed, start // each, self.chunk // each)

    def measure(self, points: Points, level: int) -> Tensor:
        """Computes the scalars of a chunk at one noise level, a row for each point or pair."""
        t = self.t[level].expand(len(points.x0)).to(self.device)
        with self._autocast(level):
            rows = self.estimator.measure(self.denoiser, points, t)
        if self.paired and not self.estimator.paired:
            rows = (rows[: len(t) // 2] + rows[len(t) // 2 :]) / 2
        return rows

    def add_up(self, position: Position) -> Tensor:
        """Returns the sums of a round over all processes (G, n, k).

        Raises:
            StoppedError: A process was stopped.
            CdistillError: The sums are not finite.
        """
        stopped = self.stopped
        total = position.current.cpu()
        if self.accelerator and self.world > 1:
            self.part.save(position)  # whoever waits for a process that is killed keeps its own work
            told = torch.cat([total.flatten(), torch.tensor([float(stopped)], dtype=torch.float64)])
            told = self.accelerator.reduce(told.to(self.device), "sum").cpu()
            total, stopped = told[:-1].reshape(total.shape), bool(told[-1])
        if stopped:
            stopping.check("estimation")
            raise StoppedError("estimation: another process was stopped; run the same command to resume", 75)
        if not bool(total.isfinite().all()):
            raise CdistillError(f"estimation: the teacher's outputs are not finite in {self.precision}; try fp32")
        return total

    def stop_precise_levels(self, position: Position, target: float) -> None:
        """Stops the noise levels at which the standard errors of l and s are at most `target`.

        A level's slope hangs on its neighbours too: it goes on with one of them that is not precise enough yet.
        """
        l_error, s_error = coefficient_errors(self.estimator, self.statistics(position))
        loose = ~(torch.maximum(l_error, s_error) <= target) & (position.stops < 0)
        needed = loose.clone()
        needed[1:] |= loose[:-1]
        needed[:-1] |= loose[1:]
        done = (position.stops < 0) & ~needed
        position.stops = torch.where(done, len(position.ends) - 1, position.stops)
        self.advance(int(done.sum()) * (self.budget.samples - position.ends[-1]), "")

    def statistics(self, position: Position) -> Statistics:
        """Returns the statistics of all finished rounds."""
        each = 2 if self.paired else 1
        bounds = torch.tensor([0, *position.ends]) // each
        upto = (bounds[:, None] - torch.arange(self.groups) + self.groups - 1) // self.groups
        stops = torch.where(position.stops < 0, len(position.ends) - 1, position.stops)
        samples = torch.tensor(position.ends)[stops]
        dim = torch.Size(self.source.shape).numel()
        return Statistics(self.t, dim, position.sums, upto.diff(dim=0).double(), stops, samples)

    def _autocast(self, level: int) -> AbstractContextManager[None]:
        if self.precision == "fp32" or float(self.t[level]) < _HALF_FROM:
            return nullcontext()
        return torch.autocast(self.device.type, torch.float16)
