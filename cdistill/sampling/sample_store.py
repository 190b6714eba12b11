"""Finished samples on the disk: what an interrupted sampling leaves behind and goes on from.

Every process adds files of its own; whatever their number, the samples are read in the order of the seeds.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cdistill.data.source import to_uint8
from cdistill.errors import CorruptFileError, MissingAssetError, StoppedError
from cdistill.runtime.console import Advance
from cdistill.sampling.drawing import Drawn, Sampler, stream
from cdistill.storage.checkpoints import save_tensors
from cdistill.storage.integrity import Layout, read_layout, verify

_KIND = "unfinished samples"
_LAYOUT = 1  # to be raised whenever the same identity comes to mean other samples
_SAVE_EVERY = 10.0  # seconds of work that a kill -9 can lose
_SAVE_BYTES = 2**25
_AT_ONCE = 256

Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples.

    Attributes:
        start: Position of the first in the list of seeds.
        samples: uint8 images (b, C, H, W), or float64 vectors (b, d).
        labels: Classes (b,), int64, or None.
    """

    start: int
    samples: Array
    labels: Array | None


class _Waiting:
    """Samples that are not yet on the disk, in tensors of their own.

    Thousands of small ones would hold the heap apart between the large ones that come and go: it would grow for hours.

    Args:
        size: How many there can be.
        like: Samples of that kind.
    """

    def __init__(self, size: int, like: Drawn) -> None:
        self.since = time.monotonic()
        self._count = 0
        self._tensors = {name: part.new_empty(size, *part.shape[1:]) for name, part in _tensors(like).items()}

    def fits(self, drawn: Drawn) -> bool:
        """Whether there is room for so many more."""
        return self._count + len(drawn.rows) <= len(self._tensors["rows"])

    def add(self, drawn: Drawn) -> None:
        """Adds samples that fit."""
        for name, part in _tensors(drawn).items():
            self._tensors[name][self._count : self._count + len(part)] = part
        self._count += len(drawn.rows)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that were added."""
        return {name: part[: self._count] for name, part in self._tensors.items()}


def _tensors(drawn: Drawn) -> dict[str, Tensor]:
    found = {"rows": drawn.rows, "samples": drawn.samples}
    return found if drawn.labels is None else {**found, "labels": drawn.labels}


class Pieces:
    """Finished samples, each once; images as uint8, rounded as EDM writes them.

    Args:
        folder: For these alone.
        identity: What the samples depend on, JSON values; files of anything else are removed.
        count: Samples in the end.
        shape: Of one sample.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], count: int, shape: tuple[int, ...]) -> None:
        self.folder, self.count, self.shape = folder, count, shape
        self.identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self._waiting: _Waiting | None = None

    def missing(self) -> Tensor:
        """Returns the positions of the samples that are still to be drawn, ascending.

        Must be known to all processes before one adds something.
        """
        index = _Index(self.count)
        for path in sorted(self.folder.glob("*.safetensors")):
            layout = self._open(path)
            if layout is None:
                path.unlink(missing_ok=True)
            else:
                index.add(layout)
        return torch.from_numpy(np.flatnonzero(index.files < 0))

    def add(self, drawn: Drawn) -> None:
        """Adds finished samples; now and then writes a file."""
        samples = to_uint8(drawn.samples) if len(self.shape) == 3 else drawn.samples
        ready = replace(drawn, samples=samples)
        if self._waiting and not self._waiting.fits(ready):
            self.flush()
        if self._waiting is None:
            most = min(self.count, _SAVE_BYTES * len(samples) // samples.nbytes)
            self._waiting = _Waiting(max(most, len(samples)), ready)
        self._waiting.add(ready)
        if time.monotonic() - self._waiting.since > _SAVE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added."""
        if self._waiting is None:
            return
        tensors, self._waiting = self._waiting.tensors(), None
        path = self.folder / f"{int(tensors['rows'][0]):010d}.safetensors"
        save_tensors(path, tensors, _KIND, {"identity": self.identity, "layout": _LAYOUT})

    def read(self) -> Iterator[Batch]:
        """Yields all samples in the order of the seeds, some hundreds at a time.

        Raises:
            CorruptFileError: Some are missing.
        """
        index = _Index(self.count)
        for path in sorted(self.folder.glob("*.safetensors")):
            if layout := self._open(path):
                index.add(layout)
        if lacking := int((index.files < 0).sum()):
            raise CorruptFileError(
                f"{self.folder}: lacks {lacking} of {self.count} samples; run the same command again"
            )
        for start in range(0, self.count, _AT_ONCE):
            rows = slice(start, min(start + _AT_ONCE, self.count))
            yield Batch(start, index.read("samples", rows), index.read("labels", rows) if index.labelled else None)

    def remove(self) -> None:
        """Removes the folder, once the samples are where they belong."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, path: Path) -> Layout | None:
        """Returns where the tensors of a file are; None for a damaged file, or one of something else."""
        try:
            layout = read_layout(path)
            header, _ = verify(layout, _KIND)
        except (MissingAssetError, CorruptFileError):
            return None
        stated = {"identity": self.identity, "layout": _LAYOUT, "kind": _KIND}
        return layout if all(header.get(key) == value for key, value in stated.items()) else None


def draw_missing(
    pieces: Pieces,
    missing: Tensor,
    sampler: Sampler,
    seeds: Sequence[int],
    num_classes: int,
    classes: Sequence[int] | None,
    advance: Advance,
    accelerator: Accelerator,
    batch_size: int | None = None,
) -> None:
    """Draws the samples that are missing, shared among the processes; afterwards all can be read by each of them.

    Args:
        pieces: Where they go.
        missing: Their positions, see `Pieces.missing`; the same in every process.
        sampler: See `stream`, as for what follows.
        seeds: All wanted seeds.
        num_classes: Number of classes, 0 when unconditional.
        classes: The class of each seed, in place of the drawn one.
        advance: Told the number of finished samples.
        accelerator: Devices and processes.
        batch_size: See `stream`.

    Raises:
        StoppedError: A signal came, here or in another process; everything finished is kept.
    """
    wanted = [seeds[k] for k in missing.tolist()]
    chosen = None if classes is None else [classes[k] for k in missing.tolist()]
    stopped: StoppedError | None = None
    try:
        for drawn in stream(
            sampler, pieces.shape, wanted, num_classes, chosen, accelerator.device, advance, accelerator, batch_size
        ):
            pieces.add(replace(drawn, rows=missing[drawn.rows]))
    except StoppedError as error:
        stopped = error
    finally:
        pieces.flush()
    told = accelerator.reduce(torch.tensor(int(stopped is not None), device=accelerator.device), "sum")
    if stopped is not None:
        raise stopped
    if int(told):
        raise StoppedError("sampling: another process was stopped; run the same command to resume", 75)


class _Index:
    """Which file holds which sample, and where."""

    def __init__(self, count: int) -> None:
        self.files = np.full(count, -1, np.int32)
        self.places = np.zeros(count, np.int64)
        self.labelled = False
        self._layouts: list[Layout] = []

    def add(self, layout: Layout) -> None:
        """Adds the samples of a file."""
        rows = _read(layout, "rows", 0, layout.entries["rows"].shape[0])
        self.files[rows] = len(self._layouts)
        self.places[rows] = np.arange(len(rows))
        self.labelled = "labels" in layout.entries
        self._layouts.append(layout)

    def read(self, name: str, rows: slice) -> Array:
        """Reads a tensor at consecutive positions: a stretch at once where they are neighbours in a file as well."""
        files, places = self.files[rows], self.places[rows]
        breaks = np.flatnonzero((np.diff(files) != 0) | (np.diff(places) != 1)) + 1
        parts = [
            _read(self._layouts[files[stretch[0]]], name, int(places[stretch[0]]), len(stretch))
            for stretch in np.split(np.arange(len(files)), breaks)
        ]
        return np.concatenate(parts)


def _read(layout: Layout, name: str, first: int, count: int) -> Array:
    """Reads some rows of a tensor."""
    entry = layout.entries[name]
    dtype, each = np.dtype(entry.dtype), entry.size // entry.shape[0]
    with layout.path.open("rb") as file:
        file.seek(entry.start + first * each)
        return np.fromfile(file, dtype, count * each // dtype.itemsize).reshape(count, *entry.shape[1:])
