"""The data and the random numbers of one step: drawn for all processes together, taken by each for its own part.

Everything is a pure function of (seed, step, global sample index), so that nothing has to be saved to resume and no
draw depends on the number of processes or micro-batches; except for dropout masks, which do.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import broadcast
from cdistill.objectives.base import AnyObjectiveSection, Batch, Objective
from cdistill.objectives.dsm import draw_dsm_sigma
from cdistill.preconditionings.base import Preconditioning
from cdistill.runtime.devices import send
from cdistill.runtime.randomness import derive_seed, generator, shuffled_indices
from cdistill.sampling.trajectories import TrajectoryStore
from cdistill.schedule import EPS
from cdistill.training.settings import TrainingSection

_BLOCK = 16  # samples whose noise one generator draws

FAndG = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""f and g at noise levels t and s, float64 on the CPU."""


def tabulate(preconditioning: Preconditioning, grid: Tensor | None) -> FAndG:
    """Returns f and g as a function of noise levels; if those come from a grid, all pairs are computed once, here.

    Args:
        preconditioning: f and g.
        grid: float64 (N,), descending; None for levels from anywhere.
    """
    if grid is None:
        return preconditioning
    t, s = torch.meshgrid(grid, grid, indexing="ij")
    allowed = (s <= t) & ((s == grid[-1]) | (s == t) | (not preconditioning.to_eps_only))
    tables = [torch.full_like(t, torch.nan) for _ in range(2)]
    for table, values in zip(tables, preconditioning(t[allowed], s[allowed]), strict=True):
        table[allowed] = values
    ascending = grid.flip(0)

    def look_up(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        i, j = (len(grid) - 1 - torch.searchsorted(ascending, level.contiguous()) for level in (t, s))
        return tables[0][i, j], tables[1][i, j]

    return look_up


def draw_noise(seed: int, purpose: str, index: int, rows: slice, like: Tensor) -> Tensor:
    """Draws the standard normal noise of the samples `rows` of the global batch of step `index`.

    Args:
        seed: Seed of the run.
        purpose: What the noise is for.
        index: Number of the step.
        rows: Global numbers of the samples, without a step.
        like: One tensor of such samples (B, ...): its shape after B and its type are used.

    Returns:
        (rows, ...), on the CPU.
    """
    first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
    shape, dtype = (_BLOCK, *like.shape[1:]), like.dtype
    blocks = [torch.randn(shape, generator=generator(seed, purpose, index, k), dtype=dtype) for k in range(first, last)]
    return torch.cat(blocks)[rows.start - first * _BLOCK : rows.stop - first * _BLOCK]


def draw_data(
    source: Source, seed: int, index: int, size: int, flips: bool, rows: slice = slice(None)
) -> tuple[Tensor, Tensor | None]:
    """Draws this process's samples of the global batch of step `index`.

    Args:
        source: The data.
        seed: Seed of the run.
        index: Number of the step.
        size: Samples of the global batch.
        flips: Whether half of the images are mirrored.
        rows: Which of them this process needs; the others are drawn, but not read.

    Returns:
        x_0 (rows, ...) and labels (rows,) or None, where the source has its samples.
    """
    order = shuffled_indices(len(source), seed, index * size, size)[rows]
    flip = (torch.rand(size, generator=generator(seed, "flips", index)) < 0.5)[rows] if flips else None
    return source.batch(order, flip)


def draw_batches(
    objective: Objective[AnyObjectiveSection],
    f_and_g: FAndG,
    source: Source,
    store: TrajectoryStore | None,
    section: TrainingSection,
    seed: int,
    index: int,
    rows: slice,
    device: torch.device,
) -> list[Batch]:
    """Draws noise levels, data and noise of step `index`; puts this process's part on the device, in micro-batches.

    Args:
        objective: Draws the noise levels, and says between which of them there are jumps.
        f_and_g: f and g at pairs of noise levels.
        source: The data.
        store: Trajectories of the teacher, for an objective that reads them.
        section: Batch size, flips and number of micro-batches, all of the same size.
        seed: Seed of the draws.
        index: Number of the step.
        rows: This process's samples.
        device: Where to.
    """
    size, draw = section.batch_size, generator(seed, objective.section.name, index)
    levels = {**objective.draw(size, draw, index), "eps": torch.full((size,), EPS, dtype=torch.float64)}
    levels = {name: level[rows] for name, level in levels.items()}
    sigma = draw_dsm_sigma(size, draw)[rows] if objective.section.dsm else None
    x0, x0_labels = draw_data(source, seed, index, size, section.flips, rows)
    z = send(draw_noise(seed, "dsm", index, rows, x0), device) if sigma is not None else None
    points: dict[str, Tensor] = {}
    if objective.stored:
        assert store is not None
        names = ("t", *objective.stored)
        points, labels = draw_points(store, seed, index, size, rows, {name: levels[name] for name in names})
        points = {name: send(point.to(x0.dtype), device) for name, point in points.items()}
        x0, x_t = send(x0, device), points.pop("t")
    else:
        noise = send(draw_noise(seed, "x_t", index, rows, x0), device)
        x0, labels = send(x0, device), x0_labels
        x_t = x0 + broadcast(send(levels["t"], device), x0) * noise
    batches = []
    for samples in torch.arange(len(x0)).chunk(section.accumulation):
        few = slice(int(samples[0]), int(samples[-1]) + 1)
        own = {name: level[few] for name, level in levels.items()}
        pairs = (("t", "s"), *objective.jumps)
        coefficients = {pair: f_and_g(own[pair[0]], own[pair[1]]) for pair in pairs}
        moving = {(t, s): (own[t] != own[s]).nonzero()[:, 0] for t, s in objective.jumps}
        solving = [] if points or "path" not in own else [t != u for t, u in pairwise(own["path"].T)]
        batch = Batch(
            x0=x0[few],
            x0_labels=None if x0_labels is None else send(x0_labels[few], device),
            x_t=x_t[few],
            labels=None if labels is None else send(labels[few], device),
            levels={name: send(level, device) for name, level in own.items()},
            coefficients={pair: (send(f, device), send(g, device)) for pair, (f, g) in coefficients.items()},
            moving={pair: send(some, device) for pair, some in moving.items()},
            z=None if z is None else z[few],
            sigma=None if sigma is None else send(sigma[few], device),
            index=index,
            rows=slice(rows.start + few.start, rows.start + few.stop),
            seed=derive_seed(seed, "dropout", index, rows.start + few.start),
            solving=[None if bool(some.all()) else send(some.nonzero()[:, 0], device) for some in solving],
            points={name: point[few] for name, point in points.items()},
        )
        batches.append(batch)
    return batches


def draw_points(
    store: TrajectoryStore, seed: int, index: int, size: int, rows: slice, levels: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Draws this process's trajectories of the global batch of step `index`; each is read once an epoch.

    Args:
        store: The trajectories.
        seed: Seed of the run.
        index: Number of the step.
        size: Samples of the global batch.
        rows: Which of them this process needs.
        levels: Name -> noise level of each of these rows, (rows,), float64.

    Returns:
        Name -> points at these levels, (rows, ...), float32, and classes (rows,) or None, on the CPU.
    """
    which = shuffled_indices(len(store), derive_seed(seed, "trajectories"), index * size, size)[rows]
    points = {name: store.points(which, level) for name, level in levels.items()}
    if store.flips:
        flip = (torch.rand(size, generator=generator(seed, "flips of trajectories", index)) < 0.5)[rows]
        points = {name: torch.where(broadcast(flip, x).bool(), x.flip(-1), x) for name, x in points.items()}
    return points, store.labels(which)


def own_rows(accelerator: Accelerator, size: int) -> slice:
    """Returns this process's contiguous part of a global batch of `size` samples."""
    part = size // accelerator.num_processes
    return slice(part * accelerator.process_index, part * (accelerator.process_index + 1))


def check_divisible(batch_size: int, processes: int, accumulation: int) -> None:
    """Raises RecipeError unless the global batch divides evenly into processes and micro-batches."""
    if batch_size % (processes * accumulation):
        raise RecipeError(
            f"training.batch_size: {batch_size} images cannot be divided among {processes} processes with "
            f"{accumulation} micro-batches each; make it a multiple of {processes * accumulation}"
        )
