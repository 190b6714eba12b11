"""The data of one step, drawn for all processes together; each takes its own part."""

from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.randomness import generator, shuffled_indices

Parts = TypeVar("Parts", bound=tuple[Tensor | None, ...])


def draw_data(source: Source, seed: int, index: int, size: int, flips: bool) -> tuple[Tensor, Tensor | None]:
    """Draws the global batch of step `index`, and lets the next one be read while this one is computed with.

    Returns:
        x_0 (size, ...) and labels (size,) or None, on the CPU.
    """
    order = shuffled_indices(len(source), seed, index * size, size)
    flip = torch.rand(size, generator=generator(seed, "flips", index)) < 0.5 if flips else None
    batch = source.batch(order, flip)
    if source.lazy:
        source.prefetch(shuffled_indices(len(source), seed, (index + 1) * size, size))
    return batch


def normal_like(x: Tensor, draw: torch.Generator) -> Tensor:
    """Returns standard normal noise like `x`."""
    return torch.randn(x.shape, generator=draw, dtype=x.dtype)


def own_part(accelerator: Accelerator, tensors: Parts) -> Parts:
    """Cuts this process's contiguous part out of tensors (B, ...) of the global batch and moves it to the device."""
    count, rank = accelerator.num_processes, accelerator.process_index
    return tuple(  # type: ignore[return-value]
        None if tensor is None else tensor.chunk(count)[rank].to(accelerator.device) for tensor in tensors
    )


def check_divisible(batch_size: int, processes: int, accumulation: int) -> None:
    """Raises RecipeError unless the global batch divides evenly into processes and micro-batches."""
    if batch_size % (processes * accumulation):
        raise RecipeError(
            f"training.batch_size: {batch_size} images cannot be divided among {processes} processes with "
            f"{accumulation} micro-batches each; make it a multiple of {processes * accumulation}"
        )
