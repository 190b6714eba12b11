"""Collecting an estimator's sums: in rounds, by several processes, resumed after an interruption.

Every sample n keeps its x_0 and z at all noise levels, so that the noise of l and S is smooth in t. Points are drawn in
blocks of a fixed size aligned to n, and on a CPU the network sees one block at a time: the result does not depend on
batch sizes or processes.
"""

import glob
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError, RecipeError, StoppedError
from cdistill.estimation.base import Estimator, GroupSums, Points, replicates, standard_error
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.runtime import signals
from cdistill.runtime.console import Advance
from cdistill.runtime.devices import compiles, send
from cdistill.runtime.randomness import generator, shuffled_indices
from cdistill.storage.checkpoints import load_tensors, save_tensors

GROUPS = 32
_FIRST_ROUND = 256  # samples before the first look at the errors: 4 pairs or more in each group
_GROWTH = 1.5  # of the samples from round to round: at most half as many again as were needed
_CUDA_BLOCKS = 8  # blocks in a call on a GPU, which 16 images would leave idle
# Below it the two points of a pair lie within a few roundings of each other. Measured on the embedded teachers, fp16
# moves l by at most 3e-4 above it (bf16 by 3e-3, and by 0.05 at t = 0.002) and s by 5e-3 at t = 0.002.
_HALF_FROM = 0.01
_KIND = "unfinished statistics"
_LAYOUT = 1  # to be raised whenever the same identity comes to mean other samples or sums
_SAVE_EVERY = 20.0  # seconds of work that a kill -9 can lose


def round_ends(settings: EstimationSection) -> list[int]:
    """Returns the samples after each round: all at once, or growing by half while a target is not reached."""
    ends = [settings.samples]
    if settings.target_error is not None:
        ends = [min(_FIRST_ROUND, settings.samples)]
        while ends[-1] < settings.samples:
            ends.append(min(settings.samples, int(ends[-1] * _GROWTH) // 64 * 64))
    return ends


def is_fast(estimator: Estimator, device: torch.device) -> bool:
    """Whether forward passes alone run on a GPU: compiled, several blocks at once, in half precision by default."""
    return device.type == "cuda" and not estimator.backwards


def network_precision(estimator: Estimator, precision: str, device: torch.device) -> str:
    """Returns the precision that the teacher runs in; RecipeError for a half one where backward passes underflow."""
    if precision == "auto":
        return "fp16" if is_fast(estimator, device) else "fp32"
    if precision != "fp32" and estimator.backwards:
        raise RecipeError(f"precision: got {precision}; backward passes underflow in it: fp32, or estimator forward")
    return precision


class Progress:
    """How far the collection has come in one process, loaded from its file if there is one.

    The file lies beside the coefficient file to be, `path`; one that is damaged, of another `identity` or of another
    number of processes, which divide the samples in another way, is ignored. `shape` is (G, n, k): groups of samples,
    noise levels and scalars.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        path: Path | None = None,
        identity: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.file = None if path is None else path.with_name(f".{path.name}.part-{rank}-of-{world}")
        self._header = {"identity": identity or {}, "layout": _LAYOUT}
        self._world, self._saved = world, time.monotonic()
        self.sums = torch.zeros(0, *shape, dtype=torch.float64)  # of all processes, of each finished round (R, G, n, k)
        self.ends: list[int] = []  # samples after each finished round
        self.stops = torch.full(shape[1:2], -1, dtype=torch.int64)  # last round of each level; -1 while it needs more
        self.current = torch.zeros(shape, dtype=torch.float64)  # of this process, of the round in progress
        # This process is in this chunk, has finished so many of its levels and so many (sample, timestep) pairs.
        self.chunk = self.level = self.pairs = 0
        self._load()

    def _load(self) -> None:
        if self.file is None:
            return
        try:
            tensors, header = load_tensors(self.file, _KIND)
        except (MissingAssetError, CorruptFileError):
            return
        rounds = len(tensors["ends"]) if "ends" in tensors and tensors["ends"].dim() else 0
        shapes = {
            "sums": (rounds, *self.current.shape), "stops": self.stops.shape, "current": self.current.shape,
            "ends": (rounds,), "place": (3,),
        }  # fmt: skip
        fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            n: tuple(s) for n, s in shapes.items()
        }
        if fits and all(header.get(key) == value for key, value in self._header.items()):
            self.sums, self.stops, self.current = (tensors[name] for name in ("sums", "stops", "current"))
            self.ends = tensors["ends"].tolist()
            self.chunk, self.level, self.pairs = tensors["place"].tolist()

    def save(self) -> None:
        """Writes the file."""
        if self.file is not None:
            tensors = {
                "sums": self.sums,
                "ends": torch.tensor(self.ends, dtype=torch.int64),
                "stops": self.stops,
                "current": self.current,
                "place": torch.tensor([self.chunk, self.level, self.pairs]),
            }
            save_tensors(self.file, tensors, _KIND, self._header)
        self._saved = time.monotonic()

    def save_sometimes(self) -> None:
        """Writes the file if it was last written long ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def remove(self) -> None:
        """Removes the file, and those of other numbers of processes, once the estimate itself is written."""
        if self.file is not None:
            name = self.file.name.rpartition("-of-")[0].rpartition("-")[0]
            for path in self.file.parent.glob(f"{glob.escape(name)}-*-of-*"):
                path.unlink(missing_ok=True)

    def active(self) -> list[int]:
        """Returns the noise levels that need more samples."""
        return (self.stops < 0).nonzero()[:, 0].tolist()

    def finished_pairs(self, samples: int) -> int:
        """Returns how many of all (sample, timestep) pairs, `samples` at each noise level, need no more work."""
        stopped = int((self.stops >= 0).sum())
        before = self.ends[-1] if self.ends else 0
        return stopped * samples + (len(self.stops) - stopped) * before + self.pairs * self._world

    def close_round(self, total: Tensor, end: int) -> None:
        """Ends a round in which all processes together summed `total` (G, n, k), up to sample `end`."""
        self.sums = torch.cat([self.sums, total[None]])
        self.ends.append(end)
        self._start_round()

    def back_to(self, rounds: int) -> None:
        """Forgets what came after the first `rounds` rounds."""
        if len(self.ends) > rounds:
            self.stops = torch.where(self.stops >= rounds, -1, self.stops)
            self.sums, self.ends = self.sums[:rounds], self.ends[:rounds]
            self._start_round()

    def _start_round(self) -> None:
        self.current = torch.zeros_like(self.current)
        self.chunk = self.level = self.pairs = 0


class Collection:
    """The sums of an estimator's scalars over samples x_0 + t z of the data at every noise level `t` (n,), descending.

    The data are walked through in a shuffled order, as often as it takes; the processes of `accelerator` share whole
    chunks, and the sums are those of one process to float64 rounding. `paired` draws pairs x_0 + t z, x_0 - t z for an
    estimator that does not need them, too. Unfinished sums are kept beside `path`, see `Progress`. RecipeError if the
    precision does not suit the estimator.
    """

    def __init__(
        self,
        estimator: Estimator,
        denoiser: Denoiser,
        source: Source,
        t: Tensor,
        settings: EstimationSection,
        paired: bool = False,
        accelerator: Accelerator | None = None,
        path: Path | None = None,
        identity: dict[str, Any] | None = None,
        compiled: bool | Literal["auto"] = "auto",
    ) -> None:
        self.estimator, self.source, self.t, self.accelerator = estimator, source, t, accelerator
        self.settings = settings
        self.device = next(iter(denoiser.state_dict().values())).device
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.precision = network_precision(estimator, settings.precision, self.device)
        self.paired = paired or estimator.paired
        self.rows = 2 if self.paired else 1  # of each x_0
        self.groups = min(GROUPS, settings.samples // self.rows)
        self.block = chunk_size(source.shape)
        self.levels = t.to(self.device)
        fast = is_fast(estimator, self.device)
        self.chunk = self.block * (_CUDA_BLOCKS if fast else 1)
        compiled = fast and compiles(compiled, self.device.type)
        self.denoiser = cast(Denoiser, torch.compile(denoiser, dynamic=False)) if compiled else denoiser
        self.stopped = False
        shape = self.groups, len(t), len(estimator.scalars)
        self.progress = Progress(shape, path, identity, self.rank, self.world)

    def run(self, advance: Advance = lambda count, note: None) -> GroupSums:
        """Sums up all samples, or as many as the target error needs; `advance` is told of (sample, timestep) pairs.

        StoppedError: A signal came; the file holds what was done. CdistillError: The teacher's outputs are not finite.
        """
        progress = self.progress
        if self.accelerator and self.world > 1:  # all resume in the earliest round
            rounds = self.accelerator.gather(torch.tensor([len(progress.ends)], device=self.device))
            progress.back_to(int(rounds.min()))
        for end in round_ends(self.settings)[len(progress.ends) :]:
            if not progress.active():
                break
            self._run_round(end, advance)
            progress.close_round(self._add_up(), end)
            if self.settings.target_error is not None:
                self._stop_precise_levels(self.settings.target_error, advance)
            progress.save()
        return self._sums()

    def _run_round(self, end: int, advance: Advance) -> None:
        """Adds this process's chunks of a round, up to sample `end`, to ``progress.current``."""
        progress = self.progress
        first = progress.ends[-1] if progress.ends else 0
        active = progress.active()
        progress.current = current = progress.current.to(self.device)
        starts = range(first + self.rank * self.chunk, end, self.world * self.chunk)
        for start in starts[progress.chunk :]:
            count = min(self.chunk, end - start)
            points, owners = self._draw(start, count)
            for level in active[progress.level :]:
                if signals.requested():
                    self.stopped = True
                    return progress.save()
                progress.save_sometimes()
                current[:, level] += owners @ self._measure(points, level)
                progress.level += 1
                progress.pairs += count
                advance(count * self.world, "")
            progress.chunk, progress.level = progress.chunk + 1, 0
        return None

    def _draw(self, start: int, count: int) -> tuple[Points, Tensor]:
        """Draws a chunk of points, and which groups its first `count` belong to: zeros and ones (G, rows)."""
        x0, z, probes, labels = self._draw_samples(start)
        if self.paired:
            x0, z = torch.cat([x0, x0]), torch.cat([z, -z])
            labels = None if labels is None else torch.cat([labels, labels])
        sample = start // self.rows + torch.arange(self.chunk // self.rows)
        counted = sample < (start + count) // self.rows
        owners = (torch.arange(self.groups)[:, None] == sample % self.groups) & counted
        moved = None if labels is None else send(labels, self.device)
        points = Points(send(x0, self.device), send(z, self.device), send(probes, self.device), moved)
        return points, send(owners.double(), self.device)

    def _draw_samples(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draws x_0, z and labels of the points of a chunk, once for a pair, and probes for every point."""
        indices = shuffled_indices(len(self.source), self.settings.seed, start // self.rows, self.chunk // self.rows)
        x0, labels = self.source.batch(indices)
        noise, probes = [], []
        for first in range(start, start + self.chunk, self.block):
            shape = self.block // self.rows, *self.source.shape
            draw = generator(self.settings.seed, "estimation", first)
            noise.append(torch.randn(shape, generator=draw, dtype=x0.dtype))
            probes.append(torch.randint(0, 2, (self.rows, *shape), generator=draw).to(x0.dtype) * 2 - 1)
        return x0, torch.cat(noise), torch.cat(probes, dim=1).flatten(0, 1), labels

    def _measure(self, points: Points, level: int) -> Tensor:
        """Computes the scalars of a chunk at one noise level, a row for each point or pair."""
        t = self.levels[level].expand(len(points.x0))
        half = self.precision != "fp32" and float(self.t[level]) >= _HALF_FROM
        with torch.autocast(self.device.type, torch.float16) if half else nullcontext():
            values = self.estimator.measure(self.denoiser, points, t)
        if self.paired and not self.estimator.paired:
            values = (values[: len(t) // 2] + values[len(t) // 2 :]) / 2
        return values

    def _add_up(self) -> Tensor:
        """Returns the sums of a round over all processes (G, n, k); raises what `run` raises."""
        stopped = self.stopped
        total = self.progress.current.cpu()
        if self.accelerator and self.world > 1:
            self.progress.save()  # a process that waits for one that is killed keeps its own work
            local = torch.cat([total.flatten(), torch.tensor([float(stopped)], dtype=torch.float64)])
            reduced = self.accelerator.reduce(local.to(self.device), "sum").cpu()
            total, stopped = reduced[:-1].reshape(total.shape), bool(reduced[-1])
        if stopped:
            signals.check("estimation")
            raise StoppedError("estimation: another process was stopped; run the same command to resume", 75)
        if not bool(total.isfinite().all()):
            raise CdistillError(f"estimation: the teacher's outputs are not finite in {self.precision}; try fp32")
        return total

    def _stop_precise_levels(self, target: float, advance: Advance) -> None:
        """Stops the noise levels at which the standard errors of l and s are at most `target`.

        A level's slope depends on its neighbours too: it takes more samples with one of them that is not precise yet.
        """
        progress = self.progress
        l_error, s_error = map(standard_error, replicates(self.estimator, self._sums()))
        loose = ~(torch.maximum(l_error, s_error) <= target) & (progress.stops < 0)
        needed = loose.clone()
        needed[1:] |= loose[:-1]
        needed[:-1] |= loose[1:]
        done = (progress.stops < 0) & ~needed
        progress.stops = torch.where(done, len(progress.ends) - 1, progress.stops)
        advance(int(done.sum()) * (self.settings.samples - progress.ends[-1]), "")

    def _sums(self) -> GroupSums:
        """Returns the sums of all finished rounds."""
        progress = self.progress
        bounds = torch.tensor([0, *progress.ends]) // self.rows
        upto = (bounds[:, None] - torch.arange(self.groups) + self.groups - 1) // self.groups
        stops = torch.where(progress.stops < 0, len(progress.ends) - 1, progress.stops)
        samples = torch.tensor(progress.ends)[stops]
        dim = torch.Size(self.source.shape).numel()
        return GroupSums(self.t, dim, progress.sums, upto.diff(dim=0).double(), stops, samples)
