"""Drawing samples: one generator per image seed, whole chunks for the network.

The network always runs on whole chunks aligned to the seed (see `chunk_size`), so an image depends on its seed
alone: not on the batch, not on the other seeds, not on the number of processes. States are float64; nothing is
clamped but the final picture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill import stopping
from cdistill.networks.denoiser import chunk_size
from cdistill.schedule import T

Noise = Callable[[], Tensor]
"""Draws fresh normal noise for every sample of a chunk from its own generator."""

Sampler = Callable[[Tensor, Tensor | None, Noise], Tensor]
"""Maps points at noise level T, labels and a source of noise to points at eps."""


@dataclass(frozen=True)
class Chunk:
    """What a network sees at once: the noise and the labels of consecutive seeds.

    Attributes:
        rows: Positions (r,) in the list of wanted seeds.
        places: Where those seeds are in the chunk (r,).
        x: Points at noise level T, (size, ...), float64 on the CPU.
        labels: Classes (size,), int64 on the CPU, or None.
        draws: The generator of each seed, from which its noise and label have been drawn.
        mine: Whether the chunk falls to this process.
    """

    rows: Tensor
    places: Tensor
    x: Tensor
    labels: Tensor | None
    draws: list[torch.Generator]
    mine: bool

    def noise(self, device: torch.device | str) -> Noise:
        """Returns the source of more noise, (size, ...), float64."""
        shape = self.x.shape[1:]
        return lambda: torch.stack([torch.randn(shape, generator=draw) for draw in self.draws]).double().to(device)


def draw_chunks(
    shape: tuple[int, ...],
    seeds: Sequence[int],
    num_classes: int = 0,
    classes: Sequence[int] | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Chunk]:
    """Draws noise and labels as EDM does, latent first, label second, in whole chunks aligned to the seed.

    Args:
        shape: Shape of one sample.
        seeds: Non-negative integers, in any order.
        num_classes: Number of classes, 0 when unconditional.
        classes: The class of each seed, in place of the drawn one.
        accelerator: Its processes take turns at the chunks.

    Yields:
        Every chunk with a wanted seed in it, also those of the other processes.
    """
    size = chunk_size(shape)
    wanted = torch.tensor(seeds, dtype=torch.int64)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for number, chunk in enumerate(torch.unique(wanted // size)):
        rows = (wanted // size == chunk).nonzero()[:, 0]
        places = wanted[rows] % size
        draws = [torch.Generator().manual_seed(int(chunk) * size + k) for k in range(size)]
        x = torch.stack([torch.randn(shape, generator=draw) for draw in draws]).double() * T
        labels = None
        if num_classes:
            labels = torch.stack([torch.randint(num_classes, (), generator=draw) for draw in draws])
            if classes is not None:
                labels[places] = torch.tensor(classes)[rows]
        yield Chunk(rows, places, x, labels, draws, number % world == rank)


def generate(
    sampler: Sampler,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    num_classes: int = 0,
    classes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int, str], None] = lambda count, note: None,
    accelerator: Accelerator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draws one sample for each seed, see `draw_chunks`.

    Args:
        sampler: What maps noise to samples.
        shape: Shape of one sample.
        seeds: Non-negative integers; a seed's sample is the same in every list.
        num_classes: Number of classes, 0 when unconditional.
        classes: The class of each sample, in place of the drawn one.
        device: Where the network is.
        advance: Told the number of finished samples.
        accelerator: Shares whole chunks among its processes; every process returns everything.

    Returns:
        Samples (n, ...), float64 on the CPU; labels (n,) or None.

    Raises:
        StoppedError: A signal came.
    """
    samples = torch.zeros(len(seeds), *shape, dtype=torch.float64)
    labels = torch.zeros(len(seeds), dtype=torch.int64) if num_classes else None
    world = accelerator.num_processes if accelerator else 1
    for chunk in draw_chunks(shape, seeds, num_classes, classes, accelerator):
        stopping.check("sampling")
        if labels is not None and chunk.labels is not None:
            labels[chunk.rows] = chunk.labels[chunk.places]
        if chunk.mine:
            drawn = None if chunk.labels is None else chunk.labels.to(device)
            with torch.inference_mode():
                found = sampler(chunk.x.to(device), drawn, chunk.noise(device))
            samples[chunk.rows] = found.cpu()[chunk.places]
            advance(len(chunk.rows) * world, "")
    if accelerator and world > 1:
        samples = accelerator.reduce(samples.to(accelerator.device), "sum").cpu()
    return samples, labels
