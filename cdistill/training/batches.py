"""The data of one step: drawn for all processes together, read by each for its own part."""

from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.randomness import generator, shuffled_indices

Parts = TypeVar("Parts", bound=tuple[Tensor | None, ...])


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
        x_0 (rows, ...) and labels (rows,) or None, on the CPU.
    """
    order = shuffled_indices(len(source), seed, index * size, size)[rows]
    flip = (torch.rand(size, generator=generator(seed, "flips", index)) < 0.5)[rows] if flips else None
    batch = source.batch(order, flip)
    if source.lazy:
        source.prefetch(shuffled_indices(len(source), seed, (index + 1) * size, size)[rows])
    return batch


def draw_noise(x: Tensor, draw: torch.Generator, size: int, rows: slice) -> Tensor:
    """Draws standard normal noise for a global batch of `size`, and returns the part `rows` for the samples `x`."""
    return torch.randn(size, *x.shape[1:], generator=draw, dtype=x.dtype)[rows]


def own_rows(accelerator: Accelerator, size: int) -> slice:
    """Returns this process's contiguous part of a global batch of `size` samples."""
    part = size // accelerator.num_processes
    return slice(part * accelerator.process_index, part * (accelerator.process_index + 1))


def on_device(accelerator: Accelerator, tensors: Parts) -> Parts:
    """Moves a process's part of a batch to its device."""
    return tuple(None if tensor is None else tensor.to(accelerator.device) for tensor in tensors)  # type: ignore[return-value]


def check_divisible(batch_size: int, processes: int, accumulation: int) -> None:
    """Raises RecipeError unless the global batch divides evenly into processes and micro-batches."""
    if batch_size % (processes * accumulation):
        raise RecipeError(
            f"training.batch_size: {batch_size} images cannot be divided among {processes} processes with "
            f"{accumulation} micro-batches each; make it a multiple of {processes * accumulation}"
        )
