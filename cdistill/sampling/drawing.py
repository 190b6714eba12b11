"""Drawing samples: one generator per image seed, whole chunks for the network.

On a CPU the network always runs on one whole chunk aligned to the seed (see `chunk_size`), in one thread, several
chunks at once: so an image depends on its seed alone, not on the batch, the other seeds, the number of processes or of
threads (with which some of torch's operators change their last bits). A GPU would idle with so few images: there one
call holds several chunks, and the last bits may depend on how many. States are float64; nothing is clamped but the
final picture.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.networks.denoiser import chunk_size
from cdistill.runtime import signals
from cdistill.runtime.devices import send
from cdistill.schedule import T

Item = TypeVar("Item")
Result = TypeVar("Result")

Noise = Callable[[], Tensor]
"""Draws fresh normal noise for every sample of a chunk from its own generator."""

Sampler = Callable[[Tensor, Tensor | None, Noise], Tensor]
"""Maps points at noise level T, labels and a source of noise to points at eps."""

CUDA_BATCH = 256  # images that a network call holds on a GPU by default


@dataclass(frozen=True)
class Chunk:
    """What a network sees at once: the noise and the labels of whole chunks of consecutive seeds, on the CPU."""

    rows: Tensor  # positions (r,) in the list of wanted seeds
    places: Tensor  # where those seeds are in the chunk (r,)
    x: Tensor  # points at noise level T, (size, ...), float64; `labels` (size,) are int64
    labels: Tensor | None
    draws: list[torch.Generator]  # the generator of each seed, from which its noise and label have been drawn
    turn: int  # wanted seeds that all processes together draw while this one draws the chunk

    def noise(self, device: torch.device | str) -> Noise:
        """Returns the source of more noise, (size, ...), float64."""
        shape = self.x.shape[1:]
        return lambda: send(torch.stack([torch.randn(shape, generator=draw) for draw in self.draws]).double(), device)


@dataclass(frozen=True)
class Drawn:
    """Finished samples (r, ...), float64, at positions (r,) in the list of seeds; classes (r,), int64; on the CPU."""

    rows: Tensor
    samples: Tensor
    labels: Tensor | None


def _draw(
    shape: tuple[int, ...], shares: Sequence[float], rows: Tensor, seeds: Tensor, classes: Tensor | None, turn: int
) -> Chunk:
    """Draws the noise and the labels, if they are not given, of all seeds of the chunk that has `seeds` (r,) in it."""
    size = chunk_size(shape)
    present, which = (seeds // size).unique(return_inverse=True)
    places = which * size + seeds % size
    draws = [torch.Generator().manual_seed(chunk * size + k) for chunk in present.tolist() for k in range(size)]
    x = torch.stack([torch.randn(shape, generator=draw) for draw in draws]).double() * T
    labels = None
    if shares:
        labels = torch.stack([_draw_class(shares, draw) for draw in draws])
        if classes is not None:
            labels[places] = classes
    return Chunk(rows, places, x, labels, draws, turn)


def _draw_class(shares: Sequence[float], draw: torch.Generator) -> Tensor:
    """Draws a class, int64 (), as EDM does where all occur equally often."""
    if min(shares) == max(shares):
        return torch.randint(len(shares), (), generator=draw)
    return torch.multinomial(torch.tensor(shares, dtype=torch.float64), 1, generator=draw)[0]


def draw_chunks(
    shape: tuple[int, ...],
    seeds: Sequence[int],
    shares: Sequence[float] = (),
    accelerator: Accelerator | None = None,
) -> Iterator[Chunk]:
    """Draws noise and labels as EDM does, latent first, label second, in whole chunks aligned to the seed.

    Yields the chunks of this process with a wanted seed in them, the processes of `accelerator` taking turns. Arguments
    as `stream`.
    """
    for draw in _plan(shape, seeds, shares, None, accelerator, 1):
        yield draw()


def _plan(
    shape: tuple[int, ...],
    seeds: Sequence[int],
    shares: Sequence[float],
    classes: Sequence[int] | None,
    accelerator: Accelerator | None,
    together: int,
) -> Iterator[Callable[[], Chunk]]:
    """Divides the wanted seeds; `together` neighbouring chunks become one, as far as there are wanted seeds in them."""
    wanted = torch.tensor(seeds, dtype=torch.int64)
    chosen = None if classes is None else torch.tensor(classes)
    numbers, order = (wanted // (chunk_size(shape) * together)).sort(stable=True)
    groups = order.split(numbers.unique_consecutive(return_counts=True)[1].tolist())
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for number in range(rank, len(groups), world):
        rows = groups[number]
        turn = sum(map(len, groups[number : number + world]))
        yield partial(_draw, shape, shares, rows, wanted[rows], None if chosen is None else chosen[rows], turn)


def stream(
    sampler: Sampler,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    shares: Sequence[float] = (),
    classes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int, str], None] = lambda count, note: None,
    accelerator: Accelerator | None = None,
    batch_size: int | None = None,
) -> Iterator[Drawn]:
    """Draws one sample for each seed, a chunk at a time, see `draw_chunks`; memory does not grow with the seeds.

    On a CPU as many chunks at once as torch has threads, so `sampler` is called from several threads; on a GPU one
    after the other, the noise of the next ones being drawn meanwhile.

    Args:
        sampler: What maps noise to samples.
        shape: Shape of one sample.
        seeds: Non-negative integers, in any order; a seed's sample is the same in every list.
        shares: How often each class is drawn, see `Classes.shares`; () when unconditional.
        classes: The class of each sample, in place of the drawn one.
        device: Where the network is.
        advance: Told the number of samples that all processes have finished.
        accelerator: Shares whole chunks among its processes; each gets the samples of its own.
        batch_size: See `chunks_together`.

    Raises:
        StoppedError: A signal came; all that was begun has been yielded.
    """
    plans = _plan(shape, seeds, shares, classes, accelerator, chunks_together(shape, device, batch_size))
    on_cpu = torch.device(device).type == "cpu"

    @torch.inference_mode()
    def sample(chunk: Chunk) -> tuple[Drawn, int]:
        labels = None if chunk.labels is None else send(chunk.labels, device)
        found = sampler(send(chunk.x, device), labels, chunk.noise(device)).cpu()
        with torch.inference_mode(False):  # the caller may do with these what it likes
            samples = torch.empty(len(chunk.rows), *found.shape[1:], dtype=torch.float64)
            samples.copy_(found[chunk.places])
            own = None if chunk.labels is None else chunk.labels[chunk.places]
            return Drawn(chunk.rows, samples, own), chunk.turn

    with _single_threads(threads := torch.get_num_threads() if on_cpu else 1) as pool:
        if on_cpu:
            finished = _ahead(pool, 2 * threads, lambda draw: sample(draw()), plans)
        else:
            finished = map(sample, _ahead(pool, 2, lambda draw: draw(), plans))
        for drawn, turn in finished:
            advance(turn, "")
            yield drawn
    signals.check("sampling")


@contextmanager
def _single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of threads in each of which torch's operators use one thread; elsewhere they keep theirs."""
    own = torch.get_num_threads()
    with ThreadPoolExecutor(count, "sampling", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(own)  # the default of threads to come


def _ahead(
    pool: ThreadPoolExecutor, count: int, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yields the results in the order of the items, `count` of them under way; begins none after a signal."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        if signals.requested():
            break
        waiting.append(pool.submit(work, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        if not (signals.requested() and waiting[0].cancel()):
            yield waiting[0].result()
        waiting.popleft()


def chunks_together(shape: tuple[int, ...], device: torch.device | str, batch_size: int | None) -> int:
    """Returns how many chunks a network call holds: 1 on a CPU, where images must depend on their seed alone.

    On a GPU `batch_size` images, or else `CUDA_BATCH`, rounded up to whole chunks.
    """
    if torch.device(device).type == "cpu":
        return 1
    return -(-(batch_size or CUDA_BATCH) // chunk_size(shape))


def generate(
    sampler: Sampler,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    shares: Sequence[float] = (),
    classes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Draws one sample for each seed and returns all, (n, ...), float64, and labels (n,) or None; see `stream`."""
    samples = torch.zeros(len(seeds), *shape, dtype=torch.float64)
    labels = torch.zeros(len(seeds), dtype=torch.int64) if shares else None
    for drawn in stream(sampler, shape, seeds, shares, classes, device):
        samples[drawn.rows] = drawn.samples
        if labels is not None and drawn.labels is not None:
            labels[drawn.rows] = drawn.labels
    return samples, labels
