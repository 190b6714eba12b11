"""Drawing samples: one generator per image seed, whole chunks for the network.

On a CPU the network always runs on one whole chunk aligned to the seed (see `chunk_size`), so an image depends on its
seed alone: not on the batch, not on the other seeds, not on the number of processes. A GPU would idle with so few
images: there one call holds several chunks, and the last bits may depend on how many. States are float64; nothing is
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

CUDA_BATCH = 256  # images that a network call holds on a GPU, where nobody says


@dataclass(frozen=True)
class Chunk:
    """What a network sees at once: the noise and the labels of whole chunks of consecutive seeds.

    Attributes:
        rows: Positions (r,) in the list of wanted seeds.
        places: Where those seeds are in the chunk (r,).
        x: Points at noise level T, (size, ...), float64 on the CPU.
        labels: Classes (size,), int64 on the CPU, or None.
        draws: The generator of each seed, from which its noise and label have been drawn.
        turn: Wanted seeds that all processes together draw while this one draws the chunk.
    """

    rows: Tensor
    places: Tensor
    x: Tensor
    labels: Tensor | None
    draws: list[torch.Generator]
    turn: int

    def noise(self, device: torch.device | str) -> Noise:
        """Returns the source of more noise, (size, ...), float64."""
        shape = self.x.shape[1:]
        return lambda: torch.stack([torch.randn(shape, generator=draw) for draw in self.draws]).double().to(device)


@dataclass(frozen=True)
class Drawn:
    """Finished samples.

    Attributes:
        rows: Positions (r,) in the list of wanted seeds.
        samples: (r, ...), float64 on the CPU.
        labels: The class of each (r,), int64 on the CPU, or None.
    """

    rows: Tensor
    samples: Tensor
    labels: Tensor | None


def draw_chunks(
    shape: tuple[int, ...],
    seeds: Sequence[int],
    num_classes: int = 0,
    classes: Sequence[int] | None = None,
    accelerator: Accelerator | None = None,
    together: int = 1,
) -> Iterator[Chunk]:
    """Draws noise and labels as EDM does, latent first, label second, in whole chunks aligned to the seed.

    Args:
        shape: Shape of one sample.
        seeds: Non-negative integers, in any order.
        num_classes: Number of classes, 0 when unconditional.
        classes: The class of each seed, in place of the drawn one.
        accelerator: Its processes take turns at the chunks.
        together: How many neighbouring chunks become one, as far as there are wanted seeds in them.

    Yields:
        The chunks of this process with a wanted seed in them; those of the others are not drawn.
    """
    size = chunk_size(shape)
    wanted = torch.tensor(seeds, dtype=torch.int64)
    chosen = None if classes is None else torch.tensor(classes)
    numbers, order = (wanted // (size * together)).sort(stable=True)
    groups = order.split(numbers.unique_consecutive(return_counts=True)[1].tolist())
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for number in range(rank, len(groups), world):
        rows = groups[number]
        present, which = (wanted[rows] // size).unique(return_inverse=True)
        places = which * size + wanted[rows] % size
        draws = [torch.Generator().manual_seed(chunk * size + k) for chunk in present.tolist() for k in range(size)]
        x = torch.stack([torch.randn(shape, generator=draw) for draw in draws]).double() * T
        labels = None
        if num_classes:
            labels = torch.stack([torch.randint(num_classes, (), generator=draw) for draw in draws])
            if chosen is not None:
                labels[places] = chosen[rows]
        yield Chunk(rows, places, x, labels, draws, sum(map(len, groups[number : number + world])))


def stream(
    sampler: Sampler,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    num_classes: int = 0,
    classes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int, str], None] = lambda count, note: None,
    accelerator: Accelerator | None = None,
    batch_size: int | None = None,
) -> Iterator[Drawn]:
    """Draws one sample for each seed, a chunk at a time, see `draw_chunks`; memory does not grow with the seeds.

    Args:
        sampler: What maps noise to samples.
        shape: Shape of one sample.
        seeds: Non-negative integers; a seed's sample is the same in every list.
        num_classes: Number of classes, 0 when unconditional.
        classes: The class of each sample, in place of the drawn one.
        device: Where the network is.
        advance: Told the number of samples that all processes have finished.
        accelerator: Shares whole chunks among its processes.
        batch_size: See `chunks_together`.

    Yields:
        The samples of this process's chunks.

    Raises:
        StoppedError: A signal came.
    """
    together = chunks_together(shape, device, batch_size)
    for chunk in draw_chunks(shape, seeds, num_classes, classes, accelerator, together):
        stopping.check("sampling")
        labels = None if chunk.labels is None else chunk.labels.to(device)
        with torch.inference_mode():
            found = sampler(chunk.x.to(device), labels, chunk.noise(device)).cpu()
        samples = torch.empty(len(chunk.rows), *shape, dtype=torch.float64)
        samples.copy_(found[chunk.places])
        advance(chunk.turn, "")
        yield Drawn(chunk.rows, samples, None if chunk.labels is None else chunk.labels[chunk.places])


def chunks_together(shape: tuple[int, ...], device: torch.device | str, batch_size: int | None) -> int:
    """Returns how many chunks a network call holds: 1 on a CPU, where images must depend on their seed alone.

    Args:
        shape: Shape of one sample.
        device: Where the network is.
        batch_size: Images of a call on a GPU, rounded up to whole chunks; `CUDA_BATCH` by default.
    """
    if torch.device(device).type == "cpu":
        return 1
    return -(-(batch_size or CUDA_BATCH) // chunk_size(shape))


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
    """Draws one sample for each seed and keeps all in memory; arguments and errors as `stream`.

    Returns:
        Samples (n, ...), float64 on the CPU; labels (n,) or None. Every process returns everything.
    """
    samples = torch.zeros(len(seeds), *shape, dtype=torch.float64)
    labels = torch.zeros(len(seeds), dtype=torch.int64) if num_classes else None
    for drawn in stream(sampler, shape, seeds, num_classes, classes, device, advance, accelerator):
        samples[drawn.rows] = drawn.samples
        if labels is not None and drawn.labels is not None:
            labels[drawn.rows] = drawn.labels
    if accelerator and accelerator.num_processes > 1:
        samples = accelerator.reduce(samples.to(accelerator.device), "sum").cpu()
        labels = None if labels is None else accelerator.reduce(labels.to(accelerator.device), "sum").cpu()
    return samples, labels
