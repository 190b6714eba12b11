"""Finished samples on disk, by seed: an interrupted sampling resumes from them, and a teacher's samples are kept so.

A store is a folder of shards, safetensors files of some thousand samples. Each process writes shards of its own,
atomically and with a digest; whatever their number, samples are read back by seed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from cdistill.data.source import to_uint8
from cdistill.errors import CorruptFileError, MissingAssetError, StoppedError
from cdistill.runtime.console import progress, say
from cdistill.sampling.drawing import Drawn, Sampler, stream
from cdistill.storage.checkpoints import load_tensors, save_tensors

_KIND = "samples"
_LAYOUT = 2  # to be raised whenever the same identity comes to mean other samples
_SAVE_EVERY = 10.0  # seconds of work that a kill -9 can lose
_SHARD_BYTES = 2**25
_BATCH = 256


class Batch(NamedTuple):
    """Consecutive samples.

    Attributes:
        start: Position of the first in the list of seeds.
        samples: uint8 images (b, C, H, W), or float64 vectors (b, d).
        labels: Classes (b,), int64, or None.
    """

    start: int
    samples: NDArray[Any]
    labels: NDArray[Any] | None


class SampleStore:
    """Samples by seed in a folder; memory does not grow with their number.

    Args:
        folder: For these alone.
        identity: What the samples depend on, JSON values; damaged shards and those of anything else are removed.
        shape: Of one sample.
        dtype: What is stored; by default uint8 for images, rounded as EDM writes them, and float64 for vectors.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        self.folder, self.shape = folder, shape
        self.dtype = dtype or (torch.uint8 if len(shape) == 3 else torch.float64)
        whole = {**identity, "shape": shape, "dtype": str(self.dtype), "layout": _LAYOUT}
        self.identity = json.loads(json.dumps(whole))  # as it comes back from a file
        self._paths: list[Path] = []
        self._labelled = False
        self._index = np.empty((3, 0), np.int64)  # seeds, ascending; the shard of each; its row there
        self._buffer: dict[str, Tensor] = {}
        self._buffered, self._since = 0, 0.0

    def missing(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Returns the positions of the seeds whose samples are still to be drawn, ascending."""
        self._refresh()
        return np.flatnonzero(self._find(np.asarray(seeds, np.int64)) < 0)

    def draw(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        shares: Sequence[float],
        accelerator: Accelerator,
        title: str,
        classes: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> int:
        """Draws the samples that are missing, shared among the processes; all processes call it together.

        Args:
            sampler: See `stream`, as for what follows.
            seeds: All wanted seeds, each once.
            shares: How often each class is drawn, () when unconditional.
            accelerator: Devices and processes.
            title: What the progress bar calls the samples.
            classes: The class of each seed, in place of the drawn one.
            batch_size: See `stream`.

        Returns:
            How many were drawn.

        Raises:
            StoppedError: A signal came, here or in another process; everything finished is kept.
            DiskFullError: They did not fit.
        """
        lacking = torch.zeros(len(seeds), dtype=torch.int32, device=accelerator.device)
        lacking[torch.from_numpy(self.missing(seeds))] = 1
        # Another command may write meanwhile: what any process lacks is drawn by all, so that they stay together.
        positions = accelerator.reduce(lacking, "sum").nonzero()[:, 0].tolist()
        if not positions:
            return 0
        if kept := len(seeds) - len(positions):
            say(f"{title}: resumes after {kept:,} of {len(seeds):,} samples")
        wanted = [seeds[k] for k in positions]
        chosen = None if classes is None else [classes[k] for k in positions]
        stopped: StoppedError | None = None
        with progress(len(seeds), title, "img", kept) as advance:
            try:
                for drawn in stream(
                    sampler, self.shape, wanted, shares, chosen, accelerator.device, advance, accelerator,
                    batch_size,
                ):  # fmt: skip
                    self._add(torch.tensor([wanted[k] for k in drawn.rows.tolist()]), drawn)
            except StoppedError as error:
                stopped = error
            finally:
                self._flush()
        others = accelerator.reduce(torch.tensor(int(stopped is not None), device=accelerator.device), "sum")
        if stopped is not None:
            raise stopped
        if int(others):
            raise StoppedError("sampling: another process was stopped; run the same command to resume", 75)
        return len(positions)

    def rows(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Returns the samples (n, ...) of `seeds`, and their labels (n,) or None.

        Raises:
            CorruptFileError: Some are missing.
        """
        wanted = np.asarray(seeds, np.int64)
        if (self._find(wanted) < 0).any():
            self._require(seeds)
        _, shards, places = self._index[:, self._find(wanted)]
        samples = torch.empty(len(wanted), *self.shape, dtype=self.dtype)
        labels = torch.empty(len(wanted), dtype=torch.int64) if self._labelled else None
        # A stretch at once where the seeds are neighbours in a shard as well.
        breaks = np.flatnonzero((np.diff(shards) != 0) | (np.diff(places) != 1)) + 1
        for stretch in np.split(np.arange(len(wanted)), breaks) if len(wanted) else []:
            to = slice(int(stretch[0]), int(stretch[-1]) + 1)
            first = int(places[to.start])
            with safe_open(self._paths[shards[to.start]], "pt") as file:
                samples[to] = file.get_slice("samples")[first : first + len(stretch)]
                if labels is not None:
                    labels[to] = file.get_slice("labels")[first : first + len(stretch)]
        return samples, labels

    def read(self, seeds: Sequence[int]) -> Iterator[Batch]:
        """Yields the samples of `seeds` in their order, some hundreds at a time; errors as `rows`."""
        self._require(seeds)
        for start in range(0, len(seeds), _BATCH):
            samples, labels = self.rows(seeds[start : start + _BATCH])
            yield Batch(start, samples.numpy(), None if labels is None else labels.numpy())

    def remove(self) -> None:
        """Removes the folder, once the samples are where they belong."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, seeds: Tensor, drawn: Drawn) -> None:
        """Adds finished samples; now and then writes a shard.

        The buffer is allocated once for a shard: thousands of small tensors between the large ones that come and go
        would fragment the heap, which would grow for hours.
        """
        samples = to_uint8(drawn.samples) if self.dtype == torch.uint8 else drawn.samples.to(self.dtype)
        columns = {"seeds": seeds, "samples": samples}
        if drawn.labels is not None:
            columns["labels"] = drawn.labels
        if self._buffer and self._buffered + len(seeds) > len(self._buffer["seeds"]):
            self._flush()
        if not self._buffer:
            size = max(len(seeds), _SHARD_BYTES * len(seeds) // samples.nbytes)
            self._buffer = {name: column.new_empty(size, *column.shape[1:]) for name, column in columns.items()}
            self._since = time.monotonic()
        for name, column in columns.items():
            self._buffer[name][self._buffered : self._buffered + len(seeds)] = column
        self._buffered += len(seeds)
        if time.monotonic() - self._since > _SAVE_EVERY:
            self._flush()

    def _flush(self) -> None:
        """Writes what has been added, under a name that stands for the seeds in it."""
        if not self._buffered:
            return
        columns = {name: column[: self._buffered] for name, column in self._buffer.items()}
        self._buffer, self._buffered = {}, 0
        seeds = columns["seeds"].numpy()
        name = f"{seeds[0]:010d}-{hashlib.sha256(seeds.tobytes()).hexdigest()[:12]}.safetensors"
        save_tensors(self.folder / name, columns, _KIND, {"identity": self.identity})

    def _find(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the columns of the index that hold the wanted seeds, -1 where there is none."""
        columns = np.searchsorted(self._index[0], wanted)
        known = columns < self._index.shape[1]
        known[known] = self._index[0, columns[known]] == wanted[known]
        return np.where(known, columns, -1)

    def _require(self, seeds: Sequence[int]) -> None:
        if lacking := len(self.missing(seeds)):
            raise CorruptFileError(f"{self.folder}: lacks {lacking} of {len(seeds)} samples; run the command again")

    def _refresh(self) -> None:
        """Verifies the shards that this store has not seen yet, and adds them to the index."""
        parts = [self._index]
        for path in sorted(set(self.folder.glob("[0-9]*.safetensors")) - set(self._paths)):
            try:
                tensors, header = load_tensors(path, _KIND)
            except (MissingAssetError, CorruptFileError):
                header = {}
            if header.get("identity") != self.identity or not self._fits(tensors):
                with suppress(OSError):
                    path.unlink()
                continue
            seeds = tensors["seeds"].numpy()
            parts.append(np.stack([seeds, np.full_like(seeds, len(self._paths)), np.arange(len(seeds))]))
            self._labelled = "labels" in tensors
            self._paths.append(path)
        if len(parts) > 1:
            whole = np.concatenate(parts, 1)
            self._index = whole[:, np.unique(whole[0], return_index=True)[1]]

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a shard has a sample for each seed, and a label for each or for none."""
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        count = found["seeds"][1][:1] if "seeds" in found else ()
        whole = {"seeds": (torch.int64, count), "samples": (self.dtype, (*count, *self.shape))}
        return bool(count) and found in (whole, {**whole, "labels": (torch.int64, count)})
