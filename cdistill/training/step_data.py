"""The data and the random numbers of one step: drawn for all processes together, taken by each for its own part.

Everything is a pure function of (seed, step, global sample index), so that nothing has to be saved to resume and no
draw depends on the number of processes or micro-batches.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import broadcast
from cdistill.runtime.randomness import derive_seed, generator, shuffled_indices
from cdistill.schedule import EPS, RHO, T

_BLOCK = 16  # samples whose noise one generator draws


@dataclass(frozen=True)
class Times:
    """The noise levels of a global batch, as drawn on the CPU.

    Attributes:
        start: Indices of t in the grid (B,).
        end: Indices of s in the grid (B,).
        sigma: Noise levels for DSM (B,), float64.
        h: Solver steps from t to u, the same for the whole batch.
    """

    start: Tensor
    end: Tensor
    sigma: Tensor
    h: int


@dataclass(frozen=True)
class Batch:
    """What a step needs of the samples of one micro-batch, on the device.

    Attributes:
        x0: Clean samples (B, ...).
        labels: Their classes (B,) or None.
        x_t: Samples at noise level t (B, ...).
        z: Fresh noise for DSM, like `x0`.
        sigma: Noise levels for DSM (B,), float64.
        start: Indices of t in the grid (B,).
        end: Indices of s in the grid (B,).
        inner: Which samples have s < u, (at most B,): the others need no jump from u to s.
        outer: Which samples have s > eps, (at most B,): the others need no jump from s to eps.
        h: Solver steps from t to u.
        index: Number of the step.
        rows: Where the samples are in the global batch, with start and stop.
        seed: Of the dropout masks.
    """

    x0: Tensor
    labels: Tensor | None
    x_t: Tensor
    z: Tensor
    sigma: Tensor
    start: Tensor
    end: Tensor
    inner: Tensor
    outer: Tensor
    h: int
    index: int
    rows: slice
    seed: int


def noisy(batch: Batch) -> Tensor:
    """Returns what DSM denoises, x_0 + sigma z, (B, ...)."""
    return batch.x0 + broadcast(batch.sigma, batch.x0) * batch.z


def draw_ctm_times(points: int, max_steps: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Draws CTM's times as indices of the grid: h ~ P(h) prop. to h on 1..M, i ~ U{0..N-1-h}, j ~ U{i+h..N-1}.

    Args:
        points: N.
        max_steps: M, at most N - 1.
        size: Samples.
        draw: Generator.

    Returns:
        i (size,), j (size,) and h, one for the whole step; t = tau_i, u = tau_{i+h}, s = tau_j.
    """
    h = 1 + int(torch.multinomial(torch.arange(1, max_steps + 1, dtype=torch.float64), 1, generator=draw))
    start = torch.randint(0, points - h, (size,), generator=draw)
    room = points - (start + h)  # how many places j has
    end = start + h + (torch.rand(size, generator=draw, dtype=torch.float64) * room).long()
    return start, end, h


def draw_dsm_sigma(size: int, draw: torch.Generator) -> Tensor:
    """Draws CTM's noise levels for DSM: every other one log-normal(-1.2, 1.2), else the rho-schedule at 0.7 U.

    Returns:
        float64 (size,).
    """
    lognormal = (-1.2 + 1.2 * torch.randn(size, generator=draw, dtype=torch.float64)).exp()
    place = 0.7 * torch.rand(size, generator=draw, dtype=torch.float64)
    schedule = (T ** (1 / RHO) + place * (EPS ** (1 / RHO) - T ** (1 / RHO))) ** RHO
    return torch.where(torch.arange(size) % 2 == 0, lognormal, schedule)


def draw_noise(seed: int, purpose: str, index: int, rows: slice, like: Tensor) -> Tensor:
    """Draws the standard normal noise of the samples `rows` of the global batch of step `index`.

    Args:
        seed: Seed of the run.
        purpose: What the noise is for.
        index: Number of the step.
        rows: Global numbers of the samples, without a step.
        like: One tensor of such samples (B, ...): its shape behind B and its type are used.

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
    """Draws the global batch of step `index`, and lets the next one be read while this one is computed with.

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
    source: Source, seed: int, index: int, size: int, flips: bool, times: Times, grid: Tensor, rows: slice, count: int
) -> list[Batch]:
    """Draws data and noise of step `index` and puts this process's part of it on the device, in micro-batches.

    Args:
        source: The data.
        seed: Seed of the run.
        index: Number of the step.
        size: Samples of the global batch.
        flips: Whether half of the images are mirrored.
        times: Noise levels of the global batch.
        grid: tau (N,), float64, on the device.
        rows: This process's samples.
        count: Number of micro-batches, all of the same size.
    """
    x0, labels = draw_data(source, seed, index, size, flips, rows)
    noise, z = (draw_noise(seed, purpose, index, rows, x0) for purpose in ("x_t", "dsm"))
    start, end, sigma = times.start[rows], times.end[rows], times.sigma[rows]
    device = grid.device
    x0, noise, z = (send(part, device) for part in (x0, noise, z))
    x_t = x0 + broadcast(grid[send(start, device)], x0) * noise
    batches = []
    for part in torch.arange(len(x0)).chunk(count):
        few = slice(int(part[0]), int(part[-1]) + 1)
        inner = (end[few] != start[few] + times.h).nonzero()[:, 0]
        outer = (end[few] != len(grid) - 1).nonzero()[:, 0]
        own = Batch(
            x0=x0[few],
            labels=None if labels is None else send(labels[few], device),
            x_t=x_t[few],
            z=z[few],
            sigma=send(sigma[few], device),
            start=send(start[few], device),
            end=send(end[few], device),
            inner=send(inner, device),
            outer=send(outer, device),
            h=times.h,
            index=index,
            rows=slice(rows.start + few.start, rows.start + few.stop),
            seed=derive_seed(seed, "dropout", index, rows.start + few.start),
        )
        batches.append(own)
    return batches


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to the device without waiting for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
