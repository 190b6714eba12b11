"""Images that are decoded, or read, when they are asked for, because they do not fit in memory.

Decoding processes are plain child processes that speak through pipes (see `cdistill.formats.worker`), not a
multiprocessing pool: they import no torch and not the program again, no pickle passes between them and us, one that
dies is an end of file here, and so is our death there.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cdistill import errors
from cdistill.errors import CdistillError
from cdistill.formats.archives import Images, decode_jobs
from cdistill.formats.images import Pixels
from cdistill.runtime import signals as stopping
from cdistill.runtime.processes import worker_count

if TYPE_CHECKING:
    from torch import Tensor

Indices = NDArray[np.int64]
_LOOK_EVERY = 0.5  # seconds, for signals
_PATIENCE = 10.0  # seconds without a byte after a signal; a loop that waits for images may have something to save
_PACKAGE_PARENT = Path(errors.__file__).resolve().parents[1]
# The package comes from where this one did; all else from the usual places, the standard library first.
_WORKER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import cdistill
sys.path.append(sys.path.pop(0))
from cdistill.formats.worker import main
main()
"""


class LazySamples(ABC):
    """uint8 images that are indexed like a tensor, by a tensor of indices or a slice.

    Attributes:
        shape: (N, C, H, W).
        dtype: torch.uint8.
    """

    shape: torch.Size
    dtype = torch.uint8

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        if isinstance(indices, slice):
            indices = torch.arange(*indices.indices(len(self)))
        return torch.from_numpy(self.read(indices.numpy()))

    @abstractmethod
    def read(self, indices: Indices) -> Pixels:
        """Returns the images at `indices`, (B, C, H, W), an array of its own."""

    def prefetch(self, indices: Tensor) -> None:  # noqa: B027 - most have nothing to do
        """Says that the images at `indices` will be asked for next."""


class DecodedImages(LazySamples):
    """Images of an archive or folder; which process decodes an image does not change it.

    Args:
        images: Where they are.
        shape: (C, H, W) of each.
        workers: How many processes decode; 0 for this one.
    """

    def __init__(self, images: Images, shape: tuple[int, ...], workers: int | None = None) -> None:
        self.images = images
        self.shape = torch.Size([len(images), *shape])
        self.workers = worker_count() if workers is None else workers
        self._pool: _Pool | None = None

    def read(self, indices: Indices) -> Pixels:
        """See :class:`LazySamples`."""
        if self.workers:
            return self._started().read(indices)
        pixels = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for k, image in enumerate(decode_jobs(self.images.path, self.images.jobs(indices.tolist()), self.shape[1:])):
            pixels[k] = image
        return pixels

    def prefetch(self, indices: Tensor) -> None:
        """Lets the decoding processes begin; see :class:`LazySamples`."""
        if self.workers:
            self._started().ask(indices.numpy())

    def _started(self) -> _Pool:
        if self._pool is None or self._pool.ended:
            self._pool = _Pool(self.images, self.shape[1:], self.workers)
        return self._pool


class _Pool:
    """Decoding processes; each decodes a contiguous part of what is asked for, one request at a time.

    Attributes:
        ended: The processes are gone, because one died or because a request was left in the middle.
    """

    def __init__(self, images: Images, shape: tuple[int, ...], workers: int) -> None:
        self.images, self.shape, self.ended = images, shape, False
        self._asked: Indices | None = None  # what the processes work on
        command = [sys.executable, "-P", "-c", _WORKER, str(_PACKAGE_PARENT), str(images.path.absolute())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.processes = [
            subprocess.Popen([*command, *map(str, shape)], env=environment, stdin=pipe, stdout=pipe)
            for _ in range(workers)
        ]
        weakref.finalize(self, _end, self.processes)

    def read(self, indices: Indices) -> Pixels:
        """Returns the images at `indices`, asked for before or now."""
        if self._asked is None or not np.array_equal(self._asked, indices):
            self.ask(indices)
        pixels, failures = self._receive()
        if failures:
            kind, message = failures[0]
            failure: CdistillError = getattr(errors, kind)(message)
            raise failure
        return pixels

    def ask(self, indices: Indices) -> None:
        """Sends the processes their parts, after dropping what else they were asked for."""
        if self._asked is not None:
            self._receive()  # a failure there will show again when those images are wanted
        self._asked = indices.copy()
        with self._all_or_nothing():
            for process, part in zip(self.processes, np.array_split(indices, len(self.processes)), strict=True):
                assert process.stdin is not None
                process.stdin.write(json.dumps(self.images.jobs(part.tolist())).encode() + b"\n")
                process.stdin.flush()

    def _receive(self) -> tuple[Pixels, list[list[str]]]:
        """Returns the images that were asked for, and [kind, message] of what failed, in the order of the images."""
        assert self._asked is not None
        pixels = np.empty((len(self._asked), *self.shape), np.uint8)
        failures = []
        with self._all_or_nothing():
            for process, part in zip(self.processes, np.array_split(pixels, len(self.processes)), strict=True):
                assert isinstance(process.stdout, BufferedReader)
                if failure := json.loads(_line(process.stdout.raw)):
                    failures.append(failure)
                else:
                    _fill(process.stdout.raw, part.reshape(-1).data)
        self._asked = None
        return pixels, failures

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Ends the processes unless the block is left at its end: half an answer must not be taken for the next."""
        try:
            yield
        except BaseException as error:
            self.ended = True
            _end(self.processes)
            if not isinstance(error, (EOFError, BrokenPipeError)):
                raise
            codes = sorted({process.returncode for process in self.processes})
            raise CdistillError(
                f"{self.images.path}: a decoding process died (exit codes {codes}); run the same command again, or "
                "set CDISTILL_WORKERS=0 to decode in the main process"
            ) from error


def _line(stream: RawIOBase) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = bytearray(1)
        _fill(stream, memoryview(byte))
        line += byte
    return bytes(line)


def _fill(stream: RawIOBase, target: memoryview) -> None:
    """Reads from a pipe until `target` is full.

    Raises:
        EOFError: The other end was closed.
        StoppedError: A signal came, and nothing else for a while.
    """
    ready = select.poll()
    ready.register(stream, select.POLLIN)
    silent_since = time.monotonic()
    while target.nbytes:
        if ready.poll(_LOOK_EVERY * 1000):
            count = stream.readinto(target)
            if not count:
                raise EOFError
            target, silent_since = target[count:], time.monotonic()
        elif time.monotonic() - silent_since >= _PATIENCE:
            stopping.check("reading the data")


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends decoding processes; they have nothing to save."""
    for process in processes:
        process.kill()
    for process in processes:
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        process.wait()
